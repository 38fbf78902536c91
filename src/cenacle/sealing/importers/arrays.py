"""NPZ and NPY files: arrays without pickled objects, streamed out of the archive."""

from __future__ import annotations

import math
import os
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from cenacle.errors import DataError
from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.safetensors_format import build_header
from cenacle.sealing.tensors import dtype_name, tensors_schema
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_npy", "import_npz"]

_BLOCK: Final = 1 << 20
_MAX_MEMBERS: Final = 100_000
_Shape = tuple[int, ...]
# numpy reads the header with ast and, for files of Python 2, with tokenize.
_HEADER_ERRORS: Final = (
    KeyError,
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    Warning,
    RecursionError,
    MemoryError,
)
_HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _bad(found: str, expected: str) -> DataError:
    return DataError(
        "an array file is malformed",
        found=found,
        expected=expected,
        remedy="write it again with numpy.savez",
    )


@importer("NPZ", "tensors", (".npz",))
def import_npz(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """Every array of the archive under its name.

    Raises:
        DataError: not an archive of arrays, arrays of Python objects, or unusable types.
    """
    fd = open_source(path)
    with os.fdopen(fd, "rb") as file, disk_errors(f"read {path}"):
        try:
            with zipfile.ZipFile(file) as archive:
                return _import(_Members(archive), writer, options)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            UnicodeError,
        ):
            raise _bad("a damaged or encrypted archive", "an archive of .npy files") from None


@importer("NPY", "tensors", (".npy",))
def import_npy(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """The one array, under the name ``data``."""
    fd = open_source(path)
    with os.fdopen(fd, "rb") as file, disk_errors(f"read {path}"):
        return _import(_Single(file, os.fstat(fd).st_size), writer, options)


class _Single:
    """An .npy file, as if it were an archive with the member ``data``."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self.sizes = {"data": size}

    def open(self, _: str) -> IO[bytes]:
        self._file.seek(0)
        return self._file


class _Members:
    """The members of an NPZ archive by tensor name."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._files: dict[str, zipfile.ZipInfo] = {}
        if len(archive.infolist()) > _MAX_MEMBERS:
            raise _bad(f"{len(archive.infolist())} members", f"at most {_MAX_MEMBERS}")
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in self._files:
                raise _bad("a member that is no .npy file or occurs twice", "distinct .npy files")
            self._files[name] = info
        self.sizes = {name: info.file_size for name, info in self._files.items()}

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(self._files[name])


def _import(members: _Members | _Single, writer: SealedWriter, options: Options) -> dict[str, Any]:
    specs: dict[str, tuple[str, _Shape]] = {}
    for name, size in members.sizes.items():
        file = members.open(name)
        shape, _, dtype, start = _read_header(file, name)
        specs[name] = (dtype_name(dtype, name), shape)
        expected = math.prod(shape) * dtype.itemsize
        if size - start != expected:
            raise _bad(
                f"{size - start} bytes in array {name[:80]!r}", f"{expected}, as its shape says"
            )
    header, order = build_header(specs)
    writer.write(header)
    total, done = sum(members.sizes.values()), 0
    for name in order:
        _copy(members.open(name), name, writer)
        done += members.sizes[name]
        if options.progress is not None:
            options.progress(done, total)
    return tensors_schema(specs)


def _read_header(file: IO[bytes], name: str) -> tuple[_Shape, bool, np.dtype[Any], int]:
    """Shape, Fortran order, type, and where the items begin."""
    try:
        version = np.lib.format.read_magic(file)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shape, fortran, dtype = _HEADERS[version](file)
    except _HEADER_ERRORS:
        raise _bad(f"array {name[:80]!r} without a valid header", "an .npy file") from None
    if dtype.hasobject:
        raise DataError(
            f"array {name[:80]!r} holds pickled Python objects, which could run code",
            found="dtype object",
            expected="numbers or booleans",
            remedy="convert it with array.astype, or save text columns as .csv or .parquet",
        )
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _bad(f"array {name[:80]!r} with an unusable shape", "sizes that are not negative")
    return shape, fortran, dtype, file.tell()


def _copy(file: IO[bytes], name: str, writer: SealedWriter) -> None:
    shape, fortran, dtype, _ = _read_header(file, name)
    left = math.prod(shape) * dtype.itemsize
    little = dtype.newbyteorder("<")
    if fortran and len(shape) > 1 and left:
        # Transposing needs the whole array; every other array streams.
        data = bytearray(left)
        if file.readinto(data) != left:  # type: ignore[attr-defined]
            raise _bad(f"array {name[:80]!r} that is cut short", f"{left} bytes")
        array = np.frombuffer(data, dtype).reshape(shape, order="F")
        writer.write(np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data)
        return
    while left:
        block = file.read(min(_BLOCK, left))
        count = len(block)
        if not count or count % dtype.itemsize:
            raise _bad(f"array {name[:80]!r} that is cut short", f"{left} more bytes")
        writer.write(np.frombuffer(block, dtype).astype(little, copy=False).view(np.uint8).data)
        left -= count
