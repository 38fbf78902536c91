"""A tail in ONNX becomes the graph of a recipe: layers that may be trained, and their weights.

Only layers that recipes allow are taken, and what comes out is compared with ONNX Runtime on
random samples before anybody trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cenacle.cut import plain_layers, weighted_layers
from cenacle.cut.graph_reader import Reader
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.onnx_runtime import Session
from cenacle.cut.shapes import infer_sizes
from cenacle.documents.layers import Node
from cenacle.documents.recipe import GraphModel
from cenacle.errors import DataError
from cenacle.training.graph import Graph

__all__ = ["GraphTail", "onnx_to_graph"]

_TOLERANCE: Final = 1e-4
_MAX_FOLDED: Final = 50_000_000
_HANDLERS: Final = {**plain_layers.HANDLERS, **weighted_layers.HANDLERS}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GraphTail:
    """A tail as a recipe trains it.

    Attributes:
        nodes: the layers; the last one gives the outputs.
        tensors: initial weights, named after the nodes.
        shape: of one sample that crosses.
        input: name of the tensor that crosses.
        softmax: whether a softmax stood behind the last layer. Training has its own.
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, NDArray[Any]]
    shape: Shape
    input: str
    softmax: bool

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(array.size for array in self.tensors.values())


def onnx_to_graph(tail: OnnxModel, *, fold_norms: bool = False) -> GraphTail:
    """The tail's layers and weights as a recipe has them.

    Args:
        tail: with one input of float32 and one output (batch, outputs).
        fold_norms: make batch normalization part of the convolution or linear layer before it,
            as a privacy plan needs. Its statistics then stay as they are.

    Raises:
        UntrainableError: a layer that recipes do not train, by name.
        DataError: several tensors cross, the tail does not read float32, or what the recipe's
            graph computes differs from the tail.
    """
    if len(tail.inputs) != 1 or len(tail.outputs) != 1:
        raise DataError(
            "a tail that is retrained reads one tensor and gives one",
            found=f"{len(tail.inputs)} inputs and {len(tail.outputs)} outputs",
            remedy="cut where one tensor crosses; `cenacle cut MODEL --suggest` lists such layers",
        )
    (entry,) = tail.inputs
    if entry.dtype != "F32" or not entry.batched or None in entry.shape[1:]:
        raise DataError(
            "a tail that is retrained reads samples of float32 numbers",
            found=f"{entry.dtype} of shape {entry.shape}",
            expected="F32, with the batch along the first axis and fixed sizes",
            remedy="cut after the embeddings",
        )
    reader = _read(tail, entry.name, fold_norms)
    output = tail.outputs[0].name
    last = reader.fields[-1]["name"] if reader.fields else None
    if reader.names.get(output) != last or last is None:
        raise DataError("the tail's output is not what its last layer gives")
    nodes = GraphModel.from_fields({"type": "graph", "nodes": reader.fields}).nodes
    shape = tuple(size for size in entry.shape[1:] if size is not None)
    found = GraphTail(nodes, reader.tensors, shape, entry.name, reader.softmax)
    _compare(tail, found)
    return found


def _read(tail: OnnxModel, entry: str, fold_norms: bool) -> Reader:
    shapes = {name: shape[1:] for name, shape in infer_sizes(tail.proto).row.items() if shape}
    constants = {t.name: numpy_helper.to_array(t) for t in tail.proto.graph.initializer}
    reader = Reader(tail.proto.graph, shapes, constants, {entry: "input"}, fold_norms)
    for position, node in enumerate(tail.proto.graph.node):
        if position in reader.done:
            continue
        if node.op_type != "Shape" and all(n in reader.constants for n in node.input if n):
            _fold(reader, node, tail.proto)
            continue
        if node.op_type == "CastLike" and node.input[0] in reader.constants:
            reader.constants[node.output[0]] = reader.constants[node.input[0]]
            continue
        handler = _HANDLERS.get(node.op_type)
        if node.domain or handler is None:
            if not any(reader.readers.get(name) for name in node.output):
                continue
            if node.op_type == "Shape":
                continue  # whoever needs it refuses
            raise reader.refusal(node)
        handler(reader, node)
    return reader


def _fold(reader: Reader, node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Compute what depends on constants alone."""
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import

    if sum(reader.constants[n].size for n in node.input if n) > _MAX_FOLDED:
        raise reader.refusal(node, "too large a constant")
    try:
        made = helper.make_model(
            helper.make_graph(
                [node],
                "constant",
                [
                    helper.make_tensor_value_info(
                        name,
                        helper.np_dtype_to_tensor_dtype(reader.constants[name].dtype),
                        reader.constants[name].shape,
                    )
                    for name in dict.fromkeys(node.input)
                    if name
                ],
                [onnx.ValueInfoProto(name=name) for name in node.output],
            ),
            opset_imports=list(model.opset_import),
        )
        values = ReferenceEvaluator(made).run(
            None, {name: reader.constants[name] for name in node.input if name}
        )
    except Exception as error:  # whatever the reference raises of a malformed node
        raise reader.refusal(node, "a constant that cannot be computed") from error
    for name, value in zip(node.output, values, strict=True):
        reader.constants[name] = np.asarray(value)


def _compare(tail: OnnxModel, found: GraphTail) -> None:
    """Refuse a graph that computes something else than the tail."""
    from cenacle.training._torch import torch  # noqa: PLC0415 - heavy
    from cenacle.training.models import load_tensors  # noqa: PLC0415 - torch

    graph = Graph(found.nodes, found.shape)
    load_tensors(graph, found.tensors, "the tail's weights")
    graph.eval()
    generator = np.random.Generator(np.random.Philox(key=11))
    samples = generator.standard_normal((3, *found.shape)).astype(np.float32)
    with torch.no_grad():
        ours = graph(torch.from_numpy(samples)).numpy()
    session = Session(tail.to_bytes())
    (theirs,) = session.run({found.input: samples}, [tail.outputs[0].name])
    if found.softmax:
        powers = np.exp(ours - ours.max(axis=-1, keepdims=True))
        ours = powers / powers.sum(axis=-1, keepdims=True)
    if ours.shape != theirs.shape:
        raise DataError(
            "the tail's layers do not give what the tail gives",
            found=f"shape {ours.shape}",
            expected=f"{theirs.shape}",
        )
    size = float(np.abs(theirs).max(initial=0.0))
    apart = float(np.abs(ours - theirs).max(initial=0.0))
    if not apart <= _TOLERANCE * max(size, 1e-6):
        raise DataError(
            "the tail's layers compute something else than the tail",
            found=f"a difference of {apart:.2g} among outputs of {size:.2g}",
            remedy="cut later, or report the layer that is read wrongly",
        )
