"""From a user's file to a sealed file, and back: the two verbs of the package."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cenacle.crypto import SecretBytes
from cenacle.errors import InputError
from cenacle.sealing.disk import AtomicFile, begin_writeback, disk_errors, pwrite_all
from cenacle.sealing.importers import Options, find_importer
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.package import (
    MAX_PACKAGE_BYTES,
    pack,
    package_digest,
    package_files,
)
from cenacle.sealing.parallel import Progress, for_each, thread_count
from cenacle.sealing.reader import SealedReader
from cenacle.sealing.tables import TableReader
from cenacle.sealing.tensor_reader import TensorReader
from cenacle.sealing.writer import SealedWriter

__all__ = ["read_package", "seal_bytes", "seal_path", "unseal_path"]

_BLOCK: Final = 1 << 20
_WRITEBACK: Final = 32  # blocks


def seal_path(
    source: Path | str,
    target: Path | str,
    key: SecretBytes,
    *,
    kind: str | None = None,
    threads: int | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> SealedInfo:
    """Seal a file, or a directory of Python code, in constant memory.

    Args:
        source: a table (.csv, .tsv, .parquet, .arrow), tensors (.npz, .npy, IDX,
            .safetensors, .pt), any other file, or a program's directory.
        target: the sealed file; appears only when it is complete.
        key: the 32-byte asset key.
        kind: what ``source`` must become; by default its suffix decides. ``file`` seals the
            bytes as they are.
        threads: how many threads seal; by default one a core, at most 8.
        allow_missing: accept empty cells, NaN and infinities in a table.
        progress: called with (done, in all), in the unit of the source.

    Raises:
        InputError: a path, kind or key that cannot be used.
        DataError: content that is malformed, incomplete or could run code.
        UnavailableError: the disk is full or fails; nothing is left behind.
    """
    source, target = Path(source), Path(target)
    with disk_errors(f"read {source}"):
        directory = source.is_dir()
        if target.exists() and not directory and source.samefile(target):
            raise InputError(
                "the sealed file would replace its own source",
                found=str(target),
                expected="another path",
            )
    if directory:
        if kind not in (None, "package"):
            raise InputError(
                f"a directory cannot be sealed as {kind}", found="a directory", expected="a file"
            )
        packed = pack(source)
        schema = {"package": package_digest(packed), "files": sorted(package_files(packed))}
        return seal_bytes(packed, target, key, kind="package", threads=threads, schema=schema)
    found = find_importer(source, kind)
    options = Options(allow_missing=allow_missing, progress=progress)
    if not found.kind:  # a refusal; nothing may be opened for it
        with disk_errors(f"read {source}"):
            source.stat()
    writer = SealedWriter(target, key, found.kind or "file", threads=threads)
    with writer:
        writer.set_schema(found.run(source, writer, options))
    return writer.info


def seal_bytes(
    content: bytes | bytearray | memoryview,
    target: Path | str,
    key: SecretBytes,
    *,
    kind: str = "file",
    threads: int | None = None,
    schema: dict[str, Any] | None = None,
) -> SealedInfo:
    """Seal bytes that are in memory, e.g. a report or a packed program, to a file."""
    with SealedWriter(target, key, kind, threads=threads) as writer:
        writer.write(content)
        writer.set_schema(schema or {})
    return writer.info


def read_package(reader: SealedReader) -> bytes:
    """The packed program in a container of kind ``package``.

    Raises:
        InputError: another kind, or far too big for a program.
        SealError: damaged or forged.
    """
    if reader.kind != "package" or reader.size > 2 * MAX_PACKAGE_BYTES:
        raise InputError(
            "this sealed file holds no program",
            found=f"{reader.kind} of {reader.size} bytes",
            expected=f"a package of at most {MAX_PACKAGE_BYTES} bytes",
        )
    return reader.read_range(0, reader.size)


def unseal_path(
    source: Path | str,
    target: Path | str,
    key: SecretBytes,
    *,
    expected_header: str | None = None,
    expected_digest: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SealedInfo:
    """Write the plaintext of a sealed file, for its recipient alone (mode 0600).

    Tensors become a safetensors file; a table becomes ``.arrow``, ``.parquet`` or ``.csv``
    by the suffix of ``target``; a program becomes a directory that must not exist yet.

    Raises:
        SealError: damaged, forged, truncated, for another key, or not the expected one.
        InputError: a path that cannot be used, or a suffix that does not fit the kind.
        UnavailableError: the disk is full or fails; nothing is left behind.
    """
    target = Path(target)
    with SealedReader(
        source,
        key,
        expected_header=expected_header,
        expected_digest=expected_digest,
        threads=threads,
    ) as reader:
        schema: dict[str, Any] = {}
        if reader.kind == "package":
            packed = read_package(reader)
            files = package_files(packed)
            _write_directory(target, files)
            schema = {"package": package_digest(packed), "files": sorted(files)}
        elif reader.kind == "table":
            schema = _write_table(reader, target, progress)
        else:
            if reader.kind == "tensors":
                _expect_suffix(target, (".safetensors",), "tensors")
                schema = TensorReader(reader).schema()
            with AtomicFile(target, 0o600) as file, disk_errors(f"write {target}"):
                _copy(reader, file.fd, thread_count(threads), progress)
                file.commit()
        return replace(reader.info, schema=schema)


def _expect_suffix(target: Path, suffixes: tuple[str, ...], kind: str) -> None:
    if target.suffix.lower() not in suffixes:
        raise InputError(
            f"sealed {kind} cannot be written to such a file",
            found=target.suffix or "no suffix",
            expected=" or ".join(suffixes),
            remedy=f"name the file with {suffixes[0]}",
        )


def _copy(reader: SealedReader, fd: int, threads: int, progress: Progress | None) -> None:
    block = max(_BLOCK, reader.layout.chunk)  # both are powers of two

    def make_worker() -> Callable[[int], None]:
        buffer = memoryview(bytearray(min(block, max(1, reader.size))))

        def work(index: int) -> None:
            start = index * block
            part = buffer[: min(block, reader.size - start)]
            reader.readinto(start, part)
            pwrite_all(fd, part, start)
            if index % _WRITEBACK == 0 and index:
                begin_writeback(fd, start - _WRITEBACK * block, _WRITEBACK * block)

        return work

    report = None
    if progress is not None:
        notify = progress

        def report(blocks: int) -> None:
            notify(min(reader.size, blocks * block), reader.size)

    for_each(-(-reader.size // block), make_worker, threads, report)


def _write_table(reader: SealedReader, target: Path, progress: Progress | None) -> dict[str, Any]:
    writers: dict[str, Callable[[Any, pa.Schema], Any]] = {
        ".arrow": pa.ipc.new_file,
        ".feather": pa.ipc.new_file,
        ".parquet": pq.ParquetWriter,
        ".csv": pa_csv.CSVWriter,
    }
    _expect_suffix(target, tuple(writers), "tables")
    table = TableReader(reader)
    done = 0
    with AtomicFile(target, 0o600) as file, disk_errors(f"write {target}"):
        with (
            os.fdopen(os.dup(file.fd), "wb") as stream,
            _pyarrow_errors(target),
            writers[target.suffix.lower()](stream, table.schema) as writer,
        ):
            for batch in table.batches():
                writer.write_batch(batch)
                done += batch.num_rows
                if progress is not None:
                    progress(done, table.num_rows)
        file.commit()
    return {
        "columns": [{"name": f.name, "type": str(f.type)} for f in table.schema],
        "rows": table.num_rows,
    }


@contextlib.contextmanager
def _pyarrow_errors(target: Path) -> Any:
    try:
        yield
    except pa.ArrowException:
        raise InputError(
            "this table cannot be written in that format",
            found=target.suffix,
            expected="a format with all of its column types",
            remedy="name the file with .arrow",
        ) from None


def _write_directory(target: Path, files: dict[str, bytes]) -> None:
    with disk_errors(f"write {target}"):
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        temp = target.parent / f".cenacle-{secrets.token_hex(8)}.partial"
        temp.mkdir(mode=0o700)
        try:
            for path, content in files.items():
                place = temp / path
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with place.open("xb") as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            temp.rename(target)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
