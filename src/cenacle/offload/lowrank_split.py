"""Splitting tensors into a low-rank part and a residual, and convolving with the low-rank part.

A sample X (channels, positions) becomes X = Q V + R: Q (channels, rank) has orthonormal
columns, V = Q^T X, and R = X - Q V. The sum is X to rounding whatever Q is; Q decides only how
much of X is left in R. Q comes from subspace iteration (block power method, Halko, Martinsson
and Tropp, 2011) on an evenly spread subset of the positions, started from means of groups of
channels, so that X itself is read once: where V is computed, R is written, block by block, and
a block stays in the cache.

A convolution with Q V is one with V and kernels folded over the channels,
``folded[o, k, i] = sum_c w[o, c, k] Q[c, i]``: a product of matrices over V's windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from cenacle.offload.maps import Convolution

__all__ = [
    "Scratch",
    "Windows",
    "compiled_kernels",
    "cosine_basis",
    "fold",
    "group_basis",
    "project",
    "subspace",
    "turn",
    "unfold_gradient",
]

_RUN: Final = 16
"""Positions in a run of the subset: one cache line of float32."""
_SUBSET: Final = 1024
"""A sample with fewer positions is looked at whole."""
_BLOCK: Final = 1 << 18
"""Elements of a block of X, and of what is computed from it at once."""
_NARROWEST: Final = 16
"""Numbers in a vector; narrower outputs are left to products of matrices."""
_LARGEST: Final = 7
"""Side of a kernel up to which the correlation is compiled."""
_GATHERED: Final = 3
"""As _LARGEST, for the gradient: sums of a larger kernel would not stay in registers."""


class Scratch:
    """Memory that is used again and again within one thread, by name."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with undefined content, valid until the name is taken again."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


