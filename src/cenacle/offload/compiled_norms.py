"""Batch normalisation as machine code, through numba: what torch does in five passes, in three.

As :mod:`cenacle.offload.compiled_passes`, with the same building blocks: vectors of 16 numbers,
on one thread, without the GIL, and arguments that :mod:`cenacle.offload.norms` has checked. Sums
are of 64 partial sums in float32 for each plane, and in float64 from there on.
"""

# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, assignment"
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from cenacle.offload.compiled import _splat, _total
from cenacle.offload.compiled_steps import _lanes, _open, _read, _write

__all__ = ["gradient_kernel", "moments_kernel", "normalise_kernel", "sums_kernel"]

_V: Final = ir.VectorType(ir.FloatType(), 16)
_ZERO: Final = ir.Constant(_V, [0.0] * 16)
_MASK: Final = ir.VectorType(ir.IntType(1), 16)
_WORD: Final = ir.IntType(16)
_PLANES: Final = "f4[:,:,::1]"
_MARKS: Final = "i2[:,:,::1]"


def _more(b, x, address, mask=None):
    """Add to partial sums; lanes that are not in the mask add nothing."""
    if mask is not None:
        x = b.select(mask, x, _ZERO)
    _write(b, b.fadd(_read(b, address, None), x), address, None)


def _affine(b, y, mean, scale, shift):
    """(y - mean) * scale + shift."""
    return b.fadd(b.fmul(b.fsub(y, mean), scale), shift)


def _gated(b, x, y, marks, lowest, numbers):
    """A gradient where it passes: where a bit is set, and the normalised y is above ``lowest``.

    All is above NaN, and NaN above all, so NaN as ``lowest`` lets everything pass.
    """
    word = b.load(b.inttoptr(marks, _WORD.as_pointer()))
    word.align = 2
    above = b.fcmp_unordered(">", _affine(b, y, *numbers), lowest)
    return b.select(b.and_(b.bitcast(word, _MASK), above), x, _ZERO)


@register_jitable
def _extent(y):
    """Samples, channels and the size of a plane, signed as everything that indices are made of."""
    return np.int64(y.shape[0]), np.int64(y.shape[1]), np.int64(y.shape[2])


@register_jitable
def _place(there, array, spare, width):
    """Where an operand begins and how far apart its elements are, in bytes.

    One that is not there is read, or written, in one spare place that stays in the cache.
    """
    if there:
        return np.int64(array.ctypes.data), np.int64(width)
    return np.int64(spare.ctypes.data), np.int64(0)


# ------------------------------------------------------------------ moments


def _moment_step(*, squared, tail=False):
    @intrinsic
    def step(typing, source, parts, mean, count):
        def build(context, b, signature, arguments):
            source, parts, mean, count = arguments
            mask = _lanes(b, count) if tail else None
            x = _read(b, source, mask)
            if squared:
                x = b.fsub(x, _splat(b, mean, _V))
                x = b.fmul(x, x)
            _more(b, x, parts, mask)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.float32, types.int64), build

    return step


@cache
def moments_kernel() -> Any:
    """``f(y, mean, squares)``: of each channel the mean, and the sum of squares around it.

    ``y`` float32 (samples, channels, plane), the others float64 (channels). In two passes, the
    second of which finds a channel's planes in the cache.
    """
    add, add_rest = _moment_step(squared=False), _moment_step(squared=False, tail=True)
    square, square_rest = _moment_step(squared=True), _moment_step(squared=True, tail=True)
    zero = np.int64(0)

    @numba.njit(f"void({_PLANES}, f8[::1], f8[::1])", nogil=True, error_model="numpy")
    def moments(y, mean, squares):
        samples, channels, size = _extent(y)
        full = size // 16 * 16
        room = np.zeros(64, np.float32)
        parts, origin = np.int64(room.ctypes.data), np.int64(y.ctypes.data)
        for c in range(channels):
            total = 0.0
            for i in range(samples):
                at = origin + (i * channels + c) * size * 4
                for p in range(zero, full, 16):
                    add(at + p * 4, parts + (p & 48) * 4, np.float32(0), zero)
                if full < size:
                    add_rest(at + full * 4, parts, np.float32(0), size - full)
                total += _total(parts)
            middle = total / (samples * size)
            near = np.float32(middle)
            total = 0.0
            for i in range(samples):
                at = origin + (i * channels + c) * size * 4
                for p in range(zero, full, 16):
                    square(at + p * 4, parts + (p & 48) * 4, near, zero)
                if full < size:
                    square_rest(at + full * 4, parts, near, size - full)
                total += _total(parts)
            mean[c] = middle
            squares[c] = total - samples * size * (middle - near) ** 2
        room[0] = 0  # not freed before

    return moments


