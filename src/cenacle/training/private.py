"""Training under a contract's privacy plan: what is kept from the result, drawn, and accounted.

Nothing that depends on a record leaves but through clipped, noised sums: no exact loss, no
exact metric, no message about the rows as a whole. What the guarantee rests on is drawn from
a secret, see :class:`~cenacle.training.private_trainer.Keys`; the holdout, the initial weights
and the number of steps follow from the recipe and the number of rows, which are public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.base import canonical_json
from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan, SubjectUnit
from cenacle.documents.private_recipe import check_private_recipe, privacy_events
from cenacle.documents.recipe import Recipe
from cenacle.errors import DocumentError, EnclaveError, InputError
from cenacle.training._torch import torch
from cenacle.training.data import Dataset, PartyRows
from cenacle.training.graph import Graph
from cenacle.training.loop import Loop, Rows
from cenacle.training.method import Chosen, Stage
from cenacle.training.metrics import confusion_matrix, noisy_classification_metrics
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.privacy.keystream import Keystream
from cenacle.training.privacy.noise import Noise
from cenacle.training.private_trainer import (
    Keys,
    PrivateTrainer,
    most_records,
    planned_steps,
)
from cenacle.training.subjects import units, used_rows

__all__ = ["Privacy", "PrivateMethod", "noisy_counts"]

_EXACT: Final = 2**22
"""Rows over the noise's deviation below which noise is added exactly, whatever they hold."""


@dataclass(frozen=True)
class Privacy:
    """A privacy plan, and what only those know who may know the noise.

    Attributes:
        plan: with a noise multiplier.
        secret: 32 bytes, the same whenever this run is resumed and in no other run. Whoever
            has them can take the noise away again.

    Raises:
        InputError: the secret has another length.
    """

    plan: PrivacyPlan
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != 32:
            raise InputError("a privacy plan's secret has the wrong length",
                             found=f"{len(self.secret)} bytes", expected="32 bytes")  # fmt: skip


