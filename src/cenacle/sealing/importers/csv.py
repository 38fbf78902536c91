"""CSV and TSV files: types from all rows, not from the first ones, in two streaming passes.

The first pass reads every cell as text and finds, for each column, the narrowest type that
all of its cells have; the second converts. Cells never appear in an error, not even through
pyarrow, whose messages quote them.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from cenacle.errors import DataError
from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.missing import first_true, missing_cell, refuse_missing
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.parallel import Progress
from cenacle.sealing.tables import TableWriter, check_columns
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_csv", "import_tsv"]

_RAGGED: Final = re.compile(
    r"CSV parse error: Row #([0-9]+): Expected ([0-9]+) columns, got ([0-9]+)"
)
_BLOCK: Final = 1 << 20
_MAX_HEADER: Final = 1 << 20
_NULLS: Final = pa.array(pa_csv.ConvertOptions().null_values)
_BOOLEANS: Final = pa.array(["true", "false", "True", "False", "TRUE", "FALSE"])
_INTEGER: Final = r"^-?(0|[1-9][0-9]*)$"
# No leading zeros: 00123 is a code, not a number.
_FLOAT: Final = (
    r"^[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
    r"|inf|Inf|INF|infinity|Infinity)$"
)
_NUMBER: Final = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


@importer("CSV", "table", (".csv",))
def import_csv(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """A comma-separated file with a header line, in UTF-8.

    Raises:
        DataError: no, numeric, empty or repeated column names, ragged rows, text that is
            not UTF-8, or missing values that were not allowed.
    """
    return _import(path, ",", writer, options)


@importer("TSV", "table", (".tsv",))
def import_tsv(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """As :func:`import_csv`, separated by tabs."""
    return _import(path, "\t", writer, options)


def _bad(what: str, found: str, expected: str, remedy: str) -> DataError:
    return DataError(what, found=found, expected=expected, remedy=remedy)


def _import(path: Path, separator: str, writer: SealedWriter, options: Options) -> dict[str, Any]:
    names = _read_names(path, separator)
    columns = [_Column(name) for name in names]
    rows = 0
    for batch in _read_text(path, separator, names, _half(options.progress, 0)):
        for column, cells in zip(columns, batch.columns, strict=True):
            column.look(_to_text(column.name, cells, rows), rows)
        rows += batch.num_rows
    for column in columns:
        column.decide(options.allow_missing)
    schema = pa.schema([(column.name, column.type) for column in columns])
    table = TableWriter(writer, schema)
    done = 0
    for batch in _read_text(path, separator, names, _half(options.progress, 1)):
        texts = [
            _to_text(name, cells, done) for name, cells in zip(names, batch.columns, strict=True)
        ]
        arrays = [column.convert(text) for column, text in zip(columns, texts, strict=True)]
        converted = pa.RecordBatch.from_arrays(arrays, schema=schema)
        if not options.allow_missing:
            refuse_missing(converted, done)
        table.write(converted)
        done += batch.num_rows
    if done != rows:
        raise _changed()
    return table.finish()


def _changed() -> DataError:
    return _bad(
        "a CSV file changed while it was being sealed",
        "other rows in the second pass",
        "the rows of the first",
        "seal it again when nothing writes to it",
    )


def _half(progress: Progress | None, half: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(half * total + done, 2 * total)


def _read_names(path: Path, separator: str) -> list[str]:
    with os.fdopen(open_source(path), "rb") as file, disk_errors(f"read {path}"):
        head = file.read(_MAX_HEADER)
    try:
        # Only the header must be text here; the cells are checked with their row and column.
        text = head.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
        "".join(names).encode()
    except (UnicodeEncodeError, csv.Error):
        raise _bad(
            "a CSV file has no readable header",
            "a first line that is not UTF-8 text",
            "column names",
            "save the file as CSV in UTF-8",
        ) from None
    except StopIteration:
        names = []
    if not names:
        raise _bad("a CSV file is empty", "no header", "column names", "check the file")
    for number, name in enumerate(names, 1):
        # A first record taken for names would end up readable in the manifest.
        if pc.match_substring_regex(pa.scalar(name.strip()), _NUMBER).as_py():
            raise _bad(
                f"the header of a CSV file is missing, or column {number} has a number as its name",
                "a number in the first line",
                "column names",
                "put a line with column names first",
            )
    if len(names) == 1 and any(other in names[0] for other in ";\t|,"):
        raise _bad(
            "a CSV file seems to have another separator",
            "one column with a separator in its name",
            "a tab" if separator == "\t" else "a comma",
            "save the file with commas (.csv) or tabs (.tsv)",
        )
    check_columns(names)
    return names


def _read_text(
    path: Path, separator: str, names: list[str], progress: Progress | None
) -> Iterator[pa.RecordBatch]:
    """Batches of undecoded cells; raises :class:`DataError` for the first ragged row."""
    with os.fdopen(open_source(path), "rb") as raw, disk_errors(f"read {path}"):
        total = os.fstat(raw.fileno()).st_size
        counting = _QuoteCounter(raw)
        batches = _parse(counting, separator, names)
        while isinstance(batch := _next_batch(batches), pa.RecordBatch):
            yield batch
            if progress is not None:
                progress(min(counting.position, total), total)
        if batch is not None:
            raise batch
        counting.check()


def _parse(file: _QuoteCounter, separator: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    reader = pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK),
        parse_options=pa_csv.ParseOptions(
            delimiter=separator,
            newlines_in_values=True,
            ignore_empty_lines=len(names) > 1,
        ),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            strings_can_be_null=False,
            check_utf8=False,
        ),
    )
    if reader.schema.names != names:
        raise _bad(
            "a CSV file has an ambiguous header",
            "a first line that two parsers read differently",
            "plain column names",
            "put the column names in double quotes",
        )
    yield from reader


def _next_batch(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | DataError | None:
    """The next batch, ``None`` at the end, or what is wrong.

    The error is returned, not raised: raised here it would carry pyarrow's as its context,
    and that quotes the row. Only the numbers at the start of its text are taken. (pyarrow's
    handler for invalid rows is no way: it fails, loudly, on rows that are not UTF-8.)
    """
    try:
        return next(batches, None)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        ragged = _RAGGED.match(str(error))
    if ragged is None:
        return _bad(
            "a CSV file is malformed",
            "a header without line end, open quotes, or a row longer than 1 MiB",
            "rows of cells",
            "check the file's quotes and line ends",
        )
    row, expected, found = ragged.groups()
    return _bad(
        f"row {int(row) - 1} of a CSV file has another number of cells than the header",
        found,
        expected,
        "check separators and quotes in that row",
    )


class _QuoteCounter:
    """A file for pyarrow that counts quotes: an open one would swallow the rows behind it."""

    closed = False

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._quotes = 0
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self._quotes += data.count(b'"')
        self.position += len(data)
        return data

    def check(self) -> None:
        """Raises :class:`DataError` after the end of a file with an odd number of quotes."""
        if self._quotes % 2:
            raise _bad(
                "a CSV file has a quote that is never closed",
                f"{self._quotes} double quotes",
                "an even number",
                "close the quote, or write a quote within a cell as two",
            )


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True


def _to_text(name: str, cells: pa.Array, rows_before: int) -> pa.Array:
    text = _cast(cells, pa.string())
    if text is not None:
        return text
    row = next(i for i in range(len(cells)) if not _is_utf8(cells[i].as_py()))
    raise _bad(
        f"row {rows_before + row + 1} of column {name[:80]!r} is not UTF-8 text",
        "other bytes",
        "UTF-8",
        "save the file as CSV in UTF-8",
    )


@dataclass(slots=True)
class _Column:
    """What is known about one column, and then its type."""

    name: str
    type: pa.DataType = field(default_factory=pa.string)
    alive: list[pa.DataType] = field(
        default_factory=lambda: [
            pa.int64(),
            pa.float64(),
            pa.bool_(),
            pa.date32(),
            pa.timestamp("us"),
        ]
    )
    values: int = 0
    first_empty: int | None = None
    first_marker: int | None = None

    def look(self, cells: pa.Array, rows_before: int) -> None:
        """Learn from a batch; row numbers count from 1."""
        cells = pc.utf8_trim_whitespace(cells)
        empty, marker = pc.equal(cells, ""), pc.is_in(cells, value_set=_NULLS)
        if self.first_empty is None and (row := first_true(empty)) is not None:
            self.first_empty = rows_before + row + 1
        if self.first_marker is None and (row := first_true(marker)) is not None:
            self.first_marker = rows_before + row + 1
        values = cells.filter(pc.invert(marker))
        self.values += len(values)
        if len(values):
            self.alive = _narrow(self.alive, values)

    def decide(self, allow_missing: bool) -> None:
        """Fix the type; raises :class:`DataError` for missing cells that are not allowed."""
        if self.alive and self.values:
            self.type = self.alive[0]
        # In a column of text, "NA" and the like are words.
        missing = self.first_empty if self._is_text() else self.first_marker
        if missing is not None and not allow_missing:
            found = "an empty cell" if missing == self.first_empty else "NaN or NA"
            raise missing_cell(self.name, missing, found)

    def _is_text(self) -> bool:
        return bool(self.values) and self.type == pa.string()

    def convert(self, cells: pa.Array) -> pa.Array:
        """Cells of text as the type that was decided, missing ones as null."""
        if self._is_text():
            return pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)
        cells = pc.utf8_trim_whitespace(cells)
        cells = pc.if_else(pc.is_in(cells, value_set=_NULLS), pa.scalar(None, pa.string()), cells)
        values = _cast(cells, self.type)
        if values is None:
            raise _changed()
        return values


def _narrow(alive: list[pa.DataType], cells: pa.Array) -> list[pa.DataType]:
    """The types of ``alive`` that all cells have. Integers are floats too, and nothing else."""
    if pa.int64() in alive and _match(cells, _INTEGER) and _casts(cells, pa.int64()):
        return [kind for kind in alive if kind in (pa.int64(), pa.float64())]
    if pa.float64() in alive and _are_floats(cells):
        return [pa.float64()]
    if pa.bool_() in alive and pc.all(pc.is_in(cells, value_set=_BOOLEANS)).as_py():
        return [pa.bool_()]
    times = (pa.date32(), pa.timestamp("us"))
    return [kind for kind in alive if kind in times and _casts(cells, kind)]


def _are_floats(cells: pa.Array) -> bool:
    # An integer beyond 64 bits is an identifier; a float would round it.
    long = cells.filter(pc.greater_equal(pc.utf8_length(cells), 19))
    whole = long.filter(pc.match_substring_regex(long, _INTEGER))
    return _match(cells, _FLOAT) and _casts(whole, pa.int64()) and _casts(cells, pa.float64())


def _match(cells: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(cells, pattern)).as_py())


def _casts(cells: pa.Array, kind: pa.DataType) -> bool:
    return _cast(cells, kind) is not None


def _cast(cells: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """``None`` where a cell does not fit; pyarrow's error, which quotes it, goes no further."""
    try:
        return pc.cast(cells, kind)
    except pa.ArrowException:
        return None
