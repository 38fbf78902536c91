"""One node with a large weight as several nodes with some rows of it each, to the same result.

Rows of a stored tensor are consecutive bytes, so any of them can be read alone:

* ``Gemm`` with ``transB``, ``FusedMatMul`` with ``transB`` and ``Conv``: rows of the weight are
  columns (channels) of the result, which are joined.
* ``MatMul``, and ``Gemm`` without ``transB``: rows of the weight meet columns of the input; the
  products are added up.
* ``Gather`` on the rows of a table: each part fetches the rows that lie in it. Every part is
  always read, so that what is read says nothing of the indices.

Anything else stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cenacle.cut.onnx_tensors import tensor_bytes
from cenacle.cut.tail_format import Piece

__all__ = ["Unit", "split_node"]

_FLOATS: Final = {TensorProto.FLOAT, TensorProto.DOUBLE}
_ROUND: Final = 16  # rows a part has a multiple of, for the sake of vector instructions
_LEAST_OPSET: Final = 13


@dataclass
class Unit:
    """Nodes that stay together, and the weights that they need.

    Attributes:
        nodes: in order.
        pieces: name of the input in these nodes -> the weight, or rows of it.
        constants: small tensors that the nodes need besides.
        types: value made here -> element type, where a split made it.
    """

    nodes: list[NodeProto]
    pieces: dict[str, Piece] = field(default_factory=dict)
    constants: list[TensorProto] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Split:
    """What all parts of one node share."""

    node: NodeProto
    weight: TensorProto
    weights: Mapping[str, TensorProto]
    ranges: list[tuple[int, int]]

    def name(self, kind: str, part: int | str) -> str:
        return f"{self.node.output[0]}/{kind}.{part}"

    def rows(self, tensor: TensorProto, part: int) -> Piece:
        start, stop = self.ranges[part]
        name = self.name(f"rows of {tensor.name}", start)
        return Piece(name=name, tensor=tensor.name, start=start, stop=stop)

    def attributes(self) -> dict[str, Any]:
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}


def split_node(
    node: NodeProto, weights: Mapping[str, TensorProto], *, most: int, opset: int
) -> list[Unit] | None:
    """The node in parts whose weights have at most ``most`` bytes each; ``None`` to leave it.

    Args:
        node: any node.
        weights: the tensors that are stored outside the graph, by name.
        most: bytes; a single row may have more.
        opset: version of ONNX's operators.
    """
    how = _KINDS.get((node.domain, node.op_type))
    if how is None or opset < _LEAST_OPSET or len(node.output) != 1:
        return None
    position, split = how
    name = node.input[position] if position < len(node.input) else ""
    weight = weights.get(name)
    if weight is None or len(weight.dims) < 2 or list(node.input).count(name) != 1:
        return None
    size, rows = tensor_bytes(weight), int(weight.dims[0])
    if size <= most or rows < 2:
        return None
    each = max(1, most * rows // size)
    parts = -(-rows // each)
    each = -(-rows // parts)
    rounded = -(-each // _ROUND) * _ROUND
    if rounded * (size // rows) <= most:
        each = rounded
    ranges = [(start, min(start + each, rows)) for start in range(0, rows, each)]
    return split(_Split(node, weight, weights, ranges))


def _constant(name: str, values: Iterable[int] | int, kind: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def _make(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    domain = attributes.pop("domain", "")
    return helper.make_node(kind, inputs, [output], domain=domain, **attributes)


def _split_result(split: _Split, axis: int, bias: int | None) -> list[Unit] | None:
    """Rows of the weight make columns of the result: compute them in parts and join them."""
    node, weight = split.node, split.weight
    added = node.input[bias] if bias is not None and bias < len(node.input) else ""
    # A bias with a value a row goes with its rows; another is added to the whole.
    tensor = split.weights.get(added)
    by_rows = tensor is not None and list(tensor.dims) == [weight.dims[0]]
    if added and not by_rows and (node.op_type == "Conv" or split.attributes().get("beta", 1) != 1):
        return None
    units, made = [], []
    for part in range(len(split.ranges)):
        piece = split.rows(weight, part)
        unit = Unit([], {piece.name: piece})
        inputs = [node.input[0], piece.name]
        if by_rows and tensor is not None:
            rows = split.rows(tensor, part)
            unit.pieces[rows.name] = rows
            inputs.append(rows.name)
        output = split.name("part", part)
        unit.nodes.append(
            _make(node.op_type, inputs, output, domain=node.domain, **split.attributes())
        )
        unit.types[output] = weight.data_type
        units.append(unit)
        made.append(output)
    joined = node.output[0] if not added or by_rows else split.name("joined", "all")
    last = units[-1]
    last.nodes.append(_make("Concat", made, joined, axis=axis))
    if joined != node.output[0]:
        last.nodes.append(_make("Add", [joined, added], node.output[0]))
        if tensor is not None:
            last.pieces[added] = Piece(name=added, tensor=added)
    return units


def _gemm(split: _Split) -> list[Unit] | None:
    if split.attributes().get("transB", 0):
        return _split_result(split, 1, 2)
    if split.attributes().get("beta", 1) != 1:
        return None
    return _split_sum(split, 0 if split.attributes().get("transA", 0) else 1)


def _fused(split: _Split) -> list[Unit] | None:
    plain = set(split.attributes()) <= {"transB", "transA", "alpha"}
    if not plain or not split.attributes().get("transB", 0):
        return None
    return _split_result(split, -1, None)


def _matmul(split: _Split) -> list[Unit] | None:
    return _split_sum(split, -1) if len(split.weight.dims) == 2 else None


def _conv(split: _Split) -> list[Unit] | None:
    return None if split.attributes().get("group", 1) != 1 else _split_result(split, 1, 2)


def _split_sum(split: _Split, axis: int) -> list[Unit]:
    """Rows of the weight meet columns of the input: add the products up."""
    node, weight = split.node, split.weight
    bias = node.input[2] if len(node.input) > 2 else ""
    units: list[Unit] = []
    total = ""
    last = len(split.ranges) - 1
    for part, (start, stop) in enumerate(split.ranges):
        piece = split.rows(weight, part)
        cut = [split.name(kind, part) for kind in ("starts", "ends", "axes")]
        columns, product = split.name("columns", part), split.name("part", part)
        unit = Unit([], {piece.name: piece})
        unit.constants = [
            _constant(name, [value]) for name, value in zip(cut, (start, stop, axis), strict=True)
        ]
        unit.nodes = [
            _make("Slice", [node.input[0], *cut], columns),
            _make(node.op_type, [columns, piece.name], product, **split.attributes()),
        ]
        if total:
            done = part == last and not bias
            summed = node.output[0] if done else split.name("sum", part)
            unit.nodes.append(_make("Add", [total, product], summed))
            product = summed
        if part == last and bias:
            unit.nodes.append(_make("Add", [product, bias], node.output[0]))
            if bias in split.weights:
                unit.pieces[bias] = Piece(name=bias, tensor=bias)
        total = product
        unit.types[total] = weight.data_type
        units.append(unit)
    return units


def _gather(split: _Split) -> list[Unit] | None:
    node, table = split.node, split.weight
    if split.attributes().get("axis", 0) != 0 or len(table.dims) != 2:
        return None
    count = int(table.dims[0])
    # A negative index counts from the end.
    first = Unit([])
    names = {key: split.name(key, "all") for key in ("zero", "count", "blank", "axis")}
    kinds = helper.tensor_dtype_to_np_dtype(table.data_type)
    constants = [
        _constant(names["zero"], 0),
        _constant(names["count"], count),
        _constant(names["axis"], [-1]),
        numpy_helper.from_array(np.zeros((), kinds), names["blank"]),
    ]
    wide, negative, turned = (split.name(key, "all") for key in ("index", "negative", "turned"))
    index = split.name("position", "all")
    first.nodes = [
        _make("Cast", [node.input[1]], wide, to=TensorProto.INT64),
        _make("Less", [wide, names["zero"]], negative),
        _make("Add", [wide, names["count"]], turned),
        _make("Where", [negative, turned, wide], index),
    ]
    first.types[index] = TensorProto.INT64
    first.constants = constants
    units = [first]
    found = names["blank"]
    for part, (start, stop) in enumerate(split.ranges):
        piece = split.rows(table, part)
        own = {
            key: split.name(key, part)
            for key in ("start", "size", "local", "below", "above", "here", "safe", "rows", "mask")
        }
        done = node.output[0] if part == len(split.ranges) - 1 else split.name("part", part)
        unit = Unit([], {piece.name: piece})
        unit.constants = [
            _constant(own["start"], start),
            _constant(own["size"], stop - start),
            *constants,
        ]
        unit.nodes = [
            _make("Sub", [index, own["start"]], own["local"]),
            _make("GreaterOrEqual", [own["local"], names["zero"]], own["below"]),
            _make("Less", [own["local"], own["size"]], own["above"]),
            _make("And", [own["below"], own["above"]], own["here"]),
            _make("Where", [own["here"], own["local"], names["zero"]], own["safe"]),
            _make("Gather", [piece.name, own["safe"]], own["rows"], axis=0),
            _make("Unsqueeze", [own["here"], names["axis"]], own["mask"]),
            _make("Where", [own["mask"], own["rows"], found], done),
        ]
        unit.types[done] = table.data_type
        found = done
        units.append(unit)
    return units


_KINDS: Final[Mapping[tuple[str, str], tuple[int, Callable[[_Split], list[Unit] | None]]]] = {
    ("", "Gemm"): (1, _gemm),
    ("", "MatMul"): (1, _matmul),
    ("", "Conv"): (1, _conv),
    ("", "Gather"): (0, _gather),
    ("com.microsoft", "FusedMatMul"): (1, _fused),
}
