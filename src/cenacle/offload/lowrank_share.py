"""What the enclave itself computes of a layer whose input was split into Q V and a residual.

Shares never read the residual: y = B(R, w) + B(Q V, w) + bias, where the first term comes from
accelerators and the rest is added while their result is read, in one pass, with the ReLU that
may follow. The gradient of the weight is dw = dw_R + dw_QV, and is put together here, where
nobody else sees it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final

import torch

from cenacle.offload.lowrank_split import (
    Scratch,
    Windows,
    cosine_basis,
    fold,
    project,
    subspace,
    unfold_gradient,
)
from cenacle.offload.maps import Convolution

__all__ = ["ConvolutionShare", "DenseShare", "Share"]

_BLOCK: Final = 1 << 18
"""Elements to be worked on at once."""


class Share(ABC):
    """The enclave's part of one layer, from its forward to its backward pass.

    Attributes:
        residual: what accelerators get, of the input's shape.
    """

    residual: torch.Tensor

    @abstractmethod
    def prepare(self, w: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Fold the weight; to be done while accelerators compute.

        ``w``: (out, in), or of a convolution (out, taps, in / groups).
        """

    @abstractmethod
    def add(self, part: torch.Tensor, start: int, y: torch.Tensor, *, relu: bool = False) -> None:
        """y[start:...] = part + share: every element of ``part`` is read once.

        ``relu``: what is below zero becomes zero at last.
        """

    @abstractmethod
    def gather(self, gy: torch.Tensor) -> None:
        """Correlate the gradient of y with V."""

    @abstractmethod
    def weight_gradient(self, residual: torch.Tensor) -> torch.Tensor:
        """dw from accelerators' part of it, in place; after :meth:`gather`."""


