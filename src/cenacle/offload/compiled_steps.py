"""What the passes of :mod:`cenacle.offload.passes` do to 16 numbers, in LLVM's language.

Intrinsics for :mod:`cenacle.offload.compiled_passes`: read, contract, scale, pool, scatter, write.
Addresses are numbers; a step with ``tail`` touches only its first ``count`` numbers.
"""

# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, assignment"
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

from typing import Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cenacle.offload.compiled import _affine, _load, _shuffle, _splat, _store

__all__ = ["energy_step", "in_step", "out_step", "pool_step", "scatter_step"]

_F: Final = ir.FloatType()
_I8: Final = ir.IntType(8)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_WIDTH: Final = 16
_V: Final = ir.VectorType(_F, _WIDTH)
_MASK: Final = ir.VectorType(ir.IntType(1), _WIDTH)
_WORD: Final = ir.IntType(_WIDTH)
_CODES: Final = ir.VectorType(_I8, _WIDTH)
_NONE: Final = 4
"""The code of a window whose gradient is zero; 0 to 3 are its elements in reading order."""
_FAR: Final = 1024
"""Bytes ahead that two rows at once are fetched: processors foresee one row alone."""
_EVEN: Final = list(range(0, 32, 2))
_ODD: Final = list(range(1, 32, 2))
_LOW: Final = [k // 2 + 16 * (k % 2) for k in range(16)]
_HIGH: Final = [8 + k // 2 + 16 * (k % 2) for k in range(16)]


def _lanes(b, count, first=0):
    """Which of 16 numbers from ``first`` on are below ``count``."""
    kind = ir.VectorType(_I64, _WIDTH)
    lanes = ir.Constant(kind, list(range(first, first + _WIDTH)))
    return b.icmp_signed("<", lanes, _splat(b, count, kind))


def _read(b, address, mask):
    """16 numbers; those not in the mask (if any) are zero, and their memory is not touched."""
    if mask is None:
        return _load(b, address, _V)
    read = b.module.declare_intrinsic(
        "llvm.masked.load.v16f32.p0v16f32",
        (),
        ir.FunctionType(_V, [_V.as_pointer(), _I32, _MASK, _V]),
    )
    zero = ir.Constant(_V, [0.0] * _WIDTH)
    return b.call(read, [b.inttoptr(address, _V.as_pointer()), ir.Constant(_I32, 4), mask, zero])


def _write(b, value, address, mask, stream=False):
    if mask is None:
        _store(b, value, address, stream=stream)
        return
    write = b.module.declare_intrinsic(
        "llvm.masked.store.v16f32.p0v16f32",
        (),
        ir.FunctionType(ir.VoidType(), [_V, _V.as_pointer(), _I32, _MASK]),
    )
    b.call(write, [value, b.inttoptr(address, _V.as_pointer()), ir.Constant(_I32, 4), mask])


def _add(b, x, address, mask, weight=None):
    """``address += weight * x``."""
    if weight is not None:
        x = b.fmul(x, weight, flags=("contract",))
    _write(b, b.fadd(_read(b, address, mask), x, flags=("contract",)), address, mask)


def _ahead(b, address, distance):
    """Have what is ``distance`` bytes further fetched; beyond the end this does nothing."""
    kind = _I8.as_pointer()
    fetch = b.module.declare_intrinsic(
        "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [kind, _I32, _I32, _I32])
    )
    flags = [ir.Constant(_I32, k) for k in (0, 3, 1)]
    b.call(fetch, [b.inttoptr(_at(b, address, distance), kind), *flags])


def _at(b, address, offset):
    return b.add(address, ir.Constant(_I64, offset))


def _open(b, x):
    """Where the gradient of a ReLU's result passes: above zero, or NaN, as torch has it."""
    return b.fcmp_unordered(">", x, ir.Constant(_V, [0.0] * _WIDTH))


def _dummy(context):
    return context.get_dummy_value()


# ------------------------------------------------------------------ results on their way in


def in_step(*, checked, marked, stream=False, tail=False):
    """16 numbers of a result: contract, scale, bias, cut off, note which are open, write."""

    @intrinsic
    def step(typing, source, target, total, marks, weight, scale, bias, lowest, count):
        def build(context, b, signature, arguments):
            source, target, total, marks, weight, scale, bias, lowest, count = arguments
            mask = _lanes(b, count) if tail else None
            x = _read(b, source, mask)
            if checked:
                _add(b, x, total, mask, _splat(b, weight, _V))
            y = _affine(b, x, _splat(b, scale, _V), _splat(b, bias, _V), _splat(b, lowest, _V))
            if marked:
                word = b.bitcast(_open(b, y), _WORD)
                b.store(word, b.inttoptr(marks, _WORD.as_pointer())).align = 2
            _write(b, y, target, mask, stream)
            return _dummy(context)

        address, number = types.intp, types.float32
        return types.void(*[address] * 4, *[number] * 4, types.int64), build

    return step


def pool_step(*, checked, tail=False):
    """16 windows of 2 x 2 (``count`` of them): contract, scale, bias, cut off, and the largest."""

    @intrinsic
    def step(typing, source, below, target, total, codes, weight, scale, bias, lowest, count):
        def build(context, b, signature, arguments):
            source, below, target, total, codes, weight, scale, bias, lowest, count = arguments
            wide, below_total = b.add(count, count), b.add(total, b.sub(below, source))
            near = _lanes(b, wide) if tail else None
            far = _lanes(b, wide, _WIDTH) if tail else None
            factor, add, low = (_splat(b, v, _V) for v in (scale, bias, lowest))
            rows = []
            for start, sums in ((source, total), (below, below_total)):
                if not tail:
                    _ahead(b, start, _FAR)
                    _ahead(b, start, _FAR + 64)
                halves = []
                for offset, mask in ((0, near), (64, far)):
                    x = _read(b, _at(b, start, offset), mask)
                    if checked:
                        _add(b, x, _at(b, sums, offset), mask, _splat(b, weight, _V))
                    halves.append(_affine(b, x, factor, add, low))
                rows += [_shuffle(b, *halves, _EVEN), _shuffle(b, *halves, _ODD)]
            kind = ir.VectorType(_I32, _WIDTH)
            best, code = rows[0], ir.Constant(kind, [0] * _WIDTH)
            for number, x in enumerate(rows[1:], 1):
                # As torch: a later one only if it is larger, or NaN.
                later = b.or_(b.fcmp_ordered(">", x, best), b.fcmp_unordered("uno", x, x))
                best = b.select(later, x, best)
                code = b.select(later, ir.Constant(kind, [number] * _WIDTH), code)
            code = b.select(_open(b, best), code, ir.Constant(kind, [_NONE] * _WIDTH))
            b.store(b.trunc(code, _CODES), b.inttoptr(codes, _CODES.as_pointer())).align = 1
            _write(b, best, target, _lanes(b, count) if tail else None)
            return _dummy(context)

        address, number = types.intp, types.float32
        return types.void(*[address] * 5, *[number] * 4, types.int64), build

    return step


# ------------------------------------------------------------------ operands on their way out


def _emit(b, y, mask, target, image, folds, s, q, *, checked, folded, stream):
    """Write 16 blinded numbers, and add them to what they are contracted into."""
    _write(b, y, target, mask, stream)
    if checked:
        _add(b, y, image, mask, s)
    if folded:
        for weight, address in zip(q, folds, strict=True):
            _add(b, y, address, mask, weight)


def out_step(*, gate, summed, checked, folded, stream=False, tail=False):
    """16 numbers of an operand: gate, add up, scale, write, contract."""

    @intrinsic
    def step(typing, source, target, marks, parts, image, fold, more, scale, s, q, other, count):
        def build(context, b, signature, arguments):
            (source, target, marks, parts, image, fold, more, scale, s, q, other, count) = arguments
            mask = _lanes(b, count) if tail else None
            x = _read(b, source, mask)
            if gate == "bits":
                word = b.load(b.inttoptr(marks, _WORD.as_pointer()))
                word.align = 2
                x = b.select(b.bitcast(word, _MASK), x, ir.Constant(_V, [0.0] * _WIDTH))
            if summed:
                _add(b, x, parts, None)
            y = b.fmul(x, _splat(b, scale, _V))
            weights = (_splat(b, q, _V), _splat(b, other, _V))
            _emit(
                b, y, mask, target, image, (fold, more), _splat(b, s, _V), weights,
                checked=checked, folded=folded, stream=stream,
            )  # fmt: skip
            return _dummy(context)

        address, number = types.intp, types.float32
        return types.void(*[address] * 7, *[number] * 4, types.int64), build

    return step


def scatter_step(*, summed, checked, folded, stream=False, tail=False):
    """16 windows of 2 x 2: each number goes where its window's largest was."""

    @intrinsic
    def step(
        typing, source, target, below, codes, parts, image, fold, more, scale, s, q, other, count
    ):
        def build(context, b, signature, arguments):
            (
                source, target, below, codes, parts, image, fold, more, scale, s, q, other, count,
            ) = arguments  # fmt: skip
            x = _read(b, source, _lanes(b, count) if tail else None)
            found = b.load(b.inttoptr(codes, _CODES.as_pointer()))
            found.align = 1
            kind = ir.VectorType(_I32, _WIDTH)
            code = b.zext(found, kind)
            zero = ir.Constant(_V, [0.0] * _WIDTH)
            if summed:
                some = b.icmp_unsigned("<", code, ir.Constant(kind, [_NONE] * _WIDTH))
                _add(b, b.select(some, x, zero), parts, None)
            y = b.fmul(x, _splat(b, scale, _V))
            each = [
                b.select(b.icmp_unsigned("==", code, ir.Constant(kind, [k] * _WIDTH)), y, zero)
                for k in range(_NONE)
            ]
            wide, apart = b.add(count, count), b.sub(below, target)
            weights = (_splat(b, q, _V), _splat(b, other, _V))
            samples = _splat(b, s, _V)
            for row, (even, odd) in enumerate((each[:2], each[2:])):
                for offset, lanes in ((0, _LOW), (64, _HIGH)):
                    mask = _lanes(b, wide, offset // 4) if tail else None
                    places = [
                        _at(b, b.add(place, apart) if row else place, offset)
                        for place in (target, image, fold, more)
                    ]
                    _emit(
                        b, _shuffle(b, even, odd, lanes), mask, places[0], places[1], places[2:],
                        samples, weights, checked=checked, folded=folded, stream=stream,
                    )  # fmt: skip
            return _dummy(context)

        address, number = types.intp, types.float32
        return types.void(*[address] * 8, *[number] * 4, types.int64), build

    return step


def energy_step(*, tail=False):
    """``energy += image^2`` for 16 numbers."""

    @intrinsic
    def step(typing, image, energy, count):
        def build(context, b, signature, arguments):
            image, energy, count = arguments
            mask = _lanes(b, count) if tail else None
            x = _read(b, image, mask)
            _add(b, x, energy, mask, x)
            return _dummy(context)

        return types.void(types.intp, types.intp, types.int64), build

    return step