class PrivateMethod:
    """A :class:`~cenacle.training.method.Method` that keeps a privacy plan.

    Args:
        dataset: loaded under the plan.
        digest: of the dataset.

    Raises:
        DocumentError: the recipe does what the plan does not allow, or there are more rows than
            its noise can be added to exactly.
    """

    def __init__(self, recipe: Recipe, privacy: Privacy, dataset: Dataset, digest: str) -> None:
        self.recipe = recipe
        self.plan = plan = privacy.plan
        try:
            check_private_recipe(plan, recipe, metrics=plan.metrics_noise is not None)
        except ValueError as problem:
            raise DocumentError(str(problem)) from None
        _check_size(plan, sum(map(len, dataset.parties)))
        self._keys = Keys.of(
            privacy.secret,
            canonical_json(plan.to_fields()),
            recipe.digest.encode(),
            digest.encode(),
        )
        self.mark: str | None = self._keys("checkpoint").hex()
        self.dataset = self._used(dataset)

    def _used(self, dataset: Dataset) -> Dataset:
        unit = self.plan.unit
        if not isinstance(unit, SubjectUnit):
            return dataset
        parties = []
        for party in dataset.parties:
            assert party.subjects is not None
            words = Keystream(self._keys("records", party.alias), secret=True).words(len(party))
            rows = used_rows(party.subjects, unit.most_records, words)
            parties.append(
                PartyRows(
                    party.alias, party.inputs[rows], party.targets[rows], party.subjects[rows]
                )
            )
        return replace(dataset, parties=tuple(parties))

    # --- training ------------------------------------------------------------------------

    def divide(self, training: Chosen) -> tuple[Chosen, Chosen | None]:
        return training, None

    def steps(self, rows: int) -> int:
        return planned_steps(self.recipe, self.plan, rows)

    def loop(
        self,
        stage: Stage,
        model: Graph,
        learnt: Chosen,
        rows: Rows,
        watched: Rows | None,  # noqa: ARG002 - nothing is watched
    ) -> Loop:
        owners = units(
            (party.subjects, chosen)
            for party, chosen in zip(self.dataset.parties, learnt, strict=True)
        )
        keys = self._keys.under("training", stage.number)
        return PrivateTrainer(self.recipe, self.plan, model, rows, owners, keys)

    # --- measuring -----------------------------------------------------------------------

    def measure(
        self,
        stage: Stage,
        loop: Loop,
        preprocessing: Preprocessing,
        inputs: NDArray[Any],
        targets: NDArray[Any],
    ) -> dict[str, Any]:
        assert isinstance(loop, PrivateTrainer)
        metrics: dict[str, Any] = {"rows": len(targets), "noisy": True}
        counted: list[PrivacyEvent] = []
        deviation = self.plan.metrics_noise
        if deviation is not None:
            outputs = loop.outputs(torch.from_numpy(preprocessing.apply(inputs)))
            predicted = outputs.argmax(dim=1).numpy()
            counts = confusion_matrix(targets, predicted, outputs.shape[1])
            noisy = noisy_counts(counts, deviation, self._keys("metrics", stage.number))
            metrics = noisy_classification_metrics(noisy, len(targets), deviation)
            counted = [
                PrivacyEvent(
                    noise_multiplier=deviation / most_records(self.plan),
                    sampling_probability=1.0,
                    steps=1,
                )
            ]
        return {
            "metrics": {**metrics, "epochs": self.recipe.epochs},
            "spent": [event.to_fields() for event in loop.spent],
            "counted": [event.to_fields() for event in counted],
        }

    # --- accounting ----------------------------------------------------------------------

    def events(self, results: Sequence[Mapping[str, Any]]) -> tuple[PrivacyEvent, ...]:
        """What was spent, in the order of the plan's events.

        Raises:
            EnclaveError: it is more than the plan allows.
        """
        trained = [_one(result["spent"]) for result in results]
        (each,) = self.plan.events(self.recipe.epochs)
        for event in trained:
            _demand(each, event)
        # A record is in the pooled model and in its own party's: of those, the dearest.
        pooled, *alone = (event.steps for event in trained)
        spent = [trained[0].model_copy(update={"steps": pooled + max(alone, default=0)})]
        counted = [_one(result["counted"]) for result in results if result["counted"]]
        if counted:
            spent.append(counted[0].model_copy(update={"steps": len(counted)}))
        planned = privacy_events(self.plan, self.recipe)
        if len(spent) > len(planned):
            raise EnclaveError("counts were released that the privacy plan does not have")
        for most, event in zip(planned, spent, strict=False):
            _demand(most, event)
        return tuple(spent)


def _one(fields: Sequence[Mapping[str, Any]]) -> PrivacyEvent:
    events = [PrivacyEvent.from_fields(dict(event)) for event in fields]
    if len(events) != 1:
        raise EnclaveError("the steps of a private training were not all alike")
    return events[0]


def _demand(planned: PrivacyEvent, spent: PrivacyEvent) -> None:
    if not planned.covers(spent):
        raise EnclaveError(
            "a job spent more privacy than its plan allows; nothing is released",
            found=_figures(spent),
            expected=f"at most {_figures(planned)}",
        )


def _check_size(plan: PrivacyPlan, rows: int) -> None:
    assert plan.noise_multiplier is not None
    least = min(plan.noise_multiplier, plan.metrics_noise or plan.noise_multiplier)
    if rows >= _EXACT * least:
        raise DocumentError(
            "so little noise cannot be added exactly to sums over so many rows",
            found=f"{rows} rows",
            expected=f"below {_EXACT} times the noise multiplier, and the noise of metrics",
        )


def noisy_counts(counts: NDArray[np.int64], deviation: float, key: bytes) -> NDArray[np.float64]:
    """Counts with independent Gaussian noise of standard deviation ``deviation``.

    Args:
        key: 32 bytes that are secret and used for these counts alone.
    """
    released = torch.zeros(counts.shape, dtype=torch.float64)
    total = torch.from_numpy(counts.astype(np.float64))
    noise = Noise(key=key, secret=True, compiled=False)
    noise.release([(released, total)], scale=deviation, divisor=1.0)
    assert released.grad is not None
    return np.asarray(released.grad.numpy(), dtype=np.float64)


def _figures(event: PrivacyEvent) -> str:
    return (
        f"{event.steps} steps, noise multiplier {event.noise_multiplier:g}, "
        f"sampling probability {event.sampling_probability:g}"
    )
