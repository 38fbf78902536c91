"""The ordinary training loop: epochs of shuffled batches, early stopping.

Shuffling is keyed by (seed, epoch) and dropout by (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cenacle.documents.recipe import EarlyStopping, Recipe
from cenacle.errors import EnclaveError
from cenacle.training._torch import functional, torch
from cenacle.training.checkpoint import Tensors
from cenacle.training.graph import Graph
from cenacle.training.loop import Loop, Rows, learning_rate
from cenacle.training.models import model_tensors
from cenacle.training.randomness import torch_generator

__all__ = ["Batches", "Trainer"]


@dataclass(frozen=True)
class Batches:
    """Where each batch of an epoch begins and ends.

    A remainder of a single row joins the batch before it: batch normalization cannot train
    on one row.
    """

    rows: int
    size: int

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        starts = list(range(0, self.rows, self.size))
        if len(starts) > 1 and self.size > 1 and self.rows - starts[-1] == 1:
            starts.pop()
        return tuple(zip(starts, [*starts[1:], self.rows], strict=True))


class Trainer(Loop):
    """Trains ``model`` in place.

    Args:
        rows: what the gradient is taken over.
        validation: what early stopping looks at; required if the recipe has it.

    Attributes:
        epoch: epochs completed.
        finished: no step is left.
        losses: mean training loss of each completed epoch.
    """

    parts: ClassVar[tuple[str, ...]] = (*Loop.parts, "best")

    def __init__(
        self, recipe: Recipe, model: Graph, rows: Rows, validation: Rows | None = None
    ) -> None:
        super().__init__(recipe, model)
        self.rows = rows
        self.validation = validation
        self.bounds = Batches(len(rows), recipe.batch_size).bounds
        self.epoch = 0
        self.finished = False
        self.losses: list[float] = []
        self._loss_sum = 0.0
        self._best: Tensors | None = None
        self._best_loss = math.inf
        self._waited = 0

    @property
    def total_steps(self) -> int:
        return len(self.bounds) * self.recipe.epochs

    def steps(self) -> Iterator[None]:
        """Take the steps that are left, pausing after each.

        Raises:
            EnclaveError: the loss is not finite.
        """
        while not self.finished:
            order = self._order()
            for start, end in self.bounds[self.step - self.epoch * len(self.bounds) :]:
                self._take_step(order[start:end])
                if self.step == (self.epoch + 1) * len(self.bounds):
                    self._end_epoch()
                yield
        if self._best is not None:
            self.load(self._best)

    def _order(self) -> torch.Tensor:
        generator = torch_generator(self.recipe.seed, "shuffle", self.epoch)
        return torch.randperm(len(self.rows), generator=generator)

    def _take_step(self, chosen: torch.Tensor) -> None:
        self.model.train()
        self.model.generator = torch_generator(self.recipe.seed, "dropout", self.step)
        rate = learning_rate(self.recipe, self.step, self.total_steps)
        self.optimizer.zero_grad()
        loss = self._loss(self.rows.inputs[chosen], self.rows.targets[chosen])
        value = loss.item()
        if not math.isfinite(value):
            raise EnclaveError(
                "training diverged: the loss is not a finite number",
                found=f"epoch {self.epoch + 1}, step {self.step + 1}",
                remedy="lower the learning rate, or standardize the inputs",
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(rate)
        self.step += 1
        self._loss_sum += value * len(chosen)

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = self.model(inputs)
        if self.recipe.task == "classification":
            return functional.cross_entropy(outputs, targets)
        return functional.mse_loss(outputs.squeeze(1), targets)

    def _end_epoch(self) -> None:
        self.epoch += 1
        self.losses.append(self._loss_sum / len(self.rows))
        self._loss_sum = 0.0
        self.finished = self.epoch == self.recipe.epochs
        if self.recipe.early_stopping is not None:
            self._validate(self.recipe.early_stopping)

    def _validate(self, plan: EarlyStopping) -> None:
        assert self.validation is not None
        outputs = self.outputs(self.validation.inputs)
        targets = self.validation.targets
        if self.recipe.task == "classification":
            loss = functional.cross_entropy(outputs, targets).item()
        else:
            loss = functional.mse_loss(outputs.squeeze(1), targets).item()
        if loss < self._best_loss - plan.min_delta:
            self._best_loss = loss
            self._best = model_tensors(self.model)
            self._waited = 0
        else:
            self._waited += 1
            self.finished = self.finished or self._waited >= plan.patience

    # --- state ---------------------------------------------------------------------------

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors, meta = super().state()
        for name, array in (self._best or {}).items():
            tensors[f"best/{name}"] = array
        meta |= {
            "epoch": self.epoch,
            "finished": self.finished,
            "losses": list(self.losses),
            "loss_sum": self._loss_sum,
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "waited": self._waited,
        }
        return tensors, meta

    def _restore(self, parts: Mapping[str, Tensors], meta: Mapping[str, Any]) -> None:
        super()._restore(parts, meta)
        self.epoch = int(meta["epoch"])
        self.finished = bool(meta["finished"])
        self.losses = [float(loss) for loss in meta["losses"]]
        self._loss_sum = float(meta["loss_sum"])
        self._best = parts["best"] or None
        best = meta["best_loss"]
        self._best_loss = math.inf if best is None else float(best)
        self._waited = int(meta["waited"])
        borders = (self.epoch * len(self.bounds), (self.epoch + 1) * len(self.bounds))
        if not borders[0] <= self.step < borders[1]:
            raise ValueError("step lies outside its epoch")
