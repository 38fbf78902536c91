"""Sealed tensors: numpy arrays in, numpy arrays out, at the speed of AES-GCM.

The plaintext is a safetensors file. Chunks that lie within one array are encrypted straight
from its memory and decrypted straight into it; only chunks across a border are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

import numpy as np
import numpy.typing as npt

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError
from cenacle.sealing.container import CHUNK_LOG2, TAG_BYTES, Cipher, Layout
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.parallel import Progress, for_each, thread_count
from cenacle.sealing.reader import SealedReader
from cenacle.sealing.safetensors_format import (
    DTYPE_BYTES,
    TensorSpec,
    build_header,
    header_bytes,
    parse_header,
)
from cenacle.sealing.writer import SealedWriter, Segments

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "RawTensor",
    "SealedBuffer",
    "TensorReader",
    "open_tensors",
    "seal_tensors",
    "seal_tensors_into",
    "sealed_tensors_size",
    "tensors_schema",
]

Array = npt.NDArray[Any]
Source = Path | str | bytes | bytearray | memoryview

_NUMPY: Final[Mapping[str, np.dtype[Any]]] = {
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
_NAMES: Final = {dtype: name for name, dtype in _NUMPY.items()}


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
        scratch = memoryview(bytearray(min(layout.chunk, segments.length)))

        def work(index: int) -> None:
            start = index * layout.chunk
            length = layout.chunk_bytes(index)
            offset = layout.record_offset(index)
            cipher.seal(
                index,
                segments.span(start, start + length, scratch),
                out[offset : offset + length + TAG_BYTES],
            )

        return work

    for_each(layout.chunks, make_worker, thread_count(threads))
    out[: len(cipher.header_bytes)] = cipher.header_bytes
    out[layout.end_offset : layout.container] = cipher.seal_end(layout, b"")
    return SealedBuffer(layout.container, f"sha256:{cipher.header_digest.hex()}")


class TensorReader:
    """Reads single tensors, or rows of them, out of a sealed container.

    Args:
        source: a sealed file, a buffer that holds a container, or an opened reader (which
            stays the caller's to close).
        key: the asset key; ``None`` only with an opened reader.
        expected_header: the header digest the container must have.
        expected_digest: the content digest the container must have.
        threads: how many threads decrypt; by default one a core, at most 8.

    Raises:
        SealError: as :class:`SealedReader`.
        DataError: the content is not a valid safetensors file.
    """

    def __init__(
        self,
        source: Source | SealedReader,
        key: SecretBytes | None = None,
        *,
        expected_header: str | None = None,
        expected_digest: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._owned = not isinstance(source, SealedReader)
        if isinstance(source, SealedReader):
            self._reader = source
        elif key is None:
            raise InputError("no key was given", found="none", expected="the asset key")
        else:
            self._reader = SealedReader(
                source,
                key,
                expected_header=expected_header,
                expected_digest=expected_digest,
                kind="tensors",
                threads=threads,
            )
        try:
            self._specs = _read_specs(self._reader)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their bytes."""
        return tuple(self._specs)

    @property
    def info(self) -> SealedInfo:
        """As :attr:`SealedReader.info`."""
        return self._reader.info

    def spec(self, name: str) -> TensorSpec:
        """Type, shape and place of a tensor; raises :class:`DataError` if there is none."""
        try:
            return self._specs[name]
        except KeyError:
            raise DataError(
                "there is no such tensor",
                found=repr(name[:80]),
                expected=", ".join(sorted(self._specs)[:20]) or "no tensor at all",
                remedy="name one of these",
            ) from None

    def read(self, name: str) -> Array:
        """One whole tensor. ``BF16`` is widened to ``float32``, which loses nothing.

        Raises:
            DataError: no such tensor, or a type numpy lacks; then use :meth:`read_raw`.
            SealError: a chunk of it is damaged or forged.
        """
        spec = self.spec(name)
        return self._load(name, spec.shape, spec.start)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` along the first dimension, as :meth:`read`."""
        spec = self.spec(name)
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise InputError(
                f"tensor {name[:80]!r} has no such rows",
                found=f"{start} to {stop}",
                expected=f"within 0 to {spec.shape[0] if spec.shape else 0}",
            )
        return self._load(
            name, (stop - start, *spec.shape[1:]), spec.start + start * spec.row_bytes
        )

    def read_raw(self, name: str) -> bytes:
        """The bytes of one tensor, little endian, whatever its type."""
        spec = self.spec(name)
        return self._reader.read_range(spec.start, spec.stop - spec.start)

    def items(self) -> Iterator[tuple[str, Array]]:
        """Every tensor, one at a time."""
        for name in self._specs:
            yield name, self.read(name)

    def schema(self) -> dict[str, Any]:
        """As :attr:`SealedInfo.schema`."""
        return tensors_schema({n: (s.dtype, s.shape) for n, s in self._specs.items()})

    def _load(self, name: str, shape: tuple[int, ...], offset: int) -> Array:
        dtype = self._specs[name].dtype
        array = np.empty(shape, _numpy_type(name, dtype))
        self._reader.readinto(offset, array.reshape(-1).view(np.uint8).data)
        return _finish(dtype, array)

    def close(self) -> None:
        if self._owned:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_specs(reader: SealedReader) -> dict[str, TensorSpec]:
    length = reader.read_range(0, min(8, reader.size))
    size = header_bytes(length, reader.size)
    return parse_header(length, reader.read_range(8, size), reader.size)


def _numpy_type(name: str, dtype: str) -> np.dtype[Any]:
    if dtype == "BF16":
        return np.dtype("<u2")
    try:
        return _NUMPY[dtype]
    except KeyError:
        raise DataError(
            f"tensor {name[:80]!r} has a type numpy does not know",
            found=dtype,
            expected=", ".join(_NUMPY),
            remedy="read its bytes with read_raw",
        ) from None


def _finish(dtype: str, array: Array) -> Array:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "BOOL":
        # Any byte may have been sealed; numpy's behaviour is undefined unless it is 0 or 1.
        raw = array.view(np.uint8)
        np.minimum(raw, 1, out=raw)
    return array


def open_tensors(
    source: Source,
    key: SecretBytes,
    *,
    out: bytearray | memoryview | Array | None = None,
    expected_header: str | None = None,
    expected_digest: str | None = None,
    threads: int | None = None,
) -> dict[str, Array]:
    """Decrypt all tensors at once into one block of memory; the arrays are views of it.

    Args:
        source: a sealed file, or a buffer that holds a container.
        key: the 32-byte key.
        out: where to decrypt to, of the plaintext's size or more (reusing memory is twice
            as fast as touching it for the first time); by default fresh memory.
        expected_header: the header digest the container must have.
        expected_digest: the content digest the container must have.
        threads: by default one a core, at most 8.

    Raises:
        SealError: damaged, forged, truncated, for another key, or not the expected one.
        DataError: the content is not a valid safetensors file, or has types numpy lacks.
        InputError: ``out`` is too small.
    """
    with SealedReader(
        source,
        key,
        expected_header=expected_header,
        expected_digest=expected_digest,
        kind="tensors",
        threads=threads,
    ) as reader:
        block = np.empty(reader.size, np.uint8) if out is None else out
        view = memoryview(cast("Buffer", block)).cast("B")
        if len(view) < reader.size:
            raise InputError(
                "the buffer is too small for the tensors",
                found=f"{len(view)} bytes",
                expected=f"{reader.size} bytes or more",
            )
        view = view[: reader.size]
        reader.readinto(0, view)
        length = bytes(view[:8])
        size = header_bytes(length, reader.size)
        specs = parse_header(length, bytes(view[8 : 8 + size]), reader.size)
    return {
        name: _finish(
            spec.dtype, np.ndarray(spec.shape, _numpy_type(name, spec.dtype), view, spec.start)
        )
        for name, spec in specs.items()
    }
