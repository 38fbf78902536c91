"""Clip factors, and a clipping norm that adapts.

Flat clipping bounds the norm over all parameters. Per-layer clipping bounds each group of
parameters (a module's own) by C / sqrt(groups), so that the whole is still bounded by C;
each group's factors are known as soon as its gradients are.

==============================  ==================
an example's gradient           its factor
==============================  ==================
zero                            1
norm at most C                  1
norm above C                    C / norm
infinite, NaN, beyond float32   0, and masked
==============================  ==================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cenacle.training.privacy.refusals import PrivacyError

__all__ = ["ROUNDING", "AdaptiveClip", "clip_factors", "positive"]

ROUNDING = 4e-6
"""Clipping aims at C (1 - ROUNDING): room for float32 rounding of norms and of the sum."""


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """A finite number above zero (or zero, where that is allowed).

    Raises:
        PrivacyError: it is not.
    """
    value = float(value)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise PrivacyError(
            f"{name} cannot be used",
            found=value,
            expected="a finite number " + ("of at least 0" if zero else "above 0"),
        )
    return value


def clip_factors(square_norms: Tensor, clip: float) -> Tensor:
    """Factors (B,) float32 for squared norms (B,) float64; see the table above."""
    norms = square_norms.sqrt()
    bound = clip * (1 - ROUNDING)
    factors = torch.clamp(bound / norms, max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0).float()


@dataclass
class AdaptiveClip:
    """A clipping norm that follows a quantile of the gradient norms.

    Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv:1905.03871): after each step
    ``C <- C exp(-learning_rate (b - quantile))``, where b is the noised count of examples
    within C over the expected batch size. Counts are taken as +1/2 and -1/2 about their
    middle, so one example moves them by 1/2.

    Attributes:
        quantile: the share of examples that should be within C.
        learning_rate: of log C.
        count_noise: standard deviation of the noise on the count; the paper's advice is a
            twentieth of the expected batch size. It costs privacy of its own, which the
            record tells.
        smallest: C never falls below it.
        largest: nor rises above it.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 10.0
    smallest: float = 1e-6
    largest: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise PrivacyError("the quantile cannot be used", found=self.quantile,
                               expected="a number between 0 and 1")  # fmt: skip
        positive("learning_rate", self.learning_rate)
        positive("count_noise", self.count_noise, zero=True)
        positive("smallest", self.smallest)
        positive("largest", self.largest)

    def next(self, clip: float, noised: float, expected_batch: float) -> float:
        """The clipping norm after a step whose noised, centred count was ``noised``."""
        share = noised / expected_batch + 0.5
        moved = clip * math.exp(-self.learning_rate * (share - self.quantile))
        return min(max(moved, self.smallest), self.largest)
