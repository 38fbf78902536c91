"""DP-SGD on one model: Poisson-sampled or shuffled steps, noise from a secret, resumable.

Abadi et al. 2016 (arXiv:1607.00133), with the engine of :mod:`cenacle.training.privacy`. Every
draw of a step has a key of its own, so a run that resumes anywhere releases the same noisy
gradients again, bit for bit, and never a second set of the same step.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from cenacle.crypto.kdf import encode_fields
from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan, SubjectUnit
from cenacle.documents.recipe import Recipe
from cenacle.errors import EnclaveError
from cenacle.training._torch import functional, torch
from cenacle.training.checkpoint import Tensors
from cenacle.training.graph import Graph
from cenacle.training.loop import Loop, Rows, learning_rate
from cenacle.training.privacy.engine import make_private
from cenacle.training.privacy.noise import Noise
from cenacle.training.privacy.record import Event, Sampling
from cenacle.training.privacy.sampling import PoissonSampler, ShuffledSampler
from cenacle.training.privacy.spending import spent

__all__ = ["Keys", "PrivateTrainer", "most_records", "planned_steps"]

_COMPILED: Final = 100_000_000
"""Noisy numbers of one training from which a compiled sampler repays its compilation."""


@dataclass(frozen=True)
class Keys:
    """Keys by place: HMAC-SHA-256 of the place under what only this run knows.

    They hang on the plan, the recipe and the rows, too. So the same secret with other rows
    gives other noise: nobody can take the difference of two releases and be left without it.
    """

    root: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes, *context: bytes) -> Self:
        """Of a run, from its secret and what it is bound to."""
        place = encode_fields(b"cenacle/private-training", *context)
        return cls(hmac.new(secret, place, hashlib.sha256).digest())

    def under(self, *place: str | int) -> Keys:
        """The keys of a part of the run."""
        return Keys(self(*place))

    def __call__(self, *place: str | int) -> bytes:
        """The 32 bytes for one purpose, which are for no other."""
        name = encode_fields(*(f"{type(part).__name__} {part}".encode() for part in place))
        return hmac.new(self.root, name, hashlib.sha256).digest()


def most_records(plan: PrivacyPlan) -> int:
    """How many records one unit has at most."""
    return plan.unit.most_records if isinstance(plan.unit, SubjectUnit) else 1


def planned_steps(recipe: Recipe, plan: PrivacyPlan, rows: int) -> int:
    """Optimizer steps of a training on so many rows."""
    steps = plan.steps(recipe.epochs)
    return steps if plan.sampling == "poisson" else steps * _batches(recipe, rows)


def _batches(recipe: Recipe, rows: int) -> int:
    """Of an epoch of shuffled rows: full ones, over which a remainder is spread."""
    return max(1, rows // recipe.batch_size)


class PrivateTrainer(Loop):
    """Trains ``model`` in place under ``plan``.

    Under ``poisson`` each step takes each unit with the plan's probability, all rows of a unit
    together, and ``batch_size`` is how many rows are computed at a time. Under ``shuffle`` an
    epoch is a permutation cut into batches of ``batch_size`` rows, or a few more.

    Args:
        owners: which unit each row belongs to, (rows,), from 0 without gaps.
        keys: of this training alone.

    Raises:
        PrivacyError: the model has a layer whose gradients cannot be made private.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: PrivacyPlan,
        model: Graph,
        rows: Rows,
        owners: NDArray[np.int64],
        keys: Keys,
    ) -> None:
        super().__init__(recipe, model)
        assert plan.noise_multiplier is not None
        self.plan = plan
        self.rows = rows
        self.owners = owners
        self._keys = keys
        self._planned = planned_steps(recipe, plan, len(rows))
        self._order: tuple[int, NDArray[np.int64]] | None = None
        probability = plan.sampling_probability
        sampling: Sampling
        if probability is not None:
            expected = probability * len(rows)
            sampling = self._poisson(probability, 0).sampling
        else:
            expected = len(rows) / _batches(recipe, len(rows))
            sampling = self._shuffled(recipe.batch_size, 0).sampling
        self.private = make_private(
            model,
            clip=plan.clipping_norm,
            noise_multiplier=plan.noise_multiplier,
            expected_batch=expected,
            per_layer=plan.clipping == "per-layer",
            sampling=sampling,
        )

    @property
    def total_steps(self) -> int:
        return self._planned

    @property
    def spent(self) -> tuple[PrivacyEvent, ...]:
        """What the engine recorded, of all steps so far.

        Raises:
            EnclaveError: a step's randomness was not secret.
        """
        if not all(event.secure and event.sampling.secure for event in self.private.record.events):
            raise EnclaveError("a private step was taken with randomness that is not secret")
        most = most_records(self.plan)
        return tuple(
            event.model_copy(update={"noise_multiplier": event.noise_multiplier / most})
            for event in spent(self.private.record)
        )

    def steps(self) -> Iterator[None]:
        while self.step < self.total_steps:
            self._take_step()
            yield

    def _take_step(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        chosen = torch.from_numpy(self.chosen(self.step))
        for part, rows in enumerate(torch.split(chosen, self.recipe.batch_size)):
            if len(rows):
                self.private.accumulate(
                    self._loss(part), self.rows.inputs[rows], self.rows.targets[rows]
                )
        numbers = self.model.count_parameters() * self.total_steps
        self.private.noise = Noise(
            key=self._keys("noise", self.step), secret=True, compiled=numbers > _COMPILED
        )
        self.private.release()
        self.optimizer.step(learning_rate(self.recipe, self.step, self.total_steps))
        self.step += 1

    def chosen(self, step: int) -> NDArray[np.int64]:
        """The rows of a step, which may be none under ``poisson``."""
        if self.plan.sampling_probability is not None:
            (members,) = self._poisson(self.plan.sampling_probability, step)
            among = np.zeros(self._population, dtype=np.bool_)
            among[members] = True
            return np.flatnonzero(among[self.owners])
        batches = _batches(self.recipe, len(self.rows))
        epoch, place = divmod(step, batches)
        if self._order is None or self._order[0] != epoch:
            (order,) = self._shuffled(len(self.rows), epoch)
            self._order = epoch, np.array(order, dtype=np.int64)
        return np.array_split(self._order[1], batches)[place]

    @property
    def _population(self) -> int:
        return int(self.owners.max()) + 1

    def _poisson(self, probability: float, step: int) -> PoissonSampler:
        key = self._keys("members", step)
        return PoissonSampler(self._population, probability, steps=1, key=key, secret=True)

    def _shuffled(self, size: int, epoch: int) -> ShuffledSampler:
        key = self._keys("order", epoch)
        return ShuffledSampler(len(self.rows), size, key=key, secret=True)

    def _loss(self, part: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        seed = int.from_bytes(self._keys("dropout", self.step, part)[:8], "big")

        def losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # Anew at each call: the engine compares runs of the same examples.
            self.model.generator = torch.Generator(device="cpu").manual_seed(seed)
            outputs = self.model(inputs)
            if self.recipe.task == "classification":
                return functional.cross_entropy(outputs, targets, reduction="none")
            return functional.mse_loss(outputs.squeeze(1), targets, reduction="none")

        return losses

    # --- state ---------------------------------------------------------------------------

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors, meta = super().state()
        return tensors, meta | {"record": [event.to_dict() for event in self.private.record.events]}

    def _restore(self, parts: Mapping[str, Tensors], meta: Mapping[str, Any]) -> None:
        super()._restore(parts, meta)
        self.private.record.events = [_event(dict(fields)) for fields in meta["record"]]
        if not 0 < self.step <= self.total_steps or self.private.record.steps != self.step:
            raise ValueError("the record is of another number of steps")


def _event(fields: dict[str, Any]) -> Event:
    sampling = Sampling(**fields.pop("sampling"))
    return Event(sampling=sampling, **fields | {"group_clips": tuple(fields["group_clips"])})
