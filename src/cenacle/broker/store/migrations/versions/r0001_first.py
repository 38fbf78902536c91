"""The first tables.

Digests are ``sha256:`` and 64 hexadecimal digits, times RFC 3339 text, envelopes JSON text.
Amounts in ``asset_totals`` are whole units (:mod:`cenacle.broker.ledger`).
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_DIGEST = sa.String(71)
_NAME = sa.String(63)
_TIME = sa.String(20)


def _column(name: str, kind: Any, *rest: Any, null: bool = False, key: bool = False) -> Any:
    return sa.Column(name, kind, *rest, nullable=null, primary_key=key, autoincrement=False)


def _table(name: str, *items: Any) -> None:
    op.create_table(name, *items, sqlite_with_rowid=False)


def upgrade() -> None:
    _table(
        "meta",
        _column("key", sa.String(63), key=True),
        _column("value", sa.Text),
    )
    _table(
        "parties",
        _column("name", _NAME, key=True),
        _column("digest", _DIGEST),
        _column("envelope", sa.Text),
        _column("registered_at", _TIME),
        sa.UniqueConstraint("digest"),
    )
    _table(
        "invitations",
        _column("token_hash", sa.String(71), key=True),
        _column("created_at", _TIME),
        _column("expires_at", _TIME),
        _column("used_by", _NAME, null=True),
    )
    _table(
        "assets",
        _column("digest", _DIGEST, key=True),
        _column("name", _NAME),
        _column("owner", _NAME, sa.ForeignKey("parties.name")),
        _column("envelope", sa.Text),
        _column("wrapped_key", sa.LargeBinary),
        _column("replaced_by", _DIGEST, null=True),
    )
    op.create_index("assets_by_owner", "assets", ["owner", "name"])
    _table(
        "asset_totals",
        _column("asset", _DIGEST, sa.ForeignKey("assets.digest"), key=True),
        _column("uses_reserved", sa.BigInteger),
        _column("uses_settled", sa.BigInteger),
        _column("epsilon_reserved", sa.BigInteger),
        _column("epsilon_settled", sa.BigInteger),
        _column("delta_reserved", sa.BigInteger),
        _column("delta_settled", sa.BigInteger),
        _column("unbounded", sa.BigInteger),
    )
    _table(
        "contracts",
        _column("digest", _DIGEST, key=True),
        _column("name", _NAME),
        _column("envelope", sa.Text),
        _column("proposer", _NAME, sa.ForeignKey("parties.name")),
        _column("created_at", _TIME),
        _column("replaces", _DIGEST, sa.ForeignKey("contracts.digest"), null=True),
        _column("replaced_by", _DIGEST, null=True),
        # One successor only: of two replacements of one contract, the second is refused.
        sa.UniqueConstraint("replaces"),
    )
    _table(
        "signatures",
        _column("contract", _DIGEST, sa.ForeignKey("contracts.digest"), key=True),
        _column("party", _NAME, sa.ForeignKey("parties.name"), key=True),
        _column("keyid", sa.String(71)),
        _column("signature", sa.LargeBinary),
        _column("signed_at", _TIME),
    )
    _table(
        "vetoes",
        _column("contract", _DIGEST, sa.ForeignKey("contracts.digest"), key=True),
        _column("party", _NAME, sa.ForeignKey("parties.name"), key=True),
        _column("envelope", sa.Text),
    )
    _table(
        "nonces",
        _column("nonce", sa.LargeBinary, key=True),
        _column("used_at", _TIME),
    )
    _table(
        "runs",
        _column("id", sa.String(71), key=True),
        _column("contract", _DIGEST, sa.ForeignKey("contracts.digest")),
        _column("state", sa.String(9)),
        # The contract while the run is open, else null: so a contract has one open run. A partial
        # index would say the same, but draws PostgreSQL's planner away from the primary key.
        _column("open_contract", _DIGEST, null=True),
        _column("created_at", _TIME),
        _column("releases", sa.BigInteger),
        _column("enclave_key", sa.LargeBinary, null=True),
        _column("job_secret_wrapped", sa.LargeBinary, null=True),
        _column("checkpoint_version", sa.BigInteger),
        _column("checkpoint_digest", _DIGEST, null=True),
        _column("settled_at", _TIME, null=True),
        _column("receipt_digest", _DIGEST, null=True),
        sa.UniqueConstraint("open_contract"),
        sa.CheckConstraint(
            "(state = 'open' AND open_contract IS NOT NULL AND open_contract = contract)"
            " OR (state IN ('settled', 'abandoned') AND open_contract IS NULL)",
            name="runs_state",
        ),
    )
    op.create_index("runs_by_contract", "runs", ["contract", "created_at"])
    _table(
        "reservations",
        _column("run", sa.String(71), sa.ForeignKey("runs.id"), key=True),
        _column("asset", _DIGEST, sa.ForeignKey("assets.digest"), key=True),
        _column("uses", sa.BigInteger),
        _column("epsilon", sa.Double, null=True),
        _column("delta", sa.Double, null=True),
        _column("event", sa.Text),
        _column("state", sa.String(8)),
        sa.CheckConstraint("state IN ('reserved', 'settled')", name="reservations_state"),
    )
    op.create_index("reservations_by_asset", "reservations", ["asset"])
    op.create_table(
        "log_entries",
        # On SQLite an INTEGER primary key is the row id itself: appends go to the end.
        _column("leaf_index", sa.BigInteger().with_variant(sa.Integer, "sqlite"), key=True),
        _column("kind", sa.String(63)),
        _column("body", sa.LargeBinary),
        _column("leaf_hash", sa.LargeBinary),
    )
    _table(
        "log_nodes",
        _column("level", sa.SmallInteger, key=True),
        _column("node_index", sa.BigInteger, key=True),
        _column("hash", sa.LargeBinary),
    )


def downgrade() -> None:
    raise NotImplementedError("a store is never migrated to an older version")
