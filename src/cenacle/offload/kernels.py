"""One pass over memory: permute, scale, add a bias, cut off, add up.

The enclave's part of a scheme is bound by memory traffic, so all that it does to a tensor on
its way out or in happens while it is copied. With numba this runs at copy speed; without it
torch's operations give the same numbers, to the bit, in several passes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from cenacle.errors import InputError

__all__ = ["TALL", "check_planes", "compiled_kernels", "move_planes"]

Indices = npt.NDArray[np.int32]
Scales = npt.NDArray[np.float32]

_STREAM: Final = 8 << 20
"""Bytes from which a result does not stay in the cache anyway."""
_LANES: Final = 64
TALL: Final = 4096
"""Columns up to which eight rows at once pay: beyond, their scratch leaves the inner cache."""


@cache
def compiled_kernels() -> Any:
    """The module of compiled kernels, or None where numba is not installed."""
    try:
        from cenacle.offload import compiled  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled


def move_planes(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    *,
    into: Indices | None = None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    gate: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """``dst[into[i], j, :] = row_scale[i] * col_scale[j] * src[rows[i], cols[j], :] + bias[j]``.

    Args:
        src: (rows, columns, plane), contiguous; each element is read once (with ``gate`` and
            ``sums`` too), so it may lie in memory that others can write.
        dst: (rows, ``len(cols)``, plane), contiguous, not overlapping ``src``; rows that
            ``into`` does not name stay as they are.
        rows, cols: which row and column of ``src``, int32. Repetition is allowed.
        row_scale, col_scale: float32, multiplied with each other first.
        into: which row of ``dst``, int32; 0, 1, 2, ... by default.
        bias: (columns of ``dst``), added.
        relu: replace what is below zero by zero, at last. NaN stays NaN.
        gate: like ``src``: elements where it is not above zero count as zero.
        sums: (columns of ``src``), float64: all selected elements of a column, before scaling,
            are added to it. For single numbers ``rows`` and ``cols`` should name each once.

    Raises:
        InputError: shapes or types do not fit, or an index is outside.
    """
    into = np.arange(len(rows), dtype=np.int32) if into is None else into
    check_planes(src, dst, rows, cols, row_scale, col_scale, into, bias, gate, sums)
    if not len(rows) or not dst.numel():
        return
    kernels = compiled_kernels() if src.dtype == torch.float32 else None
    lowest = 0.0 if relu else -math.inf
    if kernels is None:
        _with_torch(src, dst, rows, into, cols, row_scale, col_scale, bias, relu, gate, sums)
        return
    added = np.zeros(len(cols), np.float32) if bias is None else _array(bias)
    totals = np.empty(0) if sums is None else _array(sums)
    source, target = _array(src), _array(dst)
    gates = source if gate is None else _array(gate)
    options = {"gated": gate is not None, "summed": sums is not None}
    rest = (rows, into, cols, row_scale, col_scale, added, lowest, totals)
    if dst.shape[2] == 1:
        tall = len(rows) > 4 and src.shape[1] <= TALL
        move = kernels.columns_kernel(8 if tall else 4, **options)
        move(source[:, :, 0], target[:, :, 0], gates[:, :, 0], *rest)
    else:
        aligned = dst.data_ptr() % 64 == 0 and dst.shape[2] % 16 == 0
        move = kernels.planes_kernel(**options)
        move(source, target, gates, *rest, aligned and dst.nbytes >= _STREAM)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().numpy()


def check_planes(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    into: Indices,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    """Compiled kernels believe all of this: a wrong index would be a wild pointer."""
    shapes = src.dim() == dst.dim() == 3 and dst.shape[1:] == (len(cols), src.shape[2])
    arrays = (
        all(a.dtype == np.int32 and a.ndim == 1 and a.flags.c_contiguous for a in (rows, cols))
        and into.dtype == np.int32
        and into.flags.c_contiguous
        and len(rows) == len(into) == len(row_scale)
        and len(cols) == len(col_scale)
        and row_scale.dtype == col_scale.dtype == np.float32
        and row_scale.flags.c_contiguous
        and col_scale.flags.c_contiguous
    )
    others = (
        src.dtype == dst.dtype
        and src.device.type == dst.device.type == "cpu"
        and src.is_contiguous()
        and dst.is_contiguous()
        and (bias is None or (bias.shape == (len(cols),) and bias.dtype == src.dtype))
        and (bias is None or bias.is_contiguous())
        and (gate is None or (gate.shape == src.shape and gate.dtype == src.dtype))
        and (gate is None or gate.is_contiguous())
        and (sums is None or (sums.shape == src.shape[1:2] and sums.dtype == torch.float64))
        and (sums is None or sums.is_contiguous())
    )
    if not (shapes and arrays and others):
        raise InputError(
            "planes cannot be moved: shapes, types or layouts do not fit",
            found=f"{tuple(src.shape)} {src.dtype} to {tuple(dst.shape)} {dst.dtype}",
            expected=f"{len(rows)} rows and {len(cols)} columns, contiguous, on the CPU",
        )
    for indices, size in ((rows, src.shape[0]), (cols, src.shape[1]), (into, dst.shape[0])):
        if len(indices) and not (indices.min() >= 0 and indices.max() < size):
            raise InputError("planes cannot be moved: an index is outside", expected=f"< {size}")


def _with_torch(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    into: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    bias: torch.Tensor | None,
    relu: bool,
    gate: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    row, col = torch.from_numpy(rows), torch.from_numpy(cols)
    x = src.detach().index_select(0, row)
    if gate is not None:
        x = torch.where(gate.detach().index_select(0, row) > 0, x, x.new_zeros(()))
    if sums is not None:
        _add_up(x, col, sums)
    x = x.index_select(1, col)
    scale = torch.from_numpy(row_scale)[:, None] * torch.from_numpy(col_scale)
    y = x.mul_(scale.to(x.dtype)[:, :, None])
    y += 0.0 if bias is None else bias.detach()[:, None]
    if relu:
        y = torch.where(y < 0, y.new_zeros(()), y)
    dst.detach().index_copy_(0, torch.from_numpy(into).long(), y)


def _add_up(x: torch.Tensor, cols: torch.Tensor, sums: torch.Tensor) -> None:
    """In the order in which the compiled kernels add, so that results are equal to the bit."""
    height, width, size = x.shape
    total = sums.numpy()
    if size == 1:
        step = 8 if height > 4 and width <= TALL else 4
        for start in range(0, height, step):
            part = np.zeros(width, _array(x).dtype)
            for row in _array(x)[start : start + step, :, 0]:
                part += row
            total += part
        return
    lanes = np.zeros((height, width, -(-size // _LANES) * _LANES), _array(x).dtype)
    lanes[:, :, :size] = _array(x)
    lanes = lanes.reshape(height, width, -1, 4, _LANES // 4)
    parts = np.zeros((height, width, 4, _LANES // 4), lanes.dtype)
    for k in range(lanes.shape[2]):
        parts += lanes[:, :, k]
    left = (parts[:, :, 0] + parts[:, :, 1]) + (parts[:, :, 2] + parts[:, :, 3])
    left = left.astype(np.float64)
    while (half := left.shape[2] // 2) > 0:
        left = left[:, :, :half] + left[:, :, half:]
    for row in left[:, :, 0]:
        np.add.at(total, cols.numpy(), row[cols.numpy()])
