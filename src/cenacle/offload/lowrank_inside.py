"""Dense layers of few rows that stay in the enclave, at the speed at which memory is read.

With few rows (an image classifier's last layers) a product is one pass over the weight, but
BLAS rearranges the weight first, which is a pass more and one of writing. Here each product
reads the weight once, or writes its gradient once. Where the compiled kernels do not fit, torch
computes the same to rounding.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.offload.lowrank_split import compiled_kernels

__all__ = ["FewRows"]

_MOST: Final = 8
"""Rows up to which a product is bound by memory; one row alone BLAS does well."""
_LARGE: Final = 1 << 20
"""Elements of a weight from which it is worth it."""
_RUN: Final = 4096
"""Columns that are summed at once: those of 4 rows stay in the inner cache."""
_BLOCK: Final = 32
"""Rows of the weight that are added to the input's gradient at once."""
_PARTIAL: Final = 8
"""How many such blocks make a partial sum."""
_OUTER: Final = 16
"""Rows of a weight's gradient that BLAS writes at once: so few that it packs next to nothing."""


class FewRows:
    """One layer y = x w^T with x (rows, in), w (out, in).

    Args:
        buffers: where large results get their memory.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def fits(self, x: torch.Tensor, w: torch.Tensor) -> bool:
        """Whether the compiled kernels can be used."""
        return (
            x.dtype == w.dtype == torch.float32
            and 2 <= x.shape[0] <= _MOST
            and w.numel() >= _LARGE
            and w.shape[0] % _BLOCK == 0
            and w.is_contiguous()
            and self._width(w.shape[1]) > 0
            and compiled_kernels() is not None
        )

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """y (rows, out)."""
        (rows, inner), out = x.shape, w.shape[0]
        width = self._width(inner)
        found = x.new_zeros(out // 4, rows, 1, 4, 1)
        _kernels().gather(1)(
            x.detach().contiguous().view(rows, -1, width).numpy(),
            w.detach().view(out, -1, width).numpy(),
            found.numpy(),
        )
        return found.view(-1, rows, 4).permute(1, 0, 2).reshape(rows, out)

    def input_gradient(self, gy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """dx (rows, in) for gy (rows, out)."""
        (rows, out), inner = gy.shape, w.shape[1]
        fours = -(-rows // 4)
        factors = gy.new_zeros(4 * fours, out)
        factors[:rows] = gy
        # (blocks, fours, rows of a block, 1, 4)
        kernels = factors.view(fours, 4, -1, _BLOCK).permute(2, 0, 3, 1).contiguous()
        bias = gy.new_zeros(4 * fours).numpy()
        blocks = w.detach().view(-1, _BLOCK, 1, inner).numpy()
        add = _kernels().correlate(1)
        total, some = gy.new_zeros(4 * fours, 1, inner), gy.new_empty(4 * fours, 1, inner)
        # Partial sums, as BLAS has them: a single sum would round each summand to the whole.
        for start in range(0, len(blocks), _PARTIAL):
            some.zero_()
            part = slice(start, start + _PARTIAL)
            for block, kernel in zip(blocks[part], kernels[part].unsqueeze(3).numpy(), strict=True):
                add(block, kernel, bias, some.numpy(), some.numpy(), -math.inf)
            total += some
        return total[:rows, 0]

    def weight_gradient(self, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """dw (out, in)."""
        found = self._buffers.empty((gy.shape[1], x.shape[1]), gy.dtype)
        turned = gy.t()
        for start in range(0, len(found), _OUTER):
            block = slice(start, start + _OUTER)
            torch.mm(turned[block], x, out=found[block])
        return found

    @staticmethod
    def _width(inner: int) -> int:
        """In runs of how many columns to read; 0: there is none that fits."""
        for parts in range(1, inner // 16 + 1):
            if inner % parts == 0 and inner // parts <= _RUN and inner // parts % 16 == 0:
                return inner // parts
        return 0


def _kernels() -> Any:
    return compiled_kernels()
