"""Machine code for the enclave's part of ``lowrank``, through numba.

Importing this module needs numba (``pip install cenacle[fast]``). Kernels are compiled when
first used, run without the GIL on one thread, and trust their arguments. They compute what
:mod:`cenacle.offload.lowrank_split` does with BLAS, to rounding.

There is one inner loop, written in LLVM's language because numba has no vectors: a tile of 4
outputs and up to 3 vectors of 16 positions stays in registers while it is summed over sources
and taps,

    tile[o, p] = first[o, p] + sum over i, t of k[i, t, o] * source[i, p + offset(t)],

so the windows of a convolution are read where they lie. Multiplications are fused with
additions, and the order of each sum is fixed.
"""

# numba has no types that mypy could read.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, import-untyped"
# ruff: noqa: ARG001 - intrinsics have the arguments that numba gives them
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["correlate"]

_F: Final = ir.FloatType()
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_WIDTH: Final = 16
_V: Final = ir.VectorType(_F, _WIDTH)
_OUT: Final = 4
_ROWS: Final = 8


def _at(b, address, kind):
    return b.inttoptr(address, kind.as_pointer())


def _load(b, address):
    found = b.load(_at(b, address, _V))
    found.align = 4
    return found


def _splat(b, value):
    one = b.insert_element(ir.Constant(_V, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, _WIDTH), [0] * _WIDTH)
    return b.shuffle_vector(one, one, zeros)


def _tile(vectors: int, side: int, outs: int = _OUT):
    """``side`` x ``side`` taps; sums begin at what is at ``begin``, plus the bias."""

    @intrinsic
    def tile(typing, source, plane, row, kernel, sources, begin, bias, target, wide):
        def build(context, b, signature, arguments):
            source, plane, row, kernel, sources, begin, bias, target, wide = arguments
            fma = b.module.declare_intrinsic(
                "llvm.fma.v16f32", (), ir.FunctionType(_V, [_V, _V, _V])
            )

            def times(value, number):
                return b.mul(value, ir.Constant(_I64, number))

            def plus(value, number):
                return b.add(value, ir.Constant(_I64, number))

            held = []
            for o in range(outs):
                added = _splat(b, b.load(_at(b, plus(bias, 4 * o), _F)))
                start = b.add(begin, times(wide, o))
                for p in range(vectors):
                    value = b.fadd(_load(b, plus(start, 64 * p)), added)
                    held.append(cgutils.alloca_once_value(b, value))
            taps = side * side
            with cgutils.for_range(b, sources) as loop:
                base = b.add(source, b.mul(loop.index, plane))
                weights = b.add(kernel, times(loop.index, 4 * taps * outs))
                sums = [b.load(one) for one in held]
                for t in range(taps):
                    here = plus(b.add(base, times(row, t // side)), 4 * (t % side))
                    read = [_load(b, plus(here, 64 * p)) for p in range(vectors)]
                    for o in range(outs):
                        factor = _splat(b, b.load(_at(b, plus(weights, 4 * (t * outs + o)), _F)))
                        for p in range(vectors):
                            at = o * vectors + p
                            sums[at] = b.call(fma, [read[p], factor, sums[at]])
                for one, value in zip(held, sums, strict=True):
                    b.store(value, one)
            for o in range(outs):
                line = b.add(target, times(wide, o))
                for p in range(vectors):
                    done = b.store(b.load(held[o * vectors + p]), _at(b, plus(line, 64 * p), _V))
                    done.align = 4
            return context.get_dummy_value()

        number = types.int64
        return types.void(*[number] * 9), build

    return tile


@cache
def correlate(side: int) -> Any:
    """``f(source, kernels, bias, first, target)``: one sample of a convolution, stride 1.

    target (out, height, width) = first + bias + the convolution of source (rank, height +
    side - 1, width + side - 1) with kernels (out / 4, rank, side * side, 4). All are
    contiguous float32; ``out`` is a multiple of 4 and ``width`` at least 16. Where ``width``
    is no multiple of 16, the last numbers of a row of ``first`` are read twice, and the later
    value counts.
    """
    three, two, one = (_tile(n, side) for n in (3, 2, 1))

    @numba.njit(
        "void(f4[:,:,::1], f4[:,:,:,::1], f4[::1], f4[:,:,::1], f4[:,:,::1])",
        nogil=True,
        error_model="numpy",
    )
    def run(source, kernels, bias, first, target):
        out, height, width = target.shape
        sources = np.int64(source.shape[0])
        row = np.int64(source.shape[2]) * 4
        plane = np.int64(source.shape[1]) * row
        wide = np.int64(height) * np.int64(width) * 4
        each = np.int64(kernels[0].size) * 4
        origin, folded = np.int64(source.ctypes.data), np.int64(kernels.ctypes.data)
        begin, end = np.int64(first.ctypes.data), np.int64(target.ctypes.data)
        added = np.int64(bias.ctypes.data)
        # Some rows at once, so that planes are read and written in long runs.
        for top in range(0, height, _ROWS):
            bottom = min(top + _ROWS, height)
            for o in range(out // 4):
                k, c = folded + o * each, added + o * 16
                for h in range(top, bottom):
                    s = origin + h * row
                    offset = o * 4 * wide + h * width * 4
                    f, t = begin + offset, end + offset
                    p = np.int64(0)
                    while p + 48 <= width:
                        q = p * 4
                        three(s + q, plane, row, k, sources, f + q, c, t + q, wide)
                        p += 48
                    while p + 32 <= width:
                        q = p * 4
                        two(s + q, plane, row, k, sources, f + q, c, t + q, wide)
                        p += 32
                    while p < width:
                        q = min(p, width - 16) * 4
                        one(s + q, plane, row, k, sources, f + q, c, t + q, wide)
                        p += 16

    return run
