"""Sealed tables: Arrow record batches in, columns and row ranges out.

The plaintext is an Arrow IPC file without compression and without dictionaries, cut into
batches of one fixed number of rows (the last may be shorter), so that the batch of a row is
known without reading any. The number stands in the schema's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from cenacle.errors import DataError, InputError
from cenacle.sealing.content_reader import ContentReader
from cenacle.sealing.writer import SealedWriter

__all__ = [
    "TableReader",
    "TableWriter",
    "check_columns",
    "check_types",
    "table_schema",
]

_ROWS_KEY: Final = b"cenacle.rows_per_batch"
_BATCH_BYTES: Final = 1 << 20  # a row range costs no more than this and two chunks
_MAX_ROWS: Final = 1 << 16


def check_columns(names: Sequence[str]) -> None:
    """Raises :class:`DataError` for no, empty, overlong or repeated column names."""
    if not names:
        raise DataError("a table has no columns", found="none", expected="one or more")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip() or len(name) > 1024:
            raise DataError(
                f"column {number} has no usable name",
                found="an empty name" if not name.strip() else f"{len(name)} characters",
                expected="1 to 1024 characters",
                remedy="give every column a name in the header",
            )
        if name in seen:
            raise DataError(
                f"column name {name[:80]!r} occurs twice",
                found=f"columns {seen[name]} and {number}",
                expected="every name once",
                remedy="rename one of the columns",
            )
        seen[name] = number


def table_schema(schema: pa.Schema, rows: int) -> dict[str, Any]:
    """``{"columns": [{"name", "type"}], "rows": n}`` for a manifest."""
    return {
        "columns": [{"name": field.name, "type": str(field.type)} for field in schema],
        "rows": rows,
    }


def _supported(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_primitive(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_decimal(kind)
        or (pa.types.is_fixed_size_list(kind) and pa.types.is_primitive(kind.value_type))
    )


def check_types(schema: pa.Schema) -> None:
    """Raises :class:`DataError` for a column whose type a sealed table cannot hold."""
    for field in schema:
        if not _supported(field.type):
            raise DataError(
                f"column {field.name[:80]!r} has a type that cannot be sealed as a table",
                found=str(field.type)[:80],
                expected="numbers, booleans, dates, times, text, bytes, or fixed-size lists",
                remedy="convert the column, or seal the file with kind 'file'",
            )


class TableWriter:
    """Writes record batches of any size into a sealed table, in constant memory.

    Args:
        writer: an open :class:`SealedWriter` of kind ``table``; stays the caller's.
        schema: columns of every batch.
    """

    def __init__(self, writer: SealedWriter, schema: pa.Schema) -> None:
        check_columns(schema.names)
        check_types(schema)
        self._writer = writer
        self._schema = schema.remove_metadata()
        self._pending: list[pa.RecordBatch] = []
        self._waiting = 0
        self._rows = 0
        self._per_batch = 0
        self._stream: pa.ipc.RecordBatchFileWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch."""
        if not batch.num_rows:
            return
        if self._stream is None:
            row_bytes = max(1, batch.nbytes // batch.num_rows)
            self._begin(max(1, min(_MAX_ROWS, _BATCH_BYTES // row_bytes)))
        self._pending.append(batch)
        self._waiting += batch.num_rows
        while self._waiting >= self._per_batch:
            self._emit(self._per_batch)

    def _begin(self, per_batch: int) -> None:
        self._per_batch = per_batch
        schema = self._schema.with_metadata({_ROWS_KEY: str(per_batch).encode()})
        self._stream = pa.ipc.new_file(pa.PythonFile(_Output(self._writer), mode="w"), schema)

    def _emit(self, rows: int) -> None:
        assert self._stream is not None
        table = pa.Table.from_batches(self._pending, self._schema)
        for batch in table.slice(0, rows).combine_chunks().to_batches():
            self._stream.write_batch(batch)
        self._waiting -= rows
        self._rows += rows
        self._pending = table.slice(rows).to_batches() if self._waiting else []

    def finish(self) -> dict[str, Any]:
        """Write the rest and the footer; returns the manifest's schema."""
        if self._stream is None:
            self._begin(1)
        if self._waiting:
            self._emit(self._waiting)
        assert self._stream is not None
        self._stream.close()
        return table_schema(self._schema, self._rows)


class _Output:
    """What pyarrow writes to. Closing it must not close the sealed writer behind it."""

    closed = False

    def __init__(self, writer: SealedWriter) -> None:
        self._writer = writer

    def write(self, data: Any) -> int:
        return self._writer.write(data)

    def flush(self) -> None:
        """Nothing to do: the writer makes the file durable when it finishes."""

    def close(self) -> None:
        """Nothing to do: see the class."""


class TableReader(ContentReader):
    """Reads columns, row ranges or batches out of a sealed table, decrypting no more.

    Arguments and errors: :class:`ContentReader`; the content must be a table as
    :class:`TableWriter` writes it.
    """

    kind = "table"

    def _open(self) -> None:
        file = self._ipc(None)
        metadata = (file.schema.metadata or {}).get(_ROWS_KEY, b"")
        if not metadata.isdigit() or len(metadata) > 9 or not 1 <= int(metadata) <= _MAX_ROWS:
            raise _malformed("no number of rows a batch")
        self._per_batch = int(metadata)
        self.schema: pa.Schema = file.schema.remove_metadata()
        try:
            # pyarrow decodes names and time zones only when they are looked at.
            _ = [(field.name, getattr(field.type, "tz", None)) for field in self.schema]
        except UnicodeDecodeError:
            raise _malformed("names that are not UTF-8") from None
        check_columns(self.schema.names)
        check_types(self.schema)
        self._batches: int = file.num_record_batches
        self.num_rows = 0
        if self._batches:
            # The first column is enough to learn how long the last batch is.
            first = pa.schema([self.schema[0]])
            last = self._batch(self._ipc([0]), self._batches - 1, first).num_rows
            self.num_rows = (self._batches - 1) * self._per_batch + last

    def _ipc(self, columns: Sequence[int] | None) -> pa.ipc.RecordBatchFileReader:
        options = pa.ipc.IpcReadOptions(
            included_fields=None if columns is None else list(columns), use_threads=False
        )
        try:
            source = pa.PythonFile(self._reader.file(), mode="r")
            return pa.ipc.open_file(source, options=options)
        except (pa.ArrowException, OSError):
            raise _malformed("bytes that are not an Arrow IPC file") from None

    def _batch(
        self, file: pa.ipc.RecordBatchFileReader, index: int, schema: pa.Schema
    ) -> pa.RecordBatch:
        try:
            batch = file.get_batch(index)
            batch.validate(full=True)
        except (pa.ArrowException, OSError):
            raise _malformed(f"record batch {index} that does not decode") from None
        rows = batch.num_rows
        last = index == self._batches - 1
        if not batch.schema.equals(schema) or not (
            0 < rows <= self._per_batch if last else rows == self._per_batch
        ):
            raise _malformed(f"record batch {index} of another size or schema")
        return batch

    def _select(self, columns: Sequence[str] | None) -> tuple[list[int] | None, list[str]]:
        if columns is None:
            return None, list(self.schema.names)
        check_columns(columns)
        for name in columns:
            if name not in self.schema.names:
                raise DataError(
                    "there is no such column",
                    found=repr(name[:80]),
                    expected=", ".join(self.schema.names[:20]),
                    remedy="name one of these",
                )
        return sorted(self.schema.names.index(name) for name in columns), list(columns)

    def batches(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows ``start`` to ``stop`` of some columns, batch by batch.

        Raises:
            DataError: no such column, or content that does not decode.
            InputError: no such rows.
            SealError: a chunk of it is damaged or forged.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise InputError(
                "a table has no such rows",
                found=f"{start} to {stop}",
                expected=f"within 0 to {self.num_rows}",
            )
        indices, names = self._select(columns)
        return self._iterate(indices, names, start, stop)

    def _iterate(
        self, indices: list[int] | None, names: list[str], start: int, stop: int
    ) -> Iterator[pa.RecordBatch]:
        if start == stop:
            return
        file = self._ipc(indices)
        stored = self.schema if indices is None else pa.schema([self.schema[i] for i in indices])
        for index in range(start // self._per_batch, (stop - 1) // self._per_batch + 1):
            base = index * self._per_batch
            batch = self._batch(file, index, stored)
            low, high = max(start - base, 0), min(stop - base, batch.num_rows)
            yield batch.slice(low, high - low).select(names)

    def read(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """Rows ``start`` to ``stop`` of some columns as one table, in the order asked for."""
        batches = list(self.batches(columns, start, stop))
        names = self.schema.names if columns is None else columns
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(batches, schema)


def _malformed(found: str) -> DataError:
    return DataError(
        "a sealed table is malformed",
        found=found,
        expected="an Arrow IPC file as Cenacle writes it",
        remedy="let its owner seal the table again",
    )
