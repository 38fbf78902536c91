"""What differential privacy a job promises, and what it has spent: plan and event.

The relation of neighbours is always *zero-out*: two data sets are neighbours if one unit (a
record, or all records of a subject) of one is replaced in the other by one that contributes
nothing. For Poisson sampling that is adding or removing the unit.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cenacle.documents.base import Frozen

__all__ = ["PrivacyEvent", "PrivacyPlan", "SubjectUnit"]

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
        clipping: ``flat``: of the whole gradient; ``per-layer``: of each parameter tensor, so that
            the norms of all of them together are ``clipping_norm``.
        noise_multiplier: standard deviation of the noise over the clipping norm; without it
            the smallest that keeps ``epsilon``.
        sampling: ``poisson``: each unit joins each step with probability
            ``sampling_probability``; ``shuffle``: each record is used once in each epoch, which is
            accounted for without amplification.
        sampling_probability: for ``poisson``; an epoch is its reciprocal in steps.
    """

    epsilon: Positive
    delta: Delta
    unit: Literal["record"] | SubjectUnit = "record"
    clipping_norm: Positive
    clipping: Literal["flat", "per-layer"] = "flat"
    noise_multiplier: Positive | None = None
    sampling: Literal["poisson", "shuffle"] = "poisson"
    sampling_probability: Probability | None = None

    @model_validator(mode="after")
    def _sampled(self) -> PrivacyPlan:
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

    def event(self, epochs: int, noise_multiplier: float | None = None) -> PrivacyEvent:
        """What training will cost, with the plan's noise multiplier or this one.

        A subject's records are sampled together, and each is clipped: their sum is larger than
        one record's by ``most_records`` at most, so the noise weighs less by that factor.
        """
        noise = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        if noise is None:
            raise ValueError("the plan has no noise_multiplier: it follows from its epsilon")
        if isinstance(self.unit, SubjectUnit):
            noise /= self.unit.most_records
        return PrivacyEvent(
            noise_multiplier=noise,
            sampling_probability=self.sampling_probability or 1.0,
            steps=self.steps(epochs),
        )


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
