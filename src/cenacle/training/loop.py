"""What every training loop has: a model, an optimizer, steps, and a state to go on from.

Reproducible: with the same rows, seed, torch and number of threads on the same kind of
machine, weights are bit-identical, whether or not training was interrupted. What a step
draws is keyed by its place, see :mod:`cenacle.training.randomness`; the learning rate is a
pure function of the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.recipe import CosineSchedule, Recipe
from cenacle.errors import EnclaveError, VerificationError
from cenacle.training._torch import torch
from cenacle.training.checkpoint import Tensors
from cenacle.training.graph import Graph
from cenacle.training.models import model_tensors
from cenacle.training.optimizers import Optimizer

__all__ = ["Loop", "Rows", "learning_rate", "reproducible"]


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


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Cosine: linear warm-up to the base rate, then ``final + (1 - final) * (1 + cos(pi t)) / 2``
    of it, t from 0 to 1 (Loshchilov and Hutter 2017, without restarts).
    """
    base = recipe.optimizer.learning_rate
    schedule = recipe.schedule
    if not isinstance(schedule, CosineSchedule):
        return base
    warmup = schedule.warmup_epochs * total_steps // recipe.epochs
    if step < warmup:
        return base * (step + 1) / warmup
    wave = (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2
    return base * (schedule.final + (1 - schedule.final) * wave)


class Loop(ABC):
    """Trains ``model`` in place.

    Attributes:
        step: optimizer steps taken in all.
    """

    parts: ClassVar[tuple[str, ...]] = ("model", "optimizer")
    """Prefixes of the tensors of :meth:`state`."""

    def __init__(self, recipe: Recipe, model: Graph) -> None:
        self.recipe = recipe
        self.model = model
        self.optimizer = Optimizer(recipe.optimizer, model.parameters())
        self.step = 0

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Steps if nothing stops training early."""

    @abstractmethod
    def steps(self) -> Iterator[None]:
        """Take the steps that are left, pausing after each."""

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Train to the end. ``after_step`` may raise to interrupt; the state stays whole.

        Raises:
            EnclaveError: training diverged.
        """
        for _ in self.steps():
            after_step()
        for name, array in model_tensors(self.model).items():
            if not np.isfinite(array).all():
                raise EnclaveError(
                    "training diverged: a weight is not a finite number",
                    found=f"tensor {name!r}",
                    remedy="lower the learning rate, or standardize the inputs",
                )

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
        return tensors, {"step": self.step}

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a loop made from the same recipe and rows.

        Raises:
            VerificationError: the state is not this loop's.
        """
        parts: dict[str, Tensors] = {part: {} for part in self.parts}
        try:
            for name, array in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = np.asarray(array)
            self._restore(parts, meta)
        except (LookupError, ValueError, TypeError, RuntimeError):
            raise VerificationError(
                "a checkpoint does not fit the training that it should resume",
                remedy="run the job from the start",
            ) from None

    def _restore(self, parts: Mapping[str, Tensors], meta: Mapping[str, Any]) -> None:
        self.load(parts["model"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, array in parts["optimizer"].items():
            index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = torch.tensor(array)
        self.optimizer.load(slots)
        self.step = int(meta["step"])

    def load(self, tensors: Tensors) -> None:
        """Replace the model's weights."""
        self.model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
