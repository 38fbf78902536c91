"""Parquet and Arrow files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError
from cenacle.sealing import TableReader, seal_path

TABLE = pa.table({"a": pa.array(range(50_000)), "b": [f"x{i % 9}" for i in range(50_000)]})
WRITERS: dict[str, Any] = {
    ".parquet": pq.write_table,
    ".pq": pq.write_table,
    ".feather": pyarrow.feather.write_feather,
    ".arrow": pyarrow.feather.write_feather,
}


@pytest.fixture
def key() -> SecretBytes:
    return SecretBytes(bytes(range(32)))


@pytest.mark.parametrize("suffix", WRITERS)
def test_round_trip(tmp_path: Path, key: SecretBytes, suffix: str) -> None:
    source = tmp_path / f"a{suffix}"
    WRITERS[suffix](TABLE.set_column(1, "b", TABLE["b"].dictionary_encode()), source)
    info = seal_path(source, tmp_path / "sealed", key)
    assert info.kind == "table"
    assert info.schema == {
        "columns": [{"name": "a", "type": "int64"}, {"name": "b", "type": "string"}],
        "rows": 50_000,
    }
    assert TableReader(tmp_path / "sealed", key).read().equals(TABLE)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("column", "match"),
    [
        (pa.array([1, None, 3]), "row 20002 of column 'b' .* an empty cell"),
        (pa.array([1.0, float("nan"), 3.0]), "row 20002 of column 'b' .* NaN"),
        (pa.array([1.0, float("inf"), 3.0]), "row 20002 of column 'b' .* infinity"),
        (pa.array(["x", None, "y"]), "row 20002 of column 'b' .* an empty cell"),
    ],
)
def test_missing_values_are_refused(
    tmp_path: Path, key: SecretBytes, suffix: str, column: Any, match: str
) -> None:
    fill = pa.concat_arrays([pa.array([column[0].as_py()] * 20_000, column.type), column])
    table = pa.table({"a": range(len(fill)), "b": fill})
    WRITERS[suffix](table, tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=match):
        seal_path(tmp_path / f"a{suffix}", tmp_path / "sealed", key)
    assert not (tmp_path / "sealed").exists()
    info = seal_path(tmp_path / f"a{suffix}", tmp_path / "sealed", key, allow_missing=True)
    assert info.schema["rows"] == 20_003


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"a": [[1, 2]]}),
        pa.table({"a": [{"b": 1}]}),
        pa.table([pa.array([1]), pa.array([2])], ["a", "a"]),
        pa.table([pa.array([1])], [""]),
    ],
    ids=str,
)
def test_unusable_columns_are_refused(tmp_path: Path, key: SecretBytes, table: Any) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column"):
        seal_path(tmp_path / "a.parquet", tmp_path / "sealed", key)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_column_names_that_are_not_utf8(tmp_path: Path, key: SecretBytes, suffix: str) -> None:
    source = tmp_path / f"a{suffix}"
    WRITERS[suffix](pa.table({"colname": [1, 2]}), source)
    source.write_bytes(source.read_bytes().replace(b"colname", b"coln\xffme"))
    with pytest.raises(DataError):
        seal_path(source, tmp_path / "sealed", key)
    assert not (tmp_path / "sealed").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), suffix=st.sampled_from([".parquet", ".arrow"]))
def test_damaged_files_never_crash(
    tmp_path: Path, key: SecretBytes, data: st.DataObject, suffix: str
) -> None:
    source = tmp_path / f"a{suffix}"
    WRITERS[suffix](TABLE.slice(0, 10), source)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CenacleError):
        seal_path(source, tmp_path / "sealed", key)


def test_progress(tmp_path: Path, key: SecretBytes) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    seen: list[tuple[int, int]] = []
    seal_path(tmp_path / "a.parquet", tmp_path / "s", key, progress=lambda *step: seen.append(step))
    assert seen[-1] == (50_000, 50_000)
