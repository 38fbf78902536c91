"""Runs that have to prove themselves again while they are open, and those that failed to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_RUN = sa.String(71)
_TIME = sa.String(20)


def upgrade() -> None:
    op.create_table(
        "watches",
        sa.Column("run", _RUN, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("interval_s", sa.BigInteger, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("hpke_key", sa.LargeBinary, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("rounds", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("watches_by_due", "watches", ["due_at"])
    op.create_table(
        "revocations",
        sa.Column("run", _RUN, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("revoked_at", _TIME, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    raise NotImplementedError("a store is never migrated to an older version")