# ------------------------------------------------------------------ forward


def _normalise_step(*, stream=False, tail=False):
    @intrinsic
    def step(typing, source, other, target, marks, mean, scale, shift, lowest, count):
        def build(context, b, signature, arguments):
            source, other, target, marks, *numbers, lowest, count = arguments
            mask = _lanes(b, count) if tail else None
            *numbers, lowest = [_splat(b, v, _V) for v in (*numbers, lowest)]
            y = b.fadd(_affine(b, _read(b, source, mask), *numbers), _read(b, other, mask))
            word = b.bitcast(_open(b, y), _WORD)
            b.store(word, b.inttoptr(marks, _WORD.as_pointer())).align = 2
            # NaN stays NaN.
            y = b.select(b.fcmp_ordered("<", y, lowest), lowest, y)
            _write(b, y, target, mask, stream)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4, *[types.float32] * 4, types.int64), build

    return step


@cache
def normalise_kernel() -> Any:
    """``f(y, other, out, marks, mean, scale, shift, lowest, added, marked, stream)``.

    See :func:`cenacle.offload.norms.normalise`. ``other`` counts if ``added``; ``marks``
    (samples, channels, words of 16 bits) are written if ``marked``.
    """
    through, past = _normalise_step(), _normalise_step(stream=True)
    rest = _normalise_step(tail=True)
    zero = np.int64(0)

    @numba.njit(
        f"void({_PLANES}, {_PLANES}, {_PLANES}, {_MARKS}, f4[::1], f4[::1], f4[::1], f4, b1, b1,"
        " b1)",
        nogil=True,
        error_model="numpy",
    )
    def normalise(y, other, out, marks, mean, scale, shift, lowest, added, marked, stream):
        samples, channels, size = _extent(y)
        full, words = size // 16 * 16, np.int64(marks.shape[2])
        zeros, spare = np.zeros(16, np.float32), np.zeros(4, np.int16)
        origin, target = np.int64(y.ctypes.data), np.int64(out.ctypes.data)
        beside, far = _place(added, other, zeros, 4)
        marked_at, bits = _place(marked, marks, spare, 2)
        for i in range(samples):
            for c in range(channels):
                plane = i * channels + c
                s, t = origin + plane * size * 4, target + plane * size * 4
                o, m = beside + plane * size * far, marked_at + plane * words * bits
                u, v, w = mean[c], scale[c], shift[c]
                if stream:
                    for p in range(zero, full, 16):
                        k = m + p // 16 * bits
                        past(s + p * 4, o + p * far, t + p * 4, k, u, v, w, lowest, zero)
                else:
                    for p in range(zero, full, 16):
                        k = m + p // 16 * bits
                        through(s + p * 4, o + p * far, t + p * 4, k, u, v, w, lowest, zero)
                if full < size:
                    p, k = full, m + full // 16 * bits
                    rest(s + p * 4, o + p * far, t + p * 4, k, u, v, w, lowest, size - full)
        zeros[0], spare[0] = 0, 0  # not freed before

    return normalise


# ------------------------------------------------------------------ backward


def _sums_step(*, tail=False):
    @intrinsic
    def step(
        typing, gradient, source, marks, target, parts, products, mean, scale, shift, lowest, count
    ):
        def build(context, b, signature, arguments):
            gradient, source, marks, target, parts, products, *numbers, count = arguments
            mask = _lanes(b, count) if tail else None
            *numbers, lowest = [_splat(b, v, _V) for v in numbers]
            y = _read(b, source, mask)
            x = _gated(b, _read(b, gradient, mask), y, marks, lowest, numbers)
            _write(b, x, target, mask)
            _more(b, x, parts, mask)
            _more(b, b.fmul(x, b.fsub(y, numbers[0])), products, mask)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6, *[types.float32] * 4, types.int64), build

    return step


