"""Maximum pooling as machine code, through numba.

A row of a window is compared for 16 results at once, in a copy of the image with a border, so
that nothing is read outside. Arguments are those that :mod:`cenacle.offload.pooling` has checked.
"""

# ruff: noqa: ARG001, PLR0912
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, assignment"
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cenacle.offload.compiled import _load, _shuffle, _splat, _store

__all__ = ["pool_kernel", "spread_kernel"]

_V: Final = ir.VectorType(ir.FloatType(), 16)
_CODES: Final = ir.VectorType(ir.IntType(8), 16)
_I64: Final = ir.IntType(64)
_NONE: Final = 255


def _compare(apart):
    """Numbers of a row that are ``apart`` (1 or 2) from each other, with 16 largest ones so far."""

    @intrinsic
    def step(typing, row, best, codes, tap):
        def build(context, b, signature, arguments):
            row, best, codes, tap = arguments
            x = _load(b, row, _V)
            if apart == 2:
                more = _load(b, b.add(row, ir.Constant(_I64, 64)), _V)
                x = _shuffle(b, x, more, range(0, 32, 2))
            old = _load(b, best, _V)
            # As torch: a later one only if it is larger, or NaN.
            later = b.or_(b.fcmp_ordered(">", x, old), b.fcmp_unordered("uno", x, x))
            _store(b, b.select(later, x, old), best)
            where = b.inttoptr(codes, _CODES.as_pointer())
            found = b.load(where)
            found.align = 1
            here = _splat(b, b.trunc(tap, ir.IntType(8)), _CODES)
            b.store(b.select(later, here, found), where).align = 1
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), build

    return step


@cache
def pool_kernel() -> Any:
    """``f(x, out, codes, high, wide, down, along, top, left)``.

    ``x`` float32 (planes, height, width), ``out`` and ``codes`` (uint8) as the result. Windows
    are ``high`` x ``wide``, ``down`` and ``along`` apart, the first one begins ``top`` and ``left``
    before the image. A code is the place of the largest in its window, in reading order.
    """
    near, far = _compare(1), _compare(2)
    zero = np.int64(0)

    @numba.njit(
        "void(f4[:,:,::1], f4[:,:,::1], u1[:,:,::1], i8, i8, i8, i8, i8, i8)",
        nogil=True,
        error_model="numpy",
    )
    def pool(x, out, codes, high, wide, down, along, top, left):
        height, width, columns = np.int64(x.shape[1]), np.int64(x.shape[2]), np.int64(out.shape[2])
        rounded = (columns + 15) // 16 * 16
        image = np.empty((height, left + width + rounded * along + wide + 32), np.float32)
        best, code = np.empty(rounded, np.float32), np.empty(rounded, np.uint8)
        held, marked = np.int64(best.ctypes.data), np.int64(code.ctypes.data)
        origin, apart = np.int64(image.ctypes.data), np.int64(image.shape[1]) * 4
        for y in range(height):  # loops, because slices take seconds to compile
            for c in range(image.shape[1]):
                image[y, c] = -np.inf
        for plane in range(out.shape[0]):
            for y in range(height):
                for c in range(width):
                    image[y, left + c] = x[plane, y, c]
            for r in range(out.shape[1]):
                begin = r * down - top
                for c in range(rounded):
                    best[c], code[c] = -np.inf, _NONE
                for dy in range(max(zero, -begin), min(high, height - begin)):
                    row = origin + (begin + dy) * apart
                    for dx in range(wide):
                        tap = dy * wide + dx
                        if along == 1:
                            for c in range(zero, rounded, 16):
                                near(row + (c + dx) * 4, held + c * 4, marked + c, tap)
                        elif along == 2:
                            for c in range(zero, rounded, 16):
                                far(row + (2 * c + dx) * 4, held + c * 4, marked + c, tap)
                        else:
                            for c in range(columns):
                                v = image[begin + dy, c * along + dx]
                                if v > best[c] or np.isnan(v):
                                    best[c] = v
                                    code[c] = np.uint8(tap)
                for c in range(columns):
                    if code[c] == _NONE:  # nothing is above minus infinity: the first one
                        dx = max(zero, left - c * along)
                        code[c] = np.uint8(max(zero, -begin) * wide + dx)
                    out[plane, r, c] = best[c]
                    codes[plane, r, c] = code[c]
        image[0, 0] = best[0]  # not freed before

    return pool


@cache
def spread_kernel() -> Any:
    """``f(g, codes, out, high, wide, down, along, top, left)``: its gradient, added to ``out``."""

    @numba.njit(
        "void(f4[:,:,::1], u1[:,:,::1], f4[:,:,::1], i8, i8, i8, i8, i8, i8)",
        nogil=True,
        error_model="numpy",
    )
    def spread(g, codes, out, high, wide, down, along, top, left):
        rows, columns = np.empty(256, np.int64), np.empty(256, np.int64)
        for tap in range(high * wide):
            rows[tap], columns[tap] = tap // wide - top, tap % wide - left
        for plane in range(g.shape[0]):
            for r in range(g.shape[1]):
                for c in range(g.shape[2]):
                    tap = codes[plane, r, c]
                    out[plane, r * down + rows[tap], c * along + columns[tap]] += g[plane, r, c]

    return spread
