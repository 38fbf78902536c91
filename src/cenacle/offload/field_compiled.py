"""Masking and unmasking as machine code, through numba: one pass over memory each.

Importing this module needs numba (``pip install cenacle[offload]``). Kernels are compiled when
they are first used, in about two seconds; nothing is written to disk. They run without the
GIL, on one thread, and trust their arguments.

Long runs of elements go through loops over 64 of them, written in LLVM's own language because
numba has no vectors and no stores that bypass the cache (a store through the cache first reads
what it overwrites, which is a waste for a tensor that is too large to stay there anyway). What
is left over goes through ordinary loops.

The check's sums are of products below 2^62. Four are added before they are split into the
lowest 31 bits and the rest, so that a product costs a multiplication and an addition.
"""

# numba has no types that mypy could read, and intrinsics are known by their arguments' names.
# ruff: noqa: ARG001, PLR0915
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, assignment"
# mypy: disable-error-code="import-untyped, untyped-decorator"
from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cenacle.accelerators.operations import PRIME
from cenacle.offload.field_kernels import Kernels

__all__ = ["make_kernels"]

_P: Final = np.uint32(PRIME)
_HALF: Final = np.uint32(PRIME // 2)
_P64: Final = np.uint64(PRIME)
_SHIFT: Final = np.uint64(31)
_ROUND: Final = np.float32(1.5 * 2**23)  # adding it rounds to the nearest even integer
_ROUND_BITS: Final = np.int32(_ROUND.view(np.int32))
_LINE: Final = np.int64(64)

_F: Final = ir.FloatType()
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_FLOATS: Final = ir.VectorType(_F, 16)
_WORDS: Final = ir.VectorType(_I32, 16)
_WIDE: Final = ir.VectorType(_I64, 8)


# ------------------------------------------------------------------ building blocks in LLVM


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _splat(b, value, kind):
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, kind.count), None))


def _load(b, address, kind):
    found = b.load(b.inttoptr(address, kind.as_pointer()))
    found.align = 4
    return found


def _store(b, value, address, stream):
    done = b.store(value, b.inttoptr(address, value.type.as_pointer()))
    done.align = 64 if stream else 4
    if stream:
        done.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))


def _least(b, x, y):
    return b.select(b.icmp_unsigned("<", x, y), x, y)


def _most(b, x, y):
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def _products(b, x, y):
    """Of the even and of the odd elements, 64 bits each."""
    x, y = b.bitcast(x, _WIDE), b.bitcast(y, _WIDE)
    low, shift = _all(_WIDE, 2**32 - 1), _all(_WIDE, 32)
    even = b.mul(b.and_(x, low), b.and_(y, low))
    return even, b.mul(b.lshr(x, shift), b.lshr(y, shift))


def _total(b, vector):
    form = ir.FunctionType(_I64, [_WIDE])
    add = b.module.declare_intrinsic("llvm.vector.reduce.add.v8i64", (), form)
    return b.call(add, [vector])


