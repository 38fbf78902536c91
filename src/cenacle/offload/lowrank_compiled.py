"""Machine code for the enclave's part of ``lowrank``, through numba.

Importing this module needs numba (``pip install cenacle[offload]``). Kernels are compiled when
first used, run without the GIL on one thread, and trust their arguments. They compute what
:mod:`cenacle.offload.lowrank_split` does with BLAS, to rounding.

The inner loops are written in LLVM's language because numba has no vectors. In one, a tile of 4
outputs and up to 3 vectors of 16 positions stays in registers while it is summed over sources
and taps,

    tile[o, p] = first[o, p] + sum over i, t of k[i, t, o] * source[i, p + offset(t)];

in the other, 4 outputs, 2 sources and one row of taps stay in registers while positions pass,

    tile[o, i, t] = sum over p of gradient[o, p] * source[i, p + offset(t)].

So the windows of a convolution are read where they lie. Multiplications are fused with
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

__all__ = ["correlate", "gather", "project"]

_F: Final = ir.FloatType()
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_WIDTH: Final = 16
_V: Final = ir.VectorType(_F, _WIDTH)
_OUT: Final = 4
_ROWS: Final = 8
_POSITIONS: Final = 3072
"""Positions whose gradients of 4 outputs, and V's, stay in the inner cache."""


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


def _fma(b):
    return b.module.declare_intrinsic("llvm.fma.v16f32", (), ir.FunctionType(_V, [_V, _V, _V]))


def _tile(vectors: int, side: int, outs: int = _OUT, *, stream: bool = False):
    """``side`` x ``side`` taps; sums begin at what is at ``begin``, plus the bias.

    Results below ``lowest`` become ``lowest``; NaN stays. ``stream``: past the cache, to
    addresses that are multiples of 64.
    """

    @intrinsic
    def tile(typing, source, plane, row, kernel, sources, begin, bias, target, wide, lowest):
        def build(context, b, signature, arguments):
            source, plane, row, kernel, sources, begin, bias, target, wide, lowest = arguments
            fma, least = _fma(b), _splat(b, lowest)

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
                    value = b.load(held[o * vectors + p])
                    value = b.select(b.fcmp_ordered("<", value, least), least, value)
                    done = b.store(value, _at(b, plus(line, 64 * p), _V))
                    done.align = 64 if stream else 4
                    if stream:
                        one = b.module.add_metadata([ir.Constant(_I32, 1)])
                        done.set_metadata("nontemporal", one)
            return context.get_dummy_value()

        number = types.int64
        return types.void(*[number] * 9, types.float32), build

    return tile


