"""Tables: any columns, any rows, without the rest; and malformed ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError, InputError, SealError
from cenacle.sealing import SealedWriter, TableReader, TableWriter, seal_bytes, unseal_path

ROWS = 1000
TABLE = pa.table(
    {
        "id": pa.array(range(ROWS), pa.int64()),
        "value": np.linspace(0, 1, ROWS),
        "name": [f"row {i}" for i in range(ROWS)],
        "flag": [i % 3 == 0 for i in range(ROWS)],
        "maybe": pa.array([None if i % 5 == 0 else i for i in range(ROWS)], pa.int32()),
    }
)


def seal_table(
    table: pa.Table, path: Path, key: SecretBytes, *, rows: int = 100, chunk_log2: int = 12
) -> dict[str, Any]:
    with SealedWriter(path, key, "table", chunk_log2=chunk_log2) as writer:
        sink = TableWriter(writer, table.schema)
        for batch in table.to_batches(max_chunksize=rows):
            sink.write(batch)
        writer.set_schema(sink.finish())
    return writer.info.schema


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenacle.sealing.tables._BATCH_BYTES", 4096)


@pytest.fixture
def path(tmp_path: Path, key: SecretBytes, small_batches: None) -> Path:
    seal_table(TABLE, tmp_path / "sealed", key)
    return tmp_path / "sealed"


def test_round_trip(path: Path, key: SecretBytes) -> None:
    with TableReader(path, key) as reader:
        assert reader.num_rows == ROWS
        assert reader.schema == TABLE.schema
        assert reader.read().equals(TABLE)
        assert len(list(reader.batches())) > 5


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    columns=st.none() | st.lists(st.sampled_from(TABLE.schema.names), min_size=1, unique=True),
    start=st.integers(0, ROWS),
    stop=st.integers(0, ROWS) | st.none(),
)
def test_any_columns_and_rows(
    path: Path, key: SecretBytes, columns: list[str] | None, start: int, stop: int | None
) -> None:
    reader = TableReader(path, key)
    if stop is not None and stop < start:
        with pytest.raises(InputError, match="no such rows"):
            reader.read(columns, start, stop)
        return
    expected = TABLE if columns is None else TABLE.select(columns)
    assert reader.read(columns, start, stop).equals(
        expected.slice(start, None if stop is None else stop - start)
    )


def test_one_column_and_a_few_rows_touch_few_chunks(
    tmp_path: Path,
    key: SecretBytes,
    opened_chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cenacle.sealing.tables._BATCH_BYTES", 1 << 18)
    table = pa.table({f"c{i}": np.random.default_rng(i).random(20_000) for i in range(20)})
    seal_table(table, tmp_path / "sealed", key)
    reader = TableReader(tmp_path / "sealed", key)
    opened_chunks.clear()
    whole = table.nbytes // 4096
    assert reader.read(["c3"]).equals(table.select(["c3"]))
    assert len(set(opened_chunks)) < whole / 10
    opened_chunks.clear()
    reader.read(["c3", "c5"], 10_000, 10_010)
    assert len(set(opened_chunks)) < whole / 10


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, ROWS + 1), (5, 4), (ROWS + 1, None)])
def test_rows_that_do_not_exist(path: Path, key: SecretBytes, start: int, stop: int | None) -> None:
    with pytest.raises(InputError, match="no such rows"):
        TableReader(path, key).read(None, start, stop)


@pytest.mark.parametrize("columns", [["nein"], ["id", "nein"], ["id", "id"], []])
def test_columns_that_do_not_exist(path: Path, key: SecretBytes, columns: list[str]) -> None:
    with pytest.raises(DataError, match="column"):
        TableReader(path, key).read(columns)


@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_tables(tmp_path: Path, key: SecretBytes, rows: int) -> None:
    schema = seal_table(TABLE.slice(0, rows), tmp_path / "sealed", key)
    assert schema["rows"] == rows
    assert schema["columns"][1] == {"name": "value", "type": "double"}
    reader = TableReader(tmp_path / "sealed", key)
    assert reader.num_rows == rows
    assert reader.read().equals(TABLE.slice(0, rows))
    assert reader.read(["flag"]).num_rows == rows


@pytest.mark.parametrize("rows", [1, 7, 999, 1000])
def test_the_bytes_do_not_depend_on_how_rows_arrive(
    tmp_path: Path, key: SecretBytes, rows: int
) -> None:
    for number, size in enumerate((rows, 1000)):
        seal_table(TABLE.select(["id", "value"]), tmp_path / f"sealed{number}", key, rows=size)
        unseal_path(tmp_path / f"sealed{number}", tmp_path / f"{number}.arrow", key)
    assert (tmp_path / "0.arrow").read_bytes() == (tmp_path / "1.arrow").read_bytes()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"a": 1}]),
        pa.array([[1, 2]]),
        pa.array([None]),
        pa.array(["a"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_types_that_cannot_be_sealed(tmp_path: Path, key: SecretBytes, column: Any) -> None:
    with pytest.raises(DataError, match="'odd' has a type"):
        seal_table(pa.table({"odd": column}), tmp_path / "sealed", key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [[], [""], [" "], ["a", "a"], ["x" * 1025]])
def test_column_names_that_cannot_be_sealed(
    tmp_path: Path, key: SecretBytes, names: list[str]
) -> None:
    with pytest.raises(DataError, match="column"):
        seal_table(pa.table([pa.array([1])] * len(names), names), tmp_path / "sealed", key)


def ipc(table: pa.Table, metadata: dict[bytes, bytes] | None, sizes: list[int]) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
        start = 0
        for size in sizes:
            for batch in table.slice(start, size).combine_chunks().to_batches():
                writer.write_batch(batch)
            start += size
    return sink.getvalue()


ROWS_KEY = b"cenacle.rows_per_batch"
MALFORMED = {
    "empty": b"",
    "other bytes": b"ARROW1" + bytes(100),
    "no number of rows": ipc(TABLE, None, [100]),
    "zero rows": ipc(TABLE, {ROWS_KEY: b"0"}, [100]),
    "negative rows": ipc(TABLE, {ROWS_KEY: b"-1"}, [100]),
    "too many rows": ipc(TABLE, {ROWS_KEY: b"9" * 5000}, [100]),
    "longer last batch": ipc(TABLE, {ROWS_KEY: b"50"}, [50, 60]),
    "shorter first batch": ipc(TABLE, {ROWS_KEY: b"50"}, [40, 50]),
    "nested": ipc(pa.table({"a": [[1]]}), {ROWS_KEY: b"50"}, [1]),
    "a name that is not UTF-8": ipc(TABLE, {ROWS_KEY: b"50"}, [50]).replace(b"value", b"va\xffue"),
    "a time zone that is not UTF-8": ipc(
        pa.table({"t": pa.array([1], pa.timestamp("us", "Europe/Oslo"))}), {ROWS_KEY: b"50"}, [1]
    ).replace(b"Europe/Oslo", b"Europe/Os\xffo"),
    "no columns": ipc(pa.table({}), {ROWS_KEY: b"50"}, []),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_tables_are_refused(tmp_path: Path, key: SecretBytes, content: bytes) -> None:
    seal_bytes(content, tmp_path / "sealed", key, kind="table")
    with pytest.raises(DataError), TableReader(tmp_path / "sealed", key) as reader:
        reader.read()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_mutated_tables_never_crash(tmp_path: Path, key: SecretBytes, data: st.DataObject) -> None:
    """The owner of a table is not trusted either: Arrow's bytes may be anything."""
    content = bytearray(ipc(TABLE.slice(0, 20), {ROWS_KEY: b"10"}, [10, 10]))
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    seal_bytes(content, tmp_path / "sealed", key, kind="table")
    try:
        with TableReader(tmp_path / "sealed", key) as reader:
            reader.read().validate(full=True)
            reader.read(reader.schema.names[:1])
    except CenacleError:
        pass


