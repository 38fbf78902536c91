"""Parquet, Feather and Arrow IPC files, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cenacle.errors import DataError
from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.missing import refuse_missing
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.tables import TableWriter, check_columns
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_arrow", "import_parquet"]

_BATCH_ROWS: Final = 1 << 14


def _bad(what: str) -> DataError:
    # pyarrow's own messages may quote cells, so they are never passed on.
    return DataError(
        f"a {what} file is malformed",
        found=f"content that does not decode as {what}",
        expected=f"a {what} file",
        remedy="write it again with the program it came from",
    )


@importer("Parquet", "table", (".parquet", ".pq"))
def import_parquet(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """All rows and columns, dictionaries decoded.

    Raises:
        DataError: malformed, unusable columns, or missing values that were not allowed.
    """
    with os.fdopen(open_source(path), "rb") as raw, disk_errors(f"read {path}"):
        try:
            file = pq.ParquetFile(raw, pre_buffer=False)
            schema, rows = file.schema_arrow, file.metadata.num_rows
            check_columns(schema.names)
            batches = file.iter_batches(_BATCH_ROWS, use_threads=False)
            return _copy(batches, schema, rows, writer, options)
        except (pa.ArrowException, OverflowError, UnicodeDecodeError):
            raise _bad("Parquet") from None


@importer("Arrow", "table", (".arrow", ".feather"))
def import_arrow(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """As :func:`import_parquet`, for Arrow IPC files."""
    with os.fdopen(open_source(path), "rb") as raw, disk_errors(f"read {path}"):
        try:
            file = pa.ipc.open_file(raw)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return _copy(batches, file.schema, 0, writer, options)
        except (pa.ArrowException, UnicodeDecodeError):
            raise _bad("Arrow") from None


def _copy(
    batches: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    rows: int,
    writer: SealedWriter,
    options: Options,
) -> dict[str, Any]:
    plain = pa.schema([field.with_type(_decoded(field.type)) for field in schema])
    table = TableWriter(writer, plain)
    done = 0
    for batch in batches:
        batch.validate(full=True)
        decoded = pa.RecordBatch.from_arrays(
            [
                column.cast(field.type) if column.type != field.type else column
                for column, field in zip(batch.columns, plain, strict=True)
            ],
            schema=plain,
        )
        if not options.allow_missing:
            refuse_missing(decoded, done)
        table.write(decoded)
        done += decoded.num_rows
        if options.progress is not None and rows:
            options.progress(done, rows)
    return table.finish()


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
