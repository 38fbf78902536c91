"""Composition of privacy events, by Google's ``dp-accounting``.

Privacy loss distributions (Koskela, Jaelkoe and Honkela 2020; Doroshenko et al. 2022) are tight up
to their discretization, which is pessimistic, so an epsilon is never too small. Renyi DP (Mironov
2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) is looser, and fast.

``dp-accounting`` is the extra ``cenacle[privacy]``; without it every function here raises
:class:`~cenacle.errors.InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from cenacle.documents.privacy import PrivacyEvent
from cenacle.errors import InputError

__all__ = ["Method", "epsilon", "noise_multiplier_for", "spend", "steps_within"]

Method = Literal["pld", "rdp"]

_INTERVAL: Final = 1e-4
"""Of the discretized privacy loss; dp-accounting's own default."""

_LEAST_NOISE: Final = 1e-2
_MOST_NOISE: Final = 1e6
_PRECISION: Final = 1e-3
_ORDERS: Final = tuple([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [
    *(64, 80, 96, 128, 192, 256, 384, 512, 1024)
])  # fmt: skip


def epsilon(events: Sequence[PrivacyEvent], delta: float, *, method: Method = "pld") -> float:
    """The smallest epsilon that is known to hold for all events together, at ``delta``.

    Args:
        events: in any order; may be chosen adaptively, one after the other has run.
        delta: 0 < delta < 1.

    Returns:
        Infinity if no finite one is known.

    Raises:
        InputError: delta is out of range, or ``dp-accounting`` is not installed.
    """
    if not 0 < delta < 1:
        raise InputError("delta is out of range", found=delta, expected="between 0 and 1")
    merged = _merged(events)
    if not merged:
        return 0.0
    accountant = _accountant(method)
    for (noise, probability), steps in sorted(merged.items()):
        accountant.compose(_event(noise, probability), steps)
    found = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(found) else max(0.0, found)


def spend(
    before: Sequence[PrivacyEvent], after: PrivacyEvent, delta: float, *, method: Method = "pld"
) -> tuple[float, float]:
    """Epsilon of what was spent before, and with one more event."""
    return (
        epsilon(before, delta, method=method),
        epsilon([*before, after], delta, method=method),
    )


def noise_multiplier_for(
    target: float,
    delta: float,
    *,
    sampling_probability: float,
    steps: int,
    method: Method = "pld",
) -> float:
    """The smallest noise multiplier with which so many steps keep ``target`` at ``delta``.

    It is found by bisection, to a thousandth, and rounded up: what it gives is kept.

    Raises:
        InputError: no multiplier up to a million does, or an argument is out of range.
    """
    if not (target > 0 and 0 < sampling_probability <= 1 and steps >= 1):
        raise InputError(
            "no noise multiplier can be found for this",
            found=f"epsilon {target}, sampling probability {sampling_probability}, steps {steps}",
            expected="a positive epsilon, a probability above 0, at least one step",
        )

    def kept(noise: float) -> bool:
        event = PrivacyEvent(
            noise_multiplier=noise, sampling_probability=sampling_probability, steps=steps
        )
        return epsilon([event], delta, method=method) <= target

    low, high = _LEAST_NOISE, 1.0
    while not kept(high):
        low, high = high, high * 2
        if high > _MOST_NOISE:
            raise InputError(
                "no noise multiplier keeps this epsilon",
                found=f"epsilon {target} at delta {delta} over {steps} steps",
                remedy="allow a larger epsilon or delta, or train for fewer steps",
            )
    while high - low > _PRECISION * low:
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def steps_within(
    target: float, delta: float, event: PrivacyEvent, before: Sequence[PrivacyEvent] = ()
) -> int:
    """How many of the event's steps are possible before ``target`` is passed."""

    def kept(steps: int) -> bool:
        part = event.model_copy(update={"steps": steps})
        return epsilon([*before, part], delta) <= target

    return _largest(kept, event.steps)


def _largest(kept: Callable[[int], bool], most: int) -> int:
    if kept(most):
        return most
    low, high = 0, most
    if not kept(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def _merged(events: Sequence[PrivacyEvent]) -> dict[tuple[float, float], int]:
    found: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sampling_probability)
            found[key] = found.get(key, 0) + event.steps
    return found


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise InputError(
            "privacy cannot be accounted for: dp-accounting is not installed",
            remedy="pip install 'cenacle[privacy]'",
        ) from None
    return dp_accounting


def _accountant(method: Method) -> Any:
    library = _library()
    if method == "rdp":
        return library.rdp.RdpAccountant(list(_ORDERS))
    return library.pld.PLDAccountant(value_discretization_interval=_INTERVAL)


def _event(noise: float, probability: float) -> Any:
    library = _library()
    event = library.GaussianDpEvent(noise)
    if probability < 1:
        event = library.PoissonSampledDpEvent(probability, event)
    return event
