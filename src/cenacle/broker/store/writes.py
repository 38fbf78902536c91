"""A transaction that changes the store and appends to its log."""

from __future__ import annotations

import json
from collections.abc import Callable

from cenacle.broker.store.logbook import Logbook, Place
from cenacle.broker.store.reads import ReadTransaction
from cenacle.broker.store.rows import LogEntry
from cenacle.broker.store.runs import RunWrites
from cenacle.broker.store.session import Session
from cenacle.broker.store.totals import Totals
from cenacle.broker.store.waiting import Waiting
from cenacle.errors import InputError

__all__ = ["Transaction"]


class Transaction(RunWrites):
    """A view that sees and makes changes; all of them commit together, durably, or none."""

    __slots__ = ("_load", "_logbook")

    def __init__(
        self,
        session: Session,
        waiting: Waiting,
        totals: Totals,
        load: Callable[[ReadTransaction], Logbook],
    ) -> None:
        super().__init__(session, waiting, totals)
        self._load = load
        self._logbook: Logbook | None = None

    def append_entry(self, kind: str, body: bytes) -> int:
        """Append to the transparency log; returns the entry's index.

        Args:
            kind: what the entry records; must equal the body's own ``kind``, which is what the
                tree authenticates.
            body: canonical JSON, the leaf of the tree.

        Raises:
            InputError: the body is no JSON object, or states another kind.
        """
        try:
            stated = json.loads(body).get("kind")
        except (ValueError, AttributeError, RecursionError):
            stated = None
        if stated != kind or not kind:
            raise InputError(
                "a log entry does not state its kind",
                found=repr(stated)[:80],
                expected=f'a JSON object with "kind": "{kind}"',
            )
        return self._book().append(kind, bytes(body))

    def place(self, index: int) -> Place:
        """Where an entry just appended lies in the tree that this transaction's batch leaves.

        It is filled in before the commit, and holds once that is durable.
        """
        place = Place(index)
        self._book().places.append(place)
        return place

    def _book(self) -> Logbook:
        if self._logbook is None:
            self._logbook = self._load(self)
        return self._logbook

    def log_size(self) -> int:
        return self._book().size

    def log_root(self, size: int | None = None) -> bytes:
        if size is None or size == self._book().size:
            return self._book().frontier.root()
        return super().log_root(size)

    def get(self, level: int, index: int) -> bytes:
        known = self._book().find(level, index)
        return super().get(level, index) if known is None else known

    def entries(self, start: int, end: int) -> list[LogEntry]:
        book = self._book()
        stored = super().entries(start, min(end, book.stored))
        waiting = book.entries[max(0, start - book.stored) : max(0, end - book.stored)]
        return stored + waiting
