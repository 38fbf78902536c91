"""Opening databases: SQLite files that only one broker may hold, PostgreSQL by URL."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from cenacle.errors import ConflictError, InputError, UnavailableError
from cenacle.sealing.disk import disk_errors

__all__ = ["FileLock", "make_engine", "parse_url", "prepare_file"]

_BUSY_MS: Final = 10_000
_POOL: Final = 8
_POOL_OVERFLOW: Final = 56


def parse_url(target: str | os.PathLike[str]) -> sa.URL:
    """A store's URL: ``sqlite:///broker.db``, ``postgresql://...``, or a path to a SQLite file.

    Raises:
        InputError: it is no URL, of another database, or names no file.
    """
    if isinstance(target, os.PathLike) or "://" not in target:
        return sa.URL.create("sqlite", database=str(Path(target).absolute()))
    try:
        url = sa.make_url(target)
    except (sa.exc.ArgumentError, ValueError):
        raise InputError(
            "a store's URL cannot be read",
            expected="sqlite:///path or postgresql://user@host/database",
        ) from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite":
            if not url.database or url.database == ":memory:" or url.query:
                raise InputError(
                    "a SQLite store needs a plain file",
                    found=url.render_as_string(hide_password=True),
                    expected="sqlite:///path",
                )
            return sa.URL.create("sqlite", database=str(Path(url.database).absolute()))
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
    raise InputError(
        "a store's database is not supported",
        found=url.drivername,
        expected="sqlite or postgresql",
    )


class FileLock:
    """Held while a broker has a SQLite store open, so that there is never a second one."""

    def __init__(self, database: Path) -> None:
        path = database.with_name(database.name + ".lock")
        with disk_errors(f"lock {path}"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise ConflictError(
                    "a broker has this store open already",
                    found=str(database),
                    expected="one broker for one SQLite file",
                    remedy="stop the other broker, or use PostgreSQL for several",
                ) from None

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def prepare_file(database: Path) -> None:
    """Create a SQLite file that its owner alone can read, or check that it is so.

    Raises:
        InputError: others can read it, it is somebody else's, or no ordinary file.
    """
    with disk_errors(f"open {database}"):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(database, flags, 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("a store is not an ordinary file", found=str(database))
            if status.st_mode & 0o077 or status.st_uid != os.geteuid():
                raise InputError(
                    "a store can be read or changed by others",
                    found=f"{database} with mode {status.st_mode & 0o777:04o}",
                    expected="mode 0600 and the broker's own user",
                    remedy=f"run: chmod 600 {database}",
                )
            folder = os.open(database.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            os.close(fd)


def make_engine(url: sa.URL, *, read_only: bool) -> sa.Engine:
    """An engine in autocommit mode: transactions are begun and ended by explicit statements.

    Raises:
        UnavailableError: the PostgreSQL driver is not installed.
    """
    options: dict[str, Any] = {
        "isolation_level": "AUTOCOMMIT",
        "poolclass": sa.QueuePool,
        "pool_size": _POOL if read_only else 1,
        "max_overflow": _POOL_OVERFLOW if read_only else 1,
        "hide_parameters": True,
    }
    try:
        if url.drivername == "sqlite":
            engine = sa.create_engine(url, paramstyle="named", **options)
        else:
            engine = sa.create_engine(url, connect_args={"connect_timeout": 10}, **options)
    except ModuleNotFoundError:
        raise UnavailableError(
            "the PostgreSQL driver is not installed",
            expected="psycopg 3",
            remedy="run: pip install 'cenacle[postgres]'",
        ) from None
    setup = _set_up_sqlite if url.drivername == "sqlite" else _set_up_postgres

    def connected(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        try:
            setup(cursor, read_only)
        finally:
            cursor.close()

    sa.event.listen(engine, "connect", connected)
    return engine


def _set_up_sqlite(cursor: Any, read_only: bool) -> None:
    if sqlite3.sqlite_version_info < (3, 35):
        raise UnavailableError(
            "Python's SQLite is too old",
            found=sqlite3.sqlite_version,
            expected="3.35 or later",
            remedy="use a newer Python, or PostgreSQL",
        )
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    mode = cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise UnavailableError(
            "a SQLite store cannot use its write-ahead log here",
            found=f"journal mode {mode}",
            expected="a local file system with shared memory",
            remedy="move the store to a local disk",
        )
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA trusted_schema = OFF")
    cursor.execute(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")


def _set_up_postgres(cursor: Any, read_only: bool) -> None:
    settings = dict(
        cursor.execute(
            "SELECT name, setting FROM pg_settings WHERE name IN ('fsync',"
            " 'synchronous_commit', 'server_encoding', 'server_version_num')"
        ).fetchall()
    )
    if settings["fsync"] != "on" or settings["server_encoding"] != "UTF8":
        raise InputError(
            "a PostgreSQL server cannot keep a broker's store",
            found=f"fsync {settings['fsync']}, encoding {settings['server_encoding']}",
            expected="fsync on, encoding UTF8",
            remedy="a key may leave only after its reservation is durable; change the server",
        )
    if int(settings["server_version_num"]) < 130_000:
        raise InputError(
            "a PostgreSQL server is too old",
            found=settings["server_version_num"],
            expected="version 13 or later",
        )
    if settings["synchronous_commit"] == "off":
        cursor.execute("SET synchronous_commit = on")
    cursor.execute("SET lock_timeout = '30s'")
    cursor.execute("SET idle_in_transaction_session_timeout = '60s'")
    if read_only:
        cursor.execute("SET default_transaction_read_only = on")
