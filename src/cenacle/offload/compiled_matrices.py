"""Matrices times a few vectors, in the pass that moves them or in one of its own, through numba.

Torch multiplies a matrix with two columns at a tenth of the memory's speed, and takes three more
passes for the squares. A matrix that is blinded or unblinded anyway is contracted a few rows at a
time, while they are in the cache.
"""

# A kernel is one function because numba compiles it as one; numba has no types for mypy.
# ruff: noqa: PLR0912, PLR0915
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np

from cenacle.offload.compiled import columns_kernel as move_kernel

__all__ = ["HEIGHT", "blind_kernel", "columns_kernel", "rows_kernel", "unblind_kernel"]

HEIGHT: Final = 64
"""Rows whose sums are float32 before they join a sum in float64."""

_TINY: Final = 1e-30
_HUGE: Final = 1e36
"""Sums of squares outside are summed in float64: those of float32 numbers may have vanished."""

_FAST: Final = {"reassoc", "contract", "nsz"}
_SIGNATURE: Final = "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f8[:,::1], f8[:,::1])"


@cache
def rows_kernel() -> Any:
    """``f(x, r, found, rows, columns)``: ``found[b, i, k] = sum_j x[b, i, j] r[b, k, j]``.

    ``rows[b, i]`` and ``columns[b, j]``: sums of squares. If ``r`` has one matrix, all share it.
    """

    @numba.njit(_SIGNATURE, nogil=True, fastmath=_FAST)
    def multiply(x, r, found, rows, columns):
        height, width = x.shape[1], x.shape[2]
        squares = np.empty(width, np.float32)
        for b in range(x.shape[0]):
            vectors = r[b if r.shape[0] > 1 else 0]
            columns[b, :] = 0.0
            for top in range(0, height, HEIGHT):
                squares[:] = np.float32(0)
                for i in range(top, min(top + HEIGHT, height)):
                    row = x[b, i]
                    energy = np.float32(0)
                    for j in range(row.size):
                        square = row[j] * row[j]
                        energy += square
                        squares[j] += square
                    rows[b, i] = energy
                    for k in range(vectors.shape[0]):  # the row is in the cache by now
                        vector = vectors[k]
                        total = np.float32(0)
                        for j in range(row.size):
                            total += row[j] * vector[j]
                        found[b, i, k] = total
                for j in range(width):
                    columns[b, j] += squares[j]

    return multiply


@cache
def columns_kernel() -> Any:
    """``f(x, r, found, rows, columns)``: ``found[b, j, k] = sum_i x[b, i, j] r[b, k, i]``."""

    @numba.njit(_SIGNATURE, nogil=True, fastmath=_FAST)
    def multiply(x, r, found, rows, columns):
        height, width, count = x.shape[1], x.shape[2], r.shape[1]
        squares = np.empty(width, np.float32)
        sums = np.empty((count, width), np.float32)
        totals = np.empty((count, width), np.float64)
        for b in range(x.shape[0]):
            vectors = r[b if r.shape[0] > 1 else 0]
            columns[b, :] = 0.0
            totals[:] = 0.0
            for top in range(0, height, HEIGHT):
                squares[:] = np.float32(0)
                sums[:] = np.float32(0)
                for i in range(top, min(top + HEIGHT, height)):
                    row = x[b, i]
                    energy = np.float32(0)
                    for j in range(row.size):
                        square = row[j] * row[j]
                        energy += square
                        squares[j] += square
                    rows[b, i] = energy
                    for k in range(count):
                        weight = vectors[k, i]
                        partial = sums[k]
                        for j in range(row.size):
                            partial[j] += row[j] * weight
                for j in range(width):
                    columns[b, j] += squares[j]
                for k in range(count):
                    for j in range(width):
                        totals[k, j] += sums[k, j]
            for k in range(count):
                for j in range(width):
                    found[b, j, k] = totals[k, j]

    return multiply


# ---------------------------------------------------------------------- while they are moved


