"""Steps of a model that is in an offload session: products outside, norms and noise inside.

Examples are clipped by norms that are taken in here, from what is in here: inputs of layers, and
gradients of their outputs. The sum of a layer's clipped gradients is one product again, which
workers compute from gradients that were scaled row by row; it comes back checked, and is
not used if it is larger than the norms in it allow.

This module knows sessions by what they offer, so that the package needs no offload engine.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn

__all__ = ["Outside", "Waiting", "outside_of", "weighted_sum"]

_ROUNDING: Final = 1e-4
"""By how much of itself a sum may exceed what its examples' norms allow, for rounding."""


class Waiting(Protocol):
    """A product with a weight, whose gradient is still to be asked for."""

    def weight_gradient(self, gy: Tensor) -> Tensor:
        """The gradient of the weight for that of the product's output, as it was computed."""
        ...


class Outside(Protocol):
    """How an offload session serves private steps."""

    def around(self) -> AbstractContextManager[None]:
        """Forward passes within are offloaded, and modes entered within see functions first."""
        ...

    def inside(self) -> AbstractContextManager[None]:
        """Forward passes within stay in this process."""
        ...

    def collecting(self) -> AbstractContextManager[list[Any]]:
        """What waits, of each product with a weight within."""
        ...


class _Nowhere:
    """No session: all of it is computed here."""

    def around(self) -> AbstractContextManager[None]:
        return nullcontext()

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def collecting(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])


def outside_of(model: nn.Module) -> Outside:
    """What serves a model's private steps; for this step only.

    Raises:
        InputError: the model is in a session under which examples cannot be clipped.
    """
    claims: Any = sys.modules.get("cenacle.offload.claims")
    session = None if claims is None else claims.session_of(model)
    return _Nowhere() if session is None else cast("Outside", session.private_passes())


def weighted_sum(
    waiting: Waiting, gradients: Tensor, factors: Tensor, squares: Tensor | None
) -> Tensor | None:
    """``sum_b factors[b] G_b`` of one layer, from workers; None if it is not to be trusted.

    Whatever passed their checks, a sum is not larger than its summands together.

    Args:
        waiting: the layer's product.
        gradients: of its output, (rows, ...), consecutive rows of an example together.
        factors: (B,), none of them zero.
        squares: (B,) squared norms of the G_b, or above them.
    """
    if squares is None:
        return None
    rows = len(gradients) // len(factors)
    each = factors.to(gradients.dtype).repeat_interleave(rows)
    found = waiting.weight_gradient(gradients * each.view(-1, *(1,) * (gradients.dim() - 1)))
    most = float((factors.double() * squares.sqrt()).sum()) * (1 + _ROUNDING)
    size = float(torch.linalg.vector_norm(found, dtype=torch.float64))
    return found if size <= most else None
