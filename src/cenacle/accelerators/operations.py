"""The algebra itself, as any worker computes it, and the enclave too when it does its own.

Each operation takes tensors and JSON attributes and returns one tensor. Nothing here knows of
schemes, keys or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from cenacle.accelerators.protocol import Operation

__all__ = ["OPERATIONS", "execute"]

_CONVOLUTIONS: Final[dict[int, Callable[..., torch.Tensor]]] = {
    1: functional.conv1d,
    2: functional.conv2d,
}


def _matmul(
    a: torch.Tensor, b: torch.Tensor, *, transpose_a: bool = False, transpose_b: bool = False
) -> torch.Tensor:
    """(..., m, k) times (..., k, n); with transposes, of the last two dimensions."""
    return torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)


def _matmul_weight(gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x^T gy: the gradient of the right operand of ``x @ w``."""
    return torch.matmul(x.mT, gy)


def _conv(x: torch.Tensor, w: torch.Tensor, **geometry: Any) -> torch.Tensor:
    """x (batch, in, *space), w (out, in / groups, *kernel)."""
    return _CONVOLUTIONS[w.dim() - 2](x, w, None, **geometry)


def _conv_grad(
    gy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: list[bool], geometry: dict[str, Any]
) -> torch.Tensor:
    found = torch.ops.aten.convolution_backward(
        gy, x, w, None,
        geometry["stride"], geometry["padding"], geometry["dilation"],
        False, [0] * len(geometry["stride"]), geometry["groups"], mask,
    )  # fmt: skip
    result: torch.Tensor = found[0] if mask[0] else found[1]
    return result


def _conv_input(
    gy: torch.Tensor, w: torch.Tensor, *, shape: Sequence[int], **geometry: Any
) -> torch.Tensor:
    """Gradient of the input: ``shape`` is one sample's, (in, *space)."""
    x = gy.new_empty(1).expand((gy.shape[0], *shape))  # only its shape is looked at
    return _conv_grad(gy, x, w, [True, False, False], geometry)


def _conv_weight(
    gy: torch.Tensor, x: torch.Tensor, *, shape: Sequence[int], **geometry: Any
) -> torch.Tensor:
    """Gradient of the weight of the given shape (out, in / groups, *kernel)."""
    w = gy.new_empty(1).expand(tuple(shape))
    return _conv_grad(gy, x, w, [False, True, False], geometry)


OPERATIONS: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "matmul": _matmul,
    "matmul_weight": _matmul_weight,
    "conv": _conv,
    "conv_input": _conv_input,
    "conv_weight": _conv_weight,
}


@torch.no_grad()
def execute(operation: Operation, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute; raises ``KeyError`` for an unknown name, and whatever torch raises."""
    return OPERATIONS[operation.name](*operands, **operation.attributes)
