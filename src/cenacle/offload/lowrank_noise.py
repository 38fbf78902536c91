"""Gaussian noise on released residuals, with its differential privacy accounted.

A release is one sample's residual, clipped to a Frobenius norm of at most S, plus Gaussian
noise. Replacing the sample by any other moves it by at most 2 S; sigma is the least for which
one release is (epsilon, delta)-differentially private: the analytic Gaussian mechanism of
Balle and Wang (2018), which holds for every epsilon > 0. Releases compose as Gaussian
mechanisms do, exactly: k of them are one with sqrt(k) times the distance (Dong, Roth and Su,
2022). What floating-point arithmetic adds to the leakage (Mironov, 2012) is not covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch

from cenacle.errors import InputError
from cenacle.offload.keystream import Keystream

__all__ = ["ResidualNoise", "gaussian", "gaussian_delta", "gaussian_epsilon"]

_BLOCK: Final = 1 << 18
_MARGIN: Final = 1 - 1e-6
"""So that rounding to float32 does not lift a clipped norm above the bound."""


def gaussian_delta(epsilon: float, distance: float) -> float:
    """Least delta of a Gaussian mechanism; ``distance``: sensitivity in units of sigma."""
    if distance == 0:
        return 0.0
    ends = torch.tensor(
        [distance / 2 - epsilon / distance, -distance / 2 - epsilon / distance],
        dtype=torch.float64,
    )
    first, second = torch.special.log_ndtr(ends).tolist()
    return max(0.0, math.exp(first) - math.exp(min(0.0, epsilon + second)))


def _bisect(low: float, high: float, holds_at_low: bool, delta: float, fixed: float) -> float:
    """The border between holding and not, on the side that holds."""
    for _ in range(200):
        middle = (low + high) / 2
        pair = (fixed, middle) if holds_at_low else (middle, fixed)
        if (gaussian_delta(*pair) <= delta) == holds_at_low:
            low = middle
        else:
            high = middle
    return low if holds_at_low else high


def gaussian_epsilon(delta: float, distance: float) -> float:
    """Least epsilon of a Gaussian mechanism for a delta."""
    if gaussian_delta(0.0, distance) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, distance) > delta:
        high *= 2
    return _bisect(0.0, high, False, delta, distance)


def gaussian(count: int) -> torch.Tensor:
    """Standard normal numbers (count,) in float64 from AES-256 in counter mode, freshly keyed.

    Box and Muller's transform of 53-bit uniform numbers.
    """
    pairs = (count + 1) // 2
    stream = Keystream()
    found = torch.empty(2, pairs, dtype=torch.float64)
    for start in range(0, pairs, _BLOCK):
        size = min(_BLOCK, pairs - start)
        radius = torch.from_numpy(stream.uniform(size)).neg_().log1p_().mul_(-2).sqrt_()
        angle = torch.from_numpy(stream.uniform(size)).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=found[0, start : start + size])
        torch.mul(radius, angle.sin(), out=found[1, start : start + size])
    return found.view(-1)[:count]


@dataclass
class ResidualNoise:
    """Clips, adds noise, counts.

    Args:
        epsilon, delta: of one release.
        clip: S, the largest Frobenius norm of a residual.

    Raises:
        InputError: epsilon or clip not positive and finite, or delta not in (0, 1).
    """

    epsilon: float
    delta: float
    clip: float
    releases: int = field(default=0, init=False)
    """The most releases that any one sample can have had: one for each layer and pass."""

    def __post_init__(self) -> None:
        numbers = (self.epsilon, self.delta, self.clip)
        if not all(math.isfinite(n) and n > 0 for n in numbers) or self.delta >= 1:
            raise InputError(
                "noise on residuals needs (epsilon, delta, clip)",
                found=repr(numbers),
                expected="three positive numbers, delta below 1",
            )
        high = 1.0
        while gaussian_delta(self.epsilon, high) <= self.delta:
            high *= 2
        self._distance = _bisect(0.0, high, True, self.delta, self.epsilon)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise in each element."""
        return 2 * self.clip / self._distance

    def apply(self, residual: torch.Tensor) -> None:
        """Clip each sample (first dimension) and add noise, in place: one release of each."""
        flat = residual.view(len(residual), -1)
        norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        # A norm that is not finite cannot be clipped: such a sample becomes noise alone.
        scale = torch.where(norms.isfinite(), (self.clip * _MARGIN / norms).clamp(max=1), 0)
        flat.copy_(torch.where(scale[:, None] > 0, flat * scale[:, None], 0))
        for sample in flat:
            sample.add_(gaussian(sample.numel()).mul_(self.sigma))
        self.releases += 1

    def spent(self) -> float:
        """Epsilon of all releases of one sample together, at the same delta."""
        return gaussian_epsilon(self.delta, self._distance * math.sqrt(self.releases))

    def describe(self) -> str:
        return (
            f"Residuals are clipped to a norm of {self.clip:g} and carry Gaussian noise of "
            f"sigma {self.sigma:.4g}: one release is ({self.epsilon:g}, {self.delta:g})-"
            f"differentially private for replacing a sample. So far a sample had at most "
            f"{self.releases} releases: together epsilon {self.spent():.4g} at the same delta, "
            "over the residuals only; gradients carry no noise. Results are approximate."
        )
