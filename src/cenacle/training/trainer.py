"""The training loop: one model on one set of rows, resumable after any step.

Reproducible: with the same rows, seed, torch and number of threads on the same kind of
machine, weights are bit-identical, whether or not training was interrupted. Shuffling is
keyed by (seed, epoch) and dropout by (seed, step), see :mod:`cenacle.training.randomness`;
the learning rate is a pure function of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.recipe import CosineSchedule, EarlyStopping, Recipe
from cenacle.errors import EnclaveError, VerificationError
from cenacle.training._torch import functional, torch
from cenacle.training.checkpoint import Tensors
from cenacle.training.graph import Graph
from cenacle.training.models import model_tensors
from cenacle.training.optimizers import Optimizer
from cenacle.training.randomness import torch_generator

__all__ = ["Batches", "Rows", "Trainer", "learning_rate", "reproducible"]


@contextmanager
def reproducible(threads: int | None = None) -> Iterator[None]:
    """Deterministic algorithms and a fixed number of threads, restored afterwards.

    These are process-wide settings of torch: an operation without a deterministic
    implementation raises. The number of threads is part of what makes results
    bit-identical, because it decides the order of sums.
    """
    before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    # The same switch as use_deterministic_algorithms(True), which would also import the whole
    # of torch._inductor to set it there; nothing is compiled here.
    torch.set_deterministic_debug_mode("error")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.set_num_threads(before[1])


@dataclass(frozen=True)
class Rows:
    """Model inputs (rows, *shape) and targets (rows,): int64 codes or float32 values."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)


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


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step ``step`` (from 0).

    Cosine: linear warm-up to the base rate, then ``final + (1 - final) * (1 + cos(pi t)) / 2``
    of it, t from 0 to 1 (Loshchilov and Hutter 2017, without restarts).
    """
    base = recipe.optimizer.learning_rate
    schedule = recipe.schedule
    if not isinstance(schedule, CosineSchedule):
        return base
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / warmup
    total = recipe.epochs * steps_per_epoch - warmup
    wave = (1 + math.cos(math.pi * (step - warmup) / total)) / 2
    return base * (schedule.final + (1 - schedule.final) * wave)


class Trainer:
    """Trains ``model`` in place.

    Args:
        rows: what the gradient is taken over.
        validation: what early stopping looks at; required if the recipe has it.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps taken in all.
        finished: no step is left.
        losses: mean training loss of each completed epoch.
    """

    def __init__(
        self, recipe: Recipe, model: Graph, rows: Rows, validation: Rows | None = None
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.rows = rows
        self.validation = validation
        self.bounds = Batches(len(rows), recipe.batch_size).bounds
        self.optimizer = Optimizer(recipe.optimizer, model.parameters())
        self.epoch = 0
        self.step = 0
        self.finished = False
        self.losses: list[float] = []
        self._loss_sum = 0.0
        self._best: Tensors | None = None
        self._best_loss = math.inf
        self._waited = 0

    @property
    def total_steps(self) -> int:
        """Steps if nothing stops training early."""
        return len(self.bounds) * self.recipe.epochs

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Train to the end. ``after_step`` may raise to interrupt; the state stays whole.

        Raises:
            EnclaveError: the loss is not finite.
        """
        while not self.finished:
            order = self._order()
            for start, end in self.bounds[self.step - self.epoch * len(self.bounds) :]:
                self._take_step(order[start:end])
                if self.step == (self.epoch + 1) * len(self.bounds):
                    self._end_epoch()
                after_step()
        if self._best is not None:
            self._load(self._best)
        for name, array in model_tensors(self.model).items():
            if not np.isfinite(array).all():
                raise EnclaveError(
                    "training diverged: a weight is not a finite number",
                    found=f"tensor {name!r}",
                    remedy="lower the learning rate, or standardize the inputs",
                )

    def _order(self) -> torch.Tensor:
        generator = torch_generator(self.recipe.seed, "shuffle", self.epoch)
        return torch.randperm(len(self.rows), generator=generator)

    def _take_step(self, chosen: torch.Tensor) -> None:
        self.model.train()
        self.model.generator = torch_generator(self.recipe.seed, "dropout", self.step)
        rate = learning_rate(self.recipe, self.step, len(self.bounds))
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

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the model gives for ``inputs`` in evaluation mode: (rows, outputs)."""
        self.model.eval()
        rows = self.model.evaluation_rows
        with torch.no_grad():
            return torch.cat(
                [self.model(inputs[i : i + rows]) for i in range(0, len(inputs), rows)]
            )

    # --- state ---------------------------------------------------------------------------

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Everything that the next step depends on."""
        tensors = {f"model/{name}": array for name, array in model_tensors(self.model).items()}
        for index, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optimizer/{index}/{slot}"] = value.detach().numpy().copy()
        for name, array in (self._best or {}).items():
            tensors[f"best/{name}"] = array
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "finished": self.finished,
            "losses": list(self.losses),
            "loss_sum": self._loss_sum,
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "waited": self._waited,
        }
        return tensors, meta

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a trainer made from the same recipe and rows.

        Raises:
            VerificationError: the state is not this trainer's.
        """
        parts: dict[str, Tensors] = {"model": {}, "optimizer": {}, "best": {}}
        try:
            for name, array in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = np.asarray(array)
            self._load(parts["model"])
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, array in parts["optimizer"].items():
                index, slot = name.split("/")
                slots.setdefault(int(index), {})[slot] = torch.tensor(array)
            self.optimizer.load(slots)
            self.epoch, self.step = int(meta["epoch"]), int(meta["step"])
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
        except (LookupError, ValueError, TypeError, RuntimeError):
            raise VerificationError(
                "a checkpoint does not fit the training that it should resume",
                remedy="run the job from the start",
            ) from None

    def _load(self, tensors: Tensors) -> None:
        self.model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
