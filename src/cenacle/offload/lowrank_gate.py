"""The gradient of a layer's output on its way out: copied, gated by a ReLU, summed, in one pass."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from cenacle.offload.kernels import move_planes
from cenacle.offload.maps import Convolution, LinearMap

__all__ = ["Memory", "gated_copy"]


class Memory(Protocol):
    """Where tensors can be made."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


def gated_copy(
    map_: LinearMap,
    gy: torch.Tensor,
    gate: torch.Tensor | None,
    where: Memory,
    *,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A copy of gy that is zero where ``gate`` is not above zero, and the bias' gradient.

    Args:
        gate: the output of the ReLU after a convolution, if there was one in the same pass.
        where: what gives the copy's memory.
        sums: whether the bias' gradient is asked for.
    """
    gy = gy.contiguous()
    copied = where.empty(tuple(gy.shape), gy.dtype)
    if not isinstance(map_, Convolution):
        return copied.copy_(gy), gy.sum(0) if sums else None
    samples, channels = gy.shape[:2]
    totals = torch.zeros(channels, dtype=torch.float64) if sums else None
    move_planes(
        gy.view(samples, channels, -1),
        copied.view(samples, channels, -1),
        np.arange(samples, dtype=np.int32),
        np.arange(channels, dtype=np.int32),
        np.ones(samples, np.float32),
        np.ones(channels, np.float32),
        sums=totals,
        gate=None if gate is None else gate.contiguous().view(samples, channels, -1),
    )
    return copied, None if totals is None else totals.to(gy.dtype)
