"""Opening: random access to a container, decrypting only the chunks that are touched."""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from cenacle.crypto import SecretBytes
from cenacle.errors import InputError, SealError
from cenacle.sealing.container import (
    DIGEST_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    Cipher,
    Header,
    Layout,
    content_digest,
    parse_digest,
)
from cenacle.sealing.disk import disk_errors, open_source, pread_into
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.parallel import for_each, thread_count

__all__ = ["SealedFile", "SealedReader", "Source"]

Source = Path | str | bytes | bytearray | memoryview
"""A sealed file, or a buffer that holds a container."""

_CACHED_CHUNKS: Final = 4
_PARALLEL_BYTES: Final = 1 << 21  # below this, starting threads costs more than it saves


class _FileSource:
    """Ciphertext on disk. Records are copied out before they are checked and decrypted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = open_source(path)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int, scratch: memoryview | None = None) -> memoryview:
        if scratch is None:
            scratch = memoryview(bytearray(length))
        view = scratch[:length]
        with disk_errors(f"read {self._path}"):
            got = pread_into(self._fd, view, offset)
        if got != length:
            raise SealError(
                "a sealed file became shorter while it was read",
                found=f"an end before byte {offset + length}",
                expected=f"{self.size} bytes",
                remedy="fetch the sealed file again from its owner",
            )
        return view

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _MemorySource:
    """Ciphertext in memory, read in place; nobody else may write to it meanwhile."""

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(buffer).toreadonly().cast("B")
        self.size = len(self._view)

    def read(self, offset: int, length: int, scratch: memoryview | None = None) -> memoryview:  # noqa: ARG002
        return self._view[offset : offset + length]

    def close(self) -> None:
        self._view.release()


class SealedReader:
    """A container, opened: its header, length and digest table are genuine from here on.

    Args:
        source: the sealed file, or a buffer that holds the container.
        key: the 32-byte asset key.
        expected_header: the header digest a manifest pins; another container under the
            same key is refused.
        expected_digest: the content digest a manifest pins. Every chunk that is touched is
            then also checked against the digest table (AES-GCM alone does not bind the
            holder of the key to one content).
        kind: the kind the content must have.
        threads: how many threads decrypt long ranges; by default one a core, at most 8.

    Raises:
        SealError: damaged, forged, truncated, for another key, or not the expected one.
        InputError: the file cannot be read, or an argument is malformed.
    """

    def __init__(
        self,
        source: Source,
        key: SecretBytes,
        *,
        expected_header: str | None = None,
        expected_digest: str | None = None,
        kind: str | None = None,
        threads: int | None = None,
    ) -> None:
        header_wanted = None if expected_header is None else parse_digest(expected_header)
        digest_wanted = None if expected_digest is None else parse_digest(expected_digest)
        self._threads = thread_count(threads)
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._lock = threading.Lock()
        self._source: _FileSource | _MemorySource = (
            _FileSource(Path(source)) if isinstance(source, (str, Path)) else _MemorySource(source)
        )
        try:
            size = self._source.size
            header = Header.parse(bytes(self._source.read(0, min(size, HEADER_BYTES))))
            if header_wanted is not None and not hmac.compare_digest(
                header.digest(), header_wanted
            ):
                raise _another("header", header.digest(), header_wanted)
            self.layout = Layout.of_container(header, size)
            self._cipher = Cipher(header, key)
            self._open_end(digest_wanted)
            if kind is not None and header.kind != kind:
                raise InputError("wrong kind of sealed file", found=header.kind, expected=kind)
        except BaseException:
            self._source.close()
            raise

    def _open_end(self, digest_wanted: bytes | None) -> None:
        layout, header = self.layout, self._cipher.header
        self._table = bytes(self._source.read(layout.table_offset, layout.table_bytes))
        end = bytes(self._source.read(layout.end_offset, layout.end_bytes))
        table_digest = hashlib.sha256(self._table).digest()
        self._cipher.open_end(layout, end, table_digest)
        self._digest = content_digest(header, layout, table_digest, end) if layout.table else None
        self._check_chunks = digest_wanted is not None
        if digest_wanted is not None and (
            self._digest is None or not hmac.compare_digest(self._digest, digest_wanted)
        ):
            raise _another("content", self._digest or b"", digest_wanted)

    @property
    def kind(self) -> str:
        """``file``, ``table``, ``tensors`` or ``package``."""
        return self._cipher.header.kind

    @property
    def size(self) -> int:
        """Plaintext bytes."""
        return self.layout.plaintext

    @property
    def cache_bytes(self) -> int:
        """The most plaintext that the reader keeps for itself, of chunks read in parts."""
        return _CACHED_CHUNKS * min(self.layout.chunk, self.size)

    @property
    def info(self) -> SealedInfo:
        """As the writer reported it, without the schema; the digest is empty if there is none."""
        return SealedInfo(
            kind=self.kind,
            header_digest=f"sha256:{self._cipher.header_digest.hex()}",
            digest="" if self._digest is None else f"sha256:{self._digest.hex()}",
            size=self.layout.container,
            plaintext_bytes=self.size,
        )

    def read_range(self, offset: int, length: int) -> bytes:
        """Plaintext bytes ``offset`` to ``offset + length``, all of which must exist."""
        out = bytearray(length)
        self.readinto(offset, out)
        return bytes(out)

    def readinto(self, offset: int, buffer: Any) -> None:
        """Fill a writable contiguous buffer with the plaintext that starts at ``offset``.

        Whole chunks are decrypted straight into ``buffer``, long ranges on several threads.

        Raises:
            InputError: the range does not lie in the plaintext.
            SealError: a chunk is damaged or forged; the buffer's content is then undefined.
        """
        out = memoryview(buffer).cast("B")
        stop = offset + len(out)
        if offset < 0 or stop > self.size:
            raise InputError(
                "a range lies outside a sealed file",
                found=f"bytes {offset} to {stop}",
                expected=f"0 to {self.size}",
            )
        if not len(out):
            return
        chunk = self.layout.chunk
        first, last = offset // chunk, (stop - 1) // chunk

        def make_worker() -> Callable[[int], None]:
            scratch = self._scratch()

            def work(number: int) -> None:
                index = first + number
                begin = index * chunk
                end = begin + self.layout.chunk_bytes(index)
                if offset <= begin and end <= stop:
                    self._open_chunk(index, out[begin - offset : end - offset], scratch)
                    return
                low, high = max(begin, offset), min(end, stop)
                plain = self._cached(index, scratch)
                out[low - offset : high - offset] = plain[low - begin : high - begin]

            return work

        threads = self._threads if len(out) >= _PARALLEL_BYTES else 1
        for_each(last - first + 1, make_worker, threads)

    def _scratch(self) -> memoryview | None:
        if isinstance(self._source, _MemorySource):
            return None
        return memoryview(bytearray(min(self.layout.chunk, self.size) + TAG_BYTES))

    def _open_chunk(self, index: int, out: memoryview, scratch: memoryview | None) -> None:
        length = self.layout.chunk_bytes(index) + TAG_BYTES
        record = self._source.read(self.layout.record_offset(index), length, scratch)
        if self._check_chunks:
            start = index * DIGEST_BYTES
            if hashlib.sha256(record).digest() != self._table[start : start + DIGEST_BYTES]:
                raise SealError(
                    "a sealed file is damaged or was altered",
                    found=f"chunk {index} with another digest than its owner pinned",
                    expected="the chunk its writer sealed there",
                    remedy="fetch the sealed file again from its owner",
                )
        self._cipher.open(index, record, out)

    def _cached(self, index: int, scratch: memoryview | None) -> memoryview:
        with self._lock:
            plain = self._cache.get(index)
            if plain is not None:
                self._cache.move_to_end(index)
                return plain
        # A fresh buffer each time: an evicted one may still be read by another thread.
        plain = memoryview(bytearray(self.layout.chunk_bytes(index)))
        self._open_chunk(index, plain, scratch)
        with self._lock:
            self._cache[index] = plain
            while len(self._cache) > _CACHED_CHUNKS:
                self._cache.popitem(last=False)
        return plain

    def file(self) -> SealedFile:
        """The plaintext as a seekable, read-only binary file, e.g. for ``pyarrow.PythonFile``."""
        return SealedFile(self)

    def close(self) -> None:
        """Close the file and forget decrypted chunks. Safe to call twice."""
        with self._lock:
            self._cache.clear()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _another(what: str, found: bytes, expected: bytes) -> SealError:
    return SealError(
        f"a sealed file is not the one that was named ({what} digest)",
        found=f"sha256:{found.hex()}" if found else "none",
        expected=f"sha256:{expected.hex()}",
        remedy="fetch the sealed file that belongs to the manifest",
    )


class SealedFile(io.RawIOBase):
    """The plaintext of a :class:`SealedReader` as a file object. Closing it leaves the reader."""

    def __init__(self, reader: SealedReader) -> None:
        super().__init__()
        self._reader = reader
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._reader.size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._reader.size}
        if whence not in base or base[whence] + offset < 0:
            raise ValueError("a position in a sealed file must not be negative")
        self._position = base[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._reader.size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        data = self._reader.read_range(self._position, count) if count else b""
        self._position += count
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._reader.size - self._position))
        if count:
            self._reader.readinto(self._position, view[:count])
        self._position += count
        return count
