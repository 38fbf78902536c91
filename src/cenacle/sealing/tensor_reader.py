"""Reading sealed tensors: one, some rows of one, or all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError
from cenacle.sealing.content_reader import ContentReader
from cenacle.sealing.reader import SealedReader, Source
from cenacle.sealing.safetensors_format import TensorSpec, header_bytes, parse_header
from cenacle.sealing.tensors import NUMPY_TYPES, Array, tensors_schema

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["TensorReader", "open_tensors"]


class TensorReader(ContentReader):
    """Reads single tensors, or rows of them, out of a sealed container.

    Arguments and errors: :class:`ContentReader`; the content must be a valid safetensors file.
    """

    kind = "tensors"

    def _open(self) -> None:
        reader = self._reader
        length = reader.read_range(0, min(8, reader.size))
        size = header_bytes(length, reader.size)
        self._specs = parse_header(length, reader.read_range(8, size), reader.size)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their bytes."""
        return tuple(self._specs)

    @property
    def cache_bytes(self) -> int:
        """As :attr:`SealedReader.cache_bytes`."""
        return self._reader.cache_bytes

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

    def readinto(self, name: str, buffer: Any, *, start: int = 0, stop: int | None = None) -> None:
        """The bytes of one tensor, or of rows of it, into memory that the caller has already.

        Args:
            name: the tensor.
            buffer: writable and contiguous, of exactly the bytes that are read; they are little
                endian and as they were sealed (a ``BOOL`` may be any byte).
            start, stop: rows along the first dimension; by default all.

        Raises:
            DataError: no such tensor.
            InputError: no such rows, or a buffer of another size.
            SealError: a chunk of it is damaged or forged; the buffer's content is undefined.
        """
        spec = self.spec(name)
        offset, size = spec.start, spec.stop - spec.start
        if start != 0 or stop is not None:
            last = (spec.shape[0] if spec.shape else 0) if stop is None else stop
            if not spec.shape or not 0 <= start <= last <= spec.shape[0]:
                raise InputError(
                    f"tensor {name[:80]!r} has no such rows",
                    found=f"{start} to {last}",
                    expected=f"within 0 to {spec.shape[0] if spec.shape else 0}",
                )
            offset += start * spec.row_bytes
            size = (last - start) * spec.row_bytes
        view = memoryview(buffer).cast("B")
        if len(view) != size:
            raise InputError(
                f"the buffer for tensor {name[:80]!r} has the wrong size",
                found=f"{len(view)} bytes",
                expected=f"{size} bytes",
            )
        self._reader.readinto(offset, view)

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


def _numpy_type(name: str, dtype: str) -> np.dtype[Any]:
    if dtype == "BF16":
        return np.dtype("<u2")
    try:
        return NUMPY_TYPES[dtype]
    except KeyError:
        raise DataError(
            f"tensor {name[:80]!r} has a type numpy does not know",
            found=dtype,
            expected=", ".join(NUMPY_TYPES),
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
