"""The passes of :mod:`cenacle.offload.passes` as machine code, through numba.

As :mod:`cenacle.offload.compiled`, whose building blocks they share: vectors of 16 numbers, on
one thread, without the GIL, and arguments that the caller has checked. A pass goes through
planes in blocks, so that what it adds up stays in the inner caches.
"""

# ruff: noqa: PLR0912, PLR0915
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, type-arg, assignment"
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

from functools import cache, partial
from typing import Any

import numba
import numpy as np

from cenacle.offload.compiled import _total
from cenacle.offload.compiled_steps import (
    energy_step,
    in_step,
    out_step,
    pool_step,
    scatter_step,
)

__all__ = ["blind_kernel", "unblind_kernel"]


@cache
def unblind_kernel(*, checked: bool, marked: bool, pooled: bool) -> Any:
    """``f(src, dst, marks, into, cols, row_scale, col_scale, bias, lowest, width, block, r, s,
    bundle, totals, stream)``.

    See :func:`cenacle.offload.passes.unblind`. ``marks``: int16 of (rows, columns, words), or,
    if ``pooled``, uint8 of (rows, columns, codes); ``width``: of an image of ``src``, for
    pooling. ``block``: numbers of a plane to take at a time, a multiple of 16, or, if
    ``pooled``, of two rows. ``totals``: (bundles, plane), float64.
    """
    through = in_step(checked=checked, marked=marked)
    past = in_step(checked=checked, marked=marked, stream=True)
    rest = in_step(checked=checked, marked=marked, tail=True)
    pool, pool_rest = pool_step(checked=checked), pool_step(checked=checked, tail=True)
    kind = "u1" if pooled else "i2"
    zero = np.int64(0)

    @numba.njit(
        f"void(f4[:,:,::1], f4[:,:,::1], {kind}[:,:,::1], i4[::1], i4[::1], f4[::1], f4[::1],"
        " f4[::1], f4, i8, i8, f4[::1], f8[::1], i8, f8[:,::1], b1)",
        nogil=True,
        error_model="numpy",
    )
    def unblind(
        src, dst, marks, into, cols, row_scale, col_scale, bias, lowest, width, block, r, s,
        bundle, totals, stream,
    ):  # fmt: skip
        size = np.int64(src.shape[2])
        sums = np.zeros(block if checked else 16, np.float32)
        held = np.int64(sums.ctypes.data)
        origin, target = np.int64(src.ctypes.data), np.int64(dst.ctypes.data)
        marked_at = np.int64(marks.ctypes.data)
        words = np.int64(marks.shape[2])
        half = width // 2
        padded = (half + 15) // 16 * 16
        for i in range(into.shape[0]):
            for start in range(zero, size, block):
                end = min(start + block, size)
                for j in range(cols.shape[0]):
                    weight = r[cols[j]]
                    scale, add = row_scale[i] * col_scale[j], bias[j]
                    to = into[i] * np.int64(dst.shape[1]) + j
                    a = origin + (i * np.int64(src.shape[1]) + cols[j]) * size * 4
                    if pooled:
                        t = target + to * (size // 4) * 4
                        m = marked_at + to * words
                        for p in range(start, end, 2 * width):
                            row = p // (2 * width)
                            u, v = t + row * half * 4, m + row * padded
                            above = a + p * 4
                            acc = held + (p - start) * 4
                            for q in range(zero, half // 16 * 16, 16):
                                pool(
                                    above + q * 8, above + (width + 2 * q) * 4, u + q * 4,
                                    acc + q * 8, v + q, weight, scale, add, lowest, zero,
                                )  # fmt: skip
                            q = half // 16 * 16
                            if q < half:
                                pool_rest(
                                    above + q * 8, above + (width + 2 * q) * 4, u + q * 4,
                                    acc + q * 8, v + q, weight, scale, add, lowest, half - q,
                                )  # fmt: skip
                    else:
                        t = target + to * size * 4
                        m = marked_at + to * words * 2
                        full = start + (end - start) // 16 * 16
                        if stream:
                            for p in range(start, full, 16):
                                past(
                                    a + p * 4, t + p * 4, held + (p - start) * 4, m + p // 8,
                                    weight, scale, add, lowest, zero,
                                )  # fmt: skip
                        else:
                            for p in range(start, full, 16):
                                through(
                                    a + p * 4, t + p * 4, held + (p - start) * 4, m + p // 8,
                                    weight, scale, add, lowest, zero,
                                )  # fmt: skip
                        if full < end:
                            rest(
                                a + full * 4, t + full * 4, held + (full - start) * 4,
                                m + full // 8, weight, scale, add, lowest, end - full,
                            )  # fmt: skip
                if checked:
                    factor, number = s[i], i // bundle
                    for p in range(end - start):
                        totals[number, start + p] += factor * sums[p]
                        sums[p] = 0

    return unblind


@cache
def blind_kernel(*, gate: str, summed: bool, checked: bool, folded: bool) -> Any:
    """``f(src, dst, marks, rows, cols, row_scale, col_scale, width, block, sums, s, q, bundle,
    image, energy, folds, stream)``.

    See :func:`cenacle.offload.passes.blind`. ``gate``: ``""``, ``bits``, or ``codes`` (then
    ``src`` is pooled). ``folded``: fill ``folds`` too. ``image``: (bundles,
    columns, plane), ``energy``: (bundles, plane), ``folds``: (2, rows, plane), all float32, the
    last two zero at first.
    """
    scattered = gate == "codes"
    kind = "u1" if scattered else "i2"
    options = {"summed": summed, "checked": checked, "folded": folded}
    step = scatter_step if scattered else partial(out_step, gate=gate)
    through, past, rest = step(**options), step(**options, stream=True), step(**options, tail=True)
    square, square_rest = energy_step(), energy_step(tail=True)
    zero = np.int64(0)

    @numba.njit(
        f"void(f4[:,:,::1], f4[:,:,::1], {kind}[:,:,::1], i4[::1], i4[::1], f4[::1], f4[::1],"
        " i8, i8, f8[::1], f4[::1], f4[:,::1], i8, f4[:,:,::1], f4[:,::1], f4[:,:,::1], b1)",
        nogil=True,
        error_model="numpy",
    )
    def blind(
        src, dst, marks, rows, cols, row_scale, col_scale, width, block, sums, s, q, bundle,
        image, energy, folds, stream,
    ):  # fmt: skip
        size, small = np.int64(dst.shape[2]), np.int64(src.shape[2])
        parts = np.zeros(64, np.float32)
        held = np.int64(parts.ctypes.data)
        origin, target = np.int64(src.ctypes.data), np.int64(dst.ctypes.data)
        marked_at, words = np.int64(marks.ctypes.data), np.int64(marks.shape[2])
        images, energies = np.int64(image.ctypes.data), np.int64(energy.ctypes.data)
        folded = np.int64(folds.ctypes.data)
        apart = np.int64(folds.shape[1]) * size * 4
        half = width // 2
        padded = (half + 15) // 16 * 16
        count, columns = np.int64(rows.shape[0]), np.int64(cols.shape[0])
        wide = np.int64(src.shape[1])
        for group in range(zero, count, bundle):
            number = group // bundle
            for start in range(zero, size, block):
                end = min(start + block, size)
                full = start + (end - start) // 16 * 16
                for j in range(columns):
                    picture = images + ((number * columns + j) * size + start) * 4
                    if checked:
                        image[number, j, start:end] = 0
                    for i in range(group, min(group + bundle, count)):
                        scale = row_scale[i] * col_scale[j]
                        of = rows[i] * wide + cols[j]
                        a = origin + of * small * 4
                        t = target + (i * columns + j) * size * 4
                        f = folded + (i * size + start) * 4
                        g = f + apart
                        sample, one, two = s[i], q[0, j], q[1, j]
                        if scattered:
                            m = marked_at + of * words
                            for p in range(start, end, 2 * width):
                                row = p // (2 * width)
                                u, v = a + row * half * 4, m + row * padded
                                w, o = t + p * 4, (p - start) * 4
                                x, y, z = picture + o, f + o, g + o
                                for k in range(zero, half // 16 * 16, 16):
                                    if stream:
                                        past(
                                            u + k * 4, w + k * 8, w + (width + 2 * k) * 4, v + k,
                                            held + (k & 48) * 4, x + k * 8, y + k * 8, z + k * 8,
                                            scale, sample, one, two, zero,
                                        )  # fmt: skip
                                    else:
                                        through(
                                            u + k * 4, w + k * 8, w + (width + 2 * k) * 4, v + k,
                                            held + (k & 48) * 4, x + k * 8, y + k * 8, z + k * 8,
                                            scale, sample, one, two, zero,
                                        )  # fmt: skip
                                k = half // 16 * 16
                                if k < half:
                                    rest(
                                        u + k * 4, w + k * 8, w + (width + 2 * k) * 4, v + k,
                                        held + (k & 48) * 4, x + k * 8, y + k * 8, z + k * 8,
                                        scale, sample, one, two, half - k,
                                    )  # fmt: skip
                        else:
                            m = marked_at + of * words * 2
                            if stream:
                                for p in range(start, full, 16):
                                    o = (p - start) * 4
                                    past(
                                        a + p * 4, t + p * 4, m + p // 8, held + (p & 48) * 4,
                                        picture + o, f + o, g + o, scale, sample, one, two, zero,
                                    )  # fmt: skip
                            else:
                                for p in range(start, full, 16):
                                    o = (p - start) * 4
                                    through(
                                        a + p * 4, t + p * 4, m + p // 8, held + (p & 48) * 4,
                                        picture + o, f + o, g + o, scale, sample, one, two, zero,
                                    )  # fmt: skip
                            if full < end:
                                o = (full - start) * 4
                                rest(
                                    a + full * 4, t + full * 4, m + full // 8, held,
                                    picture + o, f + o, g + o, scale, sample, one, two, end - full,
                                )  # fmt: skip
                        if summed:
                            sums[cols[j]] += _total(held)
                    if checked:
                        e = energies + (number * size + start) * 4
                        for p in range(zero, full - start, 16):
                            square(picture + p * 4, e + p * 4, zero)
                        if full < end:
                            square_rest(
                                picture + (full - start) * 4, e + (full - start) * 4, end - full
                            )

    return blind
