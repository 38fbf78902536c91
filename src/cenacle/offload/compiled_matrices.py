"""Matrices times a few vectors, and the squares of rows and columns, in one pass, through numba.

Torch multiplies a matrix with two columns at a tenth of the memory's speed, and takes three more
passes for the squares.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, import-untyped"
from __future__ import annotations

from functools import cache
from typing import Any, Final

import numba
import numpy as np

__all__ = ["HEIGHT", "columns_kernel", "rows_kernel"]

HEIGHT: Final = 64
"""Rows whose sums are float32 before they join a sum in float64."""

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
