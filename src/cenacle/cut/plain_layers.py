"""ONNX operators without weights, read as layers of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from cenacle.cut.graph_reader import Reader, attributes

__all__ = ["HANDLERS", "Handler", "sizes", "windows"]

Handler = Callable[[Reader, onnx.NodeProto], None]


def _plain(op: str, **demanded: float) -> Handler:
    def read(reader: Reader, node: onnx.NodeProto) -> None:
        found = attributes(node)
        for name, value in demanded.items():
            if name in found and not np.isclose(found[name], value, atol=1e-6):
                raise reader.refusal(node, f"its {name} is {found[name]}")
        reader.emit(node, op, node.output[0])

    return read


def _alias(reader: Reader, node: onnx.NodeProto) -> None:
    reader.alias(node)


def _cast(reader: Reader, node: onnx.NodeProto) -> None:
    if attributes(node).get("to") != TensorProto.FLOAT:
        raise reader.refusal(node, "it changes the type of numbers")
    reader.alias(node)


def windows(
    reader: Reader, node: onnx.NodeProto, found: Mapping[str, Any], kernel: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Zeros before and after each axis."""
    dimensions = len(kernel)
    mode = found.get("auto_pad", b"NOTSET")
    if mode in (b"NOTSET", b"VALID"):
        pads = list(found.get("pads", [0] * 2 * dimensions)) if mode == b"NOTSET" else []
        pads = pads or [0] * 2 * dimensions
        return pads[:dimensions], pads[dimensions:]
    strides = found.get("strides", [1] * dimensions)
    dilations = found.get("dilations", [1] * dimensions)
    before, after = [], []
    sizes = reader.shape(node, node.input[0])[1:]
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size)
        less, more = total // 2, total - total // 2
        before.append(less if mode == b"SAME_UPPER" else more)
        after.append(more if mode == b"SAME_UPPER" else less)
    return before, after


def sizes(values: Sequence[int]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)


# --- activations and pooling --------------------------------------------------------------


