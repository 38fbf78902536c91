"""Small sums of Freivalds' check for convolutions as machine code, through numba.

What is left of an operand once it is contracted is small, but torch goes over it once for each
tap of the filter, in float64. These do it in one pass, in the cache.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np

__all__ = ["correlate_kernel", "shift_kernel"]

_FAST: Final = {"reassoc", "contract", "nsz"}
"""Sums in any order; infinities and NaN stay what they are."""


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
                            total = 0.0
                            a, c = g[r, b, u], x[r, b, row]
                            if right == 1:
                                for v in range(first, last):
                                    total += np.float64(a[v]) * np.float64(c[v + offset])
                            else:
                                for v in range(first, last):
                                    total += np.float64(a[v]) * np.float64(c[v * right + offset])
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
                        if back:
                            to, near = found[n, row], nearby[n, row]
                            of, some = taps[n, i, j, u], energy[n, u]
                            for v in range(first, last):
                                to[v * right + offset] += of[v]
                                near[v * right + offset] += some[v]
                        else:
                            to, near = found[n, u], nearby[n, u]
                            of, some = taps[n, i, j, row], energy[n, row]
                            for v in range(first, last):
                                to[v] += of[v * right + offset]
                                near[v] += some[v * right + offset]

    return shift
