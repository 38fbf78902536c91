"""An ONNX graph while it is read as layers of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cenacle.cut.graph import node_metadata
from cenacle.errors import DataError

__all__ = ["Reader", "UntrainableError", "attributes"]

_SCOPES: Final = "pkg.torch.onnx.name_scopes"

Shape = tuple[int, ...]


class UntrainableError(DataError):
    """A layer that recipes do not train."""


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name; texts are bytes."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@dataclass
class Reader:
    """An ONNX graph while it is read.

    Attributes:
        constants: values that are known without a sample.
        names: of the recipe's node that gives a tensor; ``input`` for what crosses.
        done: positions of ONNX nodes that an earlier node took along.
        fields: the recipe's nodes, as JSON values.
        fold_norms: batch normalization becomes part of the layer before it.
    """

    graph: onnx.GraphProto
    shapes: dict[str, Shape]
    constants: dict[str, NDArray[Any]]
    names: dict[str, str]
    fold_norms: bool
    readers: dict[str, list[int]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    fields: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    softmax: bool = False

    def __post_init__(self) -> None:
        for position, node in enumerate(self.graph.node):
            # Of these, types and sizes are read, and no numbers.
            aside = node.input if node.op_type == "Shape" else node.input[1:]
            silent = set(aside) if node.op_type in ("Shape", "CastLike") else set()
            for name in set(node.input) - silent:
                self.readers.setdefault(name, []).append(position)

    # --- looking ---------------------------------------------------------------------------

    def shape(self, node: onnx.NodeProto, name: str) -> Shape:
        """Of one sample of a tensor."""
        found = self.shapes.get(name)
        if found is None:
            raise self.refusal(node, "the shape of a sample is not known")
        return found

    def only_reader(self, name: str, op: str | None = None) -> int | None:
        """The one node that reads a tensor, if there is one and it is of that kind."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or any(value.name == name for value in self.graph.output):
            return None
        return readers[0] if op is None or self.graph.node[readers[0]].op_type == op else None

    def constant(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """An input that is known; None if it is left out, or depends on the sample."""
        if index >= len(node.input) or not node.input[index]:
            return None
        return self.constants.get(node.input[index])

    def weight(self, node: onnx.NodeProto, index: int, rank: int | None = None) -> NDArray[Any]:
        """A learned input.

        Raises:
            UntrainableError: it depends on the sample, is no float32, or another layer has it.
        """
        value = self.constant(node, index)
        if value is None or value.dtype != np.float32 or rank not in (None, value.ndim):
            raise self.refusal(node, "its weights are not float32 numbers of the model")
        return value

    def refusal(self, node: onnx.NodeProto, why: str | None = None) -> UntrainableError:
        return UntrainableError(
            f"layer {_layer(node)!r} cannot be retrained by a recipe",
            found=str(node.op_type)[:60] + (f": {why}" if why else ""),
            expected="layers of the recipe's list (docs/recipes.md)",
            remedy="cut after this layer, so that it stays in the public front",
        )

    # --- writing ---------------------------------------------------------------------------

    def emit(
        self,
        node: onnx.NodeProto,
        op: str,
        output: str,
        *,
        inputs: list[str] | None = None,
        weights: Mapping[str, NDArray[Any]] | None = None,
        weight_name: str = "",
        **parameters: Any,
    ) -> None:
        """Add a node of the recipe that reads ONNX tensors ``inputs`` (the node's first one)."""
        read = [node.input[0]] if inputs is None else inputs
        for name in read:
            if name not in self.names:
                raise self.refusal(node, "it reads a constant where a sample is expected")
        name = self._fresh(node, weight_name, op)
        if weight_name and weights:
            if weight_name in self.used:
                raise self.refusal(node, f"it shares weights with {self.used[weight_name]!r}")
            self.used[weight_name] = _layer(node)
        self.fields.append(
            {"op": op, "name": name, "inputs": [self.names[n] for n in read], **parameters}
        )
        for part, array in (weights or {}).items():
            self.tensors[f"{name}.{part}"] = np.asarray(array, order="C")
        self.names[output] = name

    def alias(self, node: onnx.NodeProto, output: str | None = None) -> None:
        """The node changes nothing."""
        self.names[output or node.output[0]] = self.names[node.input[0]]

    def _fresh(self, node: onnx.NodeProto, weight: str, op: str) -> str:
        base = weight.rpartition(".")[0] or _layer(node)
        parts = ["".join(c if c.isascii() and c.isalnum() else "_" for c in p) or "_"
                 for p in base.split(".")]  # fmt: skip
        if not (parts[0][0].isalpha() or parts[0][0] == "_"):
            parts[0] = f"_{parts[0]}"
        wanted = ".".join(parts)[:100]
        taken = {entry["name"] for entry in self.fields} | {"input"}
        scopes = {name[:i] for name in taken for i, c in enumerate(name) if c == "."}
        inside = {wanted[:i] for i, c in enumerate(wanted) if c == "."}
        if wanted in taken | scopes or inside & taken:
            wanted, number = f"n{len(self.fields)}_{op}", 0
            while wanted in taken | scopes:
                number += 1
                wanted = f"n{len(self.fields)}_{op}_{number}"
        return wanted


def _layer(node: onnx.NodeProto) -> str:
    scopes = [scope for scope in node_metadata(node, _SCOPES) if scope]
    if not scopes:
        return str(node.name or node.output[0])[:120]
    return (scopes[-2] if len(scopes) > 1 else scopes[-1])[:120]
