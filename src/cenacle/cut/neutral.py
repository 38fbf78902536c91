"""Nodes that belong to no part, and what crosses between two parts.

A node is *neutral* if its result follows from sizes and constants alone: ``Shape``, ``Size``, and
all that is computed from their results and from stored constants, but from no learned weight.
Exporters place such nodes anywhere; a reshape in the last layer often asks for the batch size of
the model's input. If they counted as nodes like others, the input itself, or a number that cannot
be batched, would cross. So each part computes for itself what it needs of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from onnx import NodeProto, TensorProto, helper

from cenacle.cut.graph import GraphIndex, subgraphs
from cenacle.cut.shapes import Sizes

__all__ = ["Neutral", "Plan", "Replacement"]

_ROOTS: Final = {"Shape", "Size"}
_RANDOM: Final = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_LAYOUT: Final = {
    *("Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}


@dataclass(frozen=True)
class Replacement:
    """What stands for a ``Shape`` node where the tensor that it reads is not at hand."""

    nodes: tuple[NodeProto, ...]
    constants: tuple[TensorProto, ...]


@dataclass(frozen=True)
class Plan:
    """A cut, before its parts are built.

    Attributes:
        crossing: tensors that the tail reads of the front, in the order in which they are made;
            inputs of the model first.
        front, tail: positions of the nodes of each part, neutral ones included.
        added: what takes the place of a neutral node in the tail, by its position.
    """

    crossing: tuple[str, ...]
    front: tuple[int, ...]
    tail: tuple[int, ...]
    added: Mapping[int, Replacement] = field(default_factory=dict)


class Neutral:
    """The neutral nodes of a graph.

    Attributes:
        nodes: their positions.
        dependent: names of tensors that depend on the values of the model's inputs.
        forms: tensors that are a learned weight in another form (transposed, dequantized), with
            the weight's name.
    """

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        found: set[int] = set()
        results: set[str] = set()
        dependent: set[str] = set(index.inputs)
        weightless: set[str] = set(index.inputs)
        constants = {n for n in index.initializers if not index.weights[n].parameter}
        for i, node in enumerate(index.nodes):
            plain = not node.domain and node.op_type not in _RANDOM and not any(subgraphs(node))
            if plain and (
                node.op_type in _ROOTS
                or all(name in constants or name in results for name in index.reads[i])
            ):
                found.add(i)
                results.update(node.output)
                weightless.update(node.output)
                continue
            if any(name in dependent for name in index.reads[i]):
                dependent.update(node.output)
            if plain and all(n in constants or n in weightless for n in index.reads[i]):
                weightless.update(node.output)
        self.nodes = frozenset(found)
        self.dependent = frozenset(dependent)
        self._weightless = frozenset(weightless & dependent)
        self.forms = _forms(index)

    def plan(self, front: frozenset[int], sizes: Sizes) -> Plan:
        """What crosses if ``front`` (closed under predecessors, no neutral nodes) is cut off."""
        index = self._index
        tail = [i for i in range(len(index.nodes)) if i not in front and i not in self.nodes]
        outside = {*index.inputs, *(name for i in front for name in index.nodes[i].output if name)}
        crossing = self._wanted(tail) & outside
        again = self._cheaper(crossing, sizes)
        if again:
            tail = sorted({*tail, *again})
            made = {name for i in again for name in index.nodes[i].output if name}
            crossing = (self._wanted(tail) & outside) - made
            outside -= made
        copied: set[int] = set()
        added: dict[int, Replacement] = {}
        for i in sorted(self._needed(self._wanted(tail))):
            node = index.nodes[i]
            # Of neutral nodes only Shape and Size read what is not neutral itself.
            if any(name in outside and name not in crossing for name in index.reads[i]):
                replacement = self._replace(node, sorted(crossing), sizes)
                if replacement is None:
                    crossing.update(name for name in node.output if name)
                    continue
                added[i] = replacement
            copied.add(i)
        needed = {name for i in front for name in index.reads[i]} | crossing
        order = {name: k for k, name in enumerate(index.inputs)}
        base = len(order)
        ranked = sorted(
            crossing,
            key=lambda name: (
                order.get(name, base + index.producer.get(name, 0)),
                name,
            ),
        )
        return Plan(
            tuple(ranked),
            tuple(sorted(front | self._needed(needed))),
            tuple(sorted({*tail, *copied})),
            added,
        )

    def _wanted(self, nodes: Iterable[int]) -> set[str]:
        return {name for i in nodes for name in self._index.reads[i]} | set(self._index.outputs)

    def _cheaper(self, crossing: set[str], sizes: Sizes) -> set[int]:
        """Nodes that the tail had better compute again from the model's inputs.

        A mask of attention that is made once of the lengths of texts is larger than they are. So
        what follows from inputs of the model through no weight is computed again, if these
        inputs are smaller. Never for all that crosses: the front would do nothing then.
        """
        index = self._index
        plain = {n for n in crossing if n in index.producer and n in self._weightless}
        if not plain or not any(n in index.producer for n in crossing - plain):
            return set()
        found: set[int] = set()
        present = crossing & set(index.inputs)
        for name in sorted(plain):
            cone = self._cone(index.producer[name])
            sources = {n for i in cone for n in index.reads[i] if n in index.inputs} - present
            cost = [sizes.size(source) for source in sources]
            gain = sizes.size(name)
            known = [size for size in cost if size is not None]
            if gain is not None and len(known) == len(cost) and sum(known) < gain:
                found |= cone
                present |= sources
        return found

    def _cone(self, node: int) -> set[int]:
        """What a node depends on, but through neutral nodes: these need sizes, not values."""
        found, left = {node}, [node]
        while left:
            before = set(self._index.predecessors[left.pop()]) - self.nodes - found
            found |= before
            left += before
        return found

    def _needed(self, names: Iterable[str]) -> set[int]:
        """The neutral nodes that compute some tensors, through neutral nodes alone."""
        index = self._index
        found: set[int] = set()
        left = [index.producer[name] for name in names if name in index.producer]
        while left:
            i = left.pop()
            if i in self.nodes and i not in found:
                found.add(i)
                left += index.predecessors[i]
        return found

    def _replace(self, node: NodeProto, crossing: list[str], sizes: Sizes) -> Replacement | None:
        """The same sizes, read from constants and from tensors that cross."""
        axes = sizes.axes(node.input[0])
        if axes is None or node.op_type != "Shape":
            return None
        limits = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wanted = axes[limits.get("start", 0) : limits.get("end", len(axes))]
        output = node.output[0]
        constants: list[TensorProto] = []
        nodes: list[NodeProto] = []
        parts: list[str] = []

        def constant(name: str, values: list[int]) -> str:
            constants.append(
                helper.make_tensor(
                    name, TensorProto.INT64, [len(values)], _little(values), raw=True
                )
            )
            return name

        if all(isinstance(axis, int) for axis in wanted):
            constant(output, [axis for axis in wanted if isinstance(axis, int)])
            return Replacement((), tuple(constants))
        for k, axis in enumerate(wanted):
            name = f"{output}/axis{k}"
            if isinstance(axis, int):
                parts.append(constant(name, [axis]))
                continue
            source = self._source(axis, crossing, sizes)
            if source is None:
                return None
            tensor, place = source
            where = constant(f"{name}/index", [place])
            nodes += [
                helper.make_node("Shape", [tensor], [f"{name}/shape"], f"{name}/shape"),
                helper.make_node("Gather", [f"{name}/shape", where], [name], name),
            ]
            parts.append(name)
        nodes.append(helper.make_node("Concat", parts, [output], node.name or output, axis=0))
        return Replacement(tuple(nodes), tuple(constants))

    @staticmethod
    def _source(axis: str | None, crossing: list[str], sizes: Sizes) -> tuple[str, int] | None:
        for name in crossing:
            found = sizes.axes(name) or ()
            if axis is not None and axis in found:
                return name, found.index(axis)
        return None


def _little(values: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)


def _forms(index: GraphIndex) -> dict[str, str]:
    found = {name: name for name in index.parameters}
    for node in index.nodes:
        if node.op_type in _LAYOUT and not node.domain and node.input[0] in found:
            found.update(dict.fromkeys(node.output, found[node.input[0]]))
    return found
