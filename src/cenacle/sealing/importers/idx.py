"""IDX files, plain or gzipped: the format of the MNIST database.

Format: http://yann.lecun.com/exdb/mnist/ (two zero bytes, a type, the number of dimensions,
the sizes and the items, all big endian). The tensor is named ``data``.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from cenacle.errors import DataError
from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.safetensors_format import build_header
from cenacle.sealing.tensors import tensors_schema
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_idx"]

_TYPES: Final[Mapping[int, tuple[str, str]]] = {
    0x08: ("U8", ">u1"),
    0x09: ("I8", ">i1"),
    0x0B: ("I16", ">i2"),
    0x0C: ("I32", ">i4"),
    0x0D: ("F32", ">f4"),
    0x0E: ("F64", ">f8"),
}
_BLOCK: Final = 1 << 20
_MAX_RATIO: Final = 1032  # deflate expands no byte to more than this
_SUFFIXES: Final = tuple(
    ending + packed
    for ending in (".idx", "-ubyte", "-byte", "-short", "-int", "-float", "-double")
    for packed in ("", ".gz")
)


def _bad(found: str, expected: str) -> DataError:
    return DataError(
        "an IDX file is malformed",
        found=found,
        expected=expected,
        remedy="fetch the file again from its source",
    )


@importer("IDX", "tensors", _SUFFIXES)
def import_idx(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """One tensor named ``data``, byte-swapped as it streams through.

    Raises:
        DataError: wrong magic, unknown type, or a length other than the sizes say.
    """
    fd = open_source(path)
    with os.fdopen(fd, "rb", buffering=0) as raw, disk_errors(f"read {path}"):
        packed = os.fstat(fd).st_size
        if raw.read(2) != b"\x1f\x8b":
            raw.seek(0)
            return _stream(raw, packed, False, writer, options)
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
            try:
                return _stream(unpacked, packed * _MAX_RATIO, True, writer, options)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                raise _bad("a damaged gzip stream", "an intact one") from None


def _exactly(file: IO[bytes], count: int) -> bytes:
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _stream(
    file: IO[bytes] | Any, most: int, packed: bool, writer: SealedWriter, options: Options
) -> dict[str, Any]:
    magic = _exactly(file, 4)
    if len(magic) < 4 or magic[:2] != b"\x00\x00":
        raise _bad("other first bytes", "two zero bytes, a type and a number of dimensions")
    kind, dimensions = magic[2], magic[3]
    if kind not in _TYPES:
        raise _bad(f"type 0x{kind:02x}", ", ".join(f"0x{code:02x}" for code in _TYPES))
    dtype, code = _TYPES[kind]
    sizes = _exactly(file, 4 * dimensions)
    if not dimensions or dimensions > 64 or len(sizes) < 4 * dimensions:
        raise _bad(f"{dimensions} dimensions in {4 + len(sizes)} bytes", "1 to 64 dimensions")
    shape = struct.unpack(f">{dimensions}I", sizes)
    item = np.dtype(code)
    total = math.prod(shape) * item.itemsize
    held = most - 4 - len(sizes)
    if total > held or (not packed and total != held):
        raise _bad(
            f"{held} bytes for sizes {'x'.join(map(str, shape))}"
            if not packed
            else "too few bytes",
            f"{total} bytes of items",
        )
    header, _ = build_header({"data": (dtype, shape)})
    writer.write(header)
    done = 0
    while done < total:
        block = _exactly(file, min(_BLOCK, total - done))
        if len(block) < min(_BLOCK, total - done):
            raise _bad(f"an end after {done + len(block)} bytes of items", f"{total} bytes")
        writer.write(np.frombuffer(block, item).astype(item.newbyteorder("<")).view(np.uint8).data)
        done += len(block)
        if options.progress is not None:
            options.progress(done, total)
    if file.read(1):
        raise _bad("more bytes than the sizes say", f"{total} bytes of items")
    return tensors_schema({"data": (dtype, shape)})
