"""One database transaction on a raw DBAPI connection: SQL in, rows out, errors in words.

SQLAlchemy finds the driver, parses URLs and pools connections; statements go straight to the
driver, compiled once per dialect, because the committer runs thousands a second.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import sqlalchemy as sa

from cenacle.errors import ConflictError, InputError, UnavailableError

__all__ = ["Dialect", "Memo", "Session"]

_REMEMBERED: Final = frozenset({"assets", "contracts", "meta", "parties", "signatures", "vetoes"})
_DOSSIERS: Final = frozenset({"contracts", "signatures", "vetoes"})
_SELECT: Final = re.compile(r"(?!.* UNION )SELECT [^()]* FROM (\w+)(?: WHERE [^()]*)?")
_UNSEEN: Final = re.compile(r"\b(?:nonces|runs|reservations)\b")
_CHANGE: Final = re.compile(r"(?:INSERT INTO|UPDATE|DELETE FROM) (\w+)\b")


class Dialect:
    """What differs between SQLite and PostgreSQL, and the statements compiled for one of them."""

    def __init__(self, engine: sa.Engine) -> None:
        self.is_sqlite: Final = engine.dialect.name == "sqlite"
        self._sqlalchemy = engine.dialect
        self.dbapi: Final[Any] = engine.dialect.loaded_dbapi
        self._compiled: dict[str, str] = {}
        self._tables: dict[str, tuple[str | None, str | None]] = {}
        self._harmless: dict[str, bool] = {}

    def compile(self, statement: str) -> str:
        """``:name`` parameters in the driver's own form."""
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = str(sa.text(statement).compile(dialect=self._sqlalchemy))
            self._compiled[statement] = compiled
        return compiled

    def tables(self, statement: str) -> tuple[str | None, str | None]:
        """The one table that a plain SELECT reads, and the one that a statement changes."""
        known = self._tables.get(statement)
        if known is None:
            read, changed = _SELECT.fullmatch(statement), _CHANGE.match(statement)
            known = read and read[1], changed and changed[1]
            self._tables[statement] = known
        return known

    def is_harmless(self, statement: str) -> bool:
        """Whether it changes nothing and reads no table whose rows may wait to be inserted."""
        known = self._harmless.get(statement)
        if known is None:
            known = statement.startswith("SELECT ") and _UNSEEN.search(statement) is None
            self._harmless[statement] = known
        return known

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


class Memo:
    """Rows read before in the same writing transaction, by table.

    The closures of a batch look up the same parties, assets and contracts. Under the writer's
    lock nobody else changes them, and our own changes to a table forget what was read of it.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[Any, list[tuple[Any, ...]]]] = {}

    def find(self, table: str, key: Any) -> list[tuple[Any, ...]] | None:
        return self._rows.get(table, {}).get(key)

    def keep(self, table: str, key: Any, rows: list[tuple[Any, ...]]) -> None:
        self._rows.setdefault(table, {})[key] = rows

    def forget(self, table: str | None) -> None:
        """One table's rows; None: all, since it is not known what changed."""
        if table is None:
            self._rows.clear()
        else:
            self._rows.pop(table, None)
            if table in _DOSSIERS:
                self._rows.pop("dossiers", None)


class Session:
    """Statements within one transaction. Not for use by two threads at once.

    Args:
        before: called once, before the first statement that is not harmless; until then the
            session is ``untouched``.

    Attributes:
        failed: the loss of the database, which no closure may hide.
        unclear: something failed before there was a savepoint to go back to, so nothing but the
            whole transaction can be taken back.
    """

    __slots__ = ("_before", "_cursor", "_dialect", "_memo", "_open", "failed", "unclear")

    def __init__(
        self,
        dialect: Dialect,
        cursor: Any,
        memo: Memo | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._dialect = dialect
        self._cursor = cursor
        self._memo = memo
        self._before = before
        self._open = True
        self.failed: UnavailableError | None = None
        self.unclear = False

    @property
    def untouched(self) -> bool:
        return self._before is not None

    def touch(self) -> None:
        """What a statement that is not harmless does first."""
        before, self._before = self._before, None
        if before is None:
            return
        try:
            before()
        except UnavailableError as error:
            self.failed = error
            raise
        except BaseException:
            self.unclear = True
            raise

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
            elif self._before is not None:
                self.unclear = True
            if translated is error:
                raise
            raise translated from None

    def run(self, statement: str, **parameters: Any) -> int:
        """Execute; returns the number of rows changed."""
        self._execute(statement, parameters)
        count: int = self._cursor.rowcount
        return count

    def run_many(self, statement: str, rows: Sequence[dict[str, Any]]) -> int:
        """Execute once for each row of parameters; returns how many rows changed in all."""
        if not rows:
            return 0
        self.touch()
        if self._memo is not None:
            self._memo.forget(self._dialect.tables(statement)[1])
        self._do(self._cursor.executemany, self._dialect.compile(statement), rows)
        count: int = self._cursor.rowcount
        return count

    def run_script(self, statements: str) -> None:
        """Several statements without parameters in one round trip (PostgreSQL)."""
        # psycopg would prepare what it sees often, and two statements cannot be prepared as one.
        self._do(functools.partial(self._cursor.execute, prepare=False), statements)

    def one(self, statement: str, **parameters: Any) -> tuple[Any, ...] | None:
        """The first row, or None."""
        rows = self.all(statement, **parameters)
        return rows[0] if rows else None

    def all(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        table = None if self._memo is None else self._dialect.tables(statement)[0]
        if self._memo is None or table not in _REMEMBERED:
            return self._fetch(statement, parameters)
        key = (statement, *parameters.values())
        rows = self._memo.find(table, key)
        if rows is None or not self._open:  # an ended transaction answers nothing
            rows = self._fetch(statement, parameters)
            self._memo.keep(table, key, rows)
        return rows

    def known(self, table: str, key: Any) -> list[tuple[Any, ...]] | None:
        """What :meth:`learn` was told in this transaction, unless a change made it forgotten."""
        return None if self._memo is None or not self._open else self._memo.find(table, key)

    def learn(self, table: str, key: Any, rows: list[tuple[Any, ...]]) -> None:
        """Keep rows of a table, or of ``dossiers``, for later in a writing transaction."""
        if self._memo is not None:
            self._memo.keep(table, key, rows)

    def _fetch(self, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        self._execute(statement, parameters)
        rows: list[tuple[Any, ...]] = self._do(self._cursor.fetchall)
        return rows

    def _execute(self, statement: str, parameters: dict[str, Any]) -> None:
        if self._before is not None and not self._dialect.is_harmless(statement):
            self.touch()
        if self._memo is not None and not statement.startswith("SELECT "):
            self._memo.forget(self._dialect.tables(statement)[1])
        self._do(self._cursor.execute, self._dialect.compile(statement), parameters)

    def close(self) -> None:
        """Refuse further use, so that a closure cannot keep its transaction."""
        self._open = False
        self._before = None
