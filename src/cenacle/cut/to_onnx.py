"""A graph that a recipe trained becomes ONNX, one layer after the other.

The result equals what :func:`cenacle.training.predict` computes before its softmax: scaling of
the inputs comes first, and a standardized target is restored last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut.shapes import BATCH
from cenacle.documents import layers
from cenacle.documents.layers import Node
from cenacle.errors import DataError
from cenacle.training.graph import Graph
from cenacle.training.preprocessing import Preprocessing

__all__ = ["OPSET", "graph_to_onnx"]

OPSET: Final = 20
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_IR_VERSION: Final = 10

Shape = tuple[int, ...]


class _Writer:
    """Nodes and weights of an ONNX graph, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self.layer = ""
        self._taken: set[str] = set()

    def add(
        self, op: str, inputs: Sequence[str], *, name: str | None = None, **attributes: Any
    ) -> str:
        output = self.fresh(name or f"{self.layer}.{op.lower()}")
        node = helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes)
        scopes = node.metadata_props.add()
        scopes.key, scopes.value = _SCOPES, repr(["", self.layer, op.lower()])
        self.nodes.append(node)
        return output

    def weight(self, name: str, array: NDArray[Any]) -> str:
        name = self.fresh(name)
        self.weights[name] = np.asarray(array, order="C")
        return name

    def numbers(self, name: str, values: Sequence[int]) -> str:
        return self.weight(f"{self.layer}.{name}", np.array(values, np.int64))

    def fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique


Tensors = Mapping[str, NDArray[Any]]
Layer = Callable[[_Writer, Any, list[str], list[Shape], Tensors], str]
"""Writes one node: writer, node, names and sample shapes of what it reads, its own weights."""


def graph_to_onnx(
    nodes: Sequence[Node],
    tensors: Tensors,
    preprocessing: Preprocessing,
    *,
    input_name: str = "input",
    output_name: str = "output",
    probabilities: bool = False,
) -> onnx.ModelProto:
    """The model as ONNX: input (batch, *shape), output (batch, outputs), float32.

    Args:
        nodes: as trained, with tensors named after them.
        preprocessing: its scaling becomes part of the graph.
        input_name: of the graph's input; the crossing tensor's, for a model behind a front.
        probabilities: end with a softmax over the outputs.

    Raises:
        DataError: tensors are missing, or of other shapes.
        DocumentError: the nodes do not fit samples of the preprocessing's shape.
    """
    from cenacle.training.models import load_tensors  # noqa: PLC0415 - torch

    shape = preprocessing.shape
    graph = Graph(nodes, shape, integers=preprocessing.integers)
    load_tensors(graph, tensors, "the model's tensors")
    writer = _Writer()
    writer.fresh(input_name)
    writer.fresh(output_name)
    values = {"input": _scaled(writer, input_name, preprocessing)}
    previous = "input"
    for node in nodes:
        read = node.inputs or (previous,)
        writer.layer = node.name
        prefix = node.name + "."
        own = {n[len(prefix) :]: np.asarray(a) for n, a in tensors.items() if n.startswith(prefix)}
        layer = _LAYERS.get(node.op)
        if layer is None:
            raise DataError(f"node {node.name!r} has no form in ONNX", found=node.op)
        values[node.name] = layer(
            writer, node, [values[name] for name in read], [graph.shapes[n] for n in read], own
        )
        previous = node.name
    last = values[previous]
    writer.layer = "output"
    if probabilities:
        last = writer.add("Softmax", [last], axis=-1)
    if preprocessing.target is not None:
        std = writer.weight("output.std", _single(preprocessing.target.std))
        mean = writer.weight("output.mean", _single(preprocessing.target.mean))
        last = writer.add("Add", [writer.add("Mul", [last, std]), mean])
    identity = writer.add("Identity", [last])
    writer.nodes[-1].output[0] = output_name
    assert identity
    kind = TensorProto.INT64 if preprocessing.integers else TensorProto.FLOAT
    made = helper.make_graph(
        writer.nodes,
        "cenacle",
        [helper.make_tensor_value_info(input_name, kind, [BATCH, *shape])],
        [
            helper.make_tensor_value_info(
                output_name, TensorProto.FLOAT, [BATCH, *graph.output_shape]
            )
        ],
        [numpy_helper.from_array(array, name) for name, array in writer.weights.items()],
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="cenacle"
    )
    model.ir_version = _IR_VERSION
    return model


