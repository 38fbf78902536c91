"""The passes over memory that arithmetic modulo a prime costs the enclave, compiled.

With numba each pass reads and writes every element once, at about the speed of copying; without
it numpy gives the same numbers in several passes. All arrays are contiguous, one-dimensional
pieces of tensors whose rows (samples) follow each other.

``v + (P if v < 0)`` is written as a minimum of unsigned numbers, which wrap: no branches. Every
element of a worker's answer is loaded once: it may be able to write it meanwhile.
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
_P64: Final = np.uint64(PRIME)
_SHIFT: Final = np.uint64(31)


class Kernels:
    """The passes; two implementations with the same results to the bit.

    Attributes:
        settle: ``(words)``: keep 31 bits of each; returns how many equal the prime, which are
            no field elements and have to be drawn again.
        peak: ``(x as int32 bits)``: the greatest magnitude's bits.
        blind: ``(x, inverse, mask, z, row, first, sums, out, stream)``: out = round(x inverse) +
            mask, and for each row sums += <out, z>. ``inverse`` and ``sums`` have one entry a
            row of ``row`` elements; the piece begins at element ``first``.
        unblind: ``(y, correction, r, s, rows, scale, bias, lowest, space, first, sums, out,
            stream)``: out = max(lift(y - correction) rows scale + bias, lowest), and sums +=
            <y, s x r>; returns whether some y was no field element. ``r`` has ``space``
            elements, ``s``, ``scale`` and ``bias`` one a channel, ``rows`` and ``sums`` one a
            row.

        pool: ``(y, width, out)``: the greatest of each 2 x 2 window, side by side, of images of
            even width and height; of no NaN.

    With ``stream`` the result bypasses the cache where it can: for tensors that do not fit it.
    """

    def __init__(
        self,
        settle: Callable[..., int],
        peak: Callable[..., int],
        blind: Callable[..., None],
        unblind: Callable[..., bool],
        pool: Callable[..., None],
    ) -> None:
        self.settle, self.peak, self.blind, self.unblind = settle, peak, blind, unblind
        self.pool = pool


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
    x: Array,
    inverse: Array,
    mask: Array,
    z: Array,
    row: int,
    first: int,
    sums: Array,
    out: Array,
    stream: bool,  # noqa: ARG001
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
    lowest: np.float32,
    space: int,
    first: int,
    sums: Array,
    out: Array,
    stream: bool,  # noqa: ARG001
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
        real = value.astype(np.float32) * factor[channel] + bias[channel]
        out[begin:end] = np.where(real < lowest, lowest, real)
    return bool((unsigned >= _P).any())


def _pool(y: Array, width: int, out: Array) -> None:
    y.reshape(-1, 2, width // 2, 2).max((1, 3), out=out.reshape(-1, width // 2))


@cache
def plain_kernels() -> Kernels:
    """With numpy alone."""
    return Kernels(_settle, _peak, _blind, _unblind, _pool)


# ---------------------------------------------------------------------- compiled


@cache
def compiled_kernels() -> Kernels:
    """With numba; see :mod:`cenacle.offload.field_compiled`."""
    from cenacle.offload.field_compiled import (  # noqa: PLC0415 - optional, slow to import
        make_kernels,
    )

    return make_kernels()


@cache
def kernels() -> Kernels:
    """The fastest that there is."""
    return plain_kernels() if importlib.util.find_spec("numba") is None else compiled_kernels()