def _blocks(b, count, one, addresses, stream):
    """Loop over blocks of 64 elements of 4 bytes.

    ``one(addresses)`` works on 16 elements; it returns (factor, other, seen): the sum of factor
    times other is kept, and the greatest of what was seen. Returns the sum's two parts and that.
    """
    before = b.basic_block
    loop, done = b.append_basic_block("blocks"), b.append_basic_block("done")
    zero = ir.Constant(_I64, 0)
    start = [zero, _all(_WIDE, 0), _all(_WIDE, 0), _all(_WORDS, 0)]
    b.cbranch(b.icmp_signed(">", count, zero), loop, done)
    b.position_at_end(loop)
    now = [b.phi(value.type) for value in start]
    index, low, high, top = now
    sums: list[Any] = []
    for part in range(4):
        offset = b.add(b.shl(index, ir.Constant(_I64, 8)), ir.Constant(_I64, 64 * part))
        factor, other, seen = one([b.add(address, offset) for address in addresses])
        top = _most(b, top, seen)
        found = _products(b, factor, other)
        sums = [b.add(s, f) for s, f in zip(sums, found, strict=True)] if sums else list(found)
    for total in sums:
        low = b.add(low, b.and_(total, _all(_WIDE, PRIME)))
        high = b.add(high, b.lshr(total, _all(_WIDE, 31)))
    after = [b.add(index, ir.Constant(_I64, 1)), low, high, top]
    end = b.basic_block
    b.cbranch(b.icmp_signed("<", after[0], count), loop, done)
    for phi, first, later in zip(now, start, after, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    b.position_at_end(done)
    last = []
    for first, later in zip(start, after, strict=True):
        phi = b.phi(first.type)
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
        last.append(phi)
    if stream:
        b.fence("seq_cst")  # such stores are ordered by nothing less
    form = ir.FunctionType(_I32, [_WORDS])
    greatest = b.module.declare_intrinsic("llvm.vector.reduce.umax.v16i32", (), form)
    return _total(b, last[1]), _total(b, last[2]), b.call(greatest, [last[3]])


_RESULT: Final = types.Tuple((types.uint64, types.uint64, types.uint32))


def _blind_blocks(stream):
    """out = x inverse + mask, and <out, z>, for ``count`` times 64 elements."""

    @intrinsic
    def run(typing, x, mask, z, out, count, inverse):
        def build(context, b, signature, arguments):
            *addresses, count, inverse = arguments
            factor = _splat(b, inverse, _FLOATS)
            prime = _all(_WORDS, PRIME)

            def one(at):
                value = b.fmul(_load(b, at[0], _FLOATS), factor)
                moved = b.fadd(value, _all(_FLOATS, float(_ROUND)))
                q = b.sub(b.bitcast(moved, _WORDS), _all(_WORDS, int(_ROUND_BITS)))
                q = b.add(q, b.and_(b.ashr(q, _all(_WORDS, 31)), prime))
                found = b.add(q, _load(b, at[1], _WORDS))
                found = _least(b, found, b.sub(found, prime))
                _store(b, found, at[3], stream)
                return found, _load(b, at[2], _WORDS), _all(_WORDS, 0)

            parts = _blocks(b, count, one, addresses, stream)
            return context.make_tuple(b, signature.return_type, parts)

        integer = types.int64
        return _RESULT(*[integer] * 5, types.float32), build

    return run


def _unblind_blocks(stream):
    """out = max(lift(y - correction) scale + bias, lowest), <y, r> and the greatest y."""

    @intrinsic
    def run(typing, y, correction, r, out, count, scale, bias, lowest):
        def build(context, b, signature, arguments):
            *addresses, count, scale, bias, lowest = arguments
            factor, offset, least = (_splat(b, v, _FLOATS) for v in (scale, bias, lowest))
            prime = _all(_WORDS, PRIME)

            def one(at):
                seen = _load(b, at[0], _WORDS)
                v = b.sub(seen, _load(b, at[1], _WORDS))
                v = _least(b, v, b.add(v, prime))
                above = b.icmp_unsigned(">", v, _all(_WORDS, int(_HALF)))
                v = b.select(above, b.sub(v, prime), v)
                value = b.fadd(b.fmul(b.sitofp(v, _FLOATS), factor), offset)
                value = b.select(b.fcmp_ordered("<", value, least), least, value)
                _store(b, value, at[3], stream)
                return seen, _load(b, at[2], _WORDS), seen

            parts = _blocks(b, count, one, addresses, stream)
            return context.make_tuple(b, signature.return_type, parts)

        integer, real = types.int64, types.float32
        return _RESULT(*[integer] * 5, real, real, real), build

    return run


# ------------------------------------------------------------------ kernels


def make_kernels() -> Kernels:  # kernels see each other as closures
    """Compiled for this machine when they are called."""
    fast: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)
    blind_through, blind_past = _blind_blocks(False), _blind_blocks(True)
    unblind_through, unblind_past = _unblind_blocks(False), _unblind_blocks(True)

    @fast
    def settle(words):
        bad = np.uint32(0)
        for i in range(words.shape[0]):
            v = words[i] & _P
            words[i] = v
            bad += np.uint32(v == _P)
        return bad

    @fast
    def peak(bits):
        top = np.int32(0)
        for i in range(bits.shape[0]):
            top = max(top, bits[i] & np.int32(0x7FFFFFFF))
        return top

    @fast
    def blind_row(x, inverse, mask, z, out, stream):
        count = np.int64(x.shape[0] // 64)
        source, noise = np.int64(x.ctypes.data), np.int64(mask.ctypes.data)
        check, target = np.int64(z.ctypes.data), np.int64(out.ctypes.data)
        if stream and target % _LINE == 0:
            low, high, _ = blind_past(source, noise, check, target, count, inverse)
        else:
            low, high, _ = blind_through(source, noise, check, target, count, inverse)
        for i in range(count * 64, x.shape[0]):
            moved = np.float32(x[i] * inverse) + _ROUND
            q = np.int32(np.int32(moved) - np.int32(12582912))
            v = np.uint32(np.uint32(q) + mask[i])
            # q < 0 wraps around 2^32, unless the mask was greater
            v = min(v, np.uint32(v + _P)) if q < 0 else min(v, np.uint32(v - _P))
            out[i] = np.int32(v)
            product = np.uint64(v) * np.uint64(z[i])
            low += product & _P64
            high += product >> _SHIFT
        return (low % _P64 + high % _P64) % _P64

    @fast
    def blind(x, inverse, mask, z, row, first, sums, out, stream):
        begin, size = 0, x.shape[0]
        while begin < size:
            number = (first + begin) // row
            end = min(size, (number + 1) * row - first)
            at = first + begin - number * row
            total = blind_row(
                x[begin:end],
                inverse[number],
                mask[begin:end],
                z[at : at + end - begin],
                out[begin:end],
                stream,
            )
            sums[number] = (sums[number] + total) % _P64
            begin = end

    @fast
    def unblind_plane(y, correction, r, scale, bias, lowest, out, stream):
        count = np.int64(y.shape[0] // 64)
        source, known = np.int64(y.ctypes.data), np.int64(correction.ctypes.data)
        check, target = np.int64(r.ctypes.data), np.int64(out.ctypes.data)
        if stream and target % _LINE == 0:
            low, high, top = unblind_past(
                source, known, check, target, count, scale, bias, lowest
            )  # fmt: skip
        else:
            low, high, top = unblind_through(
                source, known, check, target, count, scale, bias, lowest
            )  # fmt: skip
        bad = np.uint32(top >= _P)
        for i in range(count * 64, y.shape[0]):
            seen = np.uint32(y[i])
            bad |= np.uint32(seen >= _P)
            product = np.uint64(seen) * np.uint64(r[i])
            low += product & _P64
            high += product >> _SHIFT
            v = np.uint32(seen - np.uint32(correction[i]))
            v = min(v, np.uint32(v + _P))
            lifted = np.int32(v - _P) if v > _HALF else np.int32(v)
            value = np.float32(lifted) * scale + bias
            out[i] = lowest if value < lowest else value
        return (low % _P64 + high % _P64) % _P64, bad

    @fast
    def unblind_vector(y, correction, s, r, row, scale, bias, lowest, out):
        low, high, bad = np.uint64(0), np.uint64(0), np.uint32(0)
        for i in range(y.shape[0]):
            seen = np.uint32(y[i])
            bad |= np.uint32(seen >= _P)
            product = np.uint64(seen) * np.uint64(s[i])
            low += product & _P64
            high += product >> _SHIFT
            v = np.uint32(seen - np.uint32(correction[i]))
            v = min(v, np.uint32(v + _P))
            lifted = np.int32(v - _P) if v > _HALF else np.int32(v)
            value = np.float32(lifted) * np.float32(row * scale[i]) + bias[i]
            out[i] = lowest if value < lowest else value
        return ((low % _P64 + high % _P64) % _P64) * np.uint64(r) % _P64, bad

    @fast
    def unblind(
        y, correction, r, s, rows, scale, bias, lowest, space, first, sums, out, stream
    ):  # fmt: skip
        begin, size, bad = 0, y.shape[0], np.uint32(0)
        channels = s.shape[0]
        unit = channels if space == 1 else space
        while begin < size:
            number = (first + begin) // unit
            end = min(size, (number + 1) * unit - first)
            at = first + begin - number * unit
            past = at + end - begin
            if space == 1:
                row = number
                total, wrong = unblind_vector(
                    y[begin:end], correction[begin:end], s[at:past], r[0], rows[row],
                    scale[at:past], bias[at:past], lowest, out[begin:end],
                )  # fmt: skip
            else:
                row, channel = number // channels, number % channels
                total, wrong = unblind_plane(
                    y[begin:end], correction[begin:end], r[at:past],
                    np.float32(rows[row] * scale[channel]), bias[channel], lowest,
                    out[begin:end], stream,
                )  # fmt: skip
                total = total * np.uint64(s[channel]) % _P64
            bad |= wrong
            sums[row] = (sums[row] + total) % _P64
            begin = end
        return bad != 0

    @fast
    def pool(y, width, out):
        half = width // 2
        for line in range(out.shape[0] // half):
            upper = y[2 * line * width : (2 * line + 1) * width]
            lower = y[(2 * line + 1) * width : (2 * line + 2) * width]
            target = out[line * half : (line + 1) * half]
            for i in range(half):
                a, b, c, d = upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]
                a, c = a if a > b else b, c if c > d else d
                target[i] = a if a > c else c

    return Kernels(settle, peak, blind, unblind, pool)
