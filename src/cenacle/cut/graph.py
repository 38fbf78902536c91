"""A model's graph as numbers: which node reads what, which weights belong to which node."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from cenacle.cut.onnx_tensors import tensor_bytes

__all__ = ["GraphIndex", "Weight", "captured_names", "node_metadata", "subgraphs"]

_SMALL_TYPES: Final = {
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.BOOL,
}
_MOST_CONSTANTS: Final = 4096
_SCALES: Final = {"Resize": (1, 2, 3), "Upsample": (1,)}  # inputs that say sizes, not weights


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node: branches of ``If``, bodies of ``Loop`` and ``Scan``."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured_names(graph: GraphProto) -> list[str]:
    """Names of the surrounding graph that a graph inside a node reads, each once, in order."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        names = [*node.input, *(n for inner in subgraphs(node) for n in captured_names(inner))]
        found.update(dict.fromkeys(name for name in names if name and name not in own))
        own.update(node.output)
    found.update(dict.fromkeys(v.name for v in graph.output if v.name not in own))
    return list(found)


def node_metadata(node: NodeProto, key: str) -> tuple[str, ...]:
    """A list of texts that an exporter wrote beside a node; empty if there is none."""
    for entry in node.metadata_props:
        if entry.key == key:
            try:
                value = ast.literal_eval(entry.value) if len(entry.value) < 10_000 else ()
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return ()
            texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
            return tuple(value) if texts else ()
    return ()


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor stored in the model.

    Attributes:
        parameter: whether it was learned, as far as a graph tells: numbers with a fraction, or of
            8 bits and less (quantized), with more than one element, which are not the sizes of a
            ``Resize``; of other types only what is too large to say shapes, axes or indices.
    """

    name: str
    elements: int
    size: int
    parameter: bool
    readers: tuple[int, ...]


@dataclass(frozen=True)
class GraphIndex:
    """Nodes by their position in the graph, which is topological.

    Attributes:
        reads: what each node reads, by name, each once: its inputs, and what graphs inside it
            take from the surrounding graph.
        producer: which node makes a tensor.
        readers: which nodes read a tensor.
        weights: stored tensors by name, those of graphs inside nodes too.
        predecessors: nodes whose outputs a node reads.
    """

    nodes: list[NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: list[tuple[str, ...]]
    producer: dict[str, int]
    readers: dict[str, list[int]]
    weights: dict[str, Weight]
    predecessors: list[tuple[int, ...]]
    initializers: frozenset[str] = field(default=frozenset())

    @classmethod
    def of(cls, model: ModelProto) -> GraphIndex:
        """The index of a model whose nodes stand in topological order."""
        graph = model.graph
        nodes = list(graph.node)
        producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
        reads: list[tuple[str, ...]] = []
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            inner = [n for body in subgraphs(node) for n in captured_names(body)]
            names = tuple(dict.fromkeys(n for n in [*node.input, *inner] if n))
            reads.append(names)
            for name in names:
                readers.setdefault(name, []).append(i)
        weights = {w.name: w for w in _weights(graph, nodes, readers)}
        for i, node in enumerate(nodes):
            for body in subgraphs(node):
                for weight in _inner_weights(body, i):
                    name = weight.name
                    while name in weights:
                        name += "'"
                    weights[name] = Weight(
                        name, weight.elements, weight.size, weight.parameter, (i,)
                    )
        return cls(
            nodes,
            tuple(value.name for value in graph.input),
            tuple(value.name for value in graph.output),
            reads,
            producer,
            readers,
            weights,
            [tuple(sorted({producer[n] for n in names if n in producer})) for names in reads],
            frozenset(tensor.name for tensor in graph.initializer),
        )

    def ancestors(self, nodes: Iterable[int]) -> set[int]:
        """The nodes that the given ones depend on, themselves included."""
        found, left = set(nodes), list(nodes)
        while left:
            for before in self.predecessors[left.pop()]:
                if before not in found:
                    found.add(before)
                    left.append(before)
        return found

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the stored tensors that were learned, in the graph's order."""
        return tuple(name for name, weight in self.weights.items() if weight.parameter)


def _weights(
    graph: GraphProto, nodes: list[NodeProto], readers: dict[str, list[int]]
) -> Iterator[Weight]:
    for tensor in graph.initializer:
        by = tuple(readers.get(tensor.name, ()))
        sizes = by and all(_only_sizes(nodes[i], tensor.name) for i in by)
        yield _weight(tensor, by, sizes=bool(sizes))


def _weight(tensor: TensorProto, readers: tuple[int, ...], *, sizes: bool = False) -> Weight:
    elements = 1
    for size in tensor.dims:
        elements *= size
    least = _MOST_CONSTANTS if tensor.data_type in _SMALL_TYPES else 1
    learned = elements > least and not sizes
    return Weight(tensor.name, elements, tensor_bytes(tensor), learned, readers)


def _only_sizes(node: NodeProto, name: str) -> bool:
    slots = _SCALES.get(node.op_type, ())
    return all(i in slots for i, read in enumerate(node.input) if read == name) and bool(slots)


def _inner_weights(graph: GraphProto, reader: int) -> Iterator[Weight]:
    for tensor in graph.initializer:
        yield _weight(tensor, (reader,))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                found = _weight(attribute.t, (reader,))
                yield Weight(
                    node.output[0], found.elements, found.size, found.parameter, found.readers
                )
        for inner in subgraphs(node):
            yield from _inner_weights(inner, reader)
