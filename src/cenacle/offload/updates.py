"""Optimizer rules, carried out on weights that only a worker has.

A rule is what ``torch.optim`` does to one parameter, written as operations of
:mod:`cenacle.accelerators.updates` in torch's own order, so that results are equal to the bit.
SGD consists of linear combinations, whose contractions the enclave follows
(:mod:`cenacle.offload.tracking`). Adam is not linear: nothing but another computation of the
same step could check it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cenacle.accelerators.protocol import Operation
from cenacle.offload.fleet import Fleet, Remote

__all__ = ["Adam", "Rule", "Sgd", "Slots", "add", "update", "zeros"]

Slots = Mapping[str, Remote]
"""An optimizer's state for one parameter, by torch's names."""


@dataclass(frozen=True)
class Sgd:
    """``torch.optim.SGD``'s settings for one parameter."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    linear = True


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam``'s, or with ``decoupled`` ``AdamW``'s.

    Attributes:
        step: number of this step, from 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    step: int

    linear = False


Rule = Sgd | Adam


def _compute(fleet: Fleet, name: str, *operands: Remote, **attributes: Any) -> Remote:
    like = operands[0]
    tracked = None
    if name == "combine" and like.tracked is not None and operands[1].tracked is not None:
        scale, alpha = attributes.get("scale", 1.0), attributes.get("alpha", 1.0)
        tracked = like.tracked.combined(operands[1].tracked, scale, alpha)
    return fleet.compute(
        Operation(name, attributes),
        *operands,
        shape=like.shape,
        dtype=like.dtype,
        role="weights",
        site=like.site,
        slot=like.slot,
        tracked=tracked,
    )


def add(fleet: Fleet, one: Remote, other: Remote) -> Remote:
    """Gradients of two uses of a weight."""
    return _compute(fleet, "combine", one, other)


def zeros(fleet: Fleet, w: Remote) -> Remote:
    """A gradient of nothing."""
    found = _compute(fleet, "zeros", w)
    if w.tracked is not None:
        found.tracked = w.tracked.combined(w.tracked, 0.0, 0.0)
    return found


def update(
    fleet: Fleet, rule: Rule, w: Remote, g: Remote, slots: Slots
) -> tuple[Remote, dict[str, Remote]]:
    """One step: the new weight and the new state, at the worker. Returns at once.

    Shapes: all as ``w``. Nothing that was there before is released.
    """
    if isinstance(rule, Sgd):
        return _sgd(fleet, rule, w, g, slots)
    return _adam(fleet, rule, w, g, slots)


def _sgd(
    fleet: Fleet, rule: Sgd, w: Remote, g: Remote, slots: Slots
) -> tuple[Remote, dict[str, Remote]]:
    after: dict[str, Remote] = {}
    if rule.weight_decay:
        g = _compute(fleet, "combine", g, w, alpha=rule.weight_decay)
    if rule.momentum:
        before = slots.get("momentum_buffer")
        velocity = g
        if before is not None:
            velocity = _compute(
                fleet, "combine", before, g, scale=rule.momentum, alpha=1 - rule.dampening
            )
        after["momentum_buffer"] = velocity
        g = (
            _compute(fleet, "combine", g, velocity, alpha=rule.momentum)
            if rule.nesterov
            else velocity
        )
    return _compute(fleet, "combine", w, g, alpha=-rule.lr), after


def _adam(
    fleet: Fleet, rule: Adam, w: Remote, g: Remote, slots: Slots
) -> tuple[Remote, dict[str, Remote]]:
    beta1, beta2 = rule.betas
    if rule.weight_decay and rule.decoupled:
        w = _compute(fleet, "scale", w, scale=1 - rule.lr * rule.weight_decay)
    elif rule.weight_decay:
        g = _compute(fleet, "combine", g, w, alpha=rule.weight_decay)
    if slots:
        first, second = slots["exp_avg"], slots["exp_avg_sq"]
    else:
        first = second = _compute(fleet, "zeros", g)
    first = _compute(fleet, "lerp", first, g, weight=1 - beta1)
    second = _compute(fleet, "second_moment", second, g, beta=beta2)
    size = rule.lr / (1 - beta1**rule.step)
    root = math.sqrt(1 - beta2**rule.step)
    w = _compute(fleet, "adam_step", w, first, second, size=size, root=root, eps=rule.eps)
    return w, {"exp_avg": first, "exp_avg_sq": second}
