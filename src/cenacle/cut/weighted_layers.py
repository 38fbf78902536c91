"""ONNX operators with weights, read as layers of a recipe; and shapes, among which norms hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from cenacle.cut.graph_reader import Reader, attributes
from cenacle.cut.plain_layers import Handler, sizes, windows

__all__ = ["HANDLERS"]

Array = NDArray[Any]


# --- linear layers -----------------------------------------------------------------------


def _added_bias(
    reader: Reader, output: str, channels: int, axes_after: int
) -> tuple[str, Array | None]:
    """An ``Add`` of one constant a channel that follows alone: its output and the constant."""
    position = reader.only_reader(output, "Add")
    if position is None:
        return output, None
    node = reader.graph.node[position]
    other = reader.constant(node, 1 - list(node.input).index(output))
    fits = other is not None and other.dtype == np.float32 and other.size == channels
    if other is None or not fits:
        return output, None
    tail = other.shape[len(other.shape) - axes_after :] if axes_after else ()
    if (
        len(other.shape) <= axes_after
        or other.shape[-1 - axes_after] != channels
        or set(tail) > {1}
    ):
        return output, None
    reader.done.add(position)
    return node.output[0], other.reshape(-1)


def _weight_name(node: onnx.NodeProto, index: int = 1) -> str:
    return str(node.input[index])


def _gemm(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    if found.get("transA", 0) or found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0:
        raise reader.refusal(node, "it scales or transposes what it reads")
    weight = reader.weight(node, 1, 2)
    weight = weight if found.get("transB", 0) else weight.T
    bias = reader.weight(node, 2).reshape(-1) if len(node.input) > 2 and node.input[2] else None
    if bias is not None and bias.size == 1 and len(weight) > 1:
        bias = np.full(len(weight), bias[0], np.float32)
    _linear(reader, node, weight, bias, node.output[0])


def _matmul(reader: Reader, node: onnx.NodeProto) -> None:
    if reader.constant(node, 1) is None:
        raise reader.refusal(node, "a product of two computed tensors, as attention has")
    weight = reader.weight(node, 1, 2).T
    output, bias = _added_bias(reader, node.output[0], len(weight), 0)
    _linear(reader, node, weight, bias, output)


def _linear(
    reader: Reader, node: onnx.NodeProto, weight: Array, bias: Array | None, output: str
) -> None:
    reader.emit(
        node,
        "linear",
        output,
        weights={"weight": weight} | ({} if bias is None else {"bias": bias}),
        weight_name=_weight_name(node),
        out_features=len(weight),
        bias=bias is not None,
    )


def _conv(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    weight = reader.weight(node, 1)
    dimensions = weight.ndim - 2
    if dimensions not in (1, 2):
        raise reader.refusal(node, f"in {dimensions} dimensions")
    kernel = list(weight.shape[2:])
    before, after = windows(reader, node, found, kernel)
    inputs = [node.input[0]]
    if before != after:
        inputs = [_padded(reader, node, before, after)]
        before = [0] * dimensions
    bias = reader.weight(node, 2, 1) if len(node.input) > 2 and node.input[2] else None
    output = node.output[0]
    if bias is None:
        output, bias = _added_bias(reader, output, len(weight), dimensions)
    reader.emit(
        node,
        f"conv{dimensions}d",
        output,
        inputs=inputs,
        weights={"weight": weight} | ({} if bias is None else {"bias": bias}),
        weight_name=_weight_name(node),
        out_channels=len(weight),
        kernel_size=sizes(kernel),
        stride=sizes(found.get("strides", [1] * dimensions)),
        padding=sizes(before),
        dilation=sizes(found.get("dilations", [1] * dimensions)),
        groups=found.get("group", 1),
        bias=bias is not None,
    )


def _padded(
    reader: Reader, node: onnx.NodeProto, before: Sequence[int], after: Sequence[int]
) -> str:
    """A node of zeros before one that pads its sides differently; returns a name for its output."""
    padding = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    output = f"{node.output[0]}//padded"
    reader.emit(node, "pad", output, padding=padding)
    return output


def _pad(reader: Reader, node: onnx.NodeProto) -> None:
    pads, value = reader.constant(node, 1), reader.constant(node, 2)
    mode = attributes(node).get("mode", b"constant")
    if pads is None or mode != b"constant" or (value is not None and np.any(value != 0)):
        raise reader.refusal(node, "not with zeros")
    if len(node.input) > 3 and node.input[3]:
        raise reader.refusal(node, "of chosen axes")
    rank = len(pads) // 2
    if (
        rank < 2
        or np.any(pads < 0)
        or np.any(pads[: rank - 2])
        or np.any(pads[rank : 2 * rank - 2])
    ):
        raise reader.refusal(node, "of other axes than the last two")
    last = 2 if rank > 3 or np.any(pads[[rank - 2, 2 * rank - 2]]) else 1
    before, after = pads[rank - last : rank].tolist(), pads[2 * rank - last :].tolist()
    padding = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    reader.emit(node, "pad", node.output[0], padding=padding)


# --- norms -------------------------------------------------------------------------------


def _batch_norm(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    scale, shift, mean, variance = (reader.weight(node, i, 1) for i in range(1, 5))
    epsilon = found.get("epsilon", 1e-5)
    if reader.fold_norms:
        _fold_norm(reader, node, scale / np.sqrt(variance + np.float32(epsilon)), shift, mean)
        return
    reader.emit(
        node,
        "batch_norm",
        node.output[0],
        weights={
            "weight": scale,
            "bias": shift,
            "running_mean": mean,
            "running_var": variance,
            "num_batches_tracked": np.array(0, np.int64),
        },
        weight_name=_weight_name(node),
        eps=epsilon,
        momentum=max(1.0 - found.get("momentum", 0.9), 1e-3),
    )


def _fold_norm(
    reader: Reader, node: onnx.NodeProto, factor: Array, shift: Array, mean: Array
) -> None:
    before = reader.names[node.input[0]]
    entry = next((e for e in reader.fields if e["name"] == before), None)
    if (
        entry is None
        or entry["op"] not in ("conv1d", "conv2d", "linear")
        or reader.only_reader(node.input[0]) is None
        or len(reader.tensors[f"{before}.weight"]) != len(factor)
    ):
        raise reader.refusal(node, "it normalizes over the batch, and no linear layer is before it")
    weight = reader.tensors[f"{before}.weight"]
    bias = reader.tensors.get(f"{before}.bias", np.float32(0))
    wide = (-1, *(1 for _ in weight.shape[1:]))
    reader.tensors[f"{before}.weight"] = (weight * factor.reshape(wide)).astype(np.float32)
    reader.tensors[f"{before}.bias"] = ((bias - mean) * factor + shift).astype(np.float32)
    entry["bias"] = True
    reader.alias(node)


def _layer_norm(reader: Reader, node: onnx.NodeProto) -> None:
    found = attributes(node)
    rank = len(reader.shape(node, node.input[0])) + 1
    axis = found.get("axis", -1)
    scale = reader.weight(node, 1)
    shift = reader.weight(node, 2) if len(node.input) > 2 and node.input[2] else 0 * scale
    reader.emit(
        node,
        "layer_norm",
        node.output[0],
        weights={"weight": scale, "bias": shift},
        weight_name=_weight_name(node),
        axes=-axis if axis < 0 else rank - axis,
        eps=found.get("epsilon", 1e-5),
    )


def _group_norm(reader: Reader, first: onnx.NodeProto) -> bool:
    """torch's GroupNorm: instances of one channel a group, then scale and shift a channel."""
    steps: list[int] = []
    output = first.output[0]
    for op in ("InstanceNormalization", "Reshape", "Mul", "Add"):
        position = reader.only_reader(output, op)
        if position is None:
            return False
        steps.append(position)
        output = reader.graph.node[position].output[0]
    norm, _, scaled, shifted = (reader.graph.node[i] for i in steps)
    groups, one, zero = (reader.constant(n, i) for n, i in ((first, 1), (norm, 1), (norm, 2)))
    channels = reader.shape(first, first.input[0])[0]
    if groups is None or one is None or zero is None or len(groups) != 3:
        return False
    if np.any(one != 1) or np.any(zero != 0):
        return False
    for position in steps:
        node = reader.graph.node[position]
        for name in (n for n in node.input if n not in reader.constants):
            _fold_cast(reader, name)
    parts = [_per_channel(reader, node, channels) for node in (scaled, shifted)]
    if parts[0] is None or parts[1] is None:
        return False
    reader.done.update(steps)
    reader.emit(
        first,
        "group_norm",
        output,
        weights={"weight": parts[0], "bias": parts[1]},
        weight_name=str(next(n for n in scaled.input if n in reader.constants)),
        groups=len(one),
        eps=attributes(norm).get("epsilon", 1e-5),
    )
    return True


