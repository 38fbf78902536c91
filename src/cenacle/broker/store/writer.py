"""The one connection that writes: transactions, savepoints, and what a lost commit means."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

import sqlalchemy as sa

from cenacle.broker.merkle import Frontier
from cenacle.broker.store.logbook import Logbook, Mark
from cenacle.broker.store.reads import ReadTransaction
from cenacle.broker.store.session import Dialect, Memo, Session
from cenacle.broker.store.totals import Totals
from cenacle.broker.store.waiting import Waiting
from cenacle.broker.store.writes import Transaction
from cenacle.errors import UnavailableError

__all__ = ["StoredNodes", "Writer", "unwrap"]

WRITER_LOCK: Final = 0x43454E41_57524954  # "CENAWRIT": one writing transaction in all processes
_OUTCOME_SECONDS: Final = 5.0


class Writer:
    """Used by one thread. Reconnects when the next transaction begins after a failure."""

    def __init__(self, engine: sa.Engine, dialect: Dialect) -> None:
        self._engine = engine
        self._dialect = dialect
        self._connection: Any = None
        self._cursor: Any = None
        self._frontier: Frontier | None = None
        self._logbook: Logbook | None = None
        self._mark: Mark | None = None
        self._memo = Memo()
        self._totals = Totals()
        self._waiting = Waiting()
        self._saved = False
        self._waiting_mark = self._waiting.mark()
        self._xid: str | None = None
        self.is_local: Final = dialect.is_sqlite

    def begin(self) -> None:
        """Start a transaction that no other writer can overlap.

        Raises:
            UnavailableError: the database cannot be reached, or another writer is stuck.
        """
        self._logbook, self._memo, self._totals = None, Memo(), Totals()
        self._waiting, self._saved = Waiting(), False
        for attempt in (1, 2):
            fresh = self._cursor is None
            try:
                self._start()
            except Exception as error:
                self.discard()
                translated = self._dialect.translate(unwrap(error))
                # A pooled connection may have died while it was idle: once more on a new one.
                if attempt == 2 or fresh or not isinstance(translated, UnavailableError):
                    raise translated from None
            else:
                return

    def _start(self) -> None:
        if self._cursor is None:
            self._connection = self._engine.raw_connection()
            self._cursor = self._connection.cursor()
        if self._dialect.is_sqlite:
            self._cursor.execute("BEGIN IMMEDIATE")
            return
        cursor: Any = self._cursor
        cursor.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        cursor.execute(
            "SELECT pg_advisory_xact_lock(%(key)s), pg_current_xact_id()::text",
            {"key": WRITER_LOCK},
        )
        self._xid = cursor.fetchone()[1]

    def transaction(self, *, alone: bool) -> tuple[Transaction, Session]:
        """A new view of the running transaction, for one closure, which can be taken back.

        Args:
            alone: its inserts do not wait to be made together with those of other closures.
        """
        self._mark = self._logbook.mark() if self._logbook is not None else None
        self._waiting_mark = self._waiting.mark()
        self._totals.mark()
        session = Session(self._dialect, self._cursor, self._memo, self._save)
        if alone:
            session.touch()
        return Transaction(session, self._waiting, self._totals, self._load), session

    def _save(self) -> None:
        """A savepoint in front of everything that the running closure changed."""
        session = Session(self._dialect, self._cursor)
        own = self._waiting.beyond(self._waiting_mark)
        self._waiting.flush(session)
        if self._saved and self._dialect.is_sqlite:
            session.run("RELEASE closure")
        if self._saved and not self._dialect.is_sqlite:
            session.run_script("RELEASE SAVEPOINT closure; SAVEPOINT closure")
        else:
            session.run("SAVEPOINT closure")
        self._saved = True
        own.flush(session)

    def _load(self, tx: ReadTransaction) -> Logbook:
        if self._logbook is None:
            frontier = self._frontier
            # Other processes append to a PostgreSQL log too; a SQLite file is ours alone.
            if frontier is None or not (
                self._dialect.is_sqlite or ReadTransaction.log_size(tx) == frontier.size
            ):
                size = ReadTransaction.log_size(tx)
                frontier = Frontier.load(size, StoredNodes(tx))
            self._logbook = Logbook(frontier)
        return self._logbook

    def undo(self, session: Session) -> None:
        """Take back what the closure did, in the database and in the log."""
        if session.untouched:
            self._waiting.beyond(self._waiting_mark)
        else:
            Session(self._dialect, self._cursor).run("ROLLBACK TO SAVEPOINT closure")
            self._memo.forget(None)
        self._totals.undo()
        if self._logbook is not None:
            if self._mark is None:
                self._logbook = None  # it was loaded by the closure that failed
            else:
                self._logbook.reset(self._mark)

    def flush(self) -> None:
        """Write what waits into the transaction, which is about to commit.

        Raises:
            CollisionError: rows that were to be inserted together do not fit.
        """
        session = Session(self._dialect, self._cursor)
        self._waiting.flush(session)
        self._totals.flush(session)
        if self._logbook is not None:
            self._logbook.fill(Transaction(session, self._waiting, self._totals, self._load))
            self._logbook.flush(session)

    def commit(self) -> None:
        """Commit durably what was flushed.

        Raises:
            UnavailableError: nothing of the transaction is visible; or, when the database was
                lost during the commit and stays lost, its outcome is not known (and it says so).
        """
        try:
            self._cursor.execute("COMMIT")
        except Exception as error:
            translated = self._dialect.translate(error)
            if self._dialect.is_sqlite or not isinstance(translated, UnavailableError):
                raise translated from None
            self._resolve(translated)
        if self._logbook is not None:
            self._frontier = self._logbook.frontier
        self._logbook = None

    def _resolve(self, lost: UnavailableError) -> None:
        """Ask PostgreSQL whether the transaction whose COMMIT was cut off had committed."""
        xid = self._xid
        self.discard()
        deadline = time.monotonic() + _OUTCOME_SECONDS
        while time.monotonic() < deadline:
            try:
                connection = self._engine.raw_connection()
            except Exception as error:
                if not isinstance(self._dialect.translate(unwrap(error)), UnavailableError):
                    raise
                time.sleep(0.1)
                continue
            try:
                cursor: Any = connection.cursor()
                cursor.execute("SELECT pg_xact_status(%(xid)s::text::xid8)", {"xid": xid})
                status = cursor.fetchone()[0]
            except self._dialect.dbapi.Error:
                status = None
                connection.invalidate()
            finally:
                connection.close()
            if status == "committed":
                return
            if status == "aborted":
                raise lost
            time.sleep(0.1)
        raise UnavailableError(
            "the broker lost its database while committing",
            found=lost.found,
            expected="an answer from the database",
            remedy="it is not known whether the change happened; look before trying again",
        )

    def rollback(self) -> None:
        """End a transaction that failed. The connection is kept only if that works."""
        self._frontier = self._logbook = None
        if self._cursor is None:
            return
        try:
            if self._dialect.is_sqlite:
                # SQLite may have rolled back by itself, e.g. on a full disk.
                if self._connection.driver_connection.in_transaction:
                    self._cursor.execute("ROLLBACK")
            else:
                self._cursor.execute("ROLLBACK")
        except self._dialect.dbapi.Error:
            self.discard()

    def discard(self) -> None:
        """Drop the connection; what was not committed is gone."""
        self._frontier = self._logbook = None
        connection, self._connection, self._cursor = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(self._dialect.dbapi.Error):
                connection.invalidate()
            with contextlib.suppress(self._dialect.dbapi.Error):
                connection.close()


class StoredNodes:
    """Node hashes from the database alone, past what a transaction has in memory."""

    def __init__(self, tx: ReadTransaction) -> None:
        self._tx = tx

    def get(self, level: int, index: int) -> bytes:
        return ReadTransaction.get(self._tx, level, index)


def unwrap(error: Exception) -> Exception:
    """SQLAlchemy's wrapper around a driver's error, taken off."""
    if isinstance(error, sa.exc.DBAPIError) and isinstance(error.orig, Exception):
        return error.orig
    if isinstance(error, sa.exc.TimeoutError):
        return UnavailableError(
            "the broker's store is overloaded",
            found="every connection in use",
            expected="a free one",
            remedy="try again",
        )
    return error
