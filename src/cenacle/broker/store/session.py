"""One database transaction on a raw DBAPI connection: SQL in, rows out, errors in words.

SQLAlchemy finds the driver, parses URLs and pools connections; statements go straight to the
driver, compiled once per dialect, because the committer runs thousands a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import sqlalchemy as sa

from cenacle.errors import ConflictError, InputError, UnavailableError

__all__ = ["Dialect", "Session"]


class Dialect:
    """What differs between SQLite and PostgreSQL, and the statements compiled for one of them."""

    def __init__(self, engine: sa.Engine) -> None:
        self.is_sqlite: Final = engine.dialect.name == "sqlite"
        self._sqlalchemy = engine.dialect
        self.dbapi: Final[Any] = engine.dialect.loaded_dbapi
        self._compiled: dict[str, str] = {}

    def compile(self, statement: str) -> str:
        """``:name`` parameters in the driver's own form."""
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = str(sa.text(statement).compile(dialect=self._sqlalchemy))
            self._compiled[statement] = compiled
        return compiled

    def translate(self, error: Exception) -> Exception:
        """The driver's error as one of ours, which names no value; a fault of ours stays itself."""
        if isinstance(error, self.dbapi.IntegrityError):
            return ConflictError(
                "the store refuses a change",
                found="something that exists already, or refers to what does not exist",
                expected="a new entry about known parties, assets, contracts and runs",
            )
        if isinstance(error, self.dbapi.DataError | OverflowError | UnicodeEncodeError):
            return InputError(
                "a value does not fit the store",
                found="a text, number or time out of range",
                expected="Unicode text without NUL, and 64-bit numbers",
            )
        if isinstance(error, self.dbapi.Error) and not isinstance(
            error, self.dbapi.ProgrammingError
        ):
            return UnavailableError(
                "the broker's store cannot be used",
                found=_first_line(error),
                expected="a reachable database with room on its disk",
                remedy="nothing was changed; check the disk and the database, then try again",
            )
        return error


def _first_line(error: Exception) -> str:
    """The driver's words: for these errors the server's state, never a bound value."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Session:
    """Statements within one transaction. Not for use by two threads at once."""

    __slots__ = ("_cursor", "_dialect", "_open", "failed")

    def __init__(self, dialect: Dialect, cursor: Any) -> None:
        self._dialect = dialect
        self._cursor = cursor
        self._open = True
        self.failed: UnavailableError | None = None

    def _do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if not self._open:
            raise RuntimeError("this transaction has ended")
        if self.failed is not None:
            raise self.failed
        try:
            return call(*arguments)
        except Exception as error:
            translated = self._dialect.translate(error)
            if isinstance(translated, UnavailableError):
                self.failed = translated
            if translated is error:
                raise
            raise translated from None

    def run(self, statement: str, **parameters: Any) -> int:
        """Execute; returns the number of rows changed."""
        self._do(self._cursor.execute, self._dialect.compile(statement), parameters)
        count: int = self._cursor.rowcount
        return count

    def run_many(self, statement: str, rows: Sequence[dict[str, Any]]) -> None:
        """Execute once for each row of parameters."""
        self._do(self._cursor.executemany, self._dialect.compile(statement), rows)

    def run_script(self, statements: str) -> None:
        """Several statements without parameters in one round trip (PostgreSQL)."""
        # psycopg would prepare what it sees often, and two statements cannot be prepared as one.
        self._do(functools.partial(self._cursor.execute, prepare=False), statements)

    def one(self, statement: str, **parameters: Any) -> tuple[Any, ...] | None:
        """The first row, or None."""
        self._do(self._cursor.execute, self._dialect.compile(statement), parameters)
        row: tuple[Any, ...] | None = self._do(self._cursor.fetchone)
        return row

    def all(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        self._do(self._cursor.execute, self._dialect.compile(statement), parameters)
        rows: list[tuple[Any, ...]] = self._do(self._cursor.fetchall)
        return rows

    def close(self) -> None:
        """Refuse further use, so that a closure cannot keep its transaction."""
        self._open = False
