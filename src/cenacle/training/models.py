"""The named models of a recipe, written out as graphs, so that one module runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cenacle.documents import layers
from cenacle.documents.layers import ActivationName, Node
from cenacle.documents.recipe import CnnModel, GraphModel, MlpModel, Recipe
from cenacle.errors import DataError, DocumentError
from cenacle.training._torch import torch
from cenacle.training.graph import MAX_ACTIVATIONS, Graph
from cenacle.training.randomness import secret_state, torch_generator

__all__ = ["build_model", "load_tensors", "model_nodes", "model_shape", "model_tensors"]


def model_shape(recipe: Recipe, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the model reads one sample; a cnn gets a channel axis if it lacks one."""
    if isinstance(recipe.model, CnnModel):
        if len(stored) == 2:
            return (1, *stored)
        if len(stored) != 3:
            raise DocumentError(
                "a cnn reads images",
                found=f"samples of shape {stored}",
                expected="(height, width) or (channels, height, width)",
                remedy="set data.shape",
            )
    return stored


def _outputs(recipe: Recipe) -> int:
    return 1 if recipe.data.classes is None else len(recipe.data.classes)


def model_nodes(recipe: Recipe, shape: tuple[int, ...]) -> tuple[Node, ...]:
    """The recipe's model as nodes, for samples of ``shape``."""
    model = recipe.model
    if isinstance(model, GraphModel):
        return model.nodes
    nodes: list[Node] = []
    if isinstance(model, CnnModel):
        for index, channels in enumerate(model.channels, start=1):
            nodes.append(
                layers.Conv(
                    name=f"conv{index}",
                    op="conv2d",
                    out_channels=channels,
                    kernel_size=model.kernel_size,
                    padding=model.kernel_size // 2,
                )
            )
            if model.batch_norm:
                nodes.append(layers.BatchNorm(name=f"norm{index}", op="batch_norm"))
            nodes.append(layers.Activation(name=f"activation{index}", op=model.activation))
            if model.pool > 1:
                nodes.append(
                    layers.Pool(name=f"pool{index}", op="max_pool2d", kernel_size=model.pool)
                )
    if len(shape) > 1:
        nodes.append(layers.Flatten(name="flatten", op="flatten"))
    if isinstance(model, MlpModel | CnnModel):
        nodes += _dense(model.hidden, model.activation, model.dropout)
    nodes.append(layers.Linear(name="output", op="linear", out_features=_outputs(recipe)))
    return tuple(nodes)


def _dense(widths: tuple[int, ...], activation: ActivationName, dropout: float) -> list[Node]:
    nodes: list[Node] = []
    for index, width in enumerate(widths, start=1):
        nodes.append(layers.Linear(name=f"hidden{index}", op="linear", out_features=width))
        nodes.append(layers.Activation(name=f"hidden{index}_activation", op=activation))
        if dropout > 0:
            nodes.append(layers.Dropout(name=f"hidden{index}_dropout", op="dropout", p=dropout))
    return nodes


def build_model(
    recipe: Recipe,
    shape: tuple[int, ...],
    *,
    integers: bool,
    initial: Mapping[str, NDArray[Any]] | None = None,
    secret: str | None = None,
) -> Graph:
    """A model with the recipe's initial weights, drawn by its seed (and a secret) or given.

    Raises:
        DocumentError: the model does not fit samples of ``shape`` or the task.
        DataError: the given weights are not this model's.
    """
    nodes = model_nodes(recipe, shape)
    graph = Graph(nodes, shape, integers=integers)
    if graph.output_shape != (_outputs(recipe),):
        raise DocumentError(
            "the model's output does not fit the task",
            found=f"shape {graph.output_shape} a sample",
            expected=f"({_outputs(recipe)},), one a class, or one value of a regression",
        )
    if not any(parameter.requires_grad for parameter in graph.parameters()):
        raise DocumentError("the model has nothing to train")
    if graph.activations * recipe.batch_size > MAX_ACTIVATIONS:
        raise DocumentError(
            "a batch does not fit in memory",
            found=f"{graph.activations} activations a sample, batches of {recipe.batch_size}",
            expected=f"a product <= {MAX_ACTIVATIONS}",
            remedy="lower batch_size",
        )
    if initial is None:
        generator = torch_generator(recipe.seed, "weights")
        if secret is not None:
            generator.set_state(secret_state(secret, "weights", recipe.seed))
        graph.reset(generator)
    else:
        load_tensors(graph, initial, "the initial weights")
    return graph


def model_tensors(model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Copies of a model's parameters and buffers by name."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, NDArray[Any]], what: str) -> None:
    """Put arrays into a model, which must have exactly these names and shapes.

    Raises:
        DataError: a tensor is missing, unknown, of another shape, or not finite.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise DataError(
            f"{what} are of another model",
            found=f"{len(missing)} tensors missing {missing[:4]}, {len(unknown)} unknown",
            expected=f"{len(own)} tensors of the model",
        )
    ready = {}
    for name, target in own.items():
        array = np.asarray(tensors[name])
        if array.shape != tuple(target.shape) or array.dtype.kind not in "fiu":
            raise DataError(
                f"{what} do not fit: tensor {name!r}",
                found=f"{array.dtype} of shape {array.shape}",
                expected=f"numbers of shape {tuple(target.shape)}",
            )
        ready[name] = torch.tensor(array).to(target.dtype)
        if not torch.isfinite(ready[name]).all():
            raise DataError(f"{what} hold a value that is not finite in tensor {name!r}")
    model.load_state_dict(ready)
