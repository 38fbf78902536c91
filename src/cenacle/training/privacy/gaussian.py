"""Standard normal samples from uniform words, and their addition to a sum on a grid.

Two samplers of the same distribution: the ziggurat (Marsaglia and Tsang 2000, in double
precision after Doornik 2005), compiled where numba is, and Box-Muller in numpy elsewhere.

**Floating-point attacks.** The set of floating-point numbers that ``sum + noise`` can be
depends on the sum, and tells about it (Mironov 2012, doi:10.1145/2382196.2382264; Jin et
al. 2022, arXiv:2112.05307; Haney et al. 2022, arXiv:2207.13793). Here both the sum and the
noise are rounded to multiples of one power of two, :func:`grid` (2^-30 of the noise's
scale), before they are added; all values are integers below 2^53 times that step, so the
addition is exact and every multiple can be an output whatever the sum is. Division and
rounding to float32 come after and cannot undo that. Rounding the sum adds at most
``step * sqrt(parameters) / 2`` to an example's influence: 1e-6 of the noise's scale for four
million parameters. In the manner of Holohan and Braghin 2021 (arXiv:2107.10138), every
sample is the scaled sum of ``terms`` independent ones, so that the probability of one
multiple is smooth to the product of the terms' rounding errors, and taking one term's
words apart does not give the sample.

What remains: probabilities of single multiples differ from the normal distribution's by the
double-precision rounding of exp, log and the uniform words, and tails end where 53 bits do.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cenacle.training.privacy.keystream import Keystream, Words

__all__ = ["BLOCK", "add_noise", "grid", "normals"]

BLOCK = 1 << 14
"""Samples made at a time: their words and buffers stay in the cache."""

Floats = npt.NDArray[Any]

_R = 3.6541528853610088
_V = 0.00492867323399
_LAYERS = 256
_UNIT = 2.0**-53


def _layers() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    edges = [_V / math.exp(-0.5 * _R * _R), _R]
    for _ in range(2, _LAYERS):
        last = edges[-1]
        edges.append(math.sqrt(-2.0 * math.log(_V / last + math.exp(-0.5 * last * last))))
    edges.append(0.0)
    x = np.array(edges)
    return x, np.exp(-0.5 * x * x)


_EDGES, _HEIGHTS = _layers()
# By the low nine bits of a word (layer and sign): the signed width of one of 2^53 steps, and
# the number of steps that lie under the curve for certain.
_STEPS = np.concatenate([_EDGES[:256] * _UNIT, -_EDGES[:256] * _UNIT])
_SURE = np.tile(np.floor(_EDGES[1:] / (_EDGES[:256] * _UNIT)).astype(np.int64), 2)


def grid(scale: float) -> float:
    """The step for noise of a standard deviation: a power of two, about 2^-30 of it."""
    return float(2.0 ** (math.frexp(scale)[1] - 31))


def _ziggurat(  # noqa: PLR0912 - one function is one kernel  # pragma: no cover
    words: Any, terms: int, out: Any, one: Any, bad: Any, steps: Any, sure: Any, heights: Any
) -> bool:
    """Fill ``out`` with sums of ``terms`` samples; ``False`` if the words did not last.

    Words are taken as int64. The first ``terms * len(out)`` are candidates, in a loop without
    branches; the rest replaces the hundredth of them that is not accepted at once.
    """
    count = out.shape[0]
    place = terms * count
    last = words.shape[0] - 2
    low = (1 << 53) - 1
    for term in range(terms):
        first = term * count
        for i in range(count):
            word = words[first + i]
            place_53 = (word >> 11) & low
            one[i] = np.float64(place_53) * steps[word & 511]
            bad[i] = np.int64(place_53 >= sure[word & 511])
        for i in range(count):
            if bad[i]:
                word = words[first + i]
                while True:
                    layer = word & 255
                    z = np.float64((word >> 11) & low) * steps[layer]
                    if ((word >> 11) & low) < sure[layer]:
                        break
                    if place >= last:
                        return False
                    if layer == 0:
                        while True:
                            if place >= last:
                                return False
                            u = (np.float64((words[place] >> 11) & low) + 0.5) * _UNIT
                            v = (np.float64((words[place + 1] >> 11) & low) + 0.5) * _UNIT
                            place += 2
                            z = -math.log(u) / _R
                            if -2.0 * math.log(v) > z * z:
                                break
                        z += _R
                        break
                    u = np.float64((words[place] >> 11) & low) * _UNIT
                    place += 1
                    base = heights[layer]
                    if base + u * (heights[layer + 1] - base) < math.exp(-0.5 * z * z):
                        break
                    word = words[place]
                    place += 1
                one[i] = -z if word & 256 else z
        if term == 0:
            for i in range(count):
                out[i] = one[i]
        else:
            for i in range(count):
                out[i] += one[i]
    return True


def _combine(  # pragma: no cover - compiled
    sums: Any, noise: Any, out: Any, scale: float, step: float, divisor: float
) -> None:
    inverse = 1.0 / step
    for i in range(out.shape[0]):
        both = np.rint(sums[i] * inverse) + np.rint(noise[i] * scale * inverse)
        out[i] = both * step / divisor


def _compile() -> tuple[Callable[..., bool], Callable[..., None]] | None:
    try:
        from numba import njit  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return None
    draw = (
        "boolean(int64[::1],int64,float64[::1],float64[::1],int64[::1],float64[::1],int64[::1],"
        "float64[::1])"
    )
    join = "void(float32[::1],float64[::1],float32[::1],float64,float64,float64)"
    return (
        njit(draw, nogil=True, error_model="numpy")(_ziggurat),
        njit(join, nogil=True, error_model="numpy")(_combine),
    )


@functools.cache
def _kernels() -> tuple[Callable[..., bool], Callable[..., None]] | None:
    return _compile()


class _Room(threading.local):
    """Buffers of a thread: fresh memory would cost more than the samples."""

    def __init__(self) -> None:
        self.noise = np.empty(BLOCK)
        self.one = np.empty(BLOCK)
        self.bad = np.empty(BLOCK, dtype=np.int64)


_ROOM = _Room()


def _draw(stream: Keystream, count: int, terms: int, *, compiled: bool) -> Floats:
    """``count`` (at most BLOCK) samples, in a buffer of this thread."""
    kernels = _kernels() if compiled else None
    shrink = 1 / math.sqrt(terms)
    noise = _ROOM.noise[:count]
    if kernels is None:
        noise[:] = _box_muller(stream, count, terms)
    else:
        need = terms * count
        while not kernels[0](
            stream.words(need + need // 20 + 96).view(np.int64), terms, noise,
            _ROOM.one[:count], _ROOM.bad[:count], _STEPS, _SURE, _HEIGHTS,
        ):  # fmt: skip
            pass
    noise *= shrink
    return noise


def add_noise(
    stream: Keystream,
    pieces: list[tuple[Floats, Floats]],
    *,
    scale: float,
    divisor: float,
    terms: int = 2,
    compiled: bool = True,
) -> None:
    """``out = (sum + noise) / divisor`` for pairs of flat, contiguous float arrays.

    Args:
        stream: where the randomness comes from.
        pieces: pairs (sum, out) of equal length and type, float32 or float64; together at
            most :data:`BLOCK` long.
        scale: standard deviation of the noise on the sum.
        divisor: the expected batch size.
        terms: normal samples that make up one.
        compiled: use the compiled sampler where it is.
    """
    step = grid(scale)
    noise = _draw(stream, sum(out.size for _, out in pieces), terms, compiled=compiled)
    kernels = _kernels() if compiled else None
    begin = 0
    for sums, out in pieces:
        part = noise[begin : begin + out.size]
        begin += out.size
        if kernels is not None and out.dtype == np.float32:
            kernels[1](sums, part, out, scale, step, divisor)
        else:
            both = np.rint(sums.astype(np.float64) / step) + np.rint(part * scale / step)
            out[:] = both * step / divisor


def normals(stream: Keystream, count: int, *, terms: int = 2, compiled: bool = True) -> Floats:
    """``count`` standard normal samples, float64."""
    sizes = [min(BLOCK, count - begin) for begin in range(0, count, BLOCK)]
    parts = [_draw(stream, size, terms, compiled=compiled).copy() for size in sizes]
    return np.concatenate(parts) if parts else np.empty(0)


def _box_muller(stream: Keystream, count: int, terms: int) -> npt.NDArray[np.float64]:
    half = -(-count * terms // 2)
    words: Words = stream.words(2 * half)
    one = ((words[:half] >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIT
    two = (words[half:] >> np.uint64(11)).astype(np.float64) * (_UNIT * 2 * math.pi)
    radius = np.sqrt(-2.0 * np.log(one))
    both = np.concatenate([radius * np.cos(two), radius * np.sin(two)])[: count * terms]
    summed: npt.NDArray[np.float64] = both.reshape(terms, count).sum(0)
    return summed
