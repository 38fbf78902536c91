"""The kernels of :mod:`cenacle.offload.kernels` as machine code, through numba.

Importing this module needs numba (``pip install cenacle[offload]``). Each kernel is compiled when
it is first used, in about a second; nothing is written to disk. Kernels run without the GIL,
on one thread, and trust their arguments: the caller has checked shapes and indices.

Two ideas make them as fast as a plain copy:

- Planes. Vectors of 16 numbers, the last one masked, so that a 3x3 filter is one load and one
  store; and stores that bypass the cache where the result is too large to stay there anyway
  (a store through the cache first reads what it overwrites).
- Single numbers (plane size 1). Gathering columns one number at a time runs at a tenth of
  copy speed. Instead, 4 or 8 rows are transposed in registers into a scratch that stays in the
  cache, in which a column is one vector; columns are gathered there and transposed back.

The intrinsics are written in LLVM's own language because numba has no vectors.
"""

# numba has no types that mypy could read; intrinsics are known by their arguments' names; and
# a kernel is one function because numba compiles it as one.
# ruff: noqa: ARG001, PLR0912, PLR0915
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

__all__ = ["columns_kernel", "planes_kernel"]

_F: Final = ir.FloatType()
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_WIDTH: Final = 16
_V: Final = ir.VectorType(_F, _WIDTH)
_BITS: Final = ir.VectorType(ir.IntType(1), _WIDTH)


# ------------------------------------------------------------------ building blocks in LLVM


def _shuffle(b, x, y, mask):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(mask)), list(mask)))


def _splat(b, value, kind):
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return _shuffle(b, one, one, [0] * kind.count)


def _load(b, address, kind):
    found = b.load(b.inttoptr(address, kind.as_pointer()))
    found.align = 4
    return found


def _store(b, value, address, *, stream=False):
    done = b.store(value, b.inttoptr(address, value.type.as_pointer()))
    done.align = 64 if stream else 4
    if stream:
        done.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))


def _affine(b, x, scale, bias, lowest):
    """max(x * scale + bias, lowest), NaN stays NaN."""
    y = b.fadd(b.fmul(x, scale), bias)
    return b.select(b.fcmp_ordered("<", y, lowest), lowest, y)


def _positive(b, gate, x):
    zero = ir.Constant(x.type, [0.0] * x.type.count)
    return b.select(b.fcmp_ordered(">", gate, zero), x, zero)


