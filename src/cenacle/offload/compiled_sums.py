"""Small sums of Freivalds' check for convolutions as machine code, through numba.

What is left of an operand once it is contracted is small, but torch goes over it once for each
tap of the filter, in float64. These do it in one pass, in the cache.
"""

# ruff: noqa: PLR0912
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np

__all__ = [
    "beyond_kernel",
    "beyond_product_kernel",
    "correlate_kernel",
    "shift_kernel",
    "signs_kernel",
]

_FAST: Final = {"reassoc", "contract", "nsz"}
"""Sums in any order; infinities and NaN stay what they are."""


@cache
def signs_kernel() -> Any:
    """``f(bits, found)``: see :func:`cenacle.offload.contractions.secret_signs`."""

    random = numba.types.Array(numba.uint32, 1, "C", readonly=True)

    @numba.njit(numba.void(random, numba.float64[::1]), nogil=True)
    def signs(bits, found):
        for i in range(bits.size):
            size = 0.5 + np.float64(bits[i] >> np.uint32(1)) / 2147483648.0
            found[i] = size if bits[i] & np.uint32(1) else -size

    return signs


@cache
def beyond_kernel() -> Any:
    """``f(found, value, scale, roundoff, wide, summed, tiny, slack)``: how many differ by more.

    See :class:`cenacle.offload.tolerance.Tolerance`. What is not finite, or not below an
    infinite limit, differs by more.
    """

    @numba.njit("i8(f8[::1], f8[::1], f8[::1], f8, f8, f8, f8, f8)", nogil=True)
    def beyond(found, value, scale, roundoff, wide, summed, tiny, slack):
        wrong = 0
        for i in range(value.size):
            v, s = value[i], scale[i]
            limit = slack * (roundoff * np.sqrt(s * s * wide + v * v * summed) + tiny)
            wrong += not (abs(found[i] - v) <= limit < np.inf)
        return wrong

    return beyond


@cache
def beyond_product_kernel() -> Any:
    """As :func:`beyond_kernel` with the squared scale as ``rows[b, i] * energy[b, k]``."""

    @numba.njit(
        "i8(f8[:,:,::1], f8[:,:,::1], f8[:,::1], f8[:,::1], f8, f8, f8, f8, f8)", nogil=True
    )
    def beyond(found, value, rows, energy, roundoff, wide, summed, tiny, slack):
        wrong = 0
        share = (slack * roundoff) ** 2
        for b in range(value.shape[0]):
            for i in range(value.shape[1]):
                for k in range(value.shape[2]):
                    v = value[b, i, k]
                    error = abs(found[b, i, k] - v)
                    square = rows[b, i] * energy[b, k] * wide + v * v * summed
                    if error * error <= share * square < np.inf:
                        continue  # nearly always, without a root
                    limit = slack * (roundoff * np.sqrt(square) + tiny)
                    wrong += not error <= limit < np.inf
        return wrong

    return beyond


@cache
def correlate_kernel() -> Any:
    """``f(g, x, geometry, found)``: ``found[r, i, j] = sum g[r, b, u, v] x[r, b, u', v']``.

    ``g`` (R, batch, height, width), ``x`` (R, batch, height', width'), float32; ``found`` (R,
    taps, taps') float64; ``geometry``: stride, padding and dilation in both dimensions, and u' =
    u stride - padding + i dilation.
    """

    @numba.njit(
        "void(f4[:,:,:,::1], f4[:,:,:,::1], i8[::1], f8[:,:,::1])",
        nogil=True,
        fastmath=_FAST,
        error_model="numpy",
    )
    def correlate(g, x, geometry, found):
        down, right, top, left, tall, wide = geometry
        height, width = g.shape[2], g.shape[3]
        for r in range(found.shape[0]):
            for i in range(found.shape[1]):
                for j in range(found.shape[2]):
                    found[r, i, j] = 0.0
            for b in range(g.shape[1]):
                for u in range(height):
                    for i in range(found.shape[1]):
                        row = u * down - top + i * tall
                        if row < 0 or row >= x.shape[2]:
                            continue
                        for j in range(found.shape[2]):
                            offset = j * wide - left
                            first = max(0, -(offset // right))
                            last = min(width, (x.shape[3] - 1 - offset) // right + 1)
                            if last <= first:
                                continue
                            total = np.float32(0)
                            if right == 1:  # slices, so that no index can count from the end
                                a, c = g[r, b, u, first:last], x[r, b, row, first + offset :]
                                for v in range(a.size):
                                    total += a[v] * c[v]
                            else:
                                a, c = g[r, b, u], x[r, b, row]
                                for v in range(first, last):
                                    total += a[v] * c[v * right + offset]
                            found[r, i, j] += total

    return correlate


@cache
def shift_kernel() -> Any:
    """``f(taps, energy, geometry, back, found, nearby)``: each tap's plane to where it acts.

    ``taps`` (images, taps, taps', height, width) and ``energy`` (images, height, width), float32;
    ``found`` and ``nearby`` (images, height', width') float64, zero at first. ``geometry`` as
    for :func:`correlate_kernel`. ``back``: of an input gradient.
    """

    @numba.njit(
        "void(f4[:,:,:,:,::1], f4[:,:,::1], i8[::1], b1, f8[:,:,::1], f8[:,:,::1])",
        nogil=True,
        fastmath=_FAST,
        error_model="numpy",
    )
    def shift(taps, energy, geometry, back, found, nearby):
        down, right, top, left, tall, wide = geometry
        height = taps.shape[3] if back else found.shape[1]
        width = taps.shape[4] if back else found.shape[2]
        high = found.shape[1] if back else taps.shape[3]
        broad = found.shape[2] if back else taps.shape[4]
        for n in range(taps.shape[0]):
            for u in range(height):
                for i in range(taps.shape[1]):
                    row = u * down - top + i * tall
                    if row < 0 or row >= high:
                        continue
                    for j in range(taps.shape[2]):
                        offset = j * wide - left
                        first = max(0, -(offset // right))
                        last = min(width, (broad - 1 - offset) // right + 1)
                        if last <= first:
                            continue
                        high_row, low_row = (row, u) if back else (u, row)
                        to, near = found[n, high_row], nearby[n, high_row]
                        of, some = taps[n, i, j, low_row], energy[n, low_row]
                        if right == 1:  # slices, so that no index can count from the end
                            begin, end = (
                                (first + offset, first) if back else (first, first + offset)
                            )
                            to, near, of, some = to[begin:], near[begin:], of[end:], some[end:]
                            for v in range(last - first):
                                to[v] += of[v]
                                near[v] += some[v]
                        elif back:
                            for v in range(first, last):
                                to[v * right + offset] += of[v]
                                near[v * right + offset] += some[v]
                        else:
                            for v in range(first, last):
                                to[v] += of[v * right + offset]
                                near[v] += some[v * right + offset]

    return shift
