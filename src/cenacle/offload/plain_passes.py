"""The passes of :mod:`cenacle.offload.passes` in torch's own operations, and their contractions.

For types that are not compiled, and where numba is not installed. Arguments as there, checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from cenacle.offload.kernels import Indices, Scales

__all__ = ["Sketch", "Tally", "blind_with_torch", "unblind_with_torch"]

_NONE: Final = 4
"""Marks of pooling: 0 to 3 is where a window's largest was; then there is no gradient."""


@dataclass
class Tally:
    """A result of one repetition contracted while it is read.

    Attributes:
        r: (columns of the source), float32.
        s: (rows of the source), float64; ``bundle`` of them are added up.
        totals: (bundles, plane), float64: what :func:`unblind` found.
    """

    r: np.ndarray[Any, np.dtype[np.float32]]
    s: np.ndarray[Any, np.dtype[np.float64]]
    bundle: int
    totals: torch.Tensor


@dataclass
class Sketch:
    """An operand contracted while it is written; all in the order of the blinded tensor.

    Attributes:
        s: (rows), float64; q: (2, columns), float64.
        image: (bundles, columns, plane), float32: the sum of s_b x_b over a bundle.
        energy: (bundles, plane), float32: of ``image`` squared, the sum over columns.
        folds: (2, rows, plane), float32: for both q, the sum of q_c x[:, c]; or None.
    """

    s: torch.Tensor
    q: torch.Tensor
    bundle: int
    image: torch.Tensor
    energy: torch.Tensor
    folds: torch.Tensor | None


def unblind_with_torch(
    src: torch.Tensor,
    dst: torch.Tensor,
    into: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    bias: torch.Tensor | None,
    relu: bool,
    marks: torch.Tensor | None,
    width: int | None,
    tally: Tally | None,
) -> None:
    src = src.detach().clone()  # read once
    if tally is not None:
        found = torch.matmul(torch.from_numpy(tally.r).to(src.dtype), src).double()
        weighted = found * torch.from_numpy(tally.s)[:, None]
        for number, part in enumerate(weighted.split(tally.bundle)):  # type: ignore[no-untyped-call]
            tally.totals[number] += part.sum(0)
    scale = torch.from_numpy(row_scale)[:, None] * torch.from_numpy(col_scale)
    y = src.index_select(1, torch.from_numpy(cols)) * scale.to(src.dtype)[:, :, None]
    y += 0.0 if bias is None else bias.detach()[:, None]
    if relu:
        y = torch.where(y < 0, y.new_zeros(()), y)
    rows = torch.from_numpy(into).long()
    if width is not None:
        assert marks is not None
        height, half = y.shape[2] // width, width // 2
        windows = y.view(*y.shape[:2], height // 2, 2, half, 2).transpose(3, 4).flatten(4)
        best, code = windows[..., 0].clone(), torch.zeros(windows.shape[:-1], dtype=torch.uint8)
        for number in (1, 2, 3):
            x = windows[..., number]
            later = (x > best) | x.isnan()
            best, code = torch.where(later, x, best), code.masked_fill(later, number)
        code.masked_fill_(best <= 0, _NONE)
        room = torch.zeros(*code.shape[:-1], -(-half // 16) * 16, dtype=torch.uint8)
        room[..., :half] = code
        marks[rows] = room.flatten(2)
        y = best.flatten(2)
    elif marks is not None:
        marks[rows] = torch.from_numpy(_packed(~(y <= 0)))
    dst.detach()[rows] = y


def _packed(open_: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Booleans as bits, the first one the lowest."""
    size = open_.shape[2]
    room = np.zeros((*open_.shape[:2], -(-size // 16) * 16), np.bool_)
    room[:, :, :size] = open_.numpy()
    return np.packbits(room, axis=2, bitorder="little").view("<i2")


def blind_with_torch(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    marks: torch.Tensor | None,
    width: int | None,
    sums: torch.Tensor | None,
    sketch: Sketch | None,
) -> None:
    x = src.detach()
    if width is not None:
        assert marks is not None
        half = width // 2
        code = marks.view(*marks.shape[:2], -1, -(-half // 16) * 16)[..., :half]
        wide = x.view(*x.shape[:2], -1, half)
        each = torch.stack([torch.where(code == k, wide, 0.0) for k in range(_NONE)], -1)
        x = each.view(*each.shape[:4], 2, 2).transpose(3, 4).flatten(2)
    elif marks is not None:
        bits = np.unpackbits(marks.numpy().view(np.uint8), axis=2, bitorder="little")
        x = torch.where(torch.from_numpy(bits[:, :, : x.shape[2]]) > 0, x, x.new_zeros(()))
    if sums is not None:
        sums += x.double().sum((0, 2))
    x = x.index_select(0, torch.from_numpy(rows)).index_select(1, torch.from_numpy(cols))
    scale = torch.from_numpy(row_scale)[:, None] * torch.from_numpy(col_scale)
    dst.detach().copy_(x * scale.to(x.dtype)[:, :, None])
    if sketch is not None:
        weighted = dst.float() * sketch.s.float()[:, None, None]
        for number, part in enumerate(weighted.split(sketch.bundle)):  # type: ignore[no-untyped-call]
            sketch.image[number] = part.sum(0)
            sketch.energy[number] = sketch.image[number].square().sum(0)
        if sketch.folds is not None:
            sketch.folds[:] = torch.einsum("rc,bcp->rbp", sketch.q.float(), dst.float())
