"""What optimizers do to a weight, element by element: the update operations of a worker.

Every one of these commutes with a permutation of elements, and all but :func:`_second_moment`
and :func:`_adam_step` are linear, so that they commute with signs too. They round as
``torch.optim`` does for single tensors, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

__all__ = ["UPDATES"]


def _identity(x: torch.Tensor) -> torch.Tensor:
    """To ask for what a worker keeps, as for any other result."""
    return x


def _clone(x: torch.Tensor) -> torch.Tensor:
    """Memory of the worker's own, for what was sent and is to stay."""
    return x.clone()


def _combine(
    x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """scale x + alpha y; all of SGD consists of it."""
    return (x if scale == 1 else x.mul(scale)).add(y, alpha=alpha)


def _zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def _scale(x: torch.Tensor, *, scale: float) -> torch.Tensor:
    return x.mul(scale)


def _lerp(x: torch.Tensor, y: torch.Tensor, *, weight: float) -> torch.Tensor:
    """x + weight (y - x): Adam's first moment."""
    return x.lerp(y, weight)


def _second_moment(v: torch.Tensor, g: torch.Tensor, *, beta: float) -> torch.Tensor:
    return v.mul(beta).addcmul(g, g, value=1 - beta)


def _adam_step(
    w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, size: float, root: float, eps: float
) -> torch.Tensor:
    """w - size m / (sqrt(v) / root + eps); ``size`` and ``root`` are corrected for bias."""
    return w.addcdiv(m, (v.sqrt() / root).add_(eps), value=-size)


UPDATES: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "identity": _identity,
    "clone": _clone,
    "combine": _combine,
    "zeros": _zeros,
    "scale": _scale,
    "lerp": _lerp,
    "second_moment": _second_moment,
    "adam_step": _adam_step,
}
