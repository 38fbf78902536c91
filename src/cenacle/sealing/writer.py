"""Sealing: a stream, a file or a list of buffers into a container, in constant memory."""

from __future__ import annotations

import hashlib
import io
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError
from cenacle.sealing.container import (
    CHUNK_LOG2,
    DIGEST_BYTES,
    MAX_CHUNKS,
    TAG_BYTES,
    Cipher,
    Layout,
    content_digest,
)
from cenacle.sealing.disk import AtomicFile, begin_writeback, disk_errors, pread_into, pwrite_all
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.parallel import Progress, for_each, start_thread, thread_count

__all__ = ["SealedWriter", "Segments"]

Buffer = bytes | bytearray | memoryview
_WRITEBACK: Final = 1 << 25
_QUEUED: Final = 2  # chunk buffers that wait, for each thread


class Segments:
    """Buffers laid end to end, read by chunk without joining them.

    Args:
        buffers: contiguous buffers of any item type; kept alive, not copied.
    """

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._views = [view for view in map(_as_bytes, buffers) if len(view)]
        self._starts = [0, *accumulate(len(view) for view in self._views)]
        self.length = self._starts[-1]

    def pieces(self, start: int, stop: int) -> list[memoryview]:
        """Views that together are bytes ``start`` to ``stop``; mostly just one."""
        number = bisect_right(self._starts, start) - 1
        begin = start - self._starts[number]
        found = [self._views[number][begin : begin + stop - start]]
        left = stop - start - len(found[0])
        while left:
            number += 1
            found.append(self._views[number][:left])
            left -= len(found[-1])
        return found


