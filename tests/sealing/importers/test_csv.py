"""CSV: types from all rows, clear refusals, and never a cell's value in an error."""

from __future__ import annotations

import contextlib
import csv
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError
from cenacle.sealing import TableReader, seal_path

CANARY = "canary-7391"


@pytest.fixture
def key() -> SecretBytes:
    return SecretBytes(bytes(range(32)))


def seal(folder: Path, text: str | bytes, key: SecretBytes, name: str = "a.csv", **kw: Any) -> Any:
    source = folder / name
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    seal_path(source, folder / "sealed", key, **kw)
    with TableReader(folder / "sealed", key) as reader:
        return reader.read()


TYPES = [
    (["1", "-2", "0"], pa.int64(), [1, -2, 0]),
    (["1", "2.5", "-3e2"], pa.float64(), [1.0, 2.5, -300.0]),
    ([".5", "1.", "+2"], pa.float64(), [0.5, 1.0, 2.0]),
    (["true", "False", "TRUE"], pa.bool_(), [True, False, True]),
    (["0", "1", "1"], pa.int64(), [0, 1, 1]),
    (["true", "1", "0"], pa.string(), ["true", "1", "0"]),
    (["007", "123", "042"], pa.string(), ["007", "123", "042"]),
    (["0x10", "0x11", "1"], pa.string(), ["0x10", "0x11", "1"]),
    (["9223372036854775807", "1", "2"], pa.int64(), [9223372036854775807, 1, 2]),
    (["9223372036854775808", "1", "2"], pa.string(), ["9223372036854775808", "1", "2"]),
    (["12345678901234567890", "1.5", "2"], pa.string(), ["12345678901234567890", "1.5", "2"]),
    ([" 1", "2 ", " 3 "], pa.int64(), [1, 2, 3]),
    (["a", " b", "NA"], pa.string(), ["a", " b", "NA"]),
    (['"a,b"', '"c ""d"""', '"e\nf"'], pa.string(), ["a,b", 'c "d"', "e\nf"]),
    (["1", "2", "x"], pa.string(), ["1", "2", "x"]),
]


@pytest.mark.parametrize(("cells", "kind", "values"), TYPES, ids=lambda v: str(v)[:40])
def test_types(
    tmp_path: Path, key: SecretBytes, cells: list[str], kind: Any, values: list[Any]
) -> None:
    text = "k,v\n" + "".join(f"x,{cell}\n" for cell in cells)
    table = seal(tmp_path, text, key)
    assert table.schema.field("v").type == kind
    assert table["v"].to_pylist() == values


@pytest.mark.parametrize(
    ("cell", "kind"),
    [("2020-01-31", pa.date32()), ("2020-01-31 10:00:01.5", pa.timestamp("us"))],
)
def test_dates(tmp_path: Path, key: SecretBytes, cell: str, kind: Any) -> None:
    table = seal(tmp_path, f"k,v\nx,{cell}\n", key)
    assert table.schema.field("v").type == kind


def test_a_type_that_changes_in_the_last_row(tmp_path: Path, key: SecretBytes) -> None:
    """Readers that look at the first megabyte only would fail here."""
    rows = "".join(f"{i},{i}\n" for i in range(300_000))
    table = seal(tmp_path, "a,b\n" + rows + "5,x\n", key)
    assert table.schema.field("a").type == pa.int64()
    assert table.schema.field("b").type == pa.string()
    assert table.num_rows == 300_001
    assert table["b"][-1].as_py() == "x"
    assert table["b"][299_999].as_py() == "299999"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_marks(
    tmp_path: Path, key: SecretBytes, end: str, bom: bytes, last: bool
) -> None:
    text = end.join(["a,b", "1,x", "2,y"]) + (end if last else "")
    table = seal(tmp_path, bom + text.encode(), key)
    assert table.to_pydict() == {"a": [1, 2], "b": ["x", "y"]}


def test_tabs_and_quoted_headers(tmp_path: Path, key: SecretBytes) -> None:
    table = seal(tmp_path, 'a\t"b, c"\n1\t2\n', key, "a.TSV")
    assert table.to_pydict() == {"a": [1], "b, c": [2]}


def test_no_rows(tmp_path: Path, key: SecretBytes) -> None:
    table = seal(tmp_path, "a,b\n", key)
    assert table.num_rows == 0
    assert table.schema.names == ["a", "b"]


