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
from functools import lru_cache
from typing import Any, Final, Literal

from cenacle.documents.privacy import PrivacyEvent
from cenacle.errors import InputError

__all__ = ["Method", "epsilon", "noise_multiplier_for", "spend", "steps_within"]

Method = Literal["pld", "rdp"]

_INTERVAL: Final = 1e-4
"""Of the discretized privacy loss; dp-accounting's own default."""

_HOPELESS: Final = 60.0
"""Above it no privacy is left, and a distribution of losses would take gigabytes."""

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
    bound = _finite(_renyi(merged, delta))
    if method == "rdp" or bound > _HOPELESS:
        return bound
    return min(bound, _finite(_tight(merged, delta)))


def _finite(found: float) -> float:
    return math.inf if math.isnan(found) else max(0.0, found)


def _renyi(merged: dict[tuple[float, float], int], delta: float) -> float:
    accountant = _library().rdp.RdpAccountant(list(_ORDERS))
    for (noise, probability), steps in sorted(merged.items()):
        accountant.compose(_event(noise, probability), steps)
    return float(accountant.get_epsilon(delta))


def _tight(merged: dict[tuple[float, float], int], delta: float) -> float:
    """As ``dp_accounting.pld.PLDAccountant`` composes, with each distribution computed once."""
    losses = _library().pld.privacy_loss_distribution.identity(_INTERVAL)
    for (noise, probability), steps in sorted(merged.items()):
        if probability < 1:
            part = _losses(noise, probability).self_compose(steps)
        else:
            part = _losses(noise / math.sqrt(steps), 1.0)  # Gaussians compose to a Gaussian
        losses = losses.compose(part)
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(maxsize=4)
def _losses(noise: float, probability: float) -> Any:
    """The distribution of one step's losses: most of the work, whatever the number of steps."""
    return _library().pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        sampling_prob=probability,
        value_discretization_interval=_INTERVAL,
    )


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
    also: Sequence[PrivacyEvent] = (),
    method: Method = "pld",
) -> float:
    """The smallest noise multiplier with which so many steps keep ``target`` at ``delta``.

    It is found to a thousandth, and from above: what it gives is kept.

    Args:
        also: events that are spent from the same target.

    Raises:
        InputError: no multiplier up to a million does, or an argument is out of range.
    """
    if not (target > 0 and 0 < sampling_probability <= 1 and steps >= 1):
        raise InputError(
            "no noise multiplier can be found for this",
            found=f"epsilon {target}, sampling probability {sampling_probability}, steps {steps}",
            expected="a positive epsilon, a probability above 0, at least one step",
        )

    def figure(noise: float, by: Method) -> float:
        event = PrivacyEvent(
            noise_multiplier=noise, sampling_probability=sampling_probability, steps=steps
        )
        return epsilon([event, *also], delta, method=by)

    # Renyi DP is fast and never below the truth: where it keeps the target, so does any method.
    low, high = _LEAST_NOISE, 1.0
    while figure(high, "rdp") > target:
        low, high = high, high * 2
        if high > _MOST_NOISE:
            raise InputError(
                "no noise multiplier keeps this epsilon",
                found=f"epsilon {target} at delta {delta} over {steps} steps",
                remedy="allow a larger epsilon or delta, or train for fewer steps",
            )
    high = _narrowed(lambda noise: figure(noise, "rdp"), target, low, high)
    if method == "rdp":
        return high
    return _narrowed(lambda noise: figure(noise, method), target, _LEAST_NOISE, high)


def _narrowed(figure: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least argument for which a falling figure keeps a target, to a thousandth, from above.

    Each evaluation may take seconds. A figure falls nearly as a power of the noise, so that a
    secant of logarithms needs a third of a bisection's evaluations.

    Args:
        low: where the target is passed.
        high: where it is kept.
    """
    kept = figure(high)
    slope = -1.2
    while high - low > _PRECISION * low and kept < target * (1 - _PRECISION / 2):
        aim = target * (1 - _PRECISION / 4)
        guess = high * (aim / kept) ** (1 / slope) if kept > 0 else 0.0
        if not low < guess < high:
            guess = math.sqrt(low * high)
        found = figure(guess)
        if 0 < found < math.inf and kept > 0:
            slope = min(-0.2, math.log(found / kept) / math.log(guess / high))
        if found <= target:
            high, kept = guess, found
        else:
            low = guess
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
        from absl import logging  # noqa: PLC0415 - comes with it
    except ImportError:
        raise InputError(
            "privacy cannot be accounted for: dp-accounting is not installed",
            remedy="pip install 'cenacle[privacy]'",
        ) from None
    # It warns of each order of Renyi DP that it leaves out, which only makes its bound looser.
    logging.set_verbosity(logging.ERROR)
    return dp_accounting


def _event(noise: float, probability: float) -> Any:
    library = _library()
    event = library.GaussianDpEvent(noise)
    if probability < 1:
        event = library.PoissonSampledDpEvent(probability, event)
    return event
