"""The store: opened once by a broker, read by many threads, written by its committer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlalchemy as sa

from cenacle.broker.store.committer import Committer
from cenacle.broker.store.connect import FileLock, make_engine, parse_url, prepare_file
from cenacle.broker.store.migrate import migrate
from cenacle.broker.store.reads import ReadTransaction
from cenacle.broker.store.session import Dialect, Session
from cenacle.broker.store.writer import Writer, unwrap
from cenacle.broker.store.writes import Transaction
from cenacle.errors import UnavailableError

__all__ = ["Store"]

T = TypeVar("T")


class Store:
    """Made by :meth:`open`; a context manager. Safe for use by many threads."""

    def __init__(self, url: sa.URL, lock: FileLock | None) -> None:
        self._lock = lock
        self._readers = make_engine(url, read_only=True)
        self._writers = make_engine(url, read_only=False)
        self._dialect = Dialect(self._readers)
        self.url = url.render_as_string(hide_password=True)
        try:
            with self._translated(), self._writers.connect() as connection:
                migrate(connection)
            with self.read() as tx:
                tx.check_log()
        except BaseException:
            self._dispose()
            raise
        self.committer = Committer(Writer(self._writers, self._dialect))

    @classmethod
    def open(cls, target: str | os.PathLike[str]) -> Self:
        """Open or create a store and bring its tables to this version.

        Args:
            target: ``postgresql://user@host/database``, ``sqlite:///path``, or a path.

        Raises:
            ConflictError: another broker has this SQLite file open.
            InputError: not a store, made by a newer version, or readable by others.
            ProofError: the end of its log was damaged or altered.
            UnavailableError: the database cannot be reached.
        """
        url = parse_url(target)
        if url.drivername != "sqlite":
            return cls(url, None)
        path = Path(str(url.database))
        lock = FileLock(path)
        try:
            prepare_file(path)
            return cls(url, lock)
        except BaseException:
            lock.release()
            raise

    @contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """A consistent, read-only snapshot of what is committed; many at once.

        Raises:
            UnavailableError: the database cannot be reached.
        """
        connection, cursor = self._begin_read()
        session = Session(self._dialect, cursor)
        try:
            yield ReadTransaction(session)
        finally:
            session.close()
            try:
                cursor.execute("ROLLBACK")
                cursor.close()
            except self._dialect.dbapi.Error:
                connection.invalidate()
            connection.close()

    def submit(self, closure: Callable[[Transaction], T]) -> Future[T]:
        """See :meth:`Committer.submit`."""
        return self.committer.submit(closure)

    def run(self, closure: Callable[[Transaction], T]) -> T:
        """Run one closure and wait until it is durable (or raise what it raised)."""
        return self.committer.run(closure)

    def close(self) -> None:
        """Finish what waits, then let everything go. Safe to call twice."""
        self.committer.close()
        self._dispose()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _dispose(self) -> None:
        self._readers.dispose()
        self._writers.dispose()

    def _begin_read(self) -> tuple[Any, Any]:
        begin = (
            "BEGIN"
            if self._dialect.is_sqlite
            else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        )
        with self._translated():
            for attempt in (1, 2):
                connection = self._readers.raw_connection()
                try:
                    cursor = connection.cursor()
                    cursor.execute(begin)
                except self._dialect.dbapi.OperationalError:
                    # The server restarted since this connection was used last.
                    connection.invalidate()
                    with suppress(self._dialect.dbapi.Error):
                        connection.close()
                    if attempt == 2:
                        raise
                    self._readers.dispose()
                else:
                    return connection, cursor
        raise AssertionError  # pragma: no cover

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            found = self._dialect.translate(unwrap(error))
            if found is error:
                raise
            if isinstance(found, UnavailableError):
                found = UnavailableError(
                    "a broker's store cannot be opened",
                    found=found.found,
                    expected=f"a database at {self.url}",
                    remedy=found.remedy,
                )
            raise found from None
