"""How a recipe's models are trained and measured: the ordinary way, and what any way must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError
from cenacle.training._torch import torch
from cenacle.training.data import Dataset
from cenacle.training.graph import Graph
from cenacle.training.inference import class_probabilities
from cenacle.training.loop import Loop, Rows
from cenacle.training.metrics import classification_metrics, regression_metrics
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.randomness import numpy_generator
from cenacle.training.split import choose, strata_of
from cenacle.training.trainer import Batches, Trainer

if TYPE_CHECKING:
    from cenacle.documents.privacy import PrivacyEvent

__all__ = ["Chosen", "Method", "OrdinaryMethod", "Stage"]

Chosen = tuple[NDArray[np.int64], ...]
"""Row numbers by party, ascending."""


@dataclass(frozen=True)
class Stage:
    """One model to train: on all parties (alias None) or on one."""

    number: int
    alias: str | None
    training: Chosen
    steps: int


class Method(Protocol):
    """A way to train and measure the models of one job.

    Attributes:
        dataset: the rows that it uses.
        mark: what its checkpoints carry, so that no other method goes on from them.
    """

    dataset: Dataset
    mark: str | None

    def divide(self, training: Chosen) -> tuple[Chosen, Chosen | None]:
        """Of the training rows of one model, those it learns from, and those that it watches."""

    def steps(self, rows: int) -> int:
        """Steps in all of a model that learns from so many rows."""

    def loop(
        self, stage: Stage, model: Graph, learnt: Chosen, rows: Rows, watched: Rows | None
    ) -> Loop:
        """What trains ``model`` on ``rows``, which are those numbered ``learnt``."""

    def measure(
        self,
        stage: Stage,
        loop: Loop,
        preprocessing: Preprocessing,
        inputs: NDArray[Any],
        targets: NDArray[Any],
    ) -> dict[str, Any]:
        """JSON values: ``metrics``, and whatever else :meth:`events` needs of the stage."""

    def events(self, results: Sequence[Mapping[str, Any]]) -> tuple[PrivacyEvent, ...]:
        """What all stages cost the records, from what :meth:`measure` said of each."""


class OrdinaryMethod:
    """Epochs over shuffled rows, exact metrics, no bound on what they tell."""

    mark: str | None = None

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe = recipe
        self.dataset = dataset

    def divide(self, training: Chosen) -> tuple[Chosen, Chosen | None]:
        """Early stopping takes its validation rows, the same for pooled and alone.

        Raises:
            DataError: there are none.
        """
        plan = self.recipe.early_stopping
        if plan is None:
            return training, None
        held = []
        for party, chosen in zip(self.dataset.parties, training, strict=True):
            generator = numpy_generator(self.recipe.seed, "validation", party.alias)
            if len(chosen) == 0:
                held.append(chosen)
                continue
            strata = strata_of(self.recipe, party.targets[chosen])
            held.append(chosen[choose(strata, plan.validation_fraction, generator)])
        if any(len(rows) for rows in training) and not any(len(rows) for rows in held):
            raise DataError(
                "early stopping has no validation rows",
                found=f"{sum(len(rows) for rows in training)} training rows",
                remedy="raise early_stopping.validation_fraction or bring more rows",
            )
        learnt = tuple(
            np.setdiff1d(rows, out, assume_unique=True)
            for rows, out in zip(training, held, strict=True)
        )
        return learnt, tuple(held)

    def steps(self, rows: int) -> int:
        return len(Batches(rows, self.recipe.batch_size).bounds) * self.recipe.epochs

    def loop(
        self,
        stage: Stage,  # noqa: ARG002 - every stage is trained alike
        model: Graph,
        learnt: Chosen,  # noqa: ARG002
        rows: Rows,
        watched: Rows | None,
    ) -> Loop:
        if len(rows) == 1 and any(node.op == "batch_norm" for node in model.nodes):
            raise DataError("batch normalization cannot train on a single row")
        return Trainer(self.recipe, model, rows, watched)

    def measure(
        self,
        stage: Stage,  # noqa: ARG002
        loop: Loop,
        preprocessing: Preprocessing,
        inputs: NDArray[Any],
        targets: NDArray[Any],
    ) -> dict[str, Any]:
        assert isinstance(loop, Trainer)
        outputs = loop.outputs(torch.from_numpy(preprocessing.apply(inputs))).numpy()
        if self.recipe.task == "classification":
            measured = classification_metrics(targets, class_probabilities(outputs))
        else:
            measured = regression_metrics(targets, preprocessing.restore_target(outputs[:, 0]))
        return {
            "metrics": {**measured, "epochs": loop.epoch, "training_loss": loop.losses[-1]},
        }

    def events(
        self,
        results: Sequence[Mapping[str, Any]],  # noqa: ARG002 - nothing is bounded
    ) -> tuple[PrivacyEvent, ...]:
        return ()
