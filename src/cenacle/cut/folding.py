"""Small tensors whose values follow from sizes and constants, for shape inference.

``onnx.shape_inference`` propagates such values through a few operators only, so that all sizes
behind a reshape of a reshape are lost; and without bounds, so that a few nodes fill any memory. So
they are computed here, with ONNX's reference implementation, and put into the graph as constants.
Every value is bounded before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

__all__ = ["Folder"]

_SMALL: Final = 64
_MOST: Final = 4096
_OPERATORS: Final = {
    *("Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal"),
    *("Expand", "Floor", "Gather", "Range"),
    *("Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod"),
    *("Mul", "Neg", "Not", "Or", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape"),
    *("Round", "Slice", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where"),
}

Array = np.ndarray[Any, Any]


class Folder:
    """Replaces what is known in one model's graph, step by step.

    Args:
        model: with its weights as inputs but the small ones; changed by :meth:`fold`.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._opsets: dict[str, Any] = {entry.domain: entry.version for entry in model.opset_import}
        self._outputs = {value.name for value in model.graph.output}
        self._values: dict[Any, Array] = {}
        for tensor in model.graph.initializer:
            if math.prod(tensor.dims) <= _SMALL and tensor.data_type != TensorProto.STRING:
                self._values[tensor.name] = numpy_helper.to_array(tensor)

    def fold(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Replace nodes whose results are now known; whether there were any."""
        graph = self._model.graph
        left: list[NodeProto] = []
        for node in graph.node:
            value = self._evaluate(node, shapes)
            if value is None or node.output[0] in self._outputs:
                left.append(node)
                continue
            self._values[node.output[0]] = value
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        if len(left) == len(graph.node):
            return False
        kept = [_copied(node) for node in left]
        del graph.node[:]
        graph.node.extend(kept)
        return True

    def _evaluate(self, node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Array | None:
        if node.domain or len(node.output) != 1:
            return None
        if node.op_type in {"Shape", "Size"}:
            return _sizes(node, shapes.get(node.input[0]))
        values = [self._values.get(name) for name in node.input if name]
        if node.op_type not in _OPERATORS or not values or any(v is None for v in values):
            return None
        known = [value for value in values if value is not None]
        # Two operands of 64 elements make at most 4096.
        if any(value.size > _SMALL for value in known):
            return None
        given = {name: self._values[name] for name in node.input if name}
        try:
            return self._compute(node, given) if _bounded(node, known) else None
        except Exception:
            return None  # a node that cannot be computed is left to the inference

    def _compute(self, node: NodeProto, given: dict[Any, Array]) -> Array | None:
        with np.errstate(all="ignore"):
            evaluator = ReferenceEvaluator(node, opsets=self._opsets)
            result = np.asarray(next(iter(evaluator.run(None, given))))
        return result if result.size <= _MOST and result.dtype.kind in "biuf" else None


def _bounded(node: NodeProto, values: list[Array]) -> bool:
    """Whether an operator that makes more than it reads makes little."""
    if node.op_type in {"ConstantOfShape", "Expand"}:
        return math.prod(abs(int(size)) for size in values[-1].flat) <= _MOST
    if node.op_type == "Range":
        start, limit, step = (float(value) for value in values)
        return step != 0 and abs((limit - start) / step) <= _MOST
    return len(values) <= (2 if node.op_type in {"Max", "Min"} else _SMALL)


def _sizes(node: NodeProto, shape: tuple[int, ...] | None) -> Array | None:
    if shape is None:
        return None
    if node.op_type == "Size":
        return np.array(math.prod(shape), dtype=np.int64)
    limits = {a.name: a.i for a in node.attribute}
    return np.array(shape[limits.get("start", 0) : limits.get("end", len(shape))], dtype=np.int64)


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
