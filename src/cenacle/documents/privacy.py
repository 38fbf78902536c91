"""What differential privacy a job promises, and what it has spent: plan, events and record.

The relation of neighbours is always *zero-out*: two data sets are neighbours if one unit (a
record, or all records of a subject) of one is replaced in the other by one that contributes
nothing. For Poisson sampling that is adding or removing the unit. How many records a data set
has is public.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from cenacle.documents.base import Frozen

__all__ = [
    "NOT_PRIVATE",
    "PrivacyEvent",
    "PrivacyLoss",
    "PrivacyPlan",
    "PrivacyRecord",
    "SubjectUnit",
]

NOT_PRIVATE: Final = "none: the outputs are not differentially private"

Positive = Annotated[float, Field(gt=0.0, le=1e9)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]


class SubjectUnit(Frozen):
    """All records that carry the same id are protected together.

    Attributes:
        subject: the column (or array) with the id.
        most_records: of one subject that are used; others are left out.
    """

    subject: Annotated[str, Field(min_length=1, max_length=200)]
    most_records: Annotated[int, Field(ge=1, le=100_000)]


class PrivacyPlan(Frozen):
    """Training by DP-SGD (Abadi et al. 2016), and the guarantee that it must keep.

    Attributes:
        epsilon, delta: what the whole job may cost each unit at most.
        unit: ``record``, or whose records are protected together.
        clipping_norm: of each record's gradient, in the L2 norm.
        clipping: ``flat``: of the whole gradient; ``per-layer``: of each layer's part of it, so
            that the norms of all of them together are ``clipping_norm``.
        noise_multiplier: standard deviation of the noise over the clipping norm. Left out of a
            draft, ``cenacle draft`` writes the smallest that keeps ``epsilon``.
        sampling: ``poisson``: each unit joins each step with probability
            ``sampling_probability``; ``shuffle``: each record is used once in each epoch, which is
            accounted for without amplification.
        sampling_probability: for ``poisson``; an epoch is its reciprocal in steps.
        metrics_noise: standard deviation of the noise on every count of measured records, if
            metrics leave the enclave.
    """

    epsilon: Positive
    delta: Delta
    unit: Literal["record"] | SubjectUnit = "record"
    clipping_norm: Positive
    clipping: Literal["flat", "per-layer"] = "flat"
    noise_multiplier: Positive | None = None
    sampling: Literal["poisson", "shuffle"] = "poisson"
    sampling_probability: Probability | None = None
    metrics_noise: Positive | None = None

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if (self.sampling == "poisson") != (self.sampling_probability is not None):
            raise ValueError("sampling poisson needs a sampling_probability, and shuffle has none")
        if self.sampling == "shuffle" and self.unit != "record":
            raise ValueError("subjects are sampled by poisson only")
        return self

    def steps(self, epochs: int) -> int:
        """Noisy releases that one unit can take part in, over so many epochs.

        ``poisson``: steps of the optimizer. ``shuffle``: one in each epoch.
        """
        if self.sampling_probability is None:
            return epochs
        return math.ceil(epochs / self.sampling_probability)

    def events(
        self,
        epochs: int,
        *,
        trainings: int = 1,
        measurements: int = 0,
        noise_multiplier: float | None = None,
    ) -> tuple[PrivacyEvent, ...]:
        """What the job costs each unit at most.

        A subject's records are sampled together, and each is clipped: their sum is larger than
        one record's by ``most_records`` at most, so the noise weighs less by that factor.

        Args:
            trainings: models that are trained on one record's data.
            measurements: models whose counts on one record's data are published with noise.
            noise_multiplier: in place of the plan's.

        Raises:
            ValueError: neither the plan nor the call states a noise multiplier.
        """
        noise = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        if noise is None:
            raise ValueError("the plan has no noise_multiplier: it follows from its epsilon")
        most = self.unit.most_records if isinstance(self.unit, SubjectUnit) else 1
        training = PrivacyEvent(
            noise_multiplier=noise / most,
            sampling_probability=self.sampling_probability or 1.0,
            steps=self.steps(epochs) * trainings,
        )
        if not measurements or self.metrics_noise is None:
            return (training,)
        counting = PrivacyEvent(
            noise_multiplier=self.metrics_noise / most,
            sampling_probability=1.0,
            steps=measurements,
        )
        return training, counting


class PrivacyEvent(Frozen):
    """Releases of the sampled Gaussian mechanism, all alike.

    Attributes:
        noise_multiplier: standard deviation over the most that one unit changes a sum by.
        sampling_probability: with which a unit takes part in each; 1: without amplification.
        steps: how many.
    """

    mechanism: Literal["sampled-gaussian"] = "sampled-gaussian"
    noise_multiplier: Positive
    sampling_probability: Probability
    steps: Annotated[int, Field(ge=0, le=10**9)]

    def covers(self, spent: PrivacyEvent) -> bool:
        """Whether ``spent`` costs this much at most, step by step."""
        return (
            spent.noise_multiplier >= self.noise_multiplier
            and spent.sampling_probability <= self.sampling_probability
            and spent.steps <= self.steps
        )


@dataclass(frozen=True)
class PrivacyLoss:
    """What all jobs on one asset's data cost each unit, as an epsilon at the budget's delta.

    Attributes:
        spent: of every job before; infinite if one had no plan.
        total: with the job that is decided on.
    """

    spent: float
    total: float


class PrivacyRecord(Frozen):
    """In a receipt: what was spent, exactly, and what that guarantees.

    Attributes:
        epsilon, delta: the plan's, which the events keep.
        events: of the whole job.
        description: the guarantee, and what it does not cover, for people.
    """

    unit: Literal["record"] | SubjectUnit
    clipping_norm: Positive
    clipping: Literal["flat", "per-layer"]
    sampling: Literal["poisson", "shuffle"]
    epsilon: Positive
    delta: Delta
    events: Annotated[tuple[PrivacyEvent, ...], Field(min_length=1, max_length=16)]
    description: Annotated[str, Field(min_length=1, max_length=4000)]

    @classmethod
    def of(cls, plan: PrivacyPlan, events: tuple[PrivacyEvent, ...]) -> Self:
        """The record of a job under ``plan`` that spent ``events``."""
        return cls(
            unit=plan.unit,
            clipping_norm=plan.clipping_norm,
            clipping=plan.clipping,
            sampling=plan.sampling,
            epsilon=plan.epsilon,
            delta=plan.delta,
            events=events,
            description=_description(plan, events),
        )


def _description(plan: PrivacyPlan, events: tuple[PrivacyEvent, ...]) -> str:
    training = events[0]
    unit = (
        f"all records of one subject ({plan.unit.subject!r} within one asset; at most "
        f"{plan.unit.most_records} of them are used)"
        if isinstance(plan.unit, SubjectUnit)
        else "one record"
    )
    sampling = (
        f"Poisson sampling with probability {training.sampling_probability:g}"
        if plan.sampling == "poisson"
        else "each record once in each epoch, accounted for without amplification by sampling"
    )
    lines = [
        f"({plan.epsilon:g}, {plan.delta:g})-differential privacy for each unit: {unit}.",
        "Neighbouring data sets differ in one unit, which contributes nothing in one of them.",
        f"Training: {training.steps} steps, {sampling}; gradients clipped "
        f"{'as a whole' if plan.clipping == 'flat' else 'layer by layer'} to an L2 norm of "
        f"{plan.clipping_norm:g} for each record; Gaussian noise of {training.noise_multiplier:g} "
        "times what one unit changes a sum by.",
    ]
    if len(events) > 1:
        counting = events[1]
        lines.append(
            f"Metrics: {counting.steps} tables of counts with Gaussian noise of "
            f"{counting.noise_multiplier:g} times what one unit changes them by."
        )
    lines.append(
        "Not covered: how many records there are, that a job ran or failed and with what message, "
        "its running time, and what whoever breaks the enclave's protection sees."
    )
    return " ".join(lines)
