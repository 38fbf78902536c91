"""Missing and non-finite cells, named by row and column but never by value."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cenacle.errors import DataError

__all__ = ["first_true", "missing_cell", "refuse_missing"]


def first_true(mask: pa.Array) -> int | None:
    """The first index at which a boolean array is true."""
    index: int = pc.index(mask, pa.scalar(True)).as_py()
    return None if index < 0 else index


def missing_cell(column: str, row: int, found: str) -> DataError:
    """The error for a cell; ``row`` counts from 1, the first below the header."""
    return DataError(
        f"row {row} of column {column[:80]!r} has no usable value",
        found=found,
        expected="a value in every cell",
        remedy="fill or remove the row, or allow missing values",
    )


def refuse_missing(batch: pa.RecordBatch, rows_before: int) -> None:
    """Raises :class:`DataError` for the first null, NaN or infinity of a batch."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            row = first_true(pc.is_null(column))
            assert row is not None
            raise missing_cell(name, rows_before + row + 1, "an empty cell")
        if pa.types.is_floating(column.type):
            row = first_true(pc.invert(pc.is_finite(column)))
            if row is not None:
                raise missing_cell(name, rows_before + row + 1, "NaN or an infinity")