@cache
def _contract() -> Any:
    """``f(x, rows, first, vectors, dots, norms, weights, sums, energies)``: extreme or not.

    Of rows ``x[rows]``, which are number ``first`` and those that follow of all: ``dots[i, k]``,
    their products with ``vectors[k]``; ``norms[i]``, their squared norms; and added to: ``sums[l,
    j]``, weighted with ``weights[l, i]``; the last of ``sums``, squares. The numbers of
    ``vectors`` and ``weights`` are even. ``energies``: squares are wanted.
    """

    @numba.njit(
        "b1(f4[:,::1], i4[::1], i8, f4[:,::1], f4[:,::1], f8[::1], f4[:,::1], f4[:,::1], b1)",
        nogil=True,
        fastmath=_FAST,
        error_model="numpy",
    )
    def contract(x, rows, first, vectors, dots, norms, weights, sums, energies):
        count, width = rows.shape[0], x.shape[1]
        extreme = False
        for top in range(0, count, 4):
            # The last rows are read twice where there are fewer than four left.
            left = min(4, count - top)
            p = x[rows[top]]
            q = x[rows[top + min(1, left - 1)]]
            r = x[rows[top + min(2, left - 1)]]
            s = x[rows[top + min(3, left - 1)]]
            at = first + top
            for k in range(0, vectors.shape[0], 2):
                v, w = vectors[k], vectors[k + 1]
                pv = pw = qv = qw = rv = rw = sv = sw = np.float32(0)
                for j in range(width):
                    one, two = v[j], w[j]
                    pv += p[j] * one
                    pw += p[j] * two
                    qv += q[j] * one
                    qw += q[j] * two
                    rv += r[j] * one
                    rw += r[j] * two
                    sv += s[j] * one
                    sw += s[j] * two
                dots[at, k], dots[at, k + 1] = pv, pw
                if left > 1:
                    dots[at + 1, k], dots[at + 1, k + 1] = qv, qw
                if left > 2:
                    dots[at + 2, k], dots[at + 2, k + 1] = rv, rw
                if left > 3:
                    dots[at + 3, k], dots[at + 3, k + 1] = sv, sw
            has_q, has_r, has_s = (
                np.float32(left > 1), np.float32(left > 2), np.float32(left > 3)
            )  # fmt: skip
            for k in range(0, weights.shape[0], 2):
                one, two = weights[k], weights[k + 1]
                b, c, d = at + min(1, left - 1), at + min(2, left - 1), at + min(3, left - 1)
                po, qo, ro, so = one[at], one[b] * has_q, one[c] * has_r, one[d] * has_s
                pt, qt, rt, st = two[at], two[b] * has_q, two[c] * has_r, two[d] * has_s
                v, w = sums[k], sums[k + 1]
                for j in range(width):
                    v[j] += p[j] * po + q[j] * qo + r[j] * ro + s[j] * so
                    w[j] += p[j] * pt + q[j] * qt + r[j] * rt + s[j] * st
            if energies:
                squares = sums[sums.shape[0] - 1]
                pp = qq = rr = ss = np.float32(0)
                for j in range(width):
                    a, b2, c2, d2 = p[j] * p[j], q[j] * q[j], r[j] * r[j], s[j] * s[j]
                    pp += a
                    qq += b2
                    rr += c2
                    ss += d2
                    squares[j] += a + has_q * b2 + has_r * c2 + has_s * d2
                norms[at] = pp
                if left > 1:
                    norms[at + 1] = qq
                if left > 2:
                    norms[at + 2] = rr
                if left > 3:
                    norms[at + 3] = ss
                for i in range(left):
                    if not _TINY < norms[at + i] < _HUGE:
                        row = x[rows[top + i]]
                        exact = 0.0
                        for j in range(width):
                            exact += np.float64(row[j]) * np.float64(row[j])
                        norms[at + i] = exact
                        extreme |= not exact == 0.0  # noqa: SIM201 - NaN is neither
        return extreme

    return contract


@cache
def _flush() -> Any:
    """``f(sums, totals)``: float32 sums join those in float64 and begin anew."""

    @numba.njit("void(f4[:,::1], f8[:,::1])", nogil=True)
    def flush(sums, totals):
        for k in range(sums.shape[0]):
            for j in range(sums.shape[1]):
                totals[k, j] += sums[k, j]
                sums[k, j] = 0

    return flush


