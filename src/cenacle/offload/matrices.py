"""Matrices times a few vectors, with the sums of their squares: most of a dense check's work."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, NamedTuple

import torch

__all__ = ["Multiplied", "multiply"]

_TINY: Final = 1e-30
"""Energies below are summed in float64: squares of float32 numbers may have vanished."""
_HUGE: Final = 1e36


@cache
def _compiled() -> Any:
    try:
        from cenacle.offload import compiled_matrices  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled_matrices


class Multiplied(NamedTuple):
    """A matrix, or a batch of them, times vectors.

    Attributes:
        value: (..., m, R), of the matrix's type.
        rows, columns: sums of squares along the other dimension, (..., m) and (..., n), float64.
    """

    value: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def multiply(x: torch.Tensor, vectors: torch.Tensor) -> Multiplied:
    """``x`` (..., m, n) times each of ``vectors`` (R, n), or (..., R, n) of its own each."""
    vectors = vectors.to(x.dtype)
    turned = not x.is_contiguous() and x.mT.is_contiguous()
    kernels = _compiled()
    if kernels is None or x.dtype != torch.float32 or not (turned or x.is_contiguous()):
        return _plain(x, vectors)
    source = (x.mT if turned else x).detach()
    lead = x.shape[:-2]
    m, n = x.shape[-2:]
    batch = lead.numel()
    if not batch or not m or not n:
        return _plain(x, vectors)
    value = torch.empty(batch, m, vectors.shape[-2])
    ours = torch.empty(batch, source.shape[-2], dtype=torch.float64)
    theirs = torch.empty(batch, source.shape[-1], dtype=torch.float64)
    kernel = kernels.columns_kernel() if turned else kernels.rows_kernel()
    kernel(
        source.view(batch, *source.shape[-2:]).numpy(),
        vectors.detach()
        .expand(*(lead if vectors.dim() > 2 else ()), *vectors.shape[-2:])
        .reshape(-1, *vectors.shape[-2:])
        .contiguous()
        .numpy(),
        value.numpy(),
        ours.numpy(),
        theirs.numpy(),
    )
    rows, columns = (theirs, ours) if turned else (ours, theirs)
    if not (float(rows.amin()) > _TINY and float(rows.amax()) < _HUGE):
        exact = source.double().square() if not turned else source.mT.double().square()
        rows, columns = exact.sum(-1).view(batch, m), exact.sum(-2).view(batch, n)
    return Multiplied(value.view(*lead, m, -1), rows.view(*lead, m), columns.view(*lead, n))


def _plain(x: torch.Tensor, vectors: torch.Tensor) -> Multiplied:
    squares = x.double().square()
    return Multiplied(torch.matmul(x, vectors.mT), squares.sum(-1), squares.sum(-2))
