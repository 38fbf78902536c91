"""Random access: any range equals the slice, and only touched chunks are decrypted."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import InputError, SealError
from cenacle.sealing import SealedReader, SealedWriter, seal_bytes

KEY = bytes(range(32))
PLAIN = bytes(i * 7 % 256 for i in range(1000))


@pytest.fixture(scope="module")
def sealed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "sealed"
    with SealedWriter(path, SecretBytes(KEY), "file", chunk_log2=6) as writer:
        writer.write(PLAIN)
    return path


@pytest.fixture(params=["file", "memory"])
def reader(request: pytest.FixtureRequest, sealed_file: Path) -> SealedReader:
    source = sealed_file if request.param == "file" else sealed_file.read_bytes()
    return SealedReader(source, SecretBytes(KEY))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(offset=st.integers(0, 1000), length=st.integers(0, 1000))
def test_any_range_is_the_slice(reader: SealedReader, offset: int, length: int) -> None:
    if offset + length <= len(PLAIN):
        assert reader.read_range(offset, length) == PLAIN[offset : offset + length]
    else:
        with pytest.raises(InputError, match="outside"):
            reader.read_range(offset, length)


@pytest.mark.parametrize("offset", [-1, -1000, 1001, 1 << 62])
def test_ranges_outside_are_refused(reader: SealedReader, offset: int) -> None:
    with pytest.raises(InputError, match="outside"):
        reader.read_range(offset, 1)


def test_only_touched_chunks_are_decrypted(reader: SealedReader, opened_chunks: list[int]) -> None:
    reader.read_range(70, 20)
    assert opened_chunks == [1]
    reader.read_range(100, 10)  # the same chunk, decrypted already
    assert opened_chunks == [1]
    reader.read_range(120, 100)
    assert opened_chunks == [1, 2, 3]


def test_a_damaged_chunk_does_not_hide_the_others(sealed_file: Path) -> None:
    damaged = bytearray(sealed_file.read_bytes())
    damaged[80 + 3 * 80 + 5] ^= 1
    reader = SealedReader(bytes(damaged), SecretBytes(KEY))
    assert reader.read_range(0, 192) == PLAIN[:192]
    out = bytearray(b"\xff" * 64)
    with pytest.raises(SealError, match="chunk 3"):
        reader.readinto(192, out)
    assert out == bytes(64)


def test_a_file_cut_while_it_is_read_is_refused(sealed_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(sealed_file.read_bytes())
    with SealedReader(path, SecretBytes(KEY)) as reader:
        os.truncate(path, 200)
        with pytest.raises(SealError, match="shorter"):
            reader.read_range(900, 10)


def test_a_file_changed_while_it_is_read_is_refused(sealed_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed"
    path.write_bytes(sealed_file.read_bytes())
    with SealedReader(path, SecretBytes(KEY)) as reader:
        with path.open("r+b") as file:
            file.seek(90)
            file.write(b"xxxx")
        with pytest.raises(SealError, match="chunk 0"):
            reader.read_range(0, 10)


@pytest.mark.parametrize("make", ["absent", "folder", "fifo", "empty"])
def test_what_is_no_sealed_file_is_refused(make: str, tmp_path: Path, key: SecretBytes) -> None:
    path = tmp_path / "thing"
    actions: dict[str, Callable[[], object]] = {
        "absent": lambda: None,
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "empty": path.touch,
    }
    actions[make]()
    with pytest.raises(SealError if make == "empty" else InputError):
        SealedReader(path, key)


def test_another_kind_is_refused(sealed_file: Path, key: SecretBytes) -> None:
    with pytest.raises(InputError, match="wrong kind"):
        SealedReader(sealed_file, key, kind="table")


def test_a_refused_file_is_closed(
    sealed_file: Path, other_key: SecretBytes, tmp_path: Path
) -> None:
    own = tmp_path / "own.sealed"  # other tests' descriptors come and go as they are collected
    own.write_bytes(sealed_file.read_bytes())

    def descriptors() -> int:
        found = [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]
        return found.count(os.path.realpath(own))

    with own.open("rb"):
        assert descriptors() == 1
    for _ in range(5):
        with pytest.raises(SealError):
            SealedReader(own, other_key)
    assert descriptors() == 0


def test_file_object(reader: SealedReader) -> None:
    file = reader.file()
    assert file.readable()
    assert file.seekable()
    assert file.read(10) == PLAIN[:10]
    assert file.tell() == 10
    assert file.seek(-5, io.SEEK_END) == 995
    assert file.read() == PLAIN[-5:]
    assert file.read(1) == b""
    assert file.seek(2000) == 2000
    assert file.read(5) == b""
    file.seek(100)
    file.seek(20, io.SEEK_CUR)
    buffer = bytearray(30)
    assert file.readinto(buffer) == 30
    assert buffer == PLAIN[120:150]
    with pytest.raises(ValueError, match="negative"):
        file.seek(-1)
    assert io.BufferedReader(reader.file()).read() == PLAIN


def test_many_threads_read_the_same_reader(reader: SealedReader) -> None:
    errors: list[str] = []

    def read(seed: int) -> None:
        for i in range(200):
            offset = (seed * 131 + i * 37) % 950
            if reader.read_range(offset, 50) != PLAIN[offset : offset + 50]:
                errors.append(f"{seed} {i}")

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_ranges_on_several_threads(tmp_path: Path, key: SecretBytes, threads: int) -> None:
    plain = os.urandom((5 << 20) + 3)
    info = seal_bytes(plain, tmp_path / "sealed", key, threads=threads)
    with SealedReader(
        tmp_path / "sealed", key, expected_digest=info.digest, threads=threads
    ) as reader:
        assert reader.read_range(0, len(plain)) == plain
        assert reader.read_range(1000, 4 << 20) == plain[1000 : 1000 + (4 << 20)]
    damaged = bytearray((tmp_path / "sealed").read_bytes())
    damaged[3 << 20] ^= 1
    with pytest.raises(SealError, match="chunk 2"):
        SealedReader(damaged, key, threads=threads).read_range(0, len(plain))