@cache
def blind_kernel(height: int) -> Any:
    """``f(src, dst, rows, cols, row_scale, col_scale, sums, some, rights, along, lefts, across,
    right, after, left, over, row_squares, col_squares, energies)``.

    Moves as :func:`cenacle.offload.compiled.columns_kernel`, without gate and bias, and contracts
    ``dst``, of matrices below each other as many as ``row_squares`` has rows; see
    :class:`cenacle.offload.matrix_passes.MatrixSketch`. What is not wanted has length 0.
    ``along`` (one for all or for each, columns, R), ``across`` (batch, rows, R). ``energies`` (2,
    batch, R): weighted with the squares of ``lefts`` and ``rights``. ``some``: rows at a time.
    Returns True if numbers are too extreme for squares of float32.
    """
    move, contract, flush = move_kernel(height, gated=False, summed=True), _contract(), _flush()

    @numba.njit(
        "b1(f4[:,::1], f4[:,::1], i4[::1], i4[::1], f4[::1], f4[::1], f8[::1], i8,"
        " f8[:,::1], f8[:,:,::1], f8[:,::1], f8[:,:,::1],"
        " f8[:,:,::1], f8[:,:,::1], f8[:,:,::1], f8[:,:,::1], f8[:,::1], f8[:,::1], f8[:,:,::1])",
        nogil=True,
        error_model="numpy",
    )
    def blind(
        src, dst, rows, cols, row_scale, col_scale, sums, some, rights, along, lefts, across,
        right, after, left, over, row_squares, col_squares, energies,
    ):  # fmt: skip
        batch, each = row_squares.shape
        width = src.shape[1]
        own, other = rights.shape[0], 2 * min(1, along.shape[0])
        secret, known = lefts.shape[0], 2 * min(1, across.shape[0])
        # What rows are multiplied with stands where their columns are read.
        vectors = np.empty((own + other, width), np.float32)
        weights = np.empty((secret + known, each), np.float32)
        dots = np.empty((each, own + other), np.float32)
        partial = np.zeros((secret + known + 1, width), np.float32)
        totals = np.empty((secret + known + 1, width), np.float64)
        into = np.arange(rows.shape[0]).astype(np.int32)
        bias = np.zeros(width, np.float32)
        for k in range(own):
            for j in range(width):
                vectors[k, cols[j]] = rights[k, j] * col_scale[j]
        extreme = False
        for b in range(batch):
            first = b * each
            if b < along.shape[0]:
                for j in range(width):
                    for k in range(other):
                        vectors[own + k, cols[j]] = along[b, j, k] * col_scale[j]
            for i in range(each):
                for k in range(secret):
                    weights[k, i] = lefts[k, i] * row_scale[first + i]
                for k in range(known):
                    weights[secret + k, i] = across[b, i, k] * row_scale[first + i]
            totals[:] = 0.0
            since = 0
            for top in range(0, each, some):
                end = min(top + some, each)
                extreme |= contract(
                    src, rows[first + top : first + end], top, vectors, dots, row_squares[b],
                    weights, partial, True,
                )  # fmt: skip
                since += end - top
                if since >= HEIGHT:
                    flush(partial, totals)
                    since = 0
                move(
                    src, dst, src, rows[first + top : first + end],
                    into[first + top : first + end], cols, row_scale[first + top : first + end],
                    col_scale, bias, np.float32(-np.inf), sums,
                )  # fmt: skip
            flush(partial, totals)
            for i in range(each):
                for k in range(own):
                    right[b, i, k] = dots[i, k] * row_scale[first + i]
                for k in range(other):
                    after[b, i, k] = dots[i, own + k] * row_scale[first + i]
                for k in range(secret):
                    energies[0, b, k] += row_squares[b, i] * lefts[k, i] ** 2
            for j in range(width):
                at = cols[j]
                for k in range(secret):
                    left[b, j, k] = totals[k, at] * col_scale[j]
                for k in range(known):
                    over[b, j, k] = totals[secret + k, at] * col_scale[j]
                col_squares[b, j] = totals[secret + known, at]
                for k in range(own):
                    energies[1, b, k] += col_squares[b, j] * rights[k, j] ** 2
        return extreme

    return blind


@cache
def unblind_kernel(height: int) -> Any:
    """``f(src, dst, into, cols, row_scale, col_scale, bias, each, some, r, transposed, found)``.

    As :func:`blind_kernel` for what comes back. ``found`` (batch, rows, R): rows of ``src`` times
    ``r``; or, if ``transposed``, (batch, columns, R): rows weighted with ``r`` and added up. Each
    element of ``src`` is read once, into memory of one's own.
    """
    move = move_kernel(height, gated=False, summed=False)
    contract, flush = _contract(), _flush()

    @numba.njit(
        "void(f4[:,::1], f4[:,::1], i4[::1], i4[::1], f4[::1], f4[::1], f4[::1], i8, i8,"
        " f8[:,::1], b1, f8[:,:,::1])",
        nogil=True,
        error_model="numpy",
    )
    def unblind(
        src, dst, into, cols, row_scale, col_scale, bias, each, some, r, transposed, found
    ):  # fmt: skip
        width, count = src.shape[1], r.shape[0]
        secret = r.astype(np.float32)
        own = np.empty((some, width), np.float32)
        vectors = secret[:0] if transposed else secret
        weights = secret if transposed else secret[:0]
        dots = np.empty((each, vectors.shape[0]), np.float32)
        partial = np.zeros((weights.shape[0], width), np.float32)
        totals = np.empty((weights.shape[0], width), np.float64)
        order = np.arange(some).astype(np.int32)
        none = np.empty(0, np.float64)
        for b in range(found.shape[0]):
            totals[:] = 0.0
            since = 0
            for top in range(0, each, some):
                rows = min(some, each - top)
                first = b * each + top
                for i in range(rows):
                    for j in range(width):
                        own[i, j] = src[first + i, j]
                contract(own, order[:rows], top, vectors, dots, none, weights, partial, False)
                since += rows
                if since >= HEIGHT:
                    flush(partial, totals)
                    since = 0
                move(
                    own, dst, own, order[:rows], into[first : first + rows], cols,
                    row_scale[first : first + rows], col_scale, bias, np.float32(-np.inf), none,
                )  # fmt: skip
            flush(partial, totals)
            for k in range(count):
                if transposed:
                    for j in range(width):
                        found[b, j, k] = totals[k, j]
                else:
                    for i in range(each):
                        found[b, i, k] = dots[i, k]

    return unblind
