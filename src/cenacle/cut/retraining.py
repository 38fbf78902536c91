"""A tail made ready to be trained on private data, and the trained tail made ready to serve.

The front comes from a public checkpoint and stays as it is, so that all that training learns
lies in the tail: eNNclave's setting (Schlögl and Böhme 2020, https://doi.org/10.1145/3411508.3421376).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cenacle.cut.cutting import Cut, Cutter
from cenacle.cut.graph_models import GraphTail, onnx_to_graph
from cenacle.cut.graph_reader import UntrainableError
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.specs import TensorSpec
from cenacle.cut.to_onnx import graph_to_onnx
from cenacle.documents.layers import Linear
from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.errors import DataError, InputError
from cenacle.training.model_file import ModelMetadata, read_model

__all__ = [
    "Head",
    "PreparedTail",
    "dense_head",
    "export_tail",
    "linear_head",
    "prepare",
    "with_fresh_head",
    "without_front",
]

Head = Literal["fresh", "kept", "linear", "dense"]
"""``fresh``: the tail with a new last layer; ``kept``: as it is; ``linear``: one linear layer;
``dense``: a hidden layer and a linear one."""


@dataclass(frozen=True)
class PreparedTail:
    """What a recipe trains, and behind which front.

    Attributes:
        cut: where the model was cut.
        head: what became of the tail.
        graph: layers and initial weights; without weights they are drawn by the recipe's seed.
    """

    cut: Cut
    head: Head
    graph: GraphTail

    @property
    def crossing(self) -> TensorSpec:
        return self.cut.crossing[0]

    def weights_file(self) -> bytes:
        """The initial weights as safetensors, to be sealed; equal weights make equal bytes."""
        tensors = self.graph.tensors
        return bytes(safetensors.numpy.save({name: tensors[name] for name in sorted(tensors)}))

    def model_fields(self, weights: str | None) -> dict[str, Any]:
        """The recipe's model.

        Args:
            weights: alias of the asset of the initial weights; None draws them by the seed.
        """
        model = GraphModel(type="graph", nodes=self.graph.nodes, initial_weights=weights)
        return model.to_fields()

    def front_fields(self, asset: str, digest: str | None = None) -> dict[str, Any]:
        """The recipe's front, sealed under an alias."""
        return {
            "asset": asset,
            "output": self.crossing.name,
            **({} if digest is None else {"digest": digest}),
        }


def prepare(
    model: OnnxModel,
    at: str,
    classes: int,
    *,
    head: Head = "fresh",
    fold_norms: bool = False,
    seed: int = 0,
) -> PreparedTail:
    """Cut a model, and make its tail a recipe's graph with so many outputs.

    Args:
        at: the last public layer.
        classes: outputs of the new tail; 1 for a regression.
        fold_norms: freeze batch normalization into the layers before it, as privacy plans need.
        seed: of a fresh layer's weights.

    Raises:
        InputError: no such layer, or a bad cut.
        UntrainableError: the tail holds a layer that recipes do not train; the nearest cut behind
            which all can be trained is named.
        DataError: several tensors cross, or the tail's last layer is not linear.
    """
    cutter = Cutter(model)
    cut = cutter.cut(at)
    if len(cut.crossing) != 1:
        raise DataError(
            f"{len(cut.crossing)} tensors cross at {at!r}, and training takes one",
            found=", ".join(spec.name for spec in cut.crossing)[:200],
            remedy=_advice(cutter, cut, fold_norms, head),
        )
    if head == "linear":
        return PreparedTail(cut, head, linear_head(cut.crossing[0], classes))
    if head == "dense":
        return PreparedTail(cut, head, dense_head(cut.crossing[0], classes))
    try:
        graph = onnx_to_graph(cut.tail, fold_norms=fold_norms)
    except UntrainableError as error:
        raise UntrainableError(
            error.what,
            found=error.found,
            expected=error.expected,
            remedy=_advice(cutter, cut, fold_norms, head),
        ) from None
    if head == "fresh":
        graph = with_fresh_head(graph, classes, seed)
    elif not isinstance(graph.nodes[-1], Linear) or graph.nodes[-1].out_features != classes:
        raise DataError(
            "the tail's outputs are not the classes of the data",
            found=f"{graph.nodes[-1].op} with other outputs",
            expected=f"{classes} outputs",
            remedy="take a fresh head",
        )
    return PreparedTail(cut, head, graph)