def test_a_damaged_chunk_is_a_seal_error_not_a_table_error(path: Path, key: SecretBytes) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[80 + 2 * 4112 + 7] ^= 1
    with pytest.raises(SealError), TableReader(bytes(damaged), key) as reader:
        reader.read()


def test_another_kind_is_refused(tmp_path: Path, key: SecretBytes) -> None:
    seal_bytes(b"x", tmp_path / "sealed", key)
    with pytest.raises(InputError, match="wrong kind"):
        TableReader(tmp_path / "sealed", key)
    with pytest.raises(InputError, match="no key"):
        TableReader(tmp_path / "sealed")


@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".parquet", ".csv"])
def test_unsealing(path: Path, tmp_path: Path, key: SecretBytes, suffix: str) -> None:

    target = tmp_path / f"opened{suffix}"
    info = unseal_path(path, target, key)
    assert info.schema["rows"] == ROWS
    assert target.stat().st_mode & 0o777 == 0o600
    readers: dict[str, Any] = {
        ".parquet": pa.parquet.read_table,
        ".csv": pa.csv.read_csv,
    }
    found = readers.get(suffix, lambda name: pa.ipc.open_file(str(name)).read_all())(target)
    assert found.num_rows == ROWS
    assert found["name"].to_pylist() == TABLE["name"].to_pylist()


def test_unsealing_to_another_format_is_refused(
    path: Path, tmp_path: Path, key: SecretBytes
) -> None:
    with pytest.raises(InputError, match=r"expected .arrow"):
        unseal_path(path, tmp_path / "opened.xlsx", key)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sealed"]
