"""A tail trained here, without an enclave, as a recipe would train it there.

For rehearsal on data of one's own: which cut, which head, how many epochs, and what a frozen
front costs beside the same model trained whole. Nothing here protects anybody's data.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.front_runner import OnnxFront
from cenacle.cut.graph_reader import UntrainableError
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.retraining import PreparedTail, without_front
from cenacle.documents.privacy import PrivacyPlan
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError, InputError
from cenacle.training import MemoryTensors, Privacy, load_model, predict, train, write_model

__all__ = ["Rehearsal", "Whole", "rehearse_tail"]

_HELD: Final = 0.25

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Whole:
    """The model trained whole from the same start, on the same rows.

    Attributes:
        accuracy: on the rows that the tail was measured on; None if it cannot be trained so.
        why_not: what a recipe does not train.
    """

    accuracy: float | None
    seconds: float
    why_not: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    """A tail trained here.

    Attributes:
        accuracy: on held-out rows.
        rows: (training, held out).
        model_file: as `cenacle open` would have written it.
    """

    accuracy: float
    rows: tuple[int, int]
    seconds: float
    model_file: bytes
    whole: Whole | None


def rehearse_tail(
    prepared: PreparedTail,
    recipe: Recipe,
    tensors: Tensors,
    *,
    plan: PrivacyPlan | None = None,
    whole: OnnxModel | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Rehearsal:
    """Train the recipe's tail on these samples.

    A quarter of the rows, drawn by the recipe's seed, is held out and measured on afterwards, so
    that a privacy plan has no metrics to pay for.

    Args:
        recipe: with a front; its holdout is not used.
        tensors: samples and labels by name.
        plan: with a noise multiplier; noise is drawn from a fresh secret.
        whole: the uncut model, to compare with: all its layers are trained by the same recipe,
            without a plan.

    Raises:
        DataError: the samples do not fit.
        InputError: too few rows.
        EnclaveError: training diverged.
    """
    use = recipe.front
    if use is None:
        raise InputError("the recipe has no front, so there is no tail to rehearse")
    learnt, held = _divided(tensors, recipe)
    fields = recipe.to_fields() | {"holdout": {"fraction": 0.0, "stratified": False}}
    fields["data"]["assets"] = ["data"]
    here = Recipe.from_fields(fields)
    sources = {"data": MemoryTensors(dict(learnt))}
    model = here.to_fields()["model"]
    if (alias := model.get("initial_weights")) is not None:
        sources[alias] = MemoryTensors(prepared.graph.tensors)
    front = OnnxFront(prepared.cut.front)
    started = time.monotonic()
    result = train(
        here,
        sources,
        front=front,
        progress=progress,
        privacy=None if plan is None else Privacy(plan, secrets.token_bytes(32)),
    )
    seconds = time.monotonic() - started
    accuracy = _accuracy(result.model_tensors, result.metadata, held, here, front)
    compared = None
    if whole is not None:
        compared = _whole(whole, here, prepared, learnt, held, progress)
    rows = len(learnt[_labels(here)]), len(held[_labels(here)])
    file = write_model(result.model_tensors, result.metadata)
    return Rehearsal(accuracy, rows, seconds, file, compared)


def _labels(recipe: Recipe) -> str:
    assert recipe.data.form == "tensors"
    return recipe.data.labels


def _inputs(recipe: Recipe) -> str:
    assert recipe.data.form == "tensors"
    return recipe.data.inputs


def _divided(tensors: Tensors, recipe: Recipe) -> tuple[Tensors, Tensors]:
    read = [_inputs(recipe), _labels(recipe)]
    read += list((recipe.front.inputs or {}).values()) if recipe.front else []
    for name in read:
        if name not in tensors:
            raise InputError(
                f"the data has no tensor {name!r}",
                found=", ".join(sorted(tensors))[:200],
                remedy="name the tensors of samples and labels",
            )
    rows = len(tensors[read[1]])
    if rows < 8 or any(len(tensors[name]) != rows for name in read):
        raise InputError(
            "the data has too few rows, or its tensors differ in their number",
            found=", ".join(f"{name}: {len(tensors[name])}" for name in read),
            expected="8 rows or more, the same in each tensor",
        )
    order = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(rows)
    held = np.sort(order[: int(rows * _HELD)])
    learnt = np.sort(order[int(rows * _HELD) :])
    return {n: tensors[n][learnt] for n in read}, {n: tensors[n][held] for n in read}


def _accuracy(
    tensors: Tensors,
    metadata: Mapping[str, Any],
    held: Tensors,
    recipe: Recipe,
    front: OnnxFront | None,
) -> float:
    model = load_model(tensors, metadata)
    inputs: Any = dict(held) if front is not None else held[_inputs(recipe)]
    found = predict(model, metadata, inputs, front=front)
    return float(np.mean(np.array(found.labels) == held[_labels(recipe)]))


def _whole(
    model: OnnxModel,
    recipe: Recipe,
    prepared: PreparedTail,
    learnt: Tensors,
    held: Tensors,
    progress: Callable[[int, int], None],
) -> Whole:
    classes = len(recipe.data.classes or ())
    started = time.monotonic()
    # A tail without batch normalization of its own leaves the front's statistics as they are, so
    # the whole model is compared with its statistics frozen, too.
    frozen = all(node.op != "batch_norm" for node in prepared.graph.nodes)
    try:
        try:
            same, weights = _same_recipe(model, recipe, classes, prepared, frozen)
        except UntrainableError:
            if not frozen:
                raise
            same, weights = _same_recipe(model, recipe, classes, prepared, False)
    except DataError as error:
        return Whole(None, 0.0, f"{error.what}: {error.found}")
    sources = {"data": MemoryTensors(dict(learnt)), "whole": MemoryTensors(weights)}
    result = train(same, sources, progress=progress)
    accuracy = _accuracy(result.model_tensors, result.metadata, held, same, None)
    return Whole(accuracy, time.monotonic() - started)


def _same_recipe(
    model: OnnxModel, recipe: Recipe, classes: int, prepared: PreparedTail, fold_norms: bool
) -> tuple[Recipe, Tensors]:
    return without_front(model, recipe, classes, head=prepared.head, fold_norms=fold_norms)