def _sum(b, vector):
    """Of all 16 lanes, by halves."""
    for half in (8, 4, 2, 1):
        low, high = (
            ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half)))
            for start in (0, half)
        )
        undefined = ir.Constant(vector.type, ir.Undefined)
        vector = b.fadd(
            b.shuffle_vector(vector, undefined, low), b.shuffle_vector(vector, undefined, high)
        )
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _dots(side: int, *, outs: int = _OUT):
    """Adds to ``into`` (outs, 2, side) what rows of gradients and of V give for a row of taps.

    ``wide`` bytes lie between gradients of two outputs and ``each`` between their rows;
    ``first`` and ``second`` are V's rows, ``row`` bytes long; a row of gradients is ``full``
    vectors and ``rest`` numbers. What V has beyond a row is read, and counts as zero.
    """

    @intrinsic
    def dots(typing, gradient, wide, each, first, second, row, rows, full, rest, into):
        def build(context, b, signature, arguments):
            gradient, wide, each, first, second, row, rows, full, rest, into = arguments
            fma, zero = _fma(b), ir.Constant(_V, [0.0] * _WIDTH)
            lanes = ir.VectorType(_I64, _WIDTH)
            bits = ir.VectorType(ir.IntType(1), _WIDTH)
            masked = b.module.declare_intrinsic(
                "llvm.masked.load.v16f32.p0v16f32",
                (),
                ir.FunctionType(_V, [_V.as_pointer(), _I32, bits, _V]),
            )
            count = b.insert_element(ir.Constant(lanes, ir.Undefined), rest, ir.Constant(_I32, 0))
            count = b.shuffle_vector(
                count, count, ir.Constant(ir.VectorType(_I32, _WIDTH), [0] * _WIDTH)
            )
            inside = b.icmp_signed("<", ir.Constant(lanes, list(range(_WIDTH))), count)
            number = outs * 2 * side
            held = [cgutils.alloca_once_value(b, zero) for _ in range(number)]

            def step(offset, at, read):
                values = [read(b.add(at, b.mul(wide, ir.Constant(_I64, o)))) for o in range(outs)]
                for i, source in enumerate((first, second)):
                    start = b.add(source, offset)
                    for t in range(side):
                        window = _load(b, b.add(start, ir.Constant(_I64, 4 * t)))
                        for o in range(outs):
                            one = held[(o * 2 + i) * side + t]
                            b.store(b.call(fma, [values[o], window, b.load(one)]), one)

            def partly(address):
                return b.call(masked, [_at(b, address, _V), ir.Constant(_I32, 4), inside, zero])

            with cgutils.for_range(b, rows) as outer:
                start = b.mul(outer.index, row)
                line = b.add(gradient, b.mul(outer.index, each))
                with cgutils.for_range(b, full) as loop:
                    along = b.mul(loop.index, ir.Constant(_I64, 64))
                    step(b.add(start, along), b.add(line, along), lambda a: _load(b, a))
                with b.if_then(b.icmp_signed(">", rest, ir.Constant(_I64, 0))):
                    along = b.mul(full, ir.Constant(_I64, 64))
                    step(b.add(start, along), b.add(line, along), partly)
            for k in range(number):
                place = _at(b, b.add(into, ir.Constant(_I64, 4 * k)), _F)
                b.store(b.fadd(b.load(place), _sum(b, b.load(held[k]))), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), build

    return dots


@cache
def correlate(side: int) -> Any:
    """``f(source, kernels, bias, first, target, lowest)``: a sample's convolution of stride 1.

    target (out, height, width) = first + bias + the convolution of source (rank, height +
    side - 1, width + side - 1) with kernels (out / 4, rank, side * side, 4), at least
    ``lowest``. All are contiguous float32; ``out`` is a multiple of 4 and ``width`` at least
    16. Where ``width`` is no multiple of 16, the last numbers of a row of ``first`` are read
    twice, and the later value counts.
    """
    three, two, one = (_tile(n, side) for n in (3, 2, 1))

    @numba.njit(
        "void(f4[:,:,::1], f4[:,:,:,::1], f4[::1], f4[:,:,::1], f4[:,:,::1], f4)",
        nogil=True,
        error_model="numpy",
    )
    def run(source, kernels, bias, first, target, lowest):
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
                        three(s + q, plane, row, k, sources, f + q, c, t + q, wide, lowest)
                        p += 48
                    while p + 32 <= width:
                        q = p * 4
                        two(s + q, plane, row, k, sources, f + q, c, t + q, wide, lowest)
                        p += 32
                    while p < width:
                        q = min(p, width - 16) * 4
                        one(s + q, plane, row, k, sources, f + q, c, t + q, wide, lowest)
                        p += 16

    return run


