"""One pass over memory for a convolution and what surrounds it: ReLU, pooling, contractions.

As :mod:`cenacle.offload.kernels`, for images: the enclave's part of a step is bound by memory
traffic, so everything that happens to a tensor at the border happens while it crosses.

On the way in (:func:`unblind`) a result gets its bias, its ReLU and perhaps 2 x 2 maximum pooling;
of what the backward pass needs only *marks* stay: a bit for each number, or a byte for each window.
On the way out (:func:`blind`) marks decide where a gradient passes. Both can contract what they
move with secret vectors, for Freivalds' check. Where the kernels of
:mod:`cenacle.offload.compiled_passes` cannot run, torch computes the same, up to the order in
which sums are added.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import InputError
from cenacle.offload.kernels import Indices, Scales
from cenacle.offload.plain_passes import Sketch, Tally, blind_with_torch, unblind_with_torch

__all__ = ["Sketch", "Tally", "blind", "compiled", "marks_for", "sketch_for", "unblind"]

_STREAM: Final = 8 << 20
_BLOCK: Final = 4096
"""Numbers of a plane that are contracted at a time: their sums stay in the inner cache."""


@cache
def compiled() -> Any:
    """The module of compiled passes, or None where numba is not installed."""
    try:
        from cenacle.offload import compiled_passes  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled_passes


def _fast(tensor: torch.Tensor) -> Any:
    return compiled() if tensor.dtype == torch.float32 else None


def marks_for(
    rows: int, cols: int, plane: int, width: int | None, buffers: Buffers
) -> torch.Tensor:
    """Room for marks: bits in words of 16, or bytes, if images of ``width`` are pooled."""
    if width is None:
        words = -(-plane // 16)
        count = rows * cols * words
        room = buffers.empty((-(-count // 2),), torch.float32).view(torch.int16)
        return room[:count].view(rows, cols, words)
    each = plane // (2 * width) * (-(-width // 32) * 16)
    room = buffers.empty((-(-rows * cols * each // 4),), torch.float32).view(torch.uint8)
    return room[: rows * cols * each].view(rows, cols, each)


def sketch_for(
    rows: int,
    cols: int,
    plane: int,
    s: torch.Tensor,
    q: torch.Tensor,
    bundle: int,
    buffers: Buffers,
    *,
    folded: bool = True,
) -> Sketch:
    """Room for a sketch with the secrets ``s`` and ``q``."""
    bundles = -(-rows // bundle)
    image = buffers.empty((bundles, cols, plane))
    energy = buffers.empty((bundles, plane)).zero_()
    folds = buffers.empty((2, rows, plane)).zero_() if folded else None
    return Sketch(s, q, bundle, image, energy, folds)


# ---------------------------------------------------------------------- in


def unblind(
    src: torch.Tensor,
    dst: torch.Tensor,
    into: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    *,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    marks: torch.Tensor | None = None,
    width: int | None = None,
    tally: Tally | None = None,
) -> None:
    """``dst[into[i], j] = pool(relu(row_scale[i] * col_scale[j] * src[i, cols[j]] + bias[j]))``.

    Args:
        src: (rows, columns, plane), contiguous; each element is read once, so it may lie in
            memory that others can write.
        dst: (rows, ``len(cols)``, plane), or a quarter of the plane if pooled, contiguous.
        into, cols: int32. row_scale, col_scale: float32.
        bias: (columns of ``dst``).
        relu: replace what is below zero by zero. NaN stays NaN.
        marks: from :func:`marks_for`, for ``dst``; rows like those of ``dst``.
        width: pool images of this width, even as their height, by windows of 2 x 2. Of
            several largest the first is marked; NaN counts as the largest, as in torch.
        tally: contract ``src``.

    Raises:
        InputError: shapes or types do not fit, or an index is outside.
    """
    rows, plane = src.shape[0], src.shape[2]
    _check(src, dst, into, cols, (row_scale, rows), (col_scale, len(cols)), bias)
    pooled = width is not None
    expected = plane // 4 if pooled else plane
    fits = (
        len(into) == rows
        and dst.shape[1:] == (len(cols), expected)
        and (width is None or (plane % (2 * width) == 0 and width % 2 == 0))
        and (marks is not None if pooled else True)
        and (marks is None or _marks_fit(marks, dst.shape, plane, width))
        and (tally is None or (len(tally.r), len(tally.s)) == (src.shape[1], rows))
    )
    _inside(fits, (into, dst.shape[0]), (cols, src.shape[1]))
    if not rows or not dst.numel():
        return
    module = _fast(src)
    lowest = 0.0 if relu else -math.inf
    if module is None:
        unblind_with_torch(
            src, dst, into, cols, row_scale, col_scale, bias, relu, marks, width, tally
        )
        return
    kernel = module.unblind_kernel(
        checked=tally is not None, marked=marks is not None and not pooled, pooled=pooled
    )
    added = np.zeros(len(cols), np.float32) if bias is None else bias.detach().numpy()
    r, s, bundle, totals = _NO_TALLY if tally is None else (
        tally.r, tally.s, tally.bundle, tally.totals.numpy()
    )  # fmt: skip
    if tally is None:
        r, s = np.zeros(src.shape[1], np.float32), np.zeros(rows)
    block = plane if tally is None else _BLOCK
    if width is not None:
        block = max(1, block // (2 * width)) * 2 * width
    stream = dst.nbytes >= _STREAM and dst.data_ptr() % 64 == 0 and plane % 16 == 0
    kernel(
        src.detach().numpy(), dst.detach().numpy(),
        (_NO_CODES if pooled else _NO_BITS) if marks is None else marks.numpy(),
        into, cols, row_scale, col_scale, added, lowest, width or 0, block, r, s, bundle, totals,
        stream and not pooled,
    )  # fmt: skip


_NO_BITS: Final = np.zeros((1, 1, 1), np.int16)
_NO_CODES: Final = np.zeros((1, 1, 1), np.uint8)
_NO_TALLY: Final = (np.zeros(1, np.float32), np.zeros(1), 1, np.zeros((1, 1)))
_NO_SKETCH: Final = (
    np.zeros(1, np.float32), np.zeros((2, 1), np.float32), np.zeros((1, 1, 1), np.float32),
    np.zeros((1, 1), np.float32), np.zeros((2, 1, 1), np.float32),
)  # fmt: skip


def _check(
    src: torch.Tensor,
    dst: torch.Tensor,
    picked: Indices,
    cols: Indices,
    row_scale: tuple[Scales, int],
    col_scale: tuple[Scales, int],
    bias: torch.Tensor | None = None,
) -> None:
    """Compiled passes believe all of this: a wrong index would be a wild pointer."""
    fits = (
        src.dim() == dst.dim() == 3
        and src.dtype == dst.dtype
        and src.device.type == dst.device.type == "cpu"
        and src.is_contiguous()
        and dst.is_contiguous()
        and all(
            a.dtype == np.int32 and a.ndim == 1 and a.flags.c_contiguous for a in (picked, cols)
        )
        and all(
            a.dtype == np.float32 and a.flags.c_contiguous and a.shape == (size,)
            for a, size in (row_scale, col_scale)
        )
        and (
            bias is None
            or (bias.shape == (len(cols),) and bias.dtype == src.dtype and bias.is_contiguous())
        )
    )
    if not fits:
        raise InputError(
            "planes cannot be moved: shapes, types or layouts do not fit",
            found=f"{tuple(src.shape)} {src.dtype} to {tuple(dst.shape)} {dst.dtype}",
            expected="contiguous, on the CPU, with one scale for each row and column",
        )


def _marks_fit(marks: torch.Tensor, rows: torch.Size, plane: int, width: int | None) -> bool:
    words = -(-plane // 16) if width is None else plane // (2 * width) * (-(-width // 32) * 16)
    return (
        tuple(marks.shape) == (rows[0], rows[1], words)
        and marks.dtype == (torch.int16 if width is None else torch.uint8)
        and marks.is_contiguous()
    )


def _inside(fits: bool, *indices: tuple[Indices, int]) -> None:
    if not fits or any(len(i) and not (i.min() >= 0 and i.max() < size) for i, size in indices):
        raise InputError("planes cannot be moved: a shape does not fit, or an index is outside")


# ---------------------------------------------------------------------- out


def blind(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    *,
    marks: torch.Tensor | None = None,
    width: int | None = None,
    sums: torch.Tensor | None = None,
    sketch: Sketch | None = None,
) -> None:
    """``dst[i, j] = row_scale[i] * col_scale[j] * gated(src[rows[i], cols[j]])``.

    Args:
        src: (rows, columns, plane), or a quarter of the plane if it was pooled; contiguous.
        dst: (``len(rows)``, ``len(cols)``, plane), contiguous, not overlapping ``src``.
        rows, cols: int32, each names every row or column once.
        marks: for ``src``, as :func:`unblind` left them: what is not open counts as zero.
        width: the pooled images'.
        sums: (columns of ``src``), float64: what is open of a column is added to it.
        sketch: contract ``dst``.

    Raises:
        InputError: shapes or types do not fit, or an index is outside.
    """
    count, columns, plane = dst.shape
    _check(src, dst, rows, cols, (row_scale, count), (col_scale, columns))
    scattered = width is not None
    fits = (
        (len(rows), len(cols)) == (count, columns)
        and src.shape[2] == (plane // 4 if scattered else plane)
        and (width is None or (plane % (2 * width) == 0 and width % 2 == 0))
        and (marks is not None if scattered else True)
        and (marks is None or _marks_fit(marks, src.shape, plane, width))
        and (sums is None or (sums.shape == src.shape[1:2] and sums.dtype == torch.float64))
        and (sketch is None or sketch.image.shape[1:] == dst.shape[1:])
        and (sketch is None or sketch.folds is None or sketch.folds.shape == (2, count, plane))
        and (sketch is None or len(sketch.image) == -(-count // sketch.bundle))
    )
    _inside(fits, (rows, src.shape[0]), (cols, src.shape[1]))
    if not dst.numel():
        return
    module = _fast(src)
    if module is None:
        blind_with_torch(src, dst, rows, cols, row_scale, col_scale, marks, width, sums, sketch)
        return
    gate = "" if marks is None else "codes" if scattered else "bits"
    folded = sketch is not None and sketch.folds is not None
    kernel = module.blind_kernel(
        gate=gate, summed=sums is not None, checked=sketch is not None, folded=folded
    )
    bundle, block = 8, plane
    s, q, image, energy, folds = _NO_SKETCH
    if sketch is None:
        s, q = np.zeros(count, np.float32), np.zeros((2, columns), np.float32)
    else:
        s, q = sketch.s.float().numpy(), sketch.q.float().numpy()
        bundle = sketch.bundle
        image, energy = sketch.image.numpy(), sketch.energy.numpy()
        if sketch.folds is not None:
            folds = sketch.folds.numpy()
        block = max(512, _BLOCK * 2 // min(count, bundle)) // 16 * 16
    if width is not None:
        block = max(1, block // (2 * width)) * 2 * width
    stream = dst.nbytes >= _STREAM and dst.data_ptr() % 64 == 0
    stream = stream and (plane if width is None else width) % 16 == 0
    none = _NO_CODES if scattered else _NO_BITS
    kernel(
        src.detach().numpy(), dst.detach().numpy(), none if marks is None else marks.numpy(),
        rows, cols, row_scale, col_scale, width or 0, block,
        np.zeros(src.shape[1]) if sums is None else sums.numpy(), s, q, bundle,
        image, energy, folds, stream,
    )  # fmt: skip
