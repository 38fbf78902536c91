"""Layers of a graph: which node belongs to which, by the names that its exporter left.

In this order: the list of scopes that ``torch.onnx`` writes beside each node (importers of
Keras files write the same), names such as ``/layer1/layer1.0/conv1/Conv`` of older exporters,
else each node is a layer of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from onnx import NodeProto

from cenacle.cut.graph import node_metadata, subgraphs
from cenacle.cut.onnx_model import OnnxModel

__all__ = ["CLASSES", "SCOPES", "Layers"]

SCOPES: Final = "pkg.torch.onnx.name_scopes"
CLASSES: Final = "pkg.torch.onnx.class_hierarchy"

# Layers whose state passes between their nodes, or whose statistics belong to their weights.
_ATOMIC: Final = re.compile(
    r"(?:RNN|LSTM|GRU)(?:Cell|\dD)?$|(?:^|\.)(?:StackedRNNCells|Bidirectional|TimeDistributed)$"
    r"|(?:^|\.)\w*BatchNorm(?:\dd|alization)?$"
)


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes:
        members: layer name to the positions of its nodes, those of nested layers included; in
            the order in which the layers begin.
        atomic: layers that no cut may split.
        owner: the innermost layer of each node.
        inside: names that occur only inside a node (the body of a loop) to that node.
    """

    members: dict[str, tuple[int, ...]]
    atomic: frozenset[str]
    owner: tuple[str, ...]
    inside: dict[str, int]

    @classmethod
    def of(cls, model: OnnxModel) -> Layers:
        """The layers of a model."""
        members: dict[str, list[int]] = {}
        atomic: set[str] = set()
        owner: list[str] = []
        inside: dict[str, int] = {}
        nodes = model.index.nodes
        taken = {path for node in nodes for path, _ in _scopes(node)}
        for i, node in enumerate(nodes):
            scopes = _scopes(node)
            if not scopes:
                own = _own_name(node)
                scopes = [(own if own not in taken else f"{own}/{i}", "")]
            for path, kind in scopes:
                members.setdefault(path, []).append(i)
                if _ATOMIC.search(kind):
                    atomic.add(path)
            owner.append(scopes[-1][0])
            for name in _inner_names(node):
                inside.setdefault(name, i)
        for name in [name for name in inside if name in members]:
            del inside[name]
        return cls(
            {name: tuple(found) for name, found in members.items()},
            frozenset(atomic),
            tuple(owner),
            inside,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All layers, in the order in which they begin."""
        return tuple(self.members)


def _scopes(node: NodeProto) -> list[tuple[str, str]]:
    """Path and class of the layers around a node, from the outermost; the model itself is none."""
    scopes = node_metadata(node, SCOPES)
    if scopes:
        classes = node_metadata(node, CLASSES)
        if len(classes) != len(scopes):
            classes = ("",) * len(scopes)
        # The first is the model, the last the operation.
        found = list(zip(scopes, classes, strict=True))[:-1]
        return [(path, kind) for path, kind in found if path]
    parts: list[str] = []
    paths: list[tuple[str, str]] = []
    for part in [part for part in node.name.split("/") if part][:-1]:
        # TorchScript repeats a container's name in the names of its members.
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
        paths.append((".".join(parts), ""))
    return paths


def _own_name(node: NodeProto) -> str:
    operation = node_metadata(node, SCOPES)
    if operation and operation[-1]:
        return operation[-1]
    last = node.name.rstrip("/").rsplit("/", 1)[-1]
    return last or next((name for name in node.output if name), node.op_type)


def _inner_names(node: NodeProto) -> Iterator[str]:
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from (path for path, _ in _scopes(inner))
            yield _own_name(inner)
            yield from _inner_names(inner)
