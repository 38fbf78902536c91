"""Sealing tensors: numpy arrays into a container, at the speed of AES-GCM.

The plaintext is a safetensors file. Chunks that lie within one array are encrypted straight
from its memory, those across a border piece by piece; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError
from cenacle.sealing.container import CHUNK_LOG2, TAG_BYTES, Cipher, Layout
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.parallel import Progress, for_each, thread_count
from cenacle.sealing.safetensors_format import (
    DTYPE_BYTES,
    build_header,
)
from cenacle.sealing.writer import SealedWriter, Segments

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "NUMPY_TYPES",
    "Array",
    "RawTensor",
    "SealedBuffer",
    "dtype_name",
    "seal_tensors",
    "seal_tensors_into",
    "sealed_tensors_size",
    "tensors_schema",
]

Array = npt.NDArray[Any]

NUMPY_TYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
}
_NAMES: Final = {dtype: name for name, dtype in NUMPY_TYPES.items()}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of a type numpy lacks (``BF16``, ``F8_E4M3``, ...): its bytes, little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class SealedBuffer:
    """What :func:`seal_tensors_into` wrote: ``size`` bytes, pinned by ``header_digest``."""

    size: int
    header_digest: str


def dtype_name(dtype: np.dtype[Any], name: str) -> str:
    """The safetensors name of a numpy type; raises :class:`DataError` for any other."""
    try:
        return _NAMES[dtype.newbyteorder("<")]
    except (KeyError, TypeError):
        raise DataError(
            f"tensor {name[:80]!r} has a type that cannot be sealed",
            found="Python objects" if dtype.hasobject else str(dtype),
            expected="booleans, integers, floats of 16 to 64 bits, or complex64",
            remedy="convert it, for example with array.astype('float32')",
        ) from None


def tensors_schema(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """``{"tensors": {name: {"dtype", "shape"}}}`` for a manifest, names sorted."""
    return {
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape)}
            for name, (dtype, shape) in sorted(specs.items())
        }
    }


Named = Mapping[str, "Array | RawTensor"]


def _prepare(tensors: Named) -> tuple[Segments, dict[str, tuple[str, tuple[int, ...]]]]:
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    views: dict[str, bytes | bytearray | memoryview] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, RawTensor):
            specs[name] = (tensor.dtype, tensor.shape)
            views[name] = _checked(name, tensor)
            continue
        array = np.asarray(tensor)
        specs[name] = (dtype_name(array.dtype, name), array.shape)
        # No copy for what is contiguous and little endian already, as almost all arrays are.
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        views[name] = plain.reshape(-1).view(np.uint8).data
    header, order = build_header(specs)
    return Segments([header, *(views[name] for name in order)]), specs


def _checked(name: str, tensor: RawTensor) -> memoryview:
    view = memoryview(tensor.data).cast("B")
    size = DTYPE_BYTES.get(tensor.dtype, 0)
    for extent in tensor.shape:
        size *= extent
    if tensor.dtype not in DTYPE_BYTES or len(view) != size:
        raise DataError(
            f"raw tensor {name[:80]!r} is malformed",
            found=f"{len(view)} bytes of type {tensor.dtype!r}",
            expected=f"{size} bytes of a safetensors type",
        )
    return view


def seal_tensors(
    tensors: Named,
    target: Path | str,
    key: SecretBytes,
    *,
    chunk_log2: int = CHUNK_LOG2,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SealedInfo:
    """Seal arrays to a file, in the order and with the header of the safetensors format.

    Raises:
        DataError: a type or name that cannot be sealed.
        InputError, UnavailableError: as :class:`SealedWriter`.
    """
    segments, specs = _prepare(tensors)
    with SealedWriter(target, key, "tensors", chunk_log2=chunk_log2, threads=threads) as writer:
        writer.write_segments(segments, progress)
        writer.set_schema(tensors_schema(specs))
    return writer.info


def sealed_tensors_size(tensors: Named, *, chunk_log2: int = CHUNK_LOG2) -> int:
    """Bytes that :func:`seal_tensors_into` needs for these tensors."""
    segments, _ = _prepare(tensors)
    return Layout(1 << chunk_log2, segments.length, table=False).container


def seal_tensors_into(
    buffer: bytearray | memoryview | Array,
    tensors: Named,
    key: SecretBytes,
    *,
    chunk_log2: int = CHUNK_LOG2,
    threads: int | None = None,
) -> SealedBuffer:
    """Seal arrays into memory, for a reader who holds the same key.

    The container has no digest table (SHA-256 is ten times slower than AES-GCM), so it has
    no content digest and cannot be an asset: between parties, use :func:`seal_tensors`.

    Args:
        buffer: writable and contiguous, of :func:`sealed_tensors_size` bytes or more.
        tensors: arrays by name; nobody may write to them meanwhile.
        key: the 32-byte key.
        chunk_log2: binary logarithm of the chunk size.
        threads: by default one a core, at most 8.

    Raises:
        InputError: the buffer is too small, or the key has another length.
        DataError: a type or name that cannot be sealed.
    """
    segments, _ = _prepare(tensors)
    cipher = Cipher.create(key, "tensors", chunk_log2=chunk_log2, table=False)
    layout = Layout(1 << chunk_log2, segments.length, table=False)
    out = memoryview(cast("Buffer", buffer)).cast("B")
    if len(out) < layout.container:
        raise InputError(
            "the buffer is too small for the sealed tensors",
            found=f"{len(out)} bytes",
            expected=f"{layout.container} bytes or more",
            remedy="ask sealed_tensors_size",
        )

    def make_worker() -> Callable[[int], None]:
        def work(index: int) -> None:
            start = index * layout.chunk
            length = layout.chunk_bytes(index)
            offset = layout.record_offset(index)
            cipher.seal_pieces(
                index,
                segments.pieces(start, start + length),
                out[offset : offset + length + TAG_BYTES],
            )

        return work

    for_each(layout.chunks, make_worker, thread_count(threads))
    out[: len(cipher.header_bytes)] = cipher.header_bytes
    out[layout.end_offset : layout.container] = cipher.seal_end(layout, b"")
    return SealedBuffer(layout.container, f"sha256:{cipher.header_digest.hex()}")
