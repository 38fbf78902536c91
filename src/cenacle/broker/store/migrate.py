"""Bring a store's tables to this version, in one transaction, before anything else is done."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from cenacle.errors import InputError

__all__ = ["VERSION_TABLE", "migrate"]

VERSION_TABLE: Final = "cenacle_version"
APPLICATION_ID: Final = 0x43454E41  # "CENA" in the header of a SQLite file
MIGRATION_LOCK: Final = 0x43454E41_4D494752  # "CENAMIGR"
_FOLDER: Final = Path(__file__).parent / "migrations"
_one_at_a_time: Final = threading.Lock()  # alembic keeps its environment in module globals


def migrate(connection: sa.Connection, folder: Path = _FOLDER) -> None:
    """Apply the migrations that are missing; all of them, or none.

    Args:
        connection: in autocommit mode; the transaction is begun and ended here.
        folder: where the migrations are.

    Raises:
        InputError: the store is another program's, or of a newer version of this one.
    """
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with _one_at_a_time:
        sqlite = connection.dialect.name == "sqlite"
        # Outside SQLAlchemy's own begin: its SQLite driver would leave DDL out of it.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if sqlite else "BEGIN")
        try:
            if sqlite:
                _claim_file(connection)
            else:
                connection.execute(
                    sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK}
                )
            script = ScriptDirectory.from_config(config)
            _refuse_newer(connection, script)
            command.upgrade(config, "head")
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise


def _refuse_newer(connection: sa.Connection, script: ScriptDirectory) -> None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    known = {revision.revision for revision in script.walk_revisions()}
    unknown = sorted(set(context.get_current_heads()) - known)
    if unknown:
        raise InputError(
            "the broker's store was made by a newer version of Cenacle",
            found=f"store version {', '.join(unknown)}",
            expected=f"at most {script.get_current_head()}",
            remedy="start it with that version or a later one; nothing was changed",
        )


def _claim_file(connection: sa.Connection) -> None:
    mark = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
    tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
    if mark != APPLICATION_ID and (mark or tables):
        raise InputError(
            "a file is not a broker's store",
            found="a SQLite database of another program",
            expected="a store made by Cenacle, or a new file",
            remedy="give another path; nothing was changed",
        )
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