def _as_bytes(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class _Sink:
    """Seals chunks at their place in a file, from any thread, and collects their digests."""

    def __init__(self, fd: int, cipher: Cipher) -> None:
        self.cipher = cipher
        self.fd = fd
        self.chunk = 1 << cipher.header.chunk_log2
        self._layout = Layout(self.chunk, 0, table=True)
        self._table = bytearray()
        self._lock = threading.Lock()

    def put(self, index: int, pieces: Sequence[memoryview], out: memoryview) -> None:
        """Seal a chunk given in pieces; ``out`` is scratch space of a chunk and a tag."""
        record = out[: sum(map(len, pieces)) + TAG_BYTES]
        self.cipher.seal_pieces(index, pieces, record)
        digest = hashlib.sha256(record).digest()
        offset = self._layout.record_offset(index)
        pwrite_all(self.fd, record, offset)
        window = offset // _WRITEBACK
        if window and (offset + len(record)) // _WRITEBACK != window:
            # Let the disk work on what is behind while the processor seals what is ahead.
            begin_writeback(self.fd, (window - 1) * _WRITEBACK, _WRITEBACK)
        start = index * DIGEST_BYTES
        with self._lock:
            if len(self._table) < start + DIGEST_BYTES:
                self._table.extend(bytes(start + DIGEST_BYTES - len(self._table)))
            self._table[start : start + DIGEST_BYTES] = digest

    def finish(self, plaintext: int) -> SealedInfo:
        layout = Layout(self.chunk, plaintext, table=True)
        table_digest = hashlib.sha256(self._table).digest()
        end = self.cipher.seal_end(layout, table_digest)
        pwrite_all(self.fd, self.cipher.header_bytes, 0)
        pwrite_all(self.fd, self._table, layout.table_offset)
        pwrite_all(self.fd, end, layout.end_offset)
        digest = content_digest(self.cipher.header, layout, table_digest, end)
        return SealedInfo(
            kind=self.cipher.header.kind,
            header_digest=f"sha256:{self.cipher.header_digest.hex()}",
            digest=f"sha256:{digest.hex()}",
            size=layout.container,
            plaintext_bytes=plaintext,
        )


class SealedWriter(io.RawIOBase):
    """Write a container to a file; it appears at ``target`` only when all of it is sealed.

    Use it as a context manager: leaving it normally finishes and sets :attr:`info`, leaving
    it by an exception leaves nothing behind. It is a writable binary stream, so
    ``pyarrow`` and others can write to it.

    Args:
        target: the sealed file; replaced atomically if it exists.
        key: the 32-byte asset key.
        kind: ``file``, ``table``, ``tensors`` or ``package``.
        chunk_log2: binary logarithm of the chunk size; 20 (1 MiB) unless small ranges are
            to be read from small files.
        threads: how many threads seal; by default one a core, at most 8.

    Raises:
        InputError: an unusable key, kind, chunk size or path.
        UnavailableError: the disk is full or fails, at any later call too.
    """

    def __init__(
        self,
        target: Path | str,
        key: SecretBytes,
        kind: str,
        *,
        chunk_log2: int = CHUNK_LOG2,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._threads = thread_count(threads)
        self._target = Path(target)
        cipher = Cipher.create(key, kind, chunk_log2=chunk_log2)
        self._file = AtomicFile(self._target)
        self._sink = _Sink(self._file.fd, cipher)
        self._chunk = self._sink.chunk
        self._length = 0
        self._next = 0
        self._buffer: memoryview | None = None
        self._filled = 0
        self._crew: _Crew | None = None
        self._done = False
        self._info: SealedInfo | None = None
        self._schema: dict[str, Any] = {}

    @property
    def info(self) -> SealedInfo:
        """What was sealed; raises ``ValueError`` before the writer has finished."""
        if self._info is None:
            raise ValueError("the container is not finished")
        return self._info

    @property
    def written(self) -> int:
        """Plaintext bytes taken so far."""
        return self._length

    def set_schema(self, schema: dict[str, Any]) -> None:
        """What :attr:`info` shall say about the content."""
        self._schema = schema

    def write(self, data: Any, /) -> int:
        """Seal ``data``, any contiguous buffer, after what was written before."""
        self._check_open()
        view = _as_bytes(data)
        self._grow(len(view))
        done = 0
        while done < len(view):
            if self._buffer is None:
                self._buffer = self._crew_of_threads().buffer()
                self._filled = 0
            piece = view[done : done + self._chunk - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            done += len(piece)
            if self._filled == self._chunk:
                self._submit()
        return len(view)

    def write_segments(self, segments: Segments, progress: Progress | None = None) -> None:
        """Seal buffers without copying them, on several threads; only as the whole content."""

        def read(start: int, stop: int, _: memoryview) -> list[memoryview]:
            return segments.pieces(start, stop)

        self._write_all(segments.length, read, progress)

    def write_file(self, fd: int, length: int, progress: Progress | None = None) -> None:
        """Seal ``length`` bytes of an open file, on several threads; only as the whole content.

        Raises:
            DataError: the file became shorter meanwhile.
        """

        def read(start: int, stop: int, scratch: memoryview) -> list[memoryview]:
            if pread_into(fd, scratch[: stop - start], start) != stop - start:
                raise DataError(
                    "a file became shorter while it was being sealed",
                    found=f"an end before byte {stop}",
                    expected=f"{length} bytes",
                    remedy="seal it again when nothing writes to it",
                )
            return [scratch[: stop - start]]

        self._write_all(length, read, progress)

    def _write_all(
        self,
        length: int,
        read: Callable[[int, int, memoryview], list[memoryview]],
        progress: Progress | None,
    ) -> None:
        self._check_open()
        if self._length:
            raise ValueError("the content was begun with write()")
        self._grow(length)
        chunk = min(self._chunk, max(1, length))

        def make_worker() -> Callable[[int], None]:
            scratch = memoryview(bytearray(chunk))
            out = memoryview(bytearray(chunk + TAG_BYTES))

            def work(index: int) -> None:
                start = index * self._chunk
                stop = min(length, start + self._chunk)
                self._sink.put(index, read(start, stop, scratch), out)

            return work

        report = None
        if progress is not None:
            # Bound here, so that the callback below has a narrowed type.
            notify, size = progress, self._chunk

            def report(chunks: int) -> None:
                notify(min(length, chunks * size), length)

        with disk_errors(f"write {self._target}"):
            for_each(-(-length // self._chunk), make_worker, self._threads, report)

    def finish(self) -> SealedInfo:
        """Seal the rest and the end, and give the file its name. Safe to call twice."""
        if self._info is not None:
            return self._info
        self._check_open()
        try:
            with disk_errors(f"write {self._target}"):
                if self._buffer is not None and self._filled:
                    self._submit()
                if self._crew is not None:
                    self._crew.finish()
                info = replace(self._sink.finish(self._length), schema=self._schema)
            self._file.commit()
        except BaseException:
            self.abort()
            raise
        self._done = True
        self._info = info
        return info

    def abort(self) -> None:
        """Stop; nothing is left behind. Safe to call twice, and after :meth:`finish`."""
        self._done = True
        if self._crew is not None:
            self._crew.stop()
        self._file.abort()

    def _grow(self, count: int) -> None:
        self._length += count
        if self._length > self._chunk * MAX_CHUNKS:
            raise InputError(
                "too much for one sealed file",
                found=f"more than {MAX_CHUNKS} chunks",
                expected=f"at most {MAX_CHUNKS} chunks of {self._chunk} bytes",
            )

    def _submit(self) -> None:
        assert self._buffer is not None
        with disk_errors(f"write {self._target}"):
            self._crew_of_threads().submit(self._next, self._buffer, self._filled)
        self._next += 1
        self._buffer = None

    def _crew_of_threads(self) -> _Crew:
        if self._crew is None:
            self._crew = _Crew(self._sink, self._threads)
        return self._crew

    def _check_open(self) -> None:
        if self._done:
            raise ValueError("the sealed writer is closed")

    # io.RawIOBase: close() must never turn half a stream into a finished container.

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self._done:
            self.abort()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and not self._done:
            self.finish()
        else:
            self.abort()
        super().close()


class _Crew:
    """Threads that seal the chunks of a stream, with a fixed number of buffers."""

    def __init__(self, sink: _Sink, threads: int) -> None:
        self._sink = sink
        self._work: queue.SimpleQueue[tuple[int, memoryview, int] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._to_make = threads * _QUEUED
        self._threads = threads
        self._errors: list[BaseException] = []
        self._helpers: list[threading.Thread] = []

    def buffer(self) -> memoryview:
        """A free chunk buffer; waits for one when all are in use."""
        if self._to_make and self._free.empty():
            self._to_make -= 1
            return memoryview(bytearray(self._sink.chunk))
        return self._free.get()

    def submit(self, index: int, buffer: memoryview, length: int) -> None:
        self._raise()
        if len(self._helpers) < min(self._threads, index + 1):
            helper = threading.Thread(target=self._run, name="cenacle-sealing", daemon=True)
            if start_thread(helper):
                self._helpers.append(helper)
        self._work.put((index, buffer, length))
        if not self._helpers:
            self._work.put(None)
            self._run()

    def _run(self) -> None:
        out = memoryview(bytearray(self._sink.chunk + TAG_BYTES))
        while (item := self._work.get()) is not None:
            index, buffer, length = item
            try:
                if not self._errors:
                    self._sink.put(index, [buffer[:length]], out)
            except BaseException as error:  # re-raised on the writing thread
                self._errors.append(error)
            finally:
                self._free.put(buffer)

    def _raise(self) -> None:
        if self._errors:
            raise self._errors[0]

    def finish(self) -> None:
        self.stop()
        self._raise()

    def stop(self) -> None:
        helpers, self._helpers = self._helpers, []
        for _ in helpers:
            self._work.put(None)
        for helper in helpers:
            helper.join()
