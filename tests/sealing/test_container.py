"""The container under attack: every position changed, cut, moved or replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, InputError, SealError
from cenacle.sealing import SealedReader, compute_digest, verify_digest
from cenacle.sealing.container import MAX_CHUNKS, Cipher, Header, Layout, parse_digest

KEY = bytes(range(32))
SALT = bytes(range(100, 132))
CHUNK = 64
VECTOR = json.loads(
    (Path(__file__).parents[1] / "vectors" / "sealing" / "several-chunks.json").read_text()
)
RECORD = CHUNK + 16


def read_all(container: bytes, **expected: Any) -> bytes:
    with SealedReader(container, SecretBytes(KEY), **expected) as reader:
        return reader.read_range(0, reader.size)


def structural_positions() -> list[tuple[str, int]]:
    """Where to flip bits in the ``sealed`` fixture (80 + 3 * 80 + 24 + 4 * 32 + 56 bytes)."""
    places = [(f"header {i}", i) for i in range(80)]
    for record in range(4):
        start = 80 + record * RECORD
        size = 8 if record == 3 else CHUNK
        places += [
            (f"record {record} first", start),
            (f"record {record} middle", start + size // 2),
            (f"record {record} last", start + size - 1),
            (f"record {record} tag first", start + size),
            (f"record {record} tag last", start + size + 15),
        ]
    table = 80 + 3 * RECORD + 24
    places += [(f"table {i}", table + i) for i in range(0, 128, 31)]
    places += [(f"end {i}", table + 128 + i) for i in range(56)]
    return places


def test_the_intact_container_opens(sealed: Any) -> None:
    assert len(sealed.container) == 80 + 3 * RECORD + 24 + 128 + 56
    assert read_all(sealed.container, expected_digest=sealed.content_digest) == bytes(range(200))


@pytest.mark.parametrize(("place", "position"), structural_positions(), ids=lambda v: str(v))
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_refused(
    sealed: Any, tmp_path: Path, place: str, position: int, bit: int
) -> None:
    changed = bytearray(sealed.container)
    changed[position] ^= 1 << bit
    with pytest.raises(SealError):
        read_all(bytes(changed))
    path = tmp_path / "sealed"
    path.write_bytes(changed)
    with pytest.raises(SealError):
        verify_digest(path, sealed.content_digest)


@pytest.mark.parametrize("length", range(80 + 3 * RECORD + 24 + 128 + 56))
def test_a_truncated_container_is_refused(sealed: Any, length: int) -> None:
    with pytest.raises(SealError):
        read_all(sealed.container[:length])


@pytest.mark.parametrize("chunks", range(4))
@pytest.mark.parametrize("table", [True, False])
def test_whole_records_cut_off_are_refused(
    chunks: int, table: bool, reference_seal: Callable[..., Any]
) -> None:
    """The end record and a matching table do not make a shorter file of a longer one."""
    whole = reference_seal(KEY, SALT, bytes(256), table=table)
    cut = whole.header + b"".join(whole.records[:chunks]) + whole.table[: 32 * chunks] + whole.end
    with pytest.raises(SealError):
        read_all(cut)


def test_an_end_of_a_shorter_content_is_refused(reference_seal: Callable[..., Any]) -> None:
    """Even a genuine end record under the same salt only fits the same table."""
    whole = reference_seal(KEY, SALT, bytes(256))
    other = reference_seal(KEY, SALT, bytes(255) + b"x")
    with pytest.raises(SealError):
        read_all(whole.header + b"".join(whole.records) + whole.table + other.end)


@pytest.mark.parametrize("extra", [b"\0", bytes(RECORD), bytes(RECORD + 32), bytes(1000)])
def test_appended_bytes_are_refused(sealed: Any, extra: bytes) -> None:
    with pytest.raises(SealError):
        read_all(sealed.container + extra)


def test_a_repeated_container_is_refused(sealed: Any) -> None:
    with pytest.raises(SealError):
        read_all(sealed.container + sealed.container)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("table", [True, False])
def test_reordered_records_are_refused(
    order: tuple[int, ...], table: bool, reference_seal: Callable[..., Any]
) -> None:
    made = reference_seal(KEY, SALT, bytes(range(192)), table=table)
    moved = b"".join(made.records[i] for i in order)
    with pytest.raises(SealError):
        read_all(made.header + moved + made.table + made.end)
    moved_table = b"".join(made.table[32 * i : 32 * i + 32] for i in order)
    with pytest.raises(SealError):
        read_all(made.header + moved + moved_table + made.end)


@pytest.mark.parametrize("part", ["header", "records", "first", "table", "end"])
def test_parts_of_another_file_under_the_same_key_are_refused(
    part: str, reference_seal: Callable[..., Any]
) -> None:
    one = reference_seal(KEY, SALT, bytes(192))
    two = reference_seal(KEY, SALT[::-1], bytes(192))
    parts = {"header": one.header, "table": one.table, "end": one.end}
    records = [*one.records]
    if part == "records":
        records = two.records
    elif part == "first":
        records[0] = two.records[0]
    else:
        parts[part] = getattr(two, part)
    with pytest.raises(SealError):
        read_all(parts["header"] + b"".join(records) + parts["table"] + parts["end"])


def test_another_file_under_the_same_key_is_refused_when_one_is_pinned(
    sealed: Any, reference_seal: Callable[..., Any]
) -> None:
    other = reference_seal(KEY, SALT[::-1], bytes(range(200)))
    assert read_all(other.container) == read_all(sealed.container)
    with pytest.raises(SealError, match="header digest"):
        read_all(other.container, expected_header=sealed.header_digest)
    with pytest.raises(SealError, match="content digest"):
        read_all(other.container, expected_digest=sealed.content_digest)


def test_the_owner_cannot_show_other_content_under_the_same_header(
    sealed: Any, reference_seal: Callable[..., Any], tmp_path: Path
) -> None:
    """Who knows the key can reuse the salt; the content digest is what binds the content."""
    other = reference_seal(KEY, SALT, bytes(200))
    assert other.header == sealed.header
    assert read_all(other.container, expected_header=sealed.header_digest) == bytes(200)
    with pytest.raises(SealError, match="content digest"):
        read_all(other.container, expected_digest=sealed.content_digest)
    # A genuine table and end with one valid, but other, record: found when it is touched.
    mixed = sealed.header + other.records[0] + b"".join(sealed.records[1:])
    mixed += sealed.table + sealed.end
    with SealedReader(mixed, SecretBytes(KEY), expected_digest=sealed.content_digest) as reader:
        assert reader.read_range(64, 136) == bytes(range(64, 200))
        with pytest.raises(SealError, match="chunk 0"):
            reader.read_range(10, 1)
    path = tmp_path / "sealed"
    path.write_bytes(mixed)
    with pytest.raises(SealError):
        verify_digest(path, sealed.content_digest)


def test_a_pinned_content_needs_a_table(reference_seal: Callable[..., Any], tmp_path: Path) -> None:
    made = reference_seal(KEY, SALT, bytes(100), table=False)
    assert read_all(made.container) == bytes(100)
    with pytest.raises(SealError, match="found none"):
        read_all(made.container, expected_digest="sha256:" + "0" * 64)
    (tmp_path / "sealed").write_bytes(made.container)
    with pytest.raises(SealError, match="no content digest"):
        compute_digest(tmp_path / "sealed")


def test_a_wrong_key_is_refused_before_anything_else(sealed: Any, other_key: SecretBytes) -> None:
    with pytest.raises(SealError, match="does not open with this key"):
        SealedReader(sealed.container, other_key)


def test_one_container_cannot_open_under_two_keys(
    reference_seal: Callable[..., Any],
) -> None:
    """The commitment is checked even where every tag would fit (invisible salamanders)."""
    other = bytes(32)
    made = reference_seal(other, SALT, b"")
    honest = reference_seal(KEY, SALT, b"")
    # All but the commitment made for KEY: only the commitment tells the two apart.
    header = honest.header[:48] + made.header[48:]
    with pytest.raises(SealError, match="commitment"):
        read_all(header + honest.end)


@pytest.mark.parametrize("length", [1, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(sealed: Any, length: int) -> None:
    with pytest.raises(InputError, match="asset key"):
        SealedReader(sealed.container, SecretBytes(bytes(length)))
    with pytest.raises(InputError, match="asset key"):
        Cipher.create(SecretBytes(bytes(length)), "file")


@pytest.mark.parametrize(
    ("kind", "chunk_log2"), [("files", 20), ("", 20), ("file", 5), ("file", 25), ("file", -1)]
)
def test_unusable_parameters_are_refused(key: SecretBytes, kind: str, chunk_log2: int) -> None:
    with pytest.raises(InputError):
        Cipher.create(key, kind, chunk_log2=chunk_log2)


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "g" * 64, "md5:" + "0" * 64, "sha256:" + "0" * 63, "0" * 64]
)
def test_a_malformed_digest_is_refused(text: str, sealed: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="digest is malformed"):
        parse_digest(text)
    with pytest.raises(InputError, match="digest is malformed"):
        read_all(sealed.container, expected_digest=text)
    with pytest.raises(InputError, match="digest is malformed"):
        verify_digest(tmp_path / "absent", text)


def test_containers_of_the_same_content_share_nothing(key: SecretBytes) -> None:
    one, two = Cipher.create(key, "file"), Cipher.create(key, "file")
    assert one.header.salt != two.header.salt
    assert one.header.commitment != two.header.commitment


@given(
    chunk_log2=st.integers(6, 24),
    plaintext=st.integers(0, 1 << 50),
    table=st.booleans(),
)
def test_the_size_of_a_container_determines_its_layout(
    chunk_log2: int, plaintext: int, table: bool
) -> None:
    layout = Layout(1 << chunk_log2, plaintext, table)
    header = Header("file", chunk_log2, table, bytes(32), bytes(32))
    if layout.chunks > MAX_CHUNKS:
        with pytest.raises(SealError):
            Layout.of_container(header, layout.container)
    else:
        assert Layout.of_container(header, layout.container) == layout
        assert layout.record_offset(layout.chunks) >= layout.table_offset


@given(chunk_log2=st.integers(6, 24), size=st.integers(-10, 1 << 60), table=st.booleans())
def test_any_size_has_one_layout_or_none(chunk_log2: int, size: int, table: bool) -> None:
    header = Header("file", chunk_log2, table, bytes(32), bytes(32))
    try:
        layout = Layout.of_container(header, size)
    except SealError:
        return
    assert layout.container == size


@settings(max_examples=300)
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(SealError):
        read_all(data)


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_containers_are_refused_or_unchanged(data: st.DataObject) -> None:
    """Splices, swaps, deletions and overwrites of a genuine container."""
    original = bytes.fromhex(VECTOR["container"])
    key = SecretBytes(bytes.fromhex(VECTOR["asset_key"]))
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 100)))
        how = data.draw(st.sampled_from(["delete", "overwrite", "insert", "copy"]))
        if how == "delete":
            del changed[start:stop]
        elif how == "overwrite":
            changed[start:stop] = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif how == "insert":
            changed[start:start] = data.draw(st.binary(max_size=90))
        else:
            changed[start:start] = changed[start:stop]
    try:
        with SealedReader(bytes(changed), key) as reader:
            plain = reader.read_range(0, reader.size)
    except SealError:
        assert bytes(changed) != original
        return
    assert bytes(changed) == original
    assert plain.hex() == VECTOR["plaintext"]


@settings(max_examples=200)
@given(prefix=st.binary(min_size=8, max_size=8), rest=st.binary(max_size=300))
def test_headers_after_the_magic_never_crash(prefix: bytes, rest: bytes) -> None:
    with pytest.raises(CenacleError):
        read_all(b"CENACLE\x00" + prefix + rest)