class ConvolutionShare(Share):
    """Splits each sample (channels, positions) for itself.

    Args:
        x: (batch, in, *space), contiguous.
        residual: memory of the same shape, to be written.
        rounds: of subspace iteration; 0: the fixed cosine basis.
    """

    def __init__(
        self,
        map_: Convolution,
        x: torch.Tensor,
        w_shape: tuple[int, ...],
        residual: torch.Tensor,
        rank: int,
        rounds: int,
        scratch: Scratch,
    ) -> None:
        self.residual = residual
        self._groups, self._rank, self._scratch = map_.groups, rank, scratch
        self._windows = Windows.of(map_, tuple(x.shape), w_shape)
        batch, channels = x.shape[:2]
        planes = x.view(batch, channels, *self._windows.size)
        if rounds:
            self._basis = subspace(planes.flatten(2), rank, rounds)
        else:
            self._basis = cosine_basis(channels, rank, x.dtype)[None]
        self._factors = self._windows.padded(batch, rank, x.dtype)
        target = residual.view(planes.shape)
        for b in range(batch):
            inner = self._windows.inner(self._factors[b])
            project(planes[b], self._of(b), target[b], inner, scratch)

    def _of(self, b: int) -> torch.Tensor:
        return self._basis[b if len(self._basis) > 1 else 0]

    def _unfolded(self, b: int, start: int, end: int) -> torch.Tensor:
        """V's windows and a row of ones, for the bias: (taps * rank + 1, positions)."""
        size = self._windows.taps * self._rank
        columns = (end - start) * self._windows.out[1]
        into = self._scratch.take("windows", size + 1, columns, dtype=self._factors.dtype)
        self._windows.unfold(self._factors[b], start, end, into[:size])
        into[size] = 1
        return into

    def prepare(self, w: torch.Tensor, bias: torch.Tensor | None) -> None:
        out, taps, _ = w.shape
        folded = fold(w, self._basis, self._groups)
        bases = len(self._basis)
        self._correlate = self._windows.correlation(out, w.dtype)
        if self._correlate is not None:
            self._bias = w.new_zeros(out) if bias is None else bias.detach().contiguous()
            self._kernels = w.new_empty(bases, out // 4, self._rank, taps, 4)
            self._kernels.copy_(
                folded.reshape(bases, -1, 4, taps, self._rank).permute(0, 1, 4, 3, 2)
            )
        else:
            self._kernels = w.new_empty(bases, out, taps * self._rank + 1)
            self._kernels[:, :, :-1].view(bases, out, taps, self._rank).copy_(folded)
            self._kernels[:, :, -1] = 0 if bias is None else bias

    def add(self, part: torch.Tensor, start: int, y: torch.Tensor, *, relu: bool = False) -> None:
        lowest = 0.0 if relu else -math.inf
        for i in range(len(part)):
            kernels = self._kernels[(start + i) % len(self._kernels)]
            if self._correlate is not None:
                planes = (y.shape[1], *self._windows.out)
                self._correlate(
                    self._factors[start + i].numpy(),
                    kernels.numpy(),
                    self._bias.numpy(),
                    part[i].contiguous().view(planes).numpy(),
                    y[start + i].view(planes).numpy(),
                    lowest,
                )
            else:
                self._multiply(start + i, kernels, part[i], y[start + i], relu=relu)

    def _multiply(
        self, b: int, kernels: torch.Tensor, part: torch.Tensor, y: torch.Tensor, *, relu: bool
    ) -> None:
        """One sample of :meth:`add` as products of matrices."""
        (height, width), out = self._windows.out, len(y)
        rows = self._windows.rows(out, self._rank)
        theirs, ours = part.reshape(out, -1), y.view(out, -1)
        for top in range(0, height, rows):
            end = min(top + rows, height)
            block = slice(top * width, end * width)
            torch.addmm(theirs[:, block], kernels, self._unfolded(b, top, end), out=ours[:, block])
            if relu:
                ours[:, block].clamp_min_(0)

    def gather(self, gy: torch.Tensor) -> None:
        batch, out = gy.shape[:2]
        taps, bases, rank = self._windows.taps, len(self._basis), self._rank
        compiled = self._windows.gathering(out, gy.dtype)
        if compiled is not None:
            side = self._windows.kernel[0]
            sums = self._scratch.take("sums", bases, out // 4, rank, side, 4, side, dtype=gy.dtype)
            sums.zero_()
            for b in range(batch):
                planes = gy[b].view(out, *self._windows.out)
                compiled(self._factors[b].numpy(), planes.numpy(), sums[b % bases].numpy())
            ordered = sums.permute(1, 4, 3, 5, 0, 2)
        else:
            ordered = self._gather_unfolded(gy).permute(1, 2, 0, 3)
        self._gathered = ordered.reshape(out, taps, bases * rank)

    def _gather_unfolded(self, gy: torch.Tensor) -> torch.Tensor:
        """:meth:`gather` as products of matrices: (bases, out, taps, rank)."""
        batch, out = gy.shape[:2]
        taps, width = self._windows.taps, self._windows.out[1]
        rows = self._windows.rows(out, self._rank)
        bases = len(self._basis)
        found = gy.new_zeros(bases, out, taps * self._rank)
        for b in range(batch):
            own, flat = found[b % bases], gy[b].view(out, -1)
            for top in range(0, self._windows.out[0], rows):
                end = min(top + rows, self._windows.out[0])
                unfolded = self._unfolded(b, top, end)[:-1]
                own.addmm_(flat[:, top * width : end * width], unfolded.t())
        return found.view(bases, out, taps, self._rank)

    def weight_gradient(self, residual: torch.Tensor) -> torch.Tensor:
        out, width = residual.shape[:2]
        into = residual.view(out, width, self._windows.taps)
        unfold_gradient(self._gathered, self._basis, self._groups, self._scratch, into)
        return residual


class DenseShare(Share):
    """Splits all rows together, because rows (tokens) have no space of their own.

    Args:
        x: (rows, in), contiguous.
        residual: memory of the same shape, to be written.
        rounds: of subspace iteration; 0: the fixed cosine basis.
    """

    def __init__(self, x: torch.Tensor, residual: torch.Tensor, rank: int, rounds: int) -> None:
        self.residual = residual
        rows, width = x.shape
        if rounds:
            self._basis = subspace(x.t()[None], rank, rounds)[0]
        else:
            self._basis = cosine_basis(width, rank, x.dtype)
        self._factors = x.new_empty(rows, rank + 1)
        self._factors[:, rank] = 1
        step = max(1, _BLOCK // width)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            along = torch.mm(x[block], self._basis)
            # Not addmm(out=): it would first copy X itself to where workers can read it.
            torch.sub(x[block], torch.mm(along, self._basis.t()), out=residual[block])
            self._factors[block, :rank] = along

    def prepare(self, w: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels = w.new_empty(w.shape[0], self._factors.shape[1])
        self._kernels[:, :-1] = torch.mm(w, self._basis)
        self._kernels[:, -1] = 0 if bias is None else bias

    def add(self, part: torch.Tensor, start: int, y: torch.Tensor, *, relu: bool = False) -> None:
        step = max(1, _BLOCK // y.shape[1])
        for row in range(0, part.shape[0], step):
            theirs = part[row : row + step]
            own = slice(start + row, start + row + len(theirs))
            torch.addmm(theirs, self._factors[own], self._kernels.t(), out=y[own])
            if relu:
                y[own].clamp_min_(0)

    def gather(self, gy: torch.Tensor) -> None:
        self._gathered = torch.mm(gy.t(), self._factors[:, :-1])

    def weight_gradient(self, residual: torch.Tensor) -> torch.Tensor:
        return residual.addmm_(self._gathered, self._basis.t())