@cache
def project(*, stream: bool) -> Any:
    """``f(x, along, across, factors, residual)``: one sample's V = Q^T X and X - Q V.

    x, residual (channels, positions); along (rank / 4, channels, 1, 4) and across (channels / 4,
    rank, 1, 4) hold Q and -Q, where rank is a multiple of 4 (with zeros behind Q's columns);
    factors (rank, positions) is written. All are contiguous float32, channels a multiple of 4,
    positions at least 16. Only results are ever written to ``residual``. ``stream``: past the
    cache; then its rows begin at multiples of 64 bytes.
    """
    inner, inner_one = _tile(3, 1), _tile(1, 1)
    outer, outer_one = (_tile(n, 1, stream=stream) for n in (3, 1))

    @numba.njit(
        "void(f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,::1], f4[:,::1])",
        nogil=True,
        error_model="numpy",
    )
    def run(x, along, across, factors, residual):
        channels, positions = np.int64(x.shape[0]), np.int64(x.shape[1])
        rank, wide = np.int64(factors.shape[0]), np.int64(x.shape[1]) * 4
        none, line, least = np.int64(0), np.int64(192), np.float32(-np.inf)
        zeros = np.zeros(4 * 48, np.float32)
        nothing = np.int64(zeros.ctypes.data)
        held = np.empty((rank, 48), np.float32)
        kept = np.int64(held.ctypes.data)
        source, target = np.int64(x.ctypes.data), np.int64(residual.ctypes.data)
        first, second = np.int64(along.ctypes.data), np.int64(across.ctypes.data)
        begin = none
        while begin < positions:
            taken = np.int64(48)
            p = begin
            if begin + 48 > positions:  # the last ones, perhaps once more
                taken = np.int64(16)
                p = min(begin, positions - 16)
            q = p * 4
            for i in range(none, rank, 4):
                k, v = first + i * channels * 4, kept + i * 192
                if taken == 48:
                    inner(source + q, wide, none, k, channels, nothing, nothing, v, line, least)
                else:
                    inner_one(source + q, wide, none, k, channels, nothing, nothing, v, line, least)
            for o in range(none, channels, 4):
                k, at = second + o * rank * 4, o * wide + q
                x_at, r_at = source + at, target + at
                if taken == 48:
                    outer(kept, line, none, k, rank, x_at, nothing, r_at, wide, least)
                else:
                    outer_one(kept, line, none, k, rank, x_at, nothing, r_at, wide, least)
            for i in range(rank):
                for j in range(taken):
                    factors[i, p + j] = held[i, j]
            begin = begin + taken

    return run


@cache
def gather(side: int) -> Any:
    """``f(source, gradient, into)``: what a convolution's weights get, for V instead of X.

    into (out / 4, rank, side, 4, side) += the sums over positions of gradient (out, height,
    width) times the windows of source (rank, height + side - 1, width + side - 1); into[o // 4,
    i, u, o % 4, v] is for the tap (u, v). All contiguous float32, ``out`` a multiple of 4;
    behind ``source`` lie 16 more numbers that may be read.
    """
    dots = _dots(side)

    @numba.njit("void(f4[:,:,::1], f4[:,:,::1], f4[:,:,:,:,::1])", nogil=True, error_model="numpy")
    def run(source, gradient, into):
        out, height, width = gradient.shape
        rank = np.int64(source.shape[0])
        row = np.int64(source.shape[2]) * 4
        plane = np.int64(source.shape[1]) * row
        each = np.int64(width) * 4
        wide = np.int64(height) * each
        full, rest = np.int64(width) // 16, np.int64(width) % 16
        origin, begin = np.int64(source.ctypes.data), np.int64(gradient.ctypes.data)
        some = np.zeros((4, 2, side), np.float32)
        place = np.int64(some.ctypes.data)
        rows = np.int64(max(1, _POSITIONS // width))
        for top in range(np.int64(0), height, rows):
            taken = rows if top + rows < height else height - top
            for o in range(np.int64(0), out // 4):
                g = begin + o * 4 * wide + top * each
                for i in range(np.int64(0), rank, 2):
                    last = i + 1 if i + 1 < rank else i
                    for u in range(np.int64(0), side):
                        at = origin + (top + u) * row
                        some[:] = 0
                        dots(
                            g,
                            wide,
                            each,
                            at + i * plane,
                            at + last * plane,
                            row,
                            taken,
                            full,
                            rest,
                            place,
                        )
                        for k in range(4):
                            for v in range(side):
                                into[o, i, u, k, v] += some[k, 0, v]
                                if last > i:
                                    into[o, last, u, k, v] += some[k, 1, v]

    return run
