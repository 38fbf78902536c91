"""Weights in an ONNX file: how many bytes they have, where they lie, read without trust in either.

Format: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md. A weight lies in the file
itself, or in another file beside it. Such a name is given by whoever wrote the model, so only
ordinary files in the model's own folder are opened, never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from onnx import AttributeProto, GraphProto, TensorProto, numpy_helper

from cenacle.errors import DataError, InputError
from cenacle.sealing.disk import disk_errors

__all__ = [
    "SAFETENSORS_NAMES",
    "embed",
    "file_digest",
    "graph_tensors",
    "read_external",
    "tensor_bytes",
]

_BITS: Final[dict[int, int]] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.FLOAT8E8M0: 8,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}

# ONNX element types as safetensors names them; the others cannot cross between parts.
SAFETENSORS_NAMES: Final[dict[int, str]] = {
    TensorProto.FLOAT: "F32",
    TensorProto.UINT8: "U8",
    TensorProto.INT8: "I8",
    TensorProto.UINT16: "U16",
    TensorProto.INT16: "I16",
    TensorProto.INT32: "I32",
    TensorProto.INT64: "I64",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT16: "F16",
    TensorProto.DOUBLE: "F64",
    TensorProto.UINT32: "U32",
    TensorProto.UINT64: "U64",
    TensorProto.COMPLEX64: "C64",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    TensorProto.FLOAT8E5M2: "F8_E5M2",
    TensorProto.FLOAT8E8M0: "F8_E8M0",
}

_MAX_LOCATION: Final = 1024
_BLOCK: Final = 1 << 26


def _bad(tensor: TensorProto, found: str, expected: str) -> DataError:
    return DataError(
        f"weight {tensor.name[:80]!r} of the model is malformed", found=found, expected=expected
    )


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a weight, as its type and shape say.

    Raises:
        DataError: negative sizes, or a type without bytes of a fixed size, such as text.
    """
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise _bad(tensor, f"element type {tensor.data_type}", "numbers or truth values")
    if any(size < 0 for size in tensor.dims):
        raise _bad(tensor, "a negative size", "sizes of 0 or more")
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor in a graph: weights, attributes of nodes, and those of graphs inside nodes."""
    yield from graph.initializer
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from graph_tensors(graph)


def embed(tensor: TensorProto) -> None:
    """Bring a weight's values into ``raw_data``, whatever field they came in.

    Raises:
        DataError: values whose number is not what the shape says.
    """
    size = tensor_bytes(tensor)
    if not tensor.HasField("raw_data"):
        try:
            array = numpy_helper.to_array(tensor)
            plain = numpy_helper.from_array(array, tensor.name)
        except (ValueError, TypeError, OverflowError):
            raise _bad(tensor, "values that do not fit its shape", f"{size} bytes") from None
        if list(plain.dims) != list(tensor.dims) or plain.data_type != tensor.data_type:
            raise _bad(tensor, "values that do not fit its shape", f"{size} bytes")
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.raw_data = plain.raw_data
    found = len(tensor.raw_data)
    if found != size:
        raise _bad(tensor, f"{found} bytes", f"{size}, as its shape says")


@contextlib.contextmanager
def _opened(folder: Path, location: str) -> Iterator[int]:
    """An ordinary file inside ``folder``; no component of its path may be a link."""
    parts = PurePosixPath(location).parts
    if (
        not 0 < len(location) <= _MAX_LOCATION
        or not location.isprintable()
        or "\\" in location
        or location.startswith("/")
        or ".." in parts
        or not parts
    ):
        raise InputError(
            "the model names a file for its weights that it may not",
            found=repr(location[:80]),
            expected="a file in the model's own folder",
            remedy="save the model again with its weights beside it",
        )
    with contextlib.ExitStack() as stack:
        with disk_errors(f"read the weights {location!r}"):
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, at)
            for depth, part in enumerate(parts, start=1):
                last = depth == len(parts)
                entry = os.stat(part, dir_fd=at, follow_symlinks=False).st_mode
                if not (stat.S_ISREG(entry) if last else stat.S_ISDIR(entry)):
                    raise InputError(
                        "the model's weights do not lie in an ordinary file",
                        found=repr(location[:80]),
                        expected="a file in the model's own folder, reached through no link",
                        remedy="put a copy of the file itself there",
                    )
                # Whoever exchanges it now for a link meets O_NOFOLLOW.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                flags |= os.O_NONBLOCK if last else os.O_DIRECTORY
                at = os.open(part, flags, dir_fd=at)
                stack.callback(os.close, at)
        yield at


def read_external(tensors: Iterable[TensorProto], folder: Path, digest: str | None = None) -> None:
    """Load every weight that lies in another file into ``raw_data``.

    Args:
        tensors: of the model, in any order; those that lie in the model itself stay as they are.
        folder: the model's.
        digest: what the one file of weights must hash to, if the model says so.

    Raises:
        InputError: a file outside the folder, behind a link, or missing.
        DataError: weights beyond a file's end, of another size than their shape, more bytes in
            all than the files have, or a file with another digest.
    """
    files: dict[str, list[tuple[TensorProto, int, int]]] = {}
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            location, offset, length = _place(tensor)
            files.setdefault(location, []).append((tensor, offset, length))
    if digest is not None and len(files) != 1:
        raise DataError(
            "the model states a digest of its weights, but not in one file",
            found=f"{len(files)} files",
            expected="1",
        )
    for location, places in files.items():
        with _opened(folder, location) as fd:
            _read_file(fd, location, places, digest)


def _place(tensor: TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = tensor_bytes(tensor)
    numbers = []
    for key, default in (("offset", 0), ("length", size)):
        text = entries.get(key, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _bad(tensor, f"{key} {text[:20]!r}", "a number of bytes")
        numbers.append(int(text))
    if numbers[1] != size:
        raise _bad(tensor, f"{numbers[1]} bytes", f"{size}, as its shape says")
    return entries.get("location", ""), numbers[0], numbers[1]


def _read_file(
    fd: int, location: str, places: list[tuple[TensorProto, int, int]], digest: str | None
) -> None:
    total = os.fstat(fd).st_size
    for tensor, offset, length in places:
        if offset + length > total:
            raise _bad(tensor, f"an end at byte {offset + length}", f"at most {total} in its file")
    wanted = sum(length for _, _, length in places)
    if wanted > total:
        # Else a small file could fill any memory: each weight may name the same bytes.
        raise DataError(
            f"weights of the model overlap in {location!r}",
            found=f"{wanted} bytes in all",
            expected=f"at most the file's {total}",
        )
    if digest is not None and file_digest(fd) != digest:
        raise DataError(
            f"the weights in {location!r} are not those that the model was saved with",
            found=file_digest(fd),
            expected=digest,
            remedy="copy both files again",
        )
    for tensor, offset, length in places:
        blocks: list[bytes] = []
        left = length
        with disk_errors(f"read the weights {location!r}"):
            while left:
                blocks.append(os.pread(fd, min(left, _BLOCK), offset + length - left))
                left -= len(blocks[-1])
                if not blocks[-1]:
                    raise _bad(tensor, "a file that was cut short meanwhile", f"{length} bytes")
        tensor.raw_data = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def file_digest(fd: int) -> str:
    """``sha256:`` and the digest of an open file's bytes."""
    found, position = hashlib.sha256(), 0
    while block := os.pread(fd, _BLOCK, position):
        found.update(block)
        position += len(block)
    return f"sha256:{found.hexdigest()}"
