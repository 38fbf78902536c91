"""Bring a graph into the form that is cut: what is constant in it becomes a stored tensor.

Exporters write one and the same thing in several ways. After this, all constants are initializers;
the shape of a weight is a constant (else a part would hold a weight of which it needs the shape
alone); and no operation reads a tensor merely for its type.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import InferenceError, infer_shapes

from cenacle.cut.onnx_checks import skeleton
from cenacle.cut.onnx_tensors import embed

__all__ = ["normalize"]

_CONSTANT_TYPES: Final = {
    "value_float": TensorProto.FLOAT,
    "value_floats": TensorProto.FLOAT,
    "value_int": TensorProto.INT64,
    "value_ints": TensorProto.INT64,
}


def normalize(model: ModelProto) -> None:
    """Change a model in place; its results stay the same.

    Constants inside the bodies of loops and branches stay where they are.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    types = _types(model) if any(node.op_type == "CastLike" for node in graph.node) else {}
    kept: list[NodeProto] = []
    for node in graph.node:
        tensor = None
        if not node.domain and len(node.output) == 1 and node.output[0] not in outputs:
            tensor = _constant(node, stored)
        if tensor is not None:
            tensor.name = node.output[0]
            stored[tensor.name] = tuple(tensor.dims)
            graph.initializer.append(tensor)
        elif node.op_type == "CastLike" and types.get(node.input[1]):
            kept.append(_as_cast(node, types[node.input[1]]))
        else:
            copied = NodeProto()
            copied.CopyFrom(node)  # it goes with the list that it stands in
            kept.append(copied)
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: NodeProto, stored: dict[str, tuple[int, ...]]) -> TensorProto | None:
    if node.op_type in {"Shape", "Size"} and node.input[0] in stored:
        return _sizes(node, stored[node.input[0]])
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    if attribute.name not in _CONSTANT_TYPES:
        return None
    value: Any = helper.get_attribute_value(attribute)
    many = attribute.name.endswith("s")
    tensor = helper.make_tensor(
        node.output[0],
        _CONSTANT_TYPES[attribute.name],
        [len(value)] if many else [],
        list(value) if many else [value],
    )
    embed(tensor)
    return tensor


def _sizes(node: NodeProto, shape: tuple[int, ...]) -> TensorProto:
    if node.op_type == "Size":
        return numpy_helper.from_array(np.array(math.prod(shape), dtype=np.int64))
    limits = {a.name: a.i for a in node.attribute}
    found = shape[limits.get("start", 0) : limits.get("end", len(shape))]
    return numpy_helper.from_array(np.array(found, dtype=np.int64))


def _as_cast(node: NodeProto, kind: int) -> NodeProto:
    cast = NodeProto()
    cast.CopyFrom(node)
    cast.op_type = "Cast"
    del cast.input[1:]
    cast.attribute.append(helper.make_attribute("to", kind))
    return cast


def _types(model: ModelProto) -> dict[str, int]:
    bare = skeleton(model)
    try:
        bare = infer_shapes(bare)
    except (InferenceError, ValueError, RuntimeError):
        return {}
    graph: GraphProto = bare.graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        found[value.name] = value.type.tensor_type.elem_type
    return found
