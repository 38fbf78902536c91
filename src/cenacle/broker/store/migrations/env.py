"""Alembic's entry point: migrate on the connection that the store opened, in its transaction."""

from __future__ import annotations

from alembic import context

from cenacle.broker.store.migrate import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
