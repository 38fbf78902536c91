"""Queries of several clients in one computation: who waits for whom, and for how long.

A query waits only while others are likely to join it: as long as fewer rows have come than were
under way at once a moment ago. A single client, who asks again when it has its answer, never
waits; of many clients each waits until the others' next queries are there. Never longer than the
contract allows, and never once the batch is full.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Batcher"]

T = TypeVar("T")


class _Waiting(NamedTuple, Generic[T]):
    item: T
    rows: int
    group: Hashable
    since: float


class Batcher(Generic[T]):
    """A queue that hands out what is computed together. Several threads may use it.

    Args:
        max_rows: of one batch; a single item may have more, and then is alone.
        max_wait_s: how long an item may wait for others.
        clock: seconds, never going back.
    """

    def __init__(
        self, max_rows: int, max_wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_rows, self._max_wait, self._clock = max_rows, max_wait_s, clock
        self._queue: deque[_Waiting[T]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # Rows that came and are not answered: now, the most since the last batch, and before it.
        self._under_way = 0
        self._peak = 0
        self._peak_before = 0

    def put(self, item: T, rows: int, group: Hashable = None) -> bool:
        """Add an item; False, and nothing happens, once the queue is closed.

        Args:
            group: only items of one group are computed together.
        """
        with self._changed:
            if self._closed:
                return False
            self._queue.append(_Waiting(item, rows, group, self._clock()))
            self._under_way += rows
            self._peak = max(self._peak, self._under_way)
            self._changed.notify_all()
            return True

    def answered(self, rows: int) -> None:
        """Rows that were taken have their answer."""
        with self._changed:
            self._under_way -= rows

    def close(self) -> None:
        """Take no more items; those that wait are still handed out, at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[T]:
        """Close, and give back what waits."""
        with self._changed:
            left = [one.item for one in self._queue]
            self._queue.clear()
            self.close()
            return left

    def take(self) -> list[T]:
        """The next batch, in the order in which its items came; empty once all are handed out."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            first = self._queue[0]
            deadline = first.since + self._max_wait
            while not self._closed and not self._enough(first.group):
                left = deadline - self._clock()
                if left <= 0:
                    break
                self._changed.wait(left)
                if not self._queue:  # cleared meanwhile
                    return []
            return self._pick(first.group)

    def _enough(self, group: Hashable) -> bool:
        rows = sum(one.rows for one in self._queue if one.group == group)
        return rows >= min(self._max_rows, max(self._peak, self._peak_before))

    def _pick(self, group: Hashable) -> list[T]:
        batch: list[T] = []
        rest: deque[_Waiting[T]] = deque()
        rows = 0
        full = False
        for one in self._queue:
            # Nobody is overtaken by a later query of the same group that happens to fit.
            full = full or (one.group == group and bool(batch) and rows + one.rows > self._max_rows)
            if one.group == group and not full:
                batch.append(one.item)
                rows += one.rows
            else:
                rest.append(one)
        self._queue = rest
        self._peak_before, self._peak = self._peak, self._under_way
        return batch