def _fold_cast(reader: Reader, name: str) -> None:
    """Casts and ``Unsqueeze`` of a weight, which may stand after what reads it here."""
    for position, node in enumerate(reader.graph.node):
        if name not in node.output or node.op_type not in ("Cast", "CastLike", "Unsqueeze"):
            continue
        if node.input[0] not in reader.constants:
            _fold_cast(reader, node.input[0])
        value = reader.constants.get(node.input[0])
        if value is None:
            return
        axes = reader.constant(node, 1) if node.op_type == "Unsqueeze" else None
        reader.constants[name] = value if axes is None else np.expand_dims(value, tuple(axes))
        reader.done.add(position)


def _per_channel(reader: Reader, node: onnx.NodeProto, channels: int) -> Array | None:
    for index in range(2):
        value = reader.constant(node, index)
        if value is not None and value.size == channels and value.dtype == np.float32:
            return value.reshape(-1)
    return None


# --- shapes ------------------------------------------------------------------------------


def _reshape(reader: Reader, node: onnx.NodeProto) -> None:
    if node.op_type == "Reshape" and _group_norm(reader, node):
        return
    before, after = (reader.shape(node, name) for name in (node.input[0], node.output[0]))
    if int(np.prod(before)) != int(np.prod(after)):
        raise reader.refusal(node, "it moves numbers between samples")
    if before == after:
        reader.alias(node)
    elif len(after) == 1:
        reader.emit(node, "flatten", node.output[0])
    else:
        reader.emit(node, "reshape", node.output[0], shape=list(after))


HANDLERS: Final[Mapping[str, Handler]] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
}
