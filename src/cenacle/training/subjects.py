"""Records that belong together: whose they are, and how many of each subject are used.

Subjects are numbered within one asset, in the order in which they first appear; two assets
never share one. Which records belong together, and so how many subjects there are, counts
as public: neighbouring data sets differ in what a subject's records hold, not in their places.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cenacle.errors import DataError

__all__ = ["array_subjects", "column_subjects", "units", "used_rows"]

Codes = NDArray[np.int64]


def column_subjects(column: pa.ChunkedArray, what: str) -> Codes:
    """Whose each row is: a number for each different id, from 0, (rows,).

    Raises:
        DataError: an id is missing, or ids are neither text nor integers.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise DataError(
            f"{what} does not hold ids", found=f"type {kind}", expected="text, integers"
        )
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(
            f"{what} has no value in row {row}", remedy="give such rows ids of their own"
        )
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)


def array_subjects(array: NDArray[Any], rows: int, what: str) -> Codes:
    """The same for ids in a tensor, shape (rows,) or (rows, 1).

    Raises:
        DataError: another shape, or ids are not integers.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise DataError(
            f"{what} is not one id a sample",
            found=f"{array.dtype} of shape {array.shape}",
            expected=f"integers of shape ({rows},)",
        )
    _, first, codes = np.unique(array, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes].astype(np.int64)


def used_rows(subjects: Codes, most: int, keys: NDArray[np.uint64]) -> Codes:
    """The rows to use, ascending: at most so many of each subject, those with the smallest keys.

    Args:
        subjects: whose each row is, (rows,).
        keys: one number a row; random and secret.
    """
    order = np.lexsort((keys, subjects))
    starts = np.flatnonzero(np.diff(subjects[order], prepend=-1))
    sizes = np.diff(starts, append=len(subjects))
    rank = np.arange(len(subjects)) - np.repeat(starts, sizes)
    return np.sort(order[rank < most])


def units(parts: Iterable[tuple[Codes | None, Codes]]) -> Codes:
    """Which unit of privacy each chosen row belongs to, numbered from 0 without gaps.

    Args:
        parts: by party whose each row is (None: every row is a unit), and the chosen rows.

    Returns:
        (rows,) over all parties together.
    """
    total = 0
    found = []
    for subjects, rows in parts:
        if subjects is None:
            own = np.arange(len(rows), dtype=np.int64)
        else:
            own = np.unique(subjects[rows], return_inverse=True)[1].astype(np.int64)
        found.append(own + total)
        total += int(own.max(initial=-1)) + 1
    return np.concatenate(found)