def _advice(cutter: Cutter, cut: Cut, fold_norms: bool, head: Head) -> str:
    """The earliest later cut that can be retrained, tried one after the other."""
    size = len(cut.front.proto.graph.node)
    fronts = {cutter.front_of(found): name for name, found in cutter.layers.members.items()}
    for front, name in sorted(fronts.items(), key=lambda item: len(item[0])):
        if len(front) <= size or cutter.fault(front) is not None:
            continue
        later = cutter.cut(name)
        if len(later.crossing) != 1:
            continue
        try:
            if head not in ("linear", "dense"):
                onnx_to_graph(later.tail, fold_norms=fold_norms)
        except DataError:
            continue
        return f"cut later: the nearest cut that can be retrained is --at {name}"
    return "no later cut of this model can be retrained as it is; take a linear head"


def with_fresh_head(tail: GraphTail, classes: int, seed: int = 0) -> GraphTail:
    """The tail with a new last layer for so many classes.

    Its weights are drawn as torch draws them, uniformly within one over the root of the inputs.

    Raises:
        DataError: the last layer is not linear.
    """
    last = tail.nodes[-1]
    if not isinstance(last, Linear):
        raise DataError(
            "the tail does not end in a linear layer, so it can get no fresh head",
            found=last.op,
            remedy="keep the head, or cut after the last convolution and take a linear head",
        )
    inputs = tail.tensors[f"{last.name}.weight"].shape[1]
    generator = np.random.Generator(np.random.Philox(key=seed))
    bound = 1 / np.sqrt(inputs)
    fresh = {"weight": (classes, inputs), "bias": (classes,)}
    tensors = dict(tail.tensors)
    for name, shape in fresh.items():
        drawn = generator.uniform(-bound, bound, shape)
        tensors[f"{last.name}.{name}"] = drawn.astype(np.float32)
    node = Linear(name=last.name, op="linear", inputs=last.inputs, out_features=classes, bias=True)
    return replace(tail, nodes=(*tail.nodes[:-1], node), tensors=tensors, softmax=False)


def linear_head(crossing: TensorSpec, classes: int, *, side: int = 1) -> GraphTail:
    """One linear layer on what crosses; images are averaged first, and tokens too.

    Args:
        side: images are averaged to ``side`` x ``side``.

    Raises:
        DataError: what crosses is no vector, list of tokens or image of float32.
    """
    shape = _plain_shape(crossing)
    nodes: list[dict[str, Any]] = []
    if len(shape) == 3:
        size = min(side, *shape[1:])
        nodes.append({"op": "adaptive_avg_pool2d", "name": "pool", "output_size": size})
        nodes.append({"op": "flatten", "name": "flat"})
    elif len(shape) == 2:
        nodes.append({"op": "mean", "name": "pool", "axis": 1})
    nodes.append({"op": "linear", "name": "head", "out_features": classes})
    return _drawn(nodes, shape, crossing)


def dense_head(
    crossing: TensorSpec, classes: int, *, hidden: int = 128, side: int = 8
) -> GraphTail:
    """A hidden layer with ReLU and a linear one, on all that crosses.

    That is eNNclave's tail: the features are public knowledge, what is made of them is not.

    Args:
        side: larger images are averaged to ``side`` x ``side``.

    Raises:
        DataError: as :func:`linear_head`.
    """
    shape = _plain_shape(crossing)
    nodes: list[dict[str, Any]] = []
    if len(shape) == 3 and min(shape[1:]) > side:
        nodes.append({"op": "adaptive_avg_pool2d", "name": "pool", "output_size": side})
    if len(shape) > 1:
        nodes.append({"op": "flatten", "name": "flat"})
    nodes += [
        {"op": "linear", "name": "hidden", "out_features": hidden},
        {"op": "relu", "name": "relu"},
        {"op": "linear", "name": "head", "out_features": classes},
    ]
    return _drawn(nodes, shape, crossing)