def _clip(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    low, high = (
        value if (value := reader.constant(node, i)) is not None else found.get(name)
        for i, name in ((1, "min"), (2, "max"))
    )
    low = None if low is None else float(np.asarray(low))
    high = None if high is None else float(np.asarray(high))
    if low != 0.0 or high not in (None, 6.0):
        raise reader.refusal(node, f"between {low} and {high}")
    reader.emit(node, "relu" if high is None else "relu6", node.output[0])


def _sigmoid(reader: Reader, node: onnx.NodeProto) -> None:
    position = reader.only_reader(node.output[0], "Mul")
    if position is not None:
        product = reader.graph.node[position]
        if sorted(product.input) == sorted([node.input[0], node.output[0]]):
            reader.done.add(position)
            reader.emit(node, "silu", product.output[0])
            return
    reader.emit(node, "sigmoid", node.output[0])


def _gelu(reader: Reader, node: onnx.NodeProto) -> None:
    if attributes(node).get("approximate", b"none") != b"none":
        raise reader.refusal(node, "approximated by tanh")
    reader.emit(node, "gelu", node.output[0])


def _scaled_gelu(reader: Reader, node: onnx.NodeProto, constant: float) -> bool:
    """``x * (1 + erf(x / sqrt 2)) * 0.5``, as older exporters write GELU."""
    root = constant if node.op_type == "Div" else 1 / constant if constant else 0.0
    steps: list[int] = []
    output = node.output[0]
    for op in ("Erf", "Add", "Mul", "Mul"):
        position = reader.only_reader(output, op)
        if position is None:
            return False
        steps.append(position)
        output = reader.graph.node[position].output[0]
    one, product, half = (reader.graph.node[i] for i in steps[1:])
    constants = [next((c for i in (0, 1) if (c := reader.constant(n, i)) is not None), None)
                 for n in (one, half)]  # fmt: skip
    if not np.isclose(root, np.sqrt(2), rtol=1e-5) or node.input[0] not in product.input:
        return False
    if any(c is None or c.size != 1 for c in constants):
        return False
    if [float(np.asarray(c).reshape(())) for c in constants] != [1.0, 0.5]:
        return False
    reader.done.update(steps)
    reader.emit(node, "gelu", output)
    return True


def _divided(reader: Reader, node: onnx.NodeProto) -> None:
    value = reader.constant(node, 1)
    if value is None or value.size != 1 or not _scaled_gelu(reader, node, float(value.reshape(()))):
        raise reader.refusal(node, "by numbers of the model")


def _pool(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    largest = node.op_type == "MaxPool"
    kernel = list(found["kernel_shape"])
    before, after = windows(reader, node, found, kernel)
    if (
        len(kernel) not in (1, 2)
        or before != after
        or found.get("ceil_mode", 0)
        or len(node.output) > 1
        or set(found.get("dilations", [1])) != {1}
        or (not largest and any(before) and not found.get("count_include_pad", 0))
    ):
        raise reader.refusal(node, "with uneven sides, or sizes rounded up")
    reader.emit(
        node,
        f"{'max' if largest else 'avg'}_pool{len(kernel)}d",
        node.output[0],
        kernel_size=sizes(kernel),
        stride=sizes(found.get("strides", [1] * len(kernel))),
        padding=sizes(before),
    )


def _global_pool(reader: Reader, node: onnx.NodeProto) -> None:
    dimensions = len(reader.shape(node, node.input[0])) - 1
    if dimensions not in (1, 2):
        raise reader.refusal(node, f"in {dimensions} dimensions")
    reader.emit(node, f"adaptive_avg_pool{dimensions}d", node.output[0])


def _mean(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    given = reader.constant(node, 1)
    axes = found.get("axes", None if given is None else given.tolist())
    rank = len(reader.shape(node, node.input[0])) + 1
    axes = sorted(a % rank for a in axes) if axes else []
    if not axes or 0 in axes:
        raise reader.refusal(node, "over the batch")
    if found.get("keepdims", 1):
        if axes != list(range(2, rank)) or rank not in (3, 4):
            raise reader.refusal(node, f"over axes {axes}, which stay")
        reader.emit(node, f"adaptive_avg_pool{rank - 2}d", node.output[0])
        return
    source = node.input[0]
    for count, axis in enumerate(reversed(axes), start=1):
        output = node.output[0] if count == len(axes) else f"{node.output[0]}//{axis}"
        reader.emit(node, "mean", output, inputs=[source], axis=axis)
        source = output


# --- shapes ------------------------------------------------------------------------------


def _transpose(reader: Reader, node: onnx.NodeProto) -> None:
    rank = len(reader.shape(node, node.input[0])) + 1
    order = list(attributes(node).get("perm", range(rank - 1, -1, -1)))
    if order[0] != 0:
        raise reader.refusal(node, "it moves the batch")
    source, now = node.input[0], list(range(rank))
    swaps = []
    for place, axis in enumerate(order):
        if now[place] != axis:
            other = now.index(axis)
            now[place], now[other] = now[other], now[place]
            swaps.append([place, other])
    if not swaps:
        reader.alias(node)
    for count, swap in enumerate(swaps, start=1):
        output = node.output[0] if count == len(swaps) else f"{node.output[0]}//{count}"
        reader.emit(node, "transpose", output, inputs=[source], axes=swap)
        source = output


def _slice(reader: Reader, node: onnx.NodeProto) -> None:
    if reader.shape(node, node.input[0]) != reader.shape(node, node.output[0]):
        raise reader.refusal(node, "of a part")
    reader.alias(node)


def _gather(reader: Reader, node: onnx.NodeProto) -> None:
    index, axis = reader.constant(node, 1), attributes(node).get("axis", 0)
    shape = reader.shape(node, node.input[0])
    axis = axis % (len(shape) + 1)
    if index is None or index.ndim != 0 or axis == 0:
        raise reader.refusal(node, "not one entry of an axis")
    chosen = int(index) % shape[axis - 1]
    reader.emit(node, "select", node.output[0], axis=axis, index=chosen)


# --- joins -------------------------------------------------------------------------------


def _join(op: str) -> Handler:
    def read(reader: Reader, node: onnx.NodeProto) -> None:
        known = next((c for i in (0, 1) if (c := reader.constant(node, i)) is not None), None)
        if known is not None:
            single = op == "multiply" and known.size == 1 and known is reader.constant(node, 1)
            if single and _scaled_gelu(reader, node, float(known.reshape(()))):
                return
            raise reader.refusal(node, "with numbers of the model")
        inputs = list(node.input)
        shapes = [reader.shape(node, name) for name in inputs]
        if len(set(shapes)) == 1:
            reader.emit(node, op, node.output[0], inputs=inputs)
            return
        if op == "multiply":
            for whole, gate in ((0, 1), (1, 0)):
                if shapes[gate] == (shapes[whole][0], *(1 for _ in shapes[whole][1:])):
                    reader.emit(
                        node,
                        "scale_channels",
                        node.output[0],
                        inputs=[inputs[whole], inputs[gate]],
                    )
                    return
        raise reader.refusal(node, "of tensors of different shapes")

    return read


def _concat(reader: Reader, node: onnx.NodeProto) -> None:
    rank = len(reader.shape(node, node.output[0])) + 1
    axis = attributes(node)["axis"] % rank
    if axis == 0 or len(node.input) < 2 or any(n in reader.constants for n in node.input):
        raise reader.refusal(node, "along the batch, or with numbers of the model")
    reader.emit(node, "concat", node.output[0], inputs=list(node.input), axis=axis)


def _softmax(reader: Reader, node: onnx.NodeProto) -> None:
    last = any(value.name == node.output[0] for value in reader.graph.output)
    flat = len(reader.shape(node, node.input[0])) == 1
    if not last or not flat or attributes(node).get("axis", -1) not in (-1, 1):
        raise reader.refusal(node)
    reader.softmax = True
    reader.alias(node)


HANDLERS: Final[Mapping[str, Handler]] = {
    "Add": _join("add"),
    "AveragePool": _pool,
    "Cast": _cast,
    "CastLike": _alias,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _divided,
    "Dropout": _alias,
    "Gather": _gather,
    "Gelu": _gelu,
    "GlobalAveragePool": _global_pool,
    "HardSigmoid": _plain("hard_sigmoid", alpha=1 / 6, beta=0.5),
    "HardSwish": _plain("hard_swish"),
    "Identity": _alias,
    "MaxPool": _pool,
    "Mul": _join("multiply"),
    "ReduceMean": _mean,
    "Relu": _plain("relu"),
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Sum": _join("add"),
    "Tanh": _plain("tanh"),
    "Transpose": _transpose,
}