def _single(values: Sequence[float] | NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _scaled(writer: _Writer, name: str, preprocessing: Preprocessing) -> str:
    """As :meth:`Preprocessing.apply`, with one subtraction and one factor."""
    writer.layer = "preprocessing"
    if preprocessing.integers:
        return name
    rank = len(preprocessing.shape)
    if preprocessing.ranges is not None:
        largest = float(np.finfo(np.float32).max)
        ranged = np.array([pair is not None for pair in preprocessing.ranges])
        pairs = [pair or (-largest, largest) for pair in preprocessing.ranges]
        low, high = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
        centre = np.where(ranged, (low + high) / 2, 0.0)
        half = np.where(ranged, (high - low) / 2, 1.0)
        bounds = [
            writer.weight(f"preprocessing.{side}", _single(value))
            for side, value in (("low", low), ("high", high))
        ]
        name = writer.add("Min", [writer.add("Max", [name, bounds[0]]), bounds[1]])
        factor, shift = 1 / half, centre
    elif preprocessing.inputs is not None:
        mean, std = (np.array(v) for v in (preprocessing.inputs.mean, preprocessing.inputs.std))
        if rank > 1:
            mean, std = (value.reshape(-1, *(1 for _ in range(rank - 1))) for value in (mean, std))
        factor, shift = preprocessing.scale / std, mean / preprocessing.scale
    else:
        factor, shift = np.array(preprocessing.scale), np.array(0.0)
    if np.any(shift != 0):
        name = writer.add("Sub", [name, writer.weight("preprocessing.shift", _single(shift))])
    if np.any(factor != 1):
        name = writer.add("Mul", [name, writer.weight("preprocessing.factor", _single(factor))])
    return name


# --- layers ------------------------------------------------------------------------------


def _pair(size: Any, dimensions: int) -> list[int]:
    return list(size) if isinstance(size, tuple) else [size] * dimensions


def _given(w: _Writer, node: Any, own: Tensors, *names: str) -> list[str]:
    return [w.weight(f"{node.name}.{name}", _single(own[name])) for name in names if name in own]


def _linear(
    w: _Writer, node: layers.Linear, x: list[str], shapes: list[Shape], own: Tensors
) -> str:
    weights = _given(w, node, own, "weight", "bias")
    if len(shapes[0]) == 1:
        return w.add("Gemm", [*x, *weights], transB=1)
    turned = w.weight(f"{node.name}.weight_t", _single(own["weight"]).T)
    w.weights.pop(weights[0])
    product = w.add("MatMul", [*x, turned])
    return w.add("Add", [product, weights[1]]) if node.bias else product


def _conv(w: _Writer, node: layers.Conv, x: list[str], _: list[Shape], own: Tensors) -> str:
    dimensions = int(node.op[-2])
    return w.add(
        "Conv",
        [*x, *_given(w, node, own, "weight", "bias")],
        kernel_shape=_pair(node.kernel_size, dimensions),
        strides=_pair(node.stride, dimensions),
        pads=_pair(node.padding, dimensions) * 2,
        dilations=_pair(node.dilation, dimensions),
        group=node.groups,
    )


def _activation(
    w: _Writer, node: layers.Activation, x: list[str], _: list[Shape], _own: Tensors
) -> str:
    match node.op:
        case "silu":
            return w.add("Mul", [*x, w.add("Sigmoid", x)])
        case "relu6":
            bounds = [w.weight(f"{node.name}.{v}", _single([v]).reshape(())) for v in (0, 6)]
            return w.add("Clip", [*x, *bounds])
        case "hard_sigmoid":
            return w.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        case _:
            plain = {"relu": "Relu", "gelu": "Gelu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
            return w.add({**plain, "hard_swish": "HardSwish"}[node.op], x)


def _pool(w: _Writer, node: layers.Pool, x: list[str], _: list[Shape], _own: Tensors) -> str:
    dimensions = int(node.op[-2])
    stride = node.kernel_size if node.stride is None else node.stride
    largest = node.op.startswith("max")
    kinds: dict[str, Any] = {} if largest else {"count_include_pad": 1}
    return w.add(
        "MaxPool" if largest else "AveragePool",
        x,
        kernel_shape=_pair(node.kernel_size, dimensions),
        strides=_pair(stride, dimensions),
        pads=_pair(node.padding, dimensions) * 2,
        **kinds,
    )


def _adaptive(
    w: _Writer, node: layers.AdaptiveAvgPool, x: list[str], shapes: list[Shape], _: Tensors
) -> str:
    """Averages as products: torch's windows overlap where sizes do not divide."""
    if node.output_size == 1:
        return w.add("GlobalAveragePool", x)
    value = x[0]
    sizes = shapes[0][1:]
    for axis, size in enumerate(sizes, start=2):
        windows = w.weight(f"{node.name}.windows{axis}", _windows(size, node.output_size))
        if axis == len(sizes) + 1:
            value = w.add("MatMul", [value, windows])
        else:
            swap = [0, 1, 3, 2]
            turned = w.add("Transpose", [value], perm=swap)
            value = w.add("Transpose", [w.add("MatMul", [turned, windows])], perm=swap)
    return value


def _windows(size: int, outputs: int) -> NDArray[np.float32]:
    """(size, outputs): column i averages from floor(i*size/outputs) to ceil((i+1)*size/outputs)."""
    found = np.zeros((size, outputs), np.float32)
    for i in range(outputs):
        start, end = i * size // outputs, -(-(i + 1) * size // outputs)
        found[start:end, i] = 1 / (end - start)
    return found


def _reshaped(w: _Writer, x: list[str], shape: Sequence[int]) -> str:
    return w.add("Reshape", [*x, w.numbers("shape", [-1, *shape])])


def _flatten(
    w: _Writer, node: layers.Flatten, x: list[str], shapes: list[Shape], _: Tensors
) -> str:
    kept = shapes[0][: node.start_axis - 1]
    return _reshaped(w, x, [*kept, int(np.prod(shapes[0][node.start_axis - 1 :]))])


def _transpose(
    w: _Writer, node: layers.Transpose, x: list[str], shapes: list[Shape], _: Tensors
) -> str:
    order = list(range(len(shapes[0]) + 1))
    one, two = node.axes
    order[one], order[two] = order[two], order[one]
    return w.add("Transpose", x, perm=order)


def _layer_norm(
    w: _Writer, node: layers.LayerNorm, x: list[str], _: list[Shape], own: Tensors
) -> str:
    weights = _given(w, node, own, "weight", "bias")
    return w.add("LayerNormalization", [*x, *weights], axis=-node.axes, epsilon=node.eps)


def _group_norm(
    w: _Writer, node: layers.GroupNorm, x: list[str], shapes: list[Shape], own: Tensors
) -> str:
    """As instances of one channel a group; scale and shift are per channel, after it."""
    grouped = w.add("Reshape", [*x, w.numbers("groups", [0, node.groups, -1])])
    one = w.weight(f"{node.name}.one", np.ones(node.groups, np.float32))
    zero = w.weight(f"{node.name}.zero", np.zeros(node.groups, np.float32))
    normed = w.add("InstanceNormalization", [grouped, one, zero], epsilon=node.eps)
    whole = _reshaped(w, [normed], shapes[0])
    wide = (-1, *(1 for _ in shapes[0][1:]))
    scale, shift = (
        w.weight(f"{node.name}.{name}", _single(own[name]).reshape(wide))
        for name in ("weight", "bias")
    )
    return w.add("Add", [w.add("Mul", [whole, scale]), shift])


def _batch_norm(
    w: _Writer, node: layers.BatchNorm, x: list[str], _: list[Shape], own: Tensors
) -> str:
    weights = _given(w, node, own, "weight", "bias", "running_mean", "running_var")
    return w.add("BatchNormalization", [*x, *weights], epsilon=node.eps)


def _pad(w: _Writer, node: layers.Pad, x: list[str], shapes: list[Shape], _: Tensors) -> str:
    rank = len(shapes[0]) + 1
    before, after = [0] * rank, [0] * rank
    for pair in range(len(node.padding) // 2):
        before[-1 - pair], after[-1 - pair] = node.padding[2 * pair], node.padding[2 * pair + 1]
    return w.add("Pad", [*x, w.numbers("pads", before + after)])


def _select(w: _Writer, node: layers.Select, x: list[str], _: list[Shape], _own: Tensors) -> str:
    index = w.weight(f"{node.name}.index", np.array(node.index, np.int64))
    return w.add("Gather", [*x, index], axis=node.axis)


def _embedding(
    w: _Writer, node: layers.Embedding, x: list[str], _: list[Shape], own: Tensors
) -> str:
    return w.add("Gather", [*_given(w, node, own, "weight"), *x], axis=0)


def _chain(op: str) -> Layer:
    def write(w: _Writer, _: Any, x: list[str], _shapes: list[Shape], _own: Tensors) -> str:
        value = x[0]
        for other in x[1:]:
            value = w.add(op, [value, other])
        return value

    return write


_LAYERS: Final[Mapping[str, Layer]] = {
    "linear": cast("Layer", _linear),
    **dict.fromkeys(("conv1d", "conv2d"), cast("Layer", _conv)),
    **dict.fromkeys(layers.ACTIVATIONS, cast("Layer", _activation)),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"), cast("Layer", _pool)),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), cast("Layer", _adaptive)),
    "flatten": cast("Layer", _flatten),
    "reshape": lambda w, node, x, _s, _o: _reshaped(w, x, node.shape),
    "transpose": cast("Layer", _transpose),
    "mean": lambda w, node, x, _s, _o: w.add(
        "ReduceMean", [*x, w.numbers("axis", [node.axis])], keepdims=0
    ),
    "dropout": lambda _w, _n, x, _s, _o: x[0],
    "layer_norm": cast("Layer", _layer_norm),
    "group_norm": cast("Layer", _group_norm),
    "batch_norm": cast("Layer", _batch_norm),
    "pad": cast("Layer", _pad),
    "select": cast("Layer", _select),
    "embedding": cast("Layer", _embedding),
    "add": _chain("Add"),
    "multiply": _chain("Mul"),
    "scale_channels": _chain("Mul"),
    "concat": lambda w, node, x, _s, _o: w.add("Concat", x, axis=node.axis),
}
