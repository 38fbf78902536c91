"""Writing: any cut of the stream gives the same content; all or nothing on the disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import InputError, SealError, UnavailableError
from cenacle.sealing import (
    SealedReader,
    SealedWriter,
    compute_digest,
    seal_path,
    unseal_path,
    verify_digest,
)
from cenacle.sealing.disk import AtomicFile
from cenacle.sealing.writer import Segments

MIB = 1 << 20
SIZES = [0, 1, 63, 64, 65, 128, 1000]


def open_all(path: Path, key: SecretBytes, **expected: Any) -> bytes:
    with SealedReader(path, key, **expected) as reader:
        return reader.read_range(0, reader.size)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_after(
    writer: SealedWriter, data: bytes, first: Callable[[], object] = lambda: None
) -> NoReturn:
    writer.write(data)
    first()
    raise RuntimeError


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_stream_file_and_segments_agree(
    tmp_path: Path, key: SecretBytes, size: int, threads: int
) -> None:
    plain = os.urandom(size)
    source = tmp_path / "plain"
    source.write_bytes(plain)
    for way in ("stream", "file", "segments"):
        target = tmp_path / way
        with SealedWriter(target, key, "file", chunk_log2=6, threads=threads) as writer:
            if way == "stream":
                for start in range(0, size, 37):
                    assert writer.write(plain[start : start + 37]) == len(plain[start : start + 37])
            elif way == "file":
                with source.open("rb") as file:
                    writer.write_file(file.fileno(), size)
            else:
                writer.write_segments(Segments([plain[:50], b"", plain[50:70], plain[70:]]))
        info = writer.info
        assert info.size == target.stat().st_size
        assert info.plaintext_bytes == size == writer.written
        assert compute_digest(target) == info.digest
        assert open_all(target, key, expected_digest=info.digest) == plain
        assert open_all(target, key, expected_header=info.header_digest) == plain


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(parts=st.lists(st.binary(max_size=200), max_size=8), chunk_log2=st.integers(6, 9))
def test_any_cut_of_the_stream(
    tmp_path: Path, key: SecretBytes, parts: list[bytes], chunk_log2: int
) -> None:
    target = tmp_path / "sealed"
    with SealedWriter(target, key, "file", chunk_log2=chunk_log2, threads=2) as writer:
        for part in parts:
            writer.write(part)
    assert open_all(target, key) == b"".join(parts)


@given(parts=st.lists(st.binary(max_size=30), max_size=8), data=st.data())
def test_segments_are_their_concatenation(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    segments = Segments(parts)
    assert segments.length == len(whole)
    if not whole:
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert b"".join(segments.pieces(start, stop)) == whole[start:stop]


def test_an_exception_leaves_nothing(tmp_path: Path, key: SecretBytes) -> None:
    target = tmp_path / "sealed"
    with pytest.raises(RuntimeError), SealedWriter(target, key, "file") as writer:
        fail_after(writer, bytes(3 * MIB))
    assert names(tmp_path) == []


def test_closing_without_finishing_leaves_nothing(tmp_path: Path, key: SecretBytes) -> None:
    writer = SealedWriter(tmp_path / "sealed", key, "file")
    writer.write(b"half")
    writer.close()
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"more")
    with pytest.raises(ValueError, match="not finished"):
        _ = writer.info


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, key: SecretBytes) -> None:
    target = tmp_path / "sealed"
    with SealedWriter(target, key, "file") as writer:
        writer.write(b"old")
    with pytest.raises(RuntimeError), SealedWriter(target, key, "file") as writer:
        fail_after(writer, b"new")
    assert open_all(target, key) == b"old"
    with SealedWriter(target, key, "file") as writer:
        writer.write(b"new")
    assert open_all(target, key) == b"new"
    assert names(tmp_path) == ["sealed"]


def test_finishing_twice_and_two_writers_at_once(tmp_path: Path, key: SecretBytes) -> None:
    target = tmp_path / "sealed"
    one, two = SealedWriter(target, key, "file"), SealedWriter(target, key, "file")
    one.write(b"one")
    two.write(b"two")
    assert one.finish() is one.finish()
    two.finish()
    assert open_all(target, key) == b"two"
    one.close()
    two.close()
    assert names(tmp_path) == ["sealed"]


@pytest.mark.parametrize("method", ["write_segments", "write_file"])
def test_whole_content_cannot_follow_a_stream(
    tmp_path: Path, key: SecretBytes, method: str
) -> None:
    arguments: tuple[Any, ...] = (Segments([b"x"]),) if method == "write_segments" else (0, 1)
    with SealedWriter(tmp_path / "sealed", key, "file") as writer:
        writer.write(b"begun")
        with pytest.raises(ValueError, match="begun"):
            getattr(writer, method)(*arguments)


@pytest.mark.parametrize("where", ["absent/sealed", "file/sealed", "folder"])
def test_unusable_targets_are_refused(tmp_path: Path, key: SecretBytes, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        SealedWriter(tmp_path / where, key, "file")
    assert names(tmp_path) == ["file", "folder"]


def test_without_o_tmpfile(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems without unnamed files: a hidden name, removed on failure."""
    monkeypatch.delattr(os, "O_TMPFILE")
    hidden: list[str] = []
    target = tmp_path / "sealed"
    with pytest.raises(RuntimeError), SealedWriter(target, key, "file") as writer:
        fail_after(writer, b"x", lambda: hidden.extend(names(tmp_path)))
    assert [name.startswith(".cenacle-") for name in hidden] == [True]
    assert names(tmp_path) == []
    for content in (b"one", b"two"):
        with SealedWriter(target, key, "file") as writer:
            writer.write(content)
        assert open_all(target, key) == content
    assert names(tmp_path) == ["sealed"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOENT])
