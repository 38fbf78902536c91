"""The passes over memory that arithmetic modulo a prime costs the enclave, compiled.

With numba each pass reads and writes every element once, at about the speed of copying; without
it numpy gives the same numbers in several passes. All arrays are contiguous, one-dimensional
pieces of tensors whose rows (samples) follow each other.

``v + (P if v < 0)`` is written as a minimum of unsigned numbers, which wrap: no branches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.accelerators.operations import PRIME

__all__ = ["Kernels", "compiled_kernels", "kernels", "plain_kernels"]

Array = NDArray[Any]
_P: Final = np.uint32(PRIME)
_HALF: Final = np.uint32(PRIME // 2)
_P64: Final = np.uint64(PRIME)
_SHIFT: Final = np.uint64(31)
_TOP: Final = np.uint32(31)
_ROUND: Final = np.float32(1.5 * 2**23)  # adding it rounds to the nearest even integer
_MAGIC_BITS: Final = np.int32(np.float32(1.5 * 2**23).view(np.int32))


class Kernels:
    """The passes; two implementations with the same results to the bit.

    Attributes:
        settle: ``(words)``: keep 31 bits of each; returns how many equal the prime, which are
            no field elements and have to be drawn again.
        peak: ``(x as int32 bits)``: the greatest magnitude's bits.
        blind: ``(x, inverse, mask, z, row, first, sums, out)``: out = round(x inverse) + mask,
            and for each row sums += <out, z>. ``inverse`` and ``sums`` have one entry a row of
            ``row`` elements; the piece begins at element ``first``.
        unblind: ``(y, correction, r, s, rows, scale, bias, space, first, sums, out)``: out =
            lift(y - correction) rows scale + bias, and sums += <y, s x r>; returns whether some
            y was no field element. ``r`` has ``space`` elements, ``s``, ``scale`` and ``bias``
            one a channel, ``rows`` and ``sums`` one a row.
    """

    def __init__(
        self,
        settle: Callable[..., int],
        peak: Callable[..., int],
        blind: Callable[..., None],
        unblind: Callable[..., bool],
    ) -> None:
        self.settle, self.peak, self.blind, self.unblind = settle, peak, blind, unblind


# ---------------------------------------------------------------------- plain


def _settle(words: Array) -> int:
    words &= _P
    return int(np.count_nonzero(words == _P))


def _peak(bits: Array) -> int:
    return int((bits & np.int32(0x7FFFFFFF)).max(initial=0))


def _dot(a: Array, b: Array) -> int:
    products = a.astype(np.uint64) * b.astype(np.uint64)
    return int(((products & _P64) + (products >> _SHIFT)).sum(dtype=np.uint64)) % PRIME


def _pieces(first: int, size: int, unit: int) -> list[tuple[int, int, int]]:
    """(unit's number, begin, end) for each unit that the piece touches."""
    found, begin = [], 0
    while begin < size:
        number = (first + begin) // unit
        end = min(size, (number + 1) * unit - first)
        found.append((number, begin, end))
        begin = end
    return found


def _blind(
    x: Array, inverse: Array, mask: Array, z: Array, row: int, first: int, sums: Array, out: Array
) -> None:
    for number, begin, end in _pieces(first, len(x), row):
        at = first + begin - number * row
        rounded = np.rint(x[begin:end] * inverse[number]).astype(np.int64)
        found = (rounded + mask[begin:end]) % PRIME
        out[begin:end] = found
        total = int(sums[number]) + _dot(found, z[at : at + end - begin])
        sums[number] = total % PRIME


def _unblind(
    y: Array,
    correction: Array,
    r: Array,
    s: Array,
    rows: Array,
    scale: Array,
    bias: Array,
    space: int,
    first: int,
    sums: Array,
    out: Array,
) -> bool:
    channels = len(s)
    unsigned = y.view(np.uint32).copy()  # read once: a worker may be able to write it
    for number, begin, end in _pieces(first, len(y), channels * space):
        at = first + begin - number * channels * space
        where = np.arange(at, at + end - begin)
        channel = where // space
        seen = unsigned[begin:end].astype(np.uint64)
        weighted = seen * r[where % space].astype(np.uint64)
        weighted = (weighted & _P64) + (weighted >> _SHIFT)
        weighted = (weighted & _P64) + (weighted >> _SHIFT)
        sums[number] = (int(sums[number]) + _dot(weighted, s[channel])) % PRIME
        value = (seen.astype(np.int64) - correction[begin:end]) % PRIME
        value[value > PRIME // 2] -= PRIME
        factor = rows[number] * scale
        out[begin:end] = value.astype(np.float32) * factor[channel] + bias[channel]
    return bool((unsigned >= _P).any())


@cache
def plain_kernels() -> Kernels:
    """With numpy alone."""
    return Kernels(_settle, _peak, _blind, _unblind)


# ---------------------------------------------------------------------- compiled


@cache
def compiled_kernels() -> Kernels:  # noqa: PLR0915 - kernels see each other as closures
    """With numba; compiling takes about three seconds, once for each process.

    Every element of ``y`` is loaded once: a worker may be able to write it meanwhile.
    """
    import numba  # noqa: PLC0415 - optional, and slow to import

    fast: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)

    @fast
    def settle(words):  # type: ignore[no-untyped-def]
        bad = np.uint32(0)
        for i in range(words.shape[0]):
            v = words[i] & _P
            words[i] = v
            bad += np.uint32(v == _P)
        return bad

    @fast
    def peak(bits):  # type: ignore[no-untyped-def]
        top = np.int32(0)
        for i in range(bits.shape[0]):
            top = max(top, bits[i] & np.int32(0x7FFFFFFF))
        return top

    @fast
    def blind_row(x, inverse, mask, z, out):  # type: ignore[no-untyped-def]
        low, high = np.uint64(0), np.uint64(0)
        for i in range(x.shape[0]):
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
    def blind(x, inverse, mask, z, row, first, sums, out):  # type: ignore[no-untyped-def]
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
            )
            sums[number] = (sums[number] + total) % _P64
            begin = end

    @fast
    def unblind_plane(y, correction, r, scale, bias, out):  # type: ignore[no-untyped-def]
        low, high, bad = np.uint64(0), np.uint64(0), np.uint32(0)
        for i in range(y.shape[0]):
            seen = np.uint32(y[i])
            bad |= np.uint32(seen >= _P)
            product = np.uint64(seen) * np.uint64(r[i])
            low += product & _P64
            high += product >> _SHIFT
            v = np.uint32(seen - np.uint32(correction[i]))
            v = min(v, np.uint32(v + _P))
            lifted = np.int32(v - _P) if v > _HALF else np.int32(v)
            out[i] = np.float32(lifted) * scale + bias
        return (low % _P64 + high % _P64) % _P64, bad

    @fast
    def unblind_vector(y, correction, s, r, row, scale, bias, out):  # type: ignore[no-untyped-def]
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
            out[i] = np.float32(lifted) * np.float32(row * scale[i]) + bias[i]
        return ((low % _P64 + high % _P64) % _P64) * np.uint64(r) % _P64, bad

    @fast
    def unblind(y, correction, r, s, rows, scale, bias, space, first, sums, out):  # type: ignore[no-untyped-def]
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
                    scale[at:past], bias[at:past], out[begin:end],
                )  # fmt: skip
            else:
                row, channel = number // channels, number % channels
                total, wrong = unblind_plane(
                    y[begin:end], correction[begin:end], r[at:past],
                    np.float32(rows[row] * scale[channel]), bias[channel], out[begin:end],
                )  # fmt: skip
                total = total * np.uint64(s[channel]) % _P64
            bad |= wrong
            sums[row] = (sums[row] + total) % _P64
            begin = end
        return bad != 0

    return Kernels(settle, peak, blind, unblind)


@cache
def kernels() -> Kernels:
    """The fastest that there is."""
    return plain_kernels() if importlib.util.find_spec("numba") is None else compiled_kernels()