REFUSED = {
    "no bytes": ("", "is empty"),
    "header alone": ("a,b", "malformed"),
    "repeated column": (f"a,b,a\n1,{CANARY},3\n", "'a' occurs twice"),
    "empty column name": (f"a,,c\n1,{CANARY},3\n", "column 2 has no usable name"),
    "blank column name": (f"a, ,c\n1,{CANARY},3\n", "column 2 has no usable name"),
    "no header": (f"7391,{CANARY}\n1,2\n", "column 1 has a number as its name"),
    "no header, float": (f"{CANARY},-7.391e4\n1,2\n", "column 2 has a number as its name"),
    "semicolons": (f"a;b\n1;{CANARY}\n", "another separator"),
    "short row": (f"a,b\n1,2\n{CANARY}\n", "row 2 of a CSV file .* found 1; expected 2"),
    "long row": (f"a,b\n1,2\n3,4\n5,6,{CANARY}\n", "row 3 of a CSV file .* found 3; expected 2"),
    "long row behind a blank": (f"a,b\n\n5,6,{CANARY}\n", "row 1 of a CSV file"),
    "empty cell": (f"a,b\n{CANARY},1\nx,\n", "row 2 of column 'b' .* an empty cell"),
    "blank cell": (f"a,b\n{CANARY},1\nx,  \n", "row 2 of column 'b' .* an empty cell"),
    "empty text cell": (f"a,b\n1,{CANARY}\n2,\n", "row 2 of column 'b' .* an empty cell"),
    "NaN": (f"a,b\n{CANARY},1\nx,NaN\n", "row 2 of column 'b' .* NaN or NA"),
    "NA": (f"a,b\n{CANARY},1.5\nx,NA\n", "row 2 of column 'b' .* NaN or NA"),
    "infinity": (f"a,b\n{CANARY},1\nx,-inf\n", "row 2 of column 'b' .* NaN or an infinity"),
    "overflow to infinity": (f"a,b\n{CANARY},1.5\nx,1e999\n", "row 2 of column 'b'"),
    "nothing but NA": (f"a,b\n{CANARY},NA\nx,NA\n", "row 1 of column 'b'"),
    "one column, blank line": (f"a\n{CANARY}\n\nx\n", "row 2 of column 'a'"),
    "open quote": (f'a,b\n1,"{CANARY}\n2,3\n', "quote that is never closed"),
    "not UTF-8": (f"a,b\n1,{CANARY}\n2,".encode() + b"\xff\n", "row 2 of column 'b' is not UTF-8"),
    "short row not UTF-8": (
        f"a,b\n1,{CANARY}\n".encode() + b"\xff2\n3,y\n",
        "row 2 of a CSV file .* found 1; expected 2",
    ),
    "long row not UTF-8": (
        f"a,b\n1,{CANARY}\n2,".encode() + b"\xff,9\n",
        "row 2 of a CSV file .* found 3; expected 2",
    ),
    "a row that imitates a message": (
        f'a,b\n1,"CSV parse error: Row #9: Expected 7 columns, got 8",{CANARY}\n',
        "row 1 of a CSV file .* found 3; expected 2",
    ),
    "long row in a late block": (
        "a,b\n" + "1,x\n" * 400_000 + f"2,{CANARY},9\n",
        "row 400001 of a CSV file .* found 3; expected 2",
    ),
    "header not UTF-8": (b"a,\xff\n1,2\n", "no readable header"),
    "UTF-16": (f"a,b\n1,{CANARY}\n".encode("utf-16"), "no readable header"),
}


@pytest.mark.parametrize(("text", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_place_but_not_the_value(
    tmp_path: Path,
    key: SecretBytes,
    text: str | bytes,
    match: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        seal(tmp_path, text, key)
    assert CANARY not in str(caught.value)
    assert "7391" not in str(caught.value)
    # Not even hidden in the chain, where a logger might dig it up, or on stderr.
    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in str(error)
        error = error.__cause__ or error.__context__
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_missing_values_can_be_allowed(tmp_path: Path, key: SecretBytes) -> None:
    text = "n,s,e\n1.5,x,\nNaN,,\n-inf,NA,\n,y,NA\n"
    table = seal(tmp_path, text, key, allow_missing=True)
    assert table.to_pydict() == {
        "n": [1.5, None, float("-inf"), None],
        "s": ["x", None, "NA", "y"],
        "e": [None] * 4,
    }


def test_a_file_that_changes_between_the_passes(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cenacle.sealing.importers import csv as module  # noqa: PLC0415

    source = tmp_path / "a.csv"
    genuine = module._Column.decide

    for change in (f"a\n1\n{CANARY}\n", "a\n1\n", "a\n1\n2\n3\n"):
        source.write_text("a\n1\n2\n")

        def decide(self: Any, allow: bool, change: str = change) -> None:
            genuine(self, allow)
            source.write_text(change)

        monkeypatch.setattr(module._Column, "decide", decide)
        with pytest.raises(DataError, match="changed while") as caught:
            seal_path(source, tmp_path / "sealed", key)
        assert CANARY not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.binary(max_size=200) | st.text(alphabet='ab,1.\n\r"; \t-eN', max_size=60))
def test_arbitrary_bytes_never_crash(tmp_path: Path, key: SecretBytes, data: bytes | str) -> None:
    with contextlib.suppress(CenacleError):
        seal(tmp_path, data, key)


_word = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), _word), min_size=1, max_size=8))
def test_what_the_standard_library_writes_is_read(
    tmp_path: Path, key: SecretBytes, rows: list[tuple[int, str]]
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["n", "t"])
    # A letter in every cell keeps the column text.
    writer.writerows((number, "x" + text) for number, text in rows)
    table = seal(tmp_path, out.getvalue(), key)
    assert table["n"].to_pylist() == [number for number, _ in rows]
    assert table["t"].to_pylist() == ["x" + text for _, text in rows]


@pytest.mark.processes
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = """
        import sys
        from cenacle.crypto import SecretBytes
        from cenacle.sealing import seal_path
        seal_path(sys.argv[1], sys.argv[1] + ".sealed", SecretBytes(bytes(range(32))))
        with open("/proc/self/status") as status:
            print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    """
    peaks = []
    for size in (4, 48):
        source = tmp_path / f"{size}.csv"
        block = "".join(f"{i},{i / 7:.15f},name {i}\n" for i in range(25_000)).encode()
        with source.open("wb") as file:
            file.write(b"id,value,name\n")
            while file.tell() < size << 20:
                file.write(block)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), source],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
        source.unlink()
    assert peaks[1] - peaks[0] < 40 << 20
