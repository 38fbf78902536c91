"""From what the engine did to what it cost, and to a sentence that says so.

:mod:`cenacle.accounting` composes; here is what each step was, in its terms. Whatever is not known
to have been better is accounted for at its worst.
"""

from __future__ import annotations

import math

from cenacle.accounting import epsilon as _epsilon
from cenacle.documents.privacy import PrivacyEvent
from cenacle.training.privacy.record import Event, Record

__all__ = ["describe", "epsilon", "spent"]


def spent(record: Record) -> tuple[PrivacyEvent, ...]:
    """The record's events in the accountant's terms.

    * ``poisson``: every step, with its sampling probability.
    * ``shuffled``: each example is in one batch of every epoch, so it takes part in as many
      releases as epochs were begun; no amplification.
    * ``unknown``: each example may have been in every step.
    """
    return tuple(_event(event) for event in record.events)


def _event(event: Event) -> PrivacyEvent:
    noise, count = event.noise_multiplier, event.count_noise_multiplier
    if count is not None:
        # A sum of sensitivity 1 and a count of sensitivity 1/2, released together, are one
        # Gaussian release (Andrew et al. 2021, theorem 1).
        noise = (noise**-2 + (2 * count) ** -2) ** -0.5
    chosen, steps, probability = event.sampling, event.steps, 1.0
    if chosen.kind == "poisson" and chosen.rate is not None and chosen.secure:
        probability = chosen.rate
    elif chosen.kind == "shuffled" and chosen.population and chosen.batch_size:
        steps = math.ceil(steps / max(1, chosen.population // chosen.batch_size))
    return PrivacyEvent(noise_multiplier=noise, sampling_probability=probability, steps=steps)


def epsilon(record: Record, delta: float) -> float:
    """Of everything that the record holds, at ``delta``; infinity where noise was missing.

    Raises:
        InputError: ``delta`` is out of range, or ``dp-accounting`` is not installed.
    """
    if any(not event.noise_multiplier > 0 or not event.secure for event in record.events):
        return math.inf
    return _epsilon(spent(record), delta)


def describe(record: Record, delta: float) -> str:
    """The guarantee in plain words: of what, how it came about, and what it leaves out."""
    found = epsilon(record, delta)
    lines = [
        f"({found:.4g}, {delta:g})-differential privacy of the released gradients"
        if math.isfinite(found)
        else "No differential privacy: steps were without noise, or their noise was foreseeable",
        "Unit: one example. Neighbours: data sets that differ by one example's presence.",
    ]
    for event in record.events:
        chosen = event.sampling
        how = {
            "poisson": f"Poisson sampling with probability {chosen.rate:g}"
            if chosen.rate is not None
            else "Poisson sampling",
            "shuffled": f"batches of {chosen.batch_size} of a permutation, without amplification",
        }.get(chosen.kind, "unknown sampling, as if every example were in every step")
        count = (
            ""
            if event.count_noise_multiplier is None
            else f", and of the count of clipped examples {event.count_noise_multiplier:g}"
        )
        lines.append(
            f"{event.steps} steps: {how}; {event.clipping} clipping to {event.clip:g}; "
            f"Gaussian noise of {event.noise_multiplier:g} times that{count}."
        )
    lines.append(
        "Not covered: losses and norms that were looked at, buffers of the model, the choice of "
        "settings, and what else was released of the same data."
    )
    return "\n".join(lines)