def test_where_an_open_file_cannot_get_a_name(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(os, "link", refuse)
    plain = os.urandom(3 * MIB)
    for content in (plain, b"new"):
        with SealedWriter(tmp_path / "sealed", key, "file") as writer:
            writer.write(content)
        assert open_all(tmp_path / "sealed", key) == content
    assert names(tmp_path) == ["sealed"]


def test_where_no_threads_can_be_started(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    plain = os.urandom(1000)
    with SealedWriter(tmp_path / "one", key, "file", chunk_log2=6, threads=3) as writer:
        writer.write(plain)
    (tmp_path / "plain").write_bytes(plain * 3000)
    seal_path(tmp_path / "plain", tmp_path / "two", key, threads=3)
    assert open_all(tmp_path / "one", key) == plain
    assert open_all(tmp_path / "two", key) == plain * 3000


def test_modes(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "plain").write_bytes(b"secret")
    old = os.umask(0)
    try:
        seal_path(tmp_path / "plain", tmp_path / "sealed", key)
        unseal_path(tmp_path / "sealed", tmp_path / "opened", key)
    finally:
        os.umask(old)
    assert (tmp_path / "opened").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "sealed").stat().st_mode & 0o777 == 0o666


def test_unsealing_a_damaged_file_leaves_nothing(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "plain").write_bytes(os.urandom(3 * MIB))
    seal_path(tmp_path / "plain", tmp_path / "sealed", key)
    damaged = bytearray((tmp_path / "sealed").read_bytes())
    damaged[2 * MIB + 500] ^= 1
    (tmp_path / "sealed").write_bytes(damaged)
    with pytest.raises(SealError):
        unseal_path(tmp_path / "sealed", tmp_path / "opened", key)
    assert names(tmp_path) == ["plain", "sealed"]


def test_a_source_that_shrinks_is_refused(tmp_path: Path, key: SecretBytes) -> None:
    source = tmp_path / "plain"
    source.write_bytes(bytes(100))
    with (
        source.open("rb") as file,
        pytest.raises(InputError, match="shorter"),
        SealedWriter(tmp_path / "sealed", key, "file", chunk_log2=6) as writer,
    ):
        writer.write_file(file.fileno(), 101)
    assert names(tmp_path) == ["plain"]


def test_progress_ends_at_the_whole(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "plain").write_bytes(bytes(5 * MIB + 1))
    seen: list[tuple[int, int]] = []
    seal_path(
        tmp_path / "plain",
        tmp_path / "sealed",
        key,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (5 * MIB + 1, 5 * MIB + 1)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("threads", [0, -1])
def test_unusable_numbers_of_threads(tmp_path: Path, key: SecretBytes, threads: int) -> None:
    with pytest.raises(InputError, match="threads"):
        SealedWriter(tmp_path / "sealed", key, "file", threads=threads)


def test_commit_is_durable_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    genuine_sync, genuine_link = os.fsync, os.link

    def sync(fd: int) -> None:
        order.append("folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
        genuine_sync(fd)

    def link(*args: Any, **kwargs: Any) -> None:
        order.append("name")
        genuine_link(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", link)
    with AtomicFile(tmp_path / "target") as file:
        os.write(file.fd, b"x")
        file.commit()
    assert order == ["file", "name", "folder"]


def run_python(code: str, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


@pytest.mark.processes
@pytest.mark.parametrize("way", ["file", "stream", "unseal", "tensors"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, key: SecretBytes, way: str) -> None:
    """RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC; both take the same way out."""
    source, folder = tmp_path / "plain", tmp_path / "disk"
    folder.mkdir()
    source.write_bytes(bytes(6 * MIB))
    seal_path(source, tmp_path / "sealed", key)
    code = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from cenacle.crypto import SecretBytes
        from cenacle.errors import UnavailableError
        from cenacle.sealing import SealedWriter, seal_path, seal_tensors, unseal_path
        source, target, sealed, way = sys.argv[1:]
        key = SecretBytes(bytes(range(32)))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        def stream():
            with SealedWriter(target, key, "file") as writer:
                for _ in range(64):
                    writer.write(bytes(100_000))
        ways = {
            "file": lambda: seal_path(source, target, key),
            "stream": stream,
            "unseal": lambda: unseal_path(sealed, target, key),
            "tensors": lambda: seal_tensors({"a": np.ones(6 << 20, "u1")}, target, key),
        }
        try:
            ways[way]()
        except UnavailableError as error:
            print(error)
    """
    done = run_python(code, source, folder / "target", tmp_path / "sealed", way)
    assert done.returncode == 0, done.stderr
    assert "no room" in done.stdout
    assert "Free some space" in done.stdout
    assert names(folder) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
def test_errors_of_the_disk_are_named(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(getattr(errno, number), "")

    monkeypatch.setattr(os, "pwrite", fail)
    expected = InputError if number in {"EROFS", "EACCES"} else UnavailableError
    with pytest.raises(expected), SealedWriter(tmp_path / "sealed", key, "file") as writer:
        writer.write(bytes(3 * MIB))
    assert names(tmp_path) == []


@pytest.mark.processes
@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_no_target(tmp_path: Path, key: SecretBytes, existing: bool) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    target = folder / "sealed"
    if existing:
        with SealedWriter(target, key, "file") as writer:
            writer.write(b"old")
    code = """
        import sys, time
        from cenacle.crypto import SecretBytes
        from cenacle.sealing import SealedWriter
        with SealedWriter(sys.argv[1], SecretBytes(bytes(range(32))), "file") as writer:
            for _ in range(8):
                writer.write(bytes(1 << 20))
            print("half", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    if existing:
        assert open_all(target, key) == b"old"
    # With O_TMPFILE nothing at all is left; elsewhere a hidden partial file may be.
    assert [name for name in names(folder) if not name.startswith(".cenacle-")] == (
        ["sealed"] if existing else []
    )


@pytest.mark.processes
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Sealing, verifying and opening 256 MiB takes hardly more memory than 8 MiB."""
    code = """
        import os, sys
        from cenacle.crypto import SecretBytes
        from cenacle.sealing import seal_path, unseal_path, verify_digest
        folder, size = sys.argv[1], int(sys.argv[2])
        with open(f"{folder}/plain", "wb") as file:
            file.truncate(size)
        key = SecretBytes(bytes(range(32)))
        info = seal_path(f"{folder}/plain", f"{folder}/sealed", key, threads=2)
        verify_digest(f"{folder}/sealed", info.digest, threads=2)
        unseal_path(f"{folder}/sealed", f"{folder}/opened", key, threads=2)
        assert os.path.getsize(f"{folder}/opened") == size
        with open("/proc/self/status") as status:
            print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    """
    peaks = []
    for size in (8 * MIB, 256 * MIB):
        done = run_python(code, tmp_path, size)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 16 * MIB
    assert peaks[1] < 200e6


def test_the_limit_on_open_files_is_not_used_up(tmp_path: Path, key: SecretBytes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        (tmp_path / "plain").write_bytes(b"x")
        for _ in range(50):
            info = seal_path(tmp_path / "plain", tmp_path / "sealed", key)
            verify_digest(tmp_path / "sealed", info.digest)
            open_all(tmp_path / "sealed", key)
            with pytest.raises(RuntimeError), SealedWriter(tmp_path / "no", key, "file"):
                raise RuntimeError
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