@cache
def cosine_basis(channels: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The first ``rank`` vectors of the DCT-II over channels, orthonormal (channels, rank).

    For red, green and blue these are intensity, red minus blue and 2 green - red - blue, in the
    order of their energy in natural pictures (Ohta, Kanade and Sakai, 1980).
    """
    places = torch.arange(channels, dtype=torch.float64)[:, None] + 0.5
    basis = torch.cos(math.pi / channels * places * torch.arange(rank, dtype=torch.float64))
    unit: torch.Tensor = basis / basis.square().sum(0).sqrt()
    return unit.to(dtype)


@cache
def group_basis(channels: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Means of ``rank`` groups of neighbouring channels: orthonormal (channels, rank)."""
    basis = torch.zeros(channels, rank, dtype=torch.float64)
    for i in range(rank):
        start, end = i * channels // rank, (i + 1) * channels // rank
        basis[start:end, i] = 1 / math.sqrt(end - start)
    return basis.to(dtype)


def _subset(x: torch.Tensor) -> torch.Tensor:
    """Runs of positions, evenly spread: (batch, channels, positions) to about ``_SUBSET``.

    Which ones depends on the shape alone: the same sample must always be split alike, because
    two residuals of one sample under different Q give the sample away.
    """
    positions = x.shape[2]
    runs = positions // _RUN
    step = positions // _SUBSET
    if step < 2:
        return x
    if step % 2 == 0:
        step += 1  # even steps meet the same columns of a picture again and again
    spread = x[:, :, : runs * _RUN].reshape(*x.shape[:2], runs, _RUN)[:, :, ::step]
    return spread.reshape(*x.shape[:2], -1)


def subspace(x: torch.Tensor, rank: int, rounds: int) -> torch.Tensor:
    """Where most of each sample's energy lies: orthonormal (batch, channels, rank).

    Args:
        x: (batch, channels, positions), strides as they are; rank at most channels, positions.
        rounds: of subspace iteration; each reads the subset of positions twice.
    """
    seen = _subset(x)
    basis = group_basis(x.shape[1], rank, x.dtype).expand(x.shape[0], -1, -1)
    for _ in range(rounds):
        along = torch.bmm(basis.mT, seen)
        basis = torch.linalg.qr(torch.bmm(seen, along.mT))[0]
    return basis


@cache
def compiled_kernels() -> Any:
    """The module of compiled kernels, or None where numba is not installed."""
    try:
        from cenacle.offload import lowrank_compiled  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return lowrank_compiled


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def project(
    x: torch.Tensor,
    basis: torch.Tensor,
    residual: torch.Tensor,
    factors: torch.Tensor,
    scratch: Scratch,
) -> None:
    """One sample: write V = Q^T X into ``factors`` and R = X - Q V into ``residual``.

    Args:
        x, residual: (channels, height, width), contiguous.
        basis: (channels, rank).
        factors: (rank, height, width), any strides.
    """
    channels, height, width = x.shape
    module = compiled_kernels() if x.dtype == torch.float32 else None
    if module is not None and channels % 4 == 0 and height * width >= _NARROWEST:
        _project_compiled(module, x, basis, residual, factors, scratch)
        return
    rows = min(height, max(1, _BLOCK // (channels * width)))
    flat, rest = x.view(channels, -1), residual.view(channels, -1)
    for start in range(0, height, rows):
        end = min(start + rows, height)
        columns = slice(start * width, end * width)
        along = torch.mm(basis.t(), flat[:, columns])
        # Not addmm(out=): it would first copy X itself to where workers can read it.
        torch.sub(flat[:, columns], torch.mm(basis, along), out=rest[:, columns])
        factors[:, start:end].copy_(along.view(-1, end - start, width))


def _project_compiled(
    module: Any,
    x: torch.Tensor,
    basis: torch.Tensor,
    residual: torch.Tensor,
    factors: torch.Tensor,
    scratch: Scratch,
) -> None:
    (channels, rank), positions = basis.shape, x[0].numel()
    fours = _up(rank, 4)
    wide = scratch.take("basis", channels, fours, dtype=x.dtype)
    wide[:, :rank], wide[:, rank:] = basis, 0
    along = scratch.take("along", fours // 4, channels, 1, 4, dtype=x.dtype)
    along.view(-1, channels, 4).copy_(wide.view(channels, -1, 4).transpose(0, 1))
    across = scratch.take("across", channels // 4, fours, 1, 4, dtype=x.dtype)
    across.view(-1, fours, 4).copy_(wide.view(-1, 4, fours).mT).neg_()
    found = scratch.take("factors", fours, positions, dtype=x.dtype)
    rest = residual.view(channels, -1)
    stream = positions % 16 == 0 and rest.data_ptr() % 64 == 0
    module.project(stream=stream)(
        x.view(channels, -1).numpy(), along.numpy(), across.numpy(), found.numpy(), rest.numpy()
    )
    factors.copy_(found[:rank].view(factors.shape))


def turn(w: torch.Tensor) -> torch.Tensor:
    """w (out, in / groups, *kernel) as (out, taps, in / groups): for products over channels."""
    return w.detach().flatten(2).mT.contiguous()


def fold(turned: torch.Tensor, basis: torch.Tensor, groups: int) -> torch.Tensor:
    """Kernels for V: ``turned`` (out, taps, in / groups), basis (batch, in, rank).

    Returns (batch, out, taps, rank) for ``batch`` bases, a view.
    """
    out, taps, width = turned.shape
    batch, _, rank = basis.shape
    sides = basis.view(batch, groups, width, rank).permute(1, 2, 0, 3)
    sides = sides.reshape(groups, width, batch * rank)
    folded = torch.bmm(turned.view(groups, -1, width), sides)
    return folded.view(out, taps, batch, rank).permute(2, 0, 1, 3)


def unfold_gradient(
    gathered: torch.Tensor, basis: torch.Tensor, groups: int, scratch: Scratch, into: torch.Tensor
) -> None:
    """The reverse of :func:`fold`: add the gradient of w to ``into`` (out, in / groups, taps).

    ``gathered``: (out, taps, batch * rank), basis (batch, in, rank).
    """
    out, width, taps = into.shape
    batch, _, rank = basis.shape
    sides = basis.view(batch, groups, width, rank).permute(1, 0, 3, 2)
    sides = sides.reshape(groups, batch * rank, width)
    each = out // groups
    step = min(each, max(1, _BLOCK // (4 * width * taps)))  # what is turned stays in the cache
    for group in range(groups):
        for start in range(group * each, (group + 1) * each, step):
            end = min(start + step, (group + 1) * each)
            own = scratch.take("gradient", end - start, taps, width, dtype=into.dtype)
            rows = gathered[start:end].reshape(-1, batch * rank)
            torch.mm(rows, sides[group], out=own.view(-1, width))
            into[start:end] += own.mT


@dataclass(frozen=True)
class Windows:
    """Windows of a convolution over V; one dimension of space is two with a height of 1."""

    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, map_: Convolution, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> Windows:
        def two(values: tuple[int, ...], filler: int) -> tuple[int, int]:
            return (values[0], values[1]) if len(values) > 1 else (filler, values[0])

        return cls(
            two(tuple(x_shape[2:]), 1),
            two(map_.space(x_shape, w_shape), 1),
            two(tuple(w_shape[2:]), 1),
            two(map_.stride, 1),
            two(map_.padding, 0),
            two(map_.dilation, 1),
        )

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def padded(self, batch: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros (batch, rank, height + 2 padding, width + 2 padding); 16 more lie behind them."""
        height, width = (s + 2 * p for s, p in zip(self.size, self.padding, strict=True))
        memory = torch.zeros(batch * rank * height * width + _NARROWEST, dtype=dtype)
        return memory[:-_NARROWEST].view(batch, rank, height, width)

    def inner(self, padded: torch.Tensor) -> torch.Tensor:
        """Of one padded V (rank, ...): what is not padding."""
        (top, left), (height, width) = self.padding, self.size
        return padded[:, top : top + height, left : left + width]

    def correlation(self, out: int, dtype: torch.dtype) -> Any:
        """The compiled correlation for these windows, or None: then :meth:`unfold` them."""
        if self.out[1] < _NARROWEST:
            return None
        module = self._module(out, dtype)
        return None if module is None else module.correlate(self.kernel[0])

    def gathering(self, out: int, dtype: torch.dtype) -> Any:
        """The compiled gradient for these windows, or None."""
        if self.out[1] < _NARROWEST // 2 or self.kernel[0] > _GATHERED:
            return None
        module = self._module(out, dtype)
        return None if module is None else module.gather(self.kernel[0])

    def _module(self, out: int, dtype: torch.dtype) -> Any:
        fits = out % 4 == 0 and self.kernel[0] == self.kernel[1] <= _LARGEST
        if not fits or self.stride != (1, 1) or self.dilation != (1, 1):
            return None
        return compiled_kernels() if dtype == torch.float32 else None

    def rows(self, channels: int, rank: int) -> int:
        """How many rows of the output to compute at once."""
        width = (channels + rank * self.taps) * self.out[1]
        return min(self.out[0], max(1, _BLOCK // width))

    def unfold(self, padded: torch.Tensor, start: int, end: int, into: torch.Tensor) -> None:
        """Windows of one padded V for rows [start, end) of the output.

        ``into``: (taps * rank, (end - start) * width of the output).
        """
        rank, _, row = padded.shape
        plane, column = padded.stride(0), padded.stride(2)
        assert padded.stride(1) == row
        assert column == 1
        shape = (*self.kernel, rank, end - start, self.out[1])
        strides = (
            self.dilation[0] * row,
            self.dilation[1],
            plane,
            self.stride[0] * row,
            self.stride[1],
        )
        offset = padded.storage_offset() + start * self.stride[0] * row
        into.view(shape).copy_(padded.as_strided(shape, strides, offset))
