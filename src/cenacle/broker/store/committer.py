"""Group commit: many closures, one durable commit, and no answer before it.

Closures run one after the other, first come first served, on a single thread. Those that wait
run in one transaction, each in its own savepoint; it is committed once, with one ``fsync``, and
only then are their futures resolved. So whoever holds a result holds something durable.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any, Final, TypeVar

from cenacle.broker.store.session import Session
from cenacle.broker.store.writer import Writer
from cenacle.broker.store.writes import Transaction
from cenacle.errors import UnavailableError

__all__ = ["Committer", "Turn"]

T = TypeVar("T")
MAX_BATCH: Final = 256
_PATIENCE: Final = 0.05
_Job = tuple[Future[Any], Callable[[Transaction], Any]]


class Turn:
    """A courtesy between the thread that serves requests and the one that writes.

    Each of SQLite's statements lets go of the interpreter and fights to get it back; two threads
    at work wake each other up more than they work. So each waits for the other to finish what
    it is at, but never long: nothing depends on having the turn.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Work while the other waits; after 50 ms of waiting, work beside the other."""
        mine = self._lock.acquire(timeout=_PATIENCE)
        try:
            yield
        finally:
            if mine:
                self._lock.release()


class Committer:
    """The store's only writer.

    Args:
        writer: its connection, used by this thread alone.
        max_batch: how many closures share a commit at most.
    """

    def __init__(self, writer: Writer, *, max_batch: int = MAX_BATCH) -> None:
        self.turn: Final = Turn()
        self._writer = writer
        self._max_batch = max_batch
        self._waiting: deque[_Job] = deque()
        self._wakeup = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="cenacle-committer", daemon=True)
        self._thread.start()

    def submit(self, closure: Callable[[Transaction], T]) -> Future[T]:
        """Run ``closure`` in a transaction; its future is resolved after the commit is durable.

        The closure must not keep its transaction, wait for another closure, or have effects
        that matter before the commit. An exception that it raises takes back its own changes
        alone and is delivered by its future, after the commit too.

        Raises (through the future):
            UnavailableError: the batch could not be committed; nothing of it is visible.
        """
        future: Future[T] = Future()
        with self._wakeup:
            if self._closing:
                raise UnavailableError(
                    "the broker is shutting down", remedy="try again when it is back"
                )
            self._waiting.append((future, closure))
            self._wakeup.notify()
        return future

    def run(self, closure: Callable[[Transaction], T]) -> T:
        """:meth:`submit`, and wait for the result."""
        return self.submit(closure).result()

    def close(self) -> None:
        """Finish what waits, refuse what comes, and let the connection go."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wakeup:
                while not self._waiting and not self._closing:
                    self._wakeup.wait()
                batch = [
                    self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))
                ]
            if not batch:
                self._writer.discard()
                return
            # A future that was cancelled while it waited is never run.
            batch = [job for job in batch if job[0].set_running_or_notify_cancel()]
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[_Job]) -> None:
        outcomes: list[tuple[Any, BaseException | None]] = []
        try:
            self._writer.begin()
            # With a database server the time goes in waiting for it: nothing to take turns at.
            with self.turn.taken() if self._writer.is_local else nullcontext():
                for _, closure in batch:
                    transaction, session = self._writer.transaction()
                    self._writer.savepoint(session, first=not outcomes)
                    outcomes.append(self._attempt(transaction, session, closure))
            self._writer.commit()
        except BaseException as error:
            self._writer.rollback()
            for future, _ in batch:
                future.set_exception(error)
            return
        for (future, _), (result, failure) in zip(batch, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _attempt(
        self, transaction: Transaction, session: Session, closure: Callable[[Transaction], Any]
    ) -> tuple[Any, BaseException | None]:
        try:
            result = closure(transaction)
            if session.failed is not None:  # it swallowed the loss of the database
                raise session.failed
        except BaseException as error:
            if session.failed is not None:
                raise session.failed from None
            self._writer.undo(session)
            return None, error
        else:
            return result, None
        finally:
            session.close()