def _transpose(b, rows):
    """n vectors of n numbers, n = 4 or 8, in the pattern that AVX has instructions for."""
    if len(rows) == 4:
        low, high = [0, 4, 1, 5], [2, 6, 3, 7]
        p, q, r, s = rows
        t = [_shuffle(b, x, y, m) for m in (low, high) for x, y in ((p, r), (q, s))]
        return [_shuffle(b, t[i], t[i + 1], m) for i in (0, 2) for m in (low, high)]
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    t = [_shuffle(b, rows[i], rows[i + 1], m) for i in (0, 2, 4, 6) for m in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    u = [
        _shuffle(b, t[i + j], t[i + j + 2], m) for i in (0, 4) for j in (0, 1) for m in (low, high)
    ]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [_shuffle(b, u[i], u[i + 4], m) for m in (low, high) for i in range(4)]


# ------------------------------------------------------------------ planes


def _step(*, stream=False, gated=False, summed=False, tail=False):
    """16 numbers of a plane: read, scale, perhaps gate and add up, write."""

    @intrinsic
    def step(typing, source, target, gate, parts, scale, bias, lowest, count):
        def build(context, b, signature, arguments):
            source, target, gate, parts, scale, bias, lowest, count = arguments
            zero = ir.Constant(_V, [0.0] * _WIDTH)
            if tail:
                lanes = ir.Constant(ir.VectorType(_I64, _WIDTH), list(range(_WIDTH)))
                inside = b.icmp_signed("<", lanes, _splat(b, count, ir.VectorType(_I64, _WIDTH)))
                read = b.module.declare_intrinsic(
                    "llvm.masked.load.v16f32.p0v16f32",
                    (),
                    ir.FunctionType(_V, [_V.as_pointer(), _I32, _BITS, _V]),
                )
                write = b.module.declare_intrinsic(
                    "llvm.masked.store.v16f32.p0v16f32",
                    (),
                    ir.FunctionType(ir.VoidType(), [_V, _V.as_pointer(), _I32, _BITS]),
                )
                four = ir.Constant(_I32, 4)

                def load(address):
                    pointer = b.inttoptr(address, _V.as_pointer())
                    return b.call(read, [pointer, four, inside, zero])

            else:

                def load(address):
                    return _load(b, address, _V)

            x = load(source)
            if gated:
                x = _positive(b, load(gate), x)
            if summed:
                _store(b, b.fadd(_load(b, parts, _V), x), parts)
            y = _affine(b, x, _splat(b, scale, _V), _splat(b, bias, _V), _splat(b, lowest, _V))
            if tail:
                b.call(write, [y, b.inttoptr(target, _V.as_pointer()), four, inside])
            else:
                _store(b, y, target, stream=stream)
            return context.get_dummy_value()

        address, number = types.intp, types.float32
        return types.void(*[address] * 4, *[number] * 3, types.int64), build

    return step


@intrinsic
def _total(typing, parts):
    """The sum of 64 partial sums, which are set to zero: by halves, from 16 on in double."""

    def build(context, b, signature, arguments):
        at = [b.add(arguments[0], ir.Constant(_I64, 64 * k)) for k in range(4)]
        p, q, r, s = [_load(b, address, _V) for address in at]
        for address in at:
            _store(b, ir.Constant(_V, [0.0] * _WIDTH), address)
        whole = b.fadd(b.fadd(p, q), b.fadd(r, s))
        left = b.fpext(whole, ir.VectorType(ir.DoubleType(), _WIDTH))
        for half in (8, 4, 2, 1):
            low, high = range(half), range(half, 2 * half)
            left = b.fadd(_shuffle(b, left, left, low), _shuffle(b, left, left, high))
        return b.extract_element(left, ir.Constant(_I32, 0))

    return types.float64(types.intp), build


_ARRAYS: Final = "i4[::1], i4[::1], i4[::1], f4[::1], f4[::1], f4[::1], f4"


@cache
def planes_kernel(*, gated: bool, summed: bool) -> Any:
    """``f(src, dst, gate, rows, into, cols, row_scale, col_scale, bias, lowest, sums, stream)``.

    See :func:`cenacle.offload.kernels.move_planes`. ``src`` and ``dst`` are float32 of three
    dimensions; ``gate`` like ``src``, ``sums`` (float64, one for each column of ``src``): used
    if the kernel is ``gated``, ``summed``. ``stream``: planes of ``dst`` begin at multiples of
    64 bytes, and are to bypass the cache.
    """
    through = _step(gated=gated, summed=summed)
    past = _step(stream=True, gated=gated, summed=summed)
    rest = _step(gated=gated, summed=summed, tail=True)
    zero = np.int64(0)

    @numba.njit(
        f"void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], {_ARRAYS}, f8[::1], b1)",
        nogil=True,
        error_model="numpy",
    )
    def move(src, dst, gate, rows, into, cols, row_scale, col_scale, bias, lowest, sums, stream):
        size = np.int64(dst.shape[2])
        full = size // 16 * 16
        wide = np.int64(src.shape[1]) * size * 4
        wide_to = np.int64(dst.shape[1]) * size * 4
        parts = np.zeros(64, np.float32)
        held = np.int64(parts.ctypes.data)
        origin, target = np.int64(src.ctypes.data), np.int64(dst.ctypes.data)
        gates = np.int64(gate.ctypes.data)
        for i in range(rows.shape[0]):
            for j in range(cols.shape[0]):
                scale, add = row_scale[i] * col_scale[j], bias[j]
                offset = rows[i] * wide + cols[j] * size * 4
                s, g = origin + offset, gates + offset
                t = target + into[i] * wide_to + j * size * 4
                if stream:
                    for p in range(zero, full, 16):
                        q = p * 4
                        past(s + q, t + q, g + q, held + (q & 255), scale, add, lowest, zero)
                else:
                    for p in range(zero, full, 16):
                        q = p * 4
                        through(s + q, t + q, g + q, held + (q & 255), scale, add, lowest, zero)
                if full < size:
                    q = full * 4
                    rest(s + q, t + q, g + q, held + (q & 255), scale, add, lowest, size - full)
                if summed:
                    sums[cols[j]] += _total(held)

    return move


# ------------------------------------------------------------------ single numbers


def _columns(height, *, gated, summed):
    """Both halves of moving ``height`` rows of single numbers by way of a scratch."""
    kind = ir.VectorType(_F, height)
    addresses = types.UniTuple(types.intp, height)
    numbers = types.UniTuple(types.float32, height)
    apart = [ir.Constant(_I64, 4 * height * k) for k in range(height)]

    @intrinsic
    def interleave(typing, rows, gates, offset, scratch, sums):
        def build(context, b, signature, arguments):
            rows, gates, offset, scratch, sums = arguments
            read = []
            for k in range(height):
                x = _load(b, b.add(b.extract_value(rows, k), offset), kind)
                if gated:
                    gate = _load(b, b.add(b.extract_value(gates, k), offset), kind)
                    x = _positive(b, gate, x)
                read.append(x)
            if summed:
                total = read[0]
                for x in read[1:]:
                    total = b.fadd(total, x)
                double = ir.VectorType(ir.DoubleType(), height)
                _store(b, b.fadd(_load(b, sums, double), b.fpext(total, double)), sums)
            for k, column in enumerate(_transpose(b, read)):
                _store(b, column, b.add(scratch, apart[k]))
            return context.get_dummy_value()

        return types.void(addresses, addresses, *[types.intp] * 3), build

    @intrinsic
    def gather(typing, scratch, cols, rows, offset, row_scale, col_scale, bias, lowest):
        def build(context, b, signature, arguments):
            scratch, cols, rows, offset, row_scale, col_scale, bias, lowest = arguments
            index = b.inttoptr(cols, _I32.as_pointer())
            found = []
            for k in range(height):
                column = b.zext(b.load(b.gep(index, [ir.Constant(_I32, k)])), _I64)
                at = b.add(scratch, b.mul(column, ir.Constant(_I64, 4 * height)))
                found.append(_load(b, at, kind))
            scale, add = _load(b, col_scale, kind), _load(b, bias, kind)
            low = _splat(b, lowest, kind)
            for k, x in enumerate(_transpose(b, found)):
                both = b.fmul(_splat(b, b.extract_value(row_scale, k), kind), scale)
                y = _affine(b, x, both, add, low)
                _store(b, y, b.add(b.extract_value(rows, k), offset))
            return context.get_dummy_value()

        address = types.intp
        return types.void(
            address, address, addresses, address, numbers, address, address, types.float32
        ), build

    return interleave, gather


@cache
def columns_kernel(height: int, *, gated: bool, summed: bool) -> Any:
    """As :func:`planes_kernel` for planes of one number, without ``stream``.

    ``src``, ``dst`` and ``gate`` have two dimensions. ``height``: how many rows go at once, 4
    or 8; 8 is faster as long as 32 bytes for each column fit the cache.
    """
    interleave, gather = _columns(height, gated=gated, summed=summed)
    four = height == 4

    @numba.njit(
        f"void(f4[:,::1], f4[:,::1], f4[:,::1], {_ARRAYS}, f8[::1])",
        nogil=True,
        error_model="numpy",
    )
    def move(src, dst, gate, rows, into, cols, row_scale, col_scale, bias, lowest, sums):
        count, width = rows.shape[0], np.int64(src.shape[1])
        wide, wide_to = width * 4, np.int64(dst.shape[1]) * 4
        found = np.int64(cols.shape[0])
        scratch = np.empty(width * height + 16, np.float32)
        base = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
        slot = (base - np.int64(scratch.ctypes.data)) // 4
        origin, target = np.int64(src.ctypes.data), np.int64(dst.ctypes.data)
        gates = np.int64(gate.ctypes.data)
        index, factors = np.int64(cols.ctypes.data), np.int64(col_scale.ctypes.data)
        added, totals = np.int64(bias.ctypes.data), np.int64(sums.ctypes.data)
        unread = np.empty(height, np.float64)
        even, even_to = width // height * height, found // height * height
        for i in range(0, count, height):
            # The last rows are done twice where there are fewer than ``height`` left.
            a, b, c, d = i, min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
            ra, rb, rc, rd = rows[a] * wide, rows[b] * wide, rows[c] * wide, rows[d] * wide
            ta, tb, tc, td = (
                target + into[a] * wide_to,
                target + into[b] * wide_to,
                target + into[c] * wide_to,
                target + into[d] * wide_to,
            )
            if four:
                s = (origin + ra, origin + rb, origin + rc, origin + rd)
                g = (gates + ra, gates + rb, gates + rc, gates + rd)
                t = (ta, tb, tc, td)
                r = (row_scale[a], row_scale[b], row_scale[c], row_scale[d])
            else:
                e, f = min(i + 4, count - 1), min(i + 5, count - 1)
                h, k = min(i + 6, count - 1), min(i + 7, count - 1)
                re, rf, rh, rk = rows[e] * wide, rows[f] * wide, rows[h] * wide, rows[k] * wide
                s = (
                    origin + ra, origin + rb, origin + rc, origin + rd,
                    origin + re, origin + rf, origin + rh, origin + rk,
                )  # fmt: skip
                g = (
                    gates + ra, gates + rb, gates + rc, gates + rd,
                    gates + re, gates + rf, gates + rh, gates + rk,
                )  # fmt: skip
                t = (
                    ta, tb, tc, td,
                    target + into[e] * wide_to, target + into[f] * wide_to,
                    target + into[h] * wide_to, target + into[k] * wide_to,
                )  # fmt: skip
                r = (
                    row_scale[a], row_scale[b], row_scale[c], row_scale[d],
                    row_scale[e], row_scale[f], row_scale[h], row_scale[k],
                )  # fmt: skip
            whole = i + height <= count
            if not summed or whole:
                for j in range(np.int64(0), even, height):
                    interleave(s, g, j * 4, base + j * 4 * height, totals + j * 8)
            else:
                for j in range(np.int64(0), even, height):
                    interleave(s, g, j * 4, base + j * 4 * height, unread.ctypes.data)
            for j in range(even, width):
                for q in range(height):
                    row = rows[min(i + q, count - 1)]
                    x = src[row, j]
                    if gated and not gate[row, j] > 0:
                        x = np.float32(0)
                    scratch[slot + j * height + q] = x
            if summed:
                present = min(height, count - i)
                for j in range(even if whole else 0, width):
                    total = np.float32(0)
                    for q in range(present):
                        total += scratch[slot + j * height + q]
                    sums[j] += total
            for j in range(np.int64(0), even_to, height):
                gather(base, index + j * 4, t, j * 4, r, factors + j * 4, added + j * 4, lowest)
            for j in range(even_to, found):
                for q in range(height):
                    o = min(i + q, count - 1)
                    x = scratch[slot + cols[j] * height + q]
                    y = x * (row_scale[o] * col_scale[j]) + bias[j]
                    dst[into[o], j] = lowest if y < lowest else y

    return move
