"""Sealed paging: weights come from the container when they are needed, and make room again.

A tail that is larger than the memory for its weights is computed segment by segment. Each
weight is decrypted straight into a buffer that the next ones use again, while another thread
already reads the segment after it. The container's digest table, which was checked against the
digest that the contract pins when it was opened, vouches for each chunk at each use: an altered
chunk, one of an older file, or one from another place is refused. This is what Ginseng (Yun and
Zhong, NDSS 2019) does for variables, here in software, for tensors.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.specs import NUMPY_DTYPES
from cenacle.cut.tail_format import Piece, Segment, TailReader
from cenacle.errors import CenacleError, InputError

__all__ = ["Buffer", "Pager", "piece_bytes", "segment_bytes"]

_ALIGNMENT: Final = 64
Array = NDArray[Any]


def piece_bytes(reader: TailReader, piece: Piece) -> int:
    """Bytes of a weight of a segment."""
    spec = reader.spec(piece.tensor)
    if piece.start is None or piece.stop is None:
        return spec.stop - spec.start
    return (piece.stop - piece.start) * spec.row_bytes


def segment_bytes(reader: TailReader, segment: Segment) -> int:
    """Bytes of a segment's weights in a :class:`Buffer`, each on a cache line of its own."""
    return sum(_aligned(piece_bytes(reader, piece)) for piece in segment.weights)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Buffer:
    """Memory for the weights of one segment at a time, of whole pages of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)

    def fill(self, reader: TailReader, pieces: Sequence[Piece]) -> dict[str, Array]:
        """Decrypt weights into it; the arrays are views, valid until it is filled again.

        Raises:
            SealError: a chunk is damaged, forged or of another file; the buffer is wiped.
        """
        found: dict[str, Array] = {}
        position = 0
        try:
            for piece in pieces:
                size, spec = piece_bytes(reader, piece), reader.spec(piece.tensor)
                raw = self._memory[position : position + size]
                reader.readinto(piece.tensor, raw.data, start=piece.start or 0, stop=piece.stop)
                if spec.dtype == "BOOL":
                    np.minimum(raw, 1, out=raw)  # what is sealed may be any byte
                found[piece.name] = raw.view(NUMPY_DTYPES[spec.dtype]).reshape(piece.shape(spec))
                position += _aligned(size)
        except BaseException:
            self.wipe()
            raise
        return found

    def wipe(self) -> None:
        self._memory.fill(0)


@dataclass
class _Slot:
    """A buffer, and which segment it holds or is being filled with."""

    buffer: Buffer
    holds: int | None = None
    arrays: dict[str, Array] | None = None
    pending: Future[dict[str, Array]] | None = None


class Pager:
    """The weights of a tail's segments, within a limit of memory.

    Some segments stay: as many bytes as the limit leaves once there is room to read the others,
    two at a time if possible. Which segments are read does not depend on any input.

    Args:
        reader: of the tail; it must have been opened with the pinned digest.
        segments: the manifest's.
        memory_limit: most bytes of weights in memory at any time, with what the reader keeps.

    Raises:
        InputError: a limit that is too small for the largest segment.
        SealError: a chunk is damaged, forged or of another file.
    """

    def __init__(self, reader: TailReader, segments: Sequence[Segment], memory_limit: int) -> None:
        self._reader = reader
        self._pieces = [segment.weights for segment in segments]
        sizes = [segment_bytes(reader, segment) for segment in segments]
        kept, buffers = _plan(sizes, memory_limit - reader.cache_bytes)
        if buffers == 0:
            raise InputError(
                "the memory limit is too small for the tail's largest segment",
                found=f"{memory_limit} bytes",
                expected=f"at least {max(sizes) + reader.cache_bytes}",
                remedy="allow more memory, or write the tail with smaller segments",
            )
        self._lock = threading.Lock()
        self._paged = [i for i in range(len(sizes)) if i not in kept and sizes[i]]
        largest = max((sizes[i] for i in self._paged), default=0)
        self._slots = [_Slot(Buffer(largest)) for _ in range(buffers if self._paged else 0)]
        self._kept: dict[int, tuple[Buffer | None, dict[str, Array]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        for index, size in enumerate(sizes):
            if index in kept or not size:
                buffer = Buffer(size) if size else None
                arrays = buffer.fill(reader, self._pieces[index]) if buffer else {}
                self._kept[index] = (buffer, arrays)
        if len(self._slots) > 1 and len(self._paged) > len(self._slots):
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cenacle-paging")

    @property
    def memory(self) -> int:
        """Bytes of weights that can be in memory at once, with what the reader keeps."""
        held = sum(buffer.size for buffer, _ in self._kept.values() if buffer)
        return held + sum(slot.buffer.size for slot in self._slots) + self._reader.cache_bytes

    @property
    def paged(self) -> tuple[int, ...]:
        """The segments that are read at each use."""
        return tuple(self._paged)

    def weights(self, index: int) -> Mapping[str, Array]:
        """The weights of a segment, valid until the next call; starts to read the segment after.

        Only one thread may go through the segments at a time.

        Raises:
            SealError: a chunk is damaged, forged or of another file.
            UnavailableError: the disk fails.
        """
        if index in self._kept:
            return self._kept[index][1]
        slot = next((s for s in self._slots if s.holds == index), None)
        if slot is None:
            slot = self._slots[0]
            _settle(slot)
            self._begin(slot, index)
        arrays = self._finish(slot)
        if self._thread is not None:
            after = self._paged[(self._paged.index(index) + 1) % len(self._paged)]
            if all(s.holds != after for s in self._slots):
                other = next(s for s in self._slots if s is not slot)
                _settle(other)
                other.holds = after
                other.pending = self._thread.submit(
                    other.buffer.fill, self._reader, self._pieces[after]
                )
        return arrays

    def _begin(self, slot: _Slot, index: int) -> None:
        slot.arrays = slot.buffer.fill(self._reader, self._pieces[index])
        slot.holds = index

    @staticmethod
    def _finish(slot: _Slot) -> dict[str, Array]:
        pending, slot.pending = slot.pending, None
        if pending is not None:
            try:
                slot.arrays = pending.result()
            except BaseException:
                slot.holds, slot.arrays = None, None
                raise
        assert slot.arrays is not None  # a slot that holds a segment has its arrays
        return slot.arrays

    def close(self) -> None:
        """Overwrite the weights. Nothing may use them any more. Safe to call twice."""
        for slot in self._slots:
            _settle(slot)
            slot.buffer.wipe()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        for buffer, _ in self._kept.values():
            if buffer is not None:
                buffer.wipe()
        self._kept.clear()
        self._slots.clear()
        self._paged.clear()


def _settle(slot: _Slot) -> None:
    """Wait until nothing is being read into a slot, and forget what it held."""
    pending, slot.pending = slot.pending, None
    slot.holds, slot.arrays = None, None
    if pending is not None:
        with suppress(CenacleError):  # it will be met again when the segment is needed
            pending.result()


def _plan(sizes: Sequence[int], room: int) -> tuple[set[int], int]:
    """The segments that stay in memory, and the number of buffers for the others (0: no room)."""
    if sum(sizes) <= max(0, room):
        return set(range(len(sizes))), 1
    order = sorted((i for i in range(len(sizes)) if sizes[i]), key=lambda i: (-sizes[i], i))
    buffers = max(0, min(2, room // sizes[order[0]]))
    if buffers == 0:
        return set(), 0
    kept: set[int] = set()
    held = largest = 0  # the largest segment so far that does not stay
    for position, index in enumerate(order):
        after = sizes[order[position + 1]] if position + 1 < len(order) else 0
        if held + sizes[index] + buffers * max(largest, after) <= room:
            kept.add(index)
            held += sizes[index]
        else:
            largest = max(largest, sizes[index])
    return kept, buffers