def _drawn(nodes: list[dict[str, Any]], shape: tuple[int, ...], crossing: TensorSpec) -> GraphTail:
    graph = GraphModel.from_fields({"type": "graph", "nodes": nodes})
    return GraphTail(graph.nodes, {}, shape, crossing.name, softmax=False)


def _plain_shape(crossing: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in crossing.shape[1:] if size is not None)
    if crossing.dtype != "F32" or len(shape) + 1 != len(crossing.shape) or len(shape) > 3:
        raise DataError(
            "a new head reads vectors, tokens or images of float32",
            found=f"{crossing.dtype} of shape {crossing.shape}",
            remedy="cut elsewhere",
        )
    return shape


def without_front(
    model: OnnxModel,
    recipe: Recipe,
    classes: int,
    *,
    head: Head,
    fold_norms: bool,
    weights: str = "whole",
) -> tuple[Recipe, Mapping[str, NDArray[Any]]]:
    """The same recipe for the model whole, from the same start: every layer is trained.

    Returns:
        The recipe, which reads its initial weights under the alias ``weights``, and the weights.

    Raises:
        UntrainableError: the model has a layer that recipes do not train.
        DataError: the model reads several tensors, or integers.
    """
    graph = onnx_to_graph(model, fold_norms=fold_norms)
    if head != "kept":
        graph = with_fresh_head(graph, classes, recipe.seed)
    fields = recipe.to_fields()
    del fields["data"]["front"]
    fields["data"]["standardize"] = False
    fields["data"]["shape"] = list(graph.shape)
    fields["model"] = GraphModel(
        type="graph", nodes=graph.nodes, initial_weights=weights
    ).to_fields()
    return Recipe.from_fields(fields), graph.tensors


def export_tail(
    model_file: bytes, *, front: OnnxModel | None = None, probabilities: bool = False
) -> OnnxModel:
    """A model that a recipe trained, as a tail that can be served.

    Its scaling of inputs is part of it. With a front, its input has the crossing tensor's name.

    Args:
        model_file: what `cenacle open` wrote.
        front: the front that it was trained behind; what it gives is compared with what the
            model reads.
        probabilities: end with a softmax, for a classification.

    Raises:
        DocumentError, DataError: not a model that cenacle trained.
        InputError: the model was trained behind a front that is not given, or behind another.
    """
    tensors, fields = read_model(model_file)
    described = ModelMetadata.from_fields(fields)
    name = "input"
    if (described.front is None) != (front is None):
        raise InputError(
            "the model was trained without a front"
            if described.front is None
            else "the model was trained behind a front, which is not given",
            remedy="leave --front out" if described.front is None else "name it by --front",
        )
    if described.front is not None and front is not None:
        name = described.front.output
        _check_front(described, front)
    if probabilities and described.classes is None:
        raise InputError("a regression gives no probabilities", remedy="leave them out")
    made = graph_to_onnx(
        described.nodes,
        tensors,
        described.preprocessing,
        input_name=name,
        output_name="output" if name != "output" else "scores",
        probabilities=probabilities,
    )
    return OnnxModel.from_proto(made)


def _check_front(described: ModelMetadata, front: OnnxModel) -> None:
    assert described.front is not None
    wanted = described.front.digest
    if wanted is not None and front.digest != wanted:
        raise InputError(
            "the model was trained behind another front",
            found=front.digest,
            expected=wanted,
            remedy="use the front.onnx that the recipe names",
        )
    shapes = {spec.name: spec.shape[1:] for spec in front.outputs}
    found = shapes.get(described.front.output)
    if found != described.preprocessing.shape:
        raise InputError(
            "the front does not give what the model reads",
            found=", ".join(f"{name} {shape}" for name, shape in shapes.items())[:200],
            expected=f"{described.front.output} {described.preprocessing.shape}",
        )
