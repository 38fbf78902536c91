"""The newest state of each contract, which outlives its runs: number and digest, no more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_DIGEST = sa.String(71)


def upgrade() -> None:
    op.create_table(
        "states",
        sa.Column("contract", _DIGEST, sa.ForeignKey("contracts.digest"), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("previous", _DIGEST, nullable=True),
        sa.Column("told_at", sa.String(20), nullable=False),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    raise NotImplementedError("a store is never migrated to an older version")