@cache
def sums_kernel() -> Any:
    """``f(g, y, marks, out, mean, scale, shift, lowest, marked, written, sums, products)``.

    See :func:`cenacle.offload.norms.gradient`. A gradient passes where it is ``marked`` (if it is)
    and the normalised y is above ``lowest``, NaN being below all. What passes is ``written``.
    """
    whole, rest = _sums_step(), _sums_step(tail=True)
    zero = np.int64(0)

    @numba.njit(
        f"void({_PLANES}, {_PLANES}, {_MARKS}, {_PLANES}, f4[::1], f4[::1], f4[::1], f4, b1, b1,"
        " f8[::1], f8[::1])",
        nogil=True,
        error_model="numpy",
    )
    def add_up(g, y, marks, out, mean, scale, shift, lowest, marked, written, sums, products):
        samples, channels, size = _extent(y)
        full, words = size // 16 * 16, np.int64(marks.shape[2])
        room, spare = np.zeros(128, np.float32), np.zeros(16, np.float32)
        ones = np.full(4, -1, np.int16)
        parts = np.int64(room.ctypes.data)
        held = parts + 256
        gradient, origin = np.int64(g.ctypes.data), np.int64(y.ctypes.data)
        target, far = _place(written, out, spare, 4)
        marked_at, bits = _place(marked, marks, ones, 2)
        for i in range(samples):
            for c in range(channels):
                plane = i * channels + c
                a, s = gradient + plane * size * 4, origin + plane * size * 4
                t, m = target + plane * size * far, marked_at + plane * words * bits
                u, v, w = mean[c], scale[c], shift[c]
                for p in range(zero, full, 16):
                    k, o = m + p // 16 * bits, (p & 48) * 4
                    whole(
                        a + p * 4, s + p * 4, k, t + p * far, parts + o, held + o, u, v, w, lowest,
                        zero,
                    )  # fmt: skip
                if full < size:
                    p, k = full, m + full // 16 * bits
                    rest(
                        a + p * 4, s + p * 4, k, t + p * far, parts, held, u, v, w, lowest,
                        size - full,
                    )  # fmt: skip
                sums[c] += _total(parts)
                products[c] += _total(held)
        room[0], spare[0], ones[0] = 0, 0, 0  # not freed before

    return add_up


def _gradient_step(*, stream=False, tail=False):
    @intrinsic
    def step(
        typing, gradient, source, marks, target, mean, scale, shift, lowest, slope, offset, count
    ):
        def build(context, b, signature, arguments):
            gradient, source, marks, target, *numbers, count = arguments
            mask = _lanes(b, count) if tail else None
            *numbers, lowest, slope, offset = [_splat(b, v, _V) for v in numbers]
            y = _read(b, source, mask)
            x = _gated(b, _read(b, gradient, mask), y, marks, lowest, numbers)
            away = b.fadd(b.fmul(b.fsub(y, numbers[0]), slope), offset)
            _write(b, b.fadd(b.fmul(x, numbers[1]), away), target, mask, stream)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4, *[types.float32] * 6, types.int64), build

    return step


@cache
def gradient_kernel() -> Any:
    """``f(g, y, marks, out, mean, scale, shift, lowest, marked, slope, offset, stream)``.

    See :func:`cenacle.offload.norms.gradient`: ``out = scale * g + slope * (y - mean) + offset``
    with g where it passes, as for :func:`sums_kernel`.
    """
    through, past = _gradient_step(), _gradient_step(stream=True)
    rest = _gradient_step(tail=True)
    zero = np.int64(0)

    @numba.njit(
        f"void({_PLANES}, {_PLANES}, {_MARKS}, {_PLANES}, f4[::1], f4[::1], f4[::1], f4, b1,"
        " f4[::1], f4[::1], b1)",
        nogil=True,
        error_model="numpy",
    )
    def differentiate(g, y, marks, out, mean, scale, shift, lowest, marked, slope, offset, stream):
        samples, channels, size = _extent(y)
        full, words = size // 16 * 16, np.int64(marks.shape[2])
        ones = np.full(4, -1, np.int16)
        gradient, origin = np.int64(g.ctypes.data), np.int64(y.ctypes.data)
        target = np.int64(out.ctypes.data)
        marked_at, bits = _place(marked, marks, ones, 2)
        for i in range(samples):
            for c in range(channels):
                plane = i * channels + c
                at, m = plane * size * 4, marked_at + plane * words * bits
                a, s, t = gradient + at, origin + at, target + at
                u, v, w, d, e = mean[c], scale[c], shift[c], slope[c], offset[c]
                if stream:
                    for p in range(zero, full, 16):
                        k, q = m + p // 16 * bits, p * 4
                        past(a + q, s + q, k, t + q, u, v, w, lowest, d, e, zero)
                else:
                    for p in range(zero, full, 16):
                        k, q = m + p // 16 * bits, p * 4
                        through(a + q, s + q, k, t + q, u, v, w, lowest, d, e, zero)
                if full < size:
                    k, q = m + full // 16 * bits, full * 4
                    rest(a + q, s + q, k, t + q, u, v, w, lowest, d, e, size - full)
        ones[0] = 0  # not freed before

    return differentiate
