"""Group commit: many closures, one durable commit, and no answer before it.

Closures run one after the other, first come first served, never two at once. Those that wait
run in one transaction, from each of which its own changes can be taken back; it is committed
once, with one ``fsync``, and only then are they answered. So whoever holds a result holds
something durable.

One thread does this. The exception is :meth:`Committer.together` with a local database: SQLite's
statements are over in microseconds, in which handing work from thread to thread costs more than
the work. So the closures run in the calling thread, and the committer's waits for the disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeVar

from cenacle.broker.store.session import Session
from cenacle.broker.store.waiting import CollisionError
from cenacle.broker.store.writer import Writer
from cenacle.broker.store.writes import Transaction
from cenacle.errors import UnavailableError

__all__ = ["Committer", "Outcome"]

T = TypeVar("T")
MAX_BATCH: Final = 256
_Closure = Callable[[Transaction], Any]


class Outcome(NamedTuple):
    """What a closure returned, or why nothing of it was kept."""

    result: Any
    failure: BaseException | None


class _Group(NamedTuple):
    """Closures that are answered together."""

    closures: Sequence[_Closure]
    answer: Callable[[list[Outcome]], None]
    begin: Callable[[], bool]


_Attempted = tuple[list[_Group], list[Outcome]]


class Committer:
    """The store's only writer.

    Args:
        writer: its connection, used by one thread at a time.
        max_batch: how many closures share a commit at most.
    """

    def __init__(self, writer: Writer, *, max_batch: int = MAX_BATCH) -> None:
        self._writer = writer
        self._max_batch = max_batch
        self._waiting: deque[_Group] = deque()
        self._wakeup = threading.Condition()
        self._busy = False  # somebody uses the writer
        self._attempted: _Attempted | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="cenacle-committer", daemon=True)
        self._thread.start()

    def submit(self, closure: Callable[[Transaction], T]) -> Future[T]:
        """Run ``closure`` in a transaction; its future is resolved after the commit is durable.

        The closure must not keep its transaction, wait for another closure, or have effects
        that matter before the commit; it may be run twice, the first time for nothing. An
        exception that it raises takes back its own changes alone and is delivered by its
        future, after the commit too.

        Raises (through the future):
            UnavailableError: the batch could not be committed; nothing of it is visible.
        """
        future: Future[T] = Future()

        def answer(outcomes: list[Outcome]) -> None:
            result, failure = outcomes[0]
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

        # A future that was cancelled while it waited is never run.
        group = _Group((closure,), answer, future.set_running_or_notify_cancel)
        with self._wakeup:
            self._enqueue(group)
        return future

    def together(
        self, closures: Sequence[_Closure], answer: Callable[[list[Outcome]], None]
    ) -> None:
        """Run several closures, which may take effect apart, and answer all of them at once.

        ``answer`` is called by another thread, once, after the commit is durable.

        Raises:
            UnavailableError: the committer is closed.
        """
        group = _Group(closures, answer, lambda: True)
        with self._wakeup:
            if self._busy or self._waiting or self._closing or not self._writer.is_local:
                self._enqueue(group)
                return
            self._busy = True
        attempted = self._attempt_all([group])
        with self._wakeup:
            if attempted is None:
                self._busy = False
            self._attempted = attempted
            self._wakeup.notify()

    def run(self, closure: Callable[[Transaction], T]) -> T:
        """:meth:`submit`, and wait for the result."""
        return self.submit(closure).result()

    def close(self) -> None:
        """Finish what waits, refuse what comes, and let the connection go."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        self._thread.join()

    def _enqueue(self, group: _Group) -> None:
        if self._closing:
            raise UnavailableError(
                "the broker is shutting down", remedy="try again when it is back"
            )
        self._waiting.append(group)
        self._wakeup.notify()

    def _loop(self) -> None:
        while True:
            groups: list[_Group] = []
            with self._wakeup:
                while self._attempted is None and (
                    self._busy or not (self._waiting or self._closing)
                ):
                    self._wakeup.wait()
                attempted, self._attempted = self._attempted, None
                if attempted is None:
                    groups = self._next()
                    self._busy = bool(groups)
            if attempted is None and not groups:
                self._writer.discard()
                return
            if attempted is None:
                groups = [group for group in groups if group.begin()]
                attempted = self._attempt_all(groups) if groups else None
            if attempted is not None:
                self._commit(*attempted)
            else:
                self._free()

    def _next(self) -> list[_Group]:
        """As many groups as share a commit."""
        groups: list[_Group] = []
        room = self._max_batch
        while self._waiting and (not groups or len(self._waiting[0].closures) <= room):
            groups.append(self._waiting.popleft())
            room -= len(groups[-1].closures)
        return groups

    def _free(self) -> None:
        with self._wakeup:
            self._busy = False
            self._wakeup.notify()

    def _attempt_all(self, groups: list[_Group]) -> _Attempted | None:
        """Run everything up to the commit; None: it failed, which has been answered."""
        try:
            try:
                outcomes = self._transact(groups, alone=False)
            except CollisionError:
                self._writer.rollback()
                outcomes = self._transact(groups, alone=True)
        except BaseException as error:
            self._fail(groups, error)
            return None
        else:
            return groups, outcomes

    def _transact(self, groups: list[_Group], *, alone: bool) -> list[Outcome]:
        self._writer.begin()
        outcomes = []
        for group in groups:
            for closure in group.closures:
                transaction, session = self._writer.transaction(alone=alone)
                outcomes.append(self._attempt(transaction, session, closure))
        self._writer.flush()
        return outcomes

    def _commit(self, groups: list[_Group], outcomes: list[Outcome]) -> None:
        try:
            self._writer.commit()
        except BaseException as error:
            self._fail(groups, error)
            self._free()
            return
        self._free()
        start = 0
        for group in groups:
            end = start + len(group.closures)
            group.answer(outcomes[start:end])
            start = end

    def _fail(self, groups: list[_Group], error: BaseException) -> None:
        self._writer.rollback()
        for group in groups:
            group.answer([Outcome(None, error)] * len(group.closures))

    def _attempt(self, transaction: Transaction, session: Session, closure: _Closure) -> Outcome:
        try:
            result = closure(transaction)
            if session.failed is not None:  # it swallowed the loss of the database
                raise session.failed
            if session.unclear:
                raise CollisionError
        except BaseException as error:
            if session.failed is not None:
                raise session.failed from None
            if session.unclear:
                raise CollisionError from error
            self._writer.undo(session)
            return Outcome(None, error)
        else:
            return Outcome(result, None)
        finally:
            session.close()
