"""Which manifests speak of the same data, so that a privacy budget covers all of them.

An owner's manifests of one container belong together, and so do those that replace each other.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_DIGEST = sa.String(71)


def upgrade() -> None:
    table = op.create_table(
        "lineages",
        sa.Column("asset", _DIGEST, sa.ForeignKey("assets.digest"), primary_key=True),
        sa.Column("lineage", _DIGEST, nullable=False),
        sa.Column("container", _DIGEST, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("lineages_by_lineage", "lineages", ["lineage"])
    op.create_index("lineages_by_container", "lineages", ["container"])
    rows = op.get_bind().execute(
        sa.text("SELECT digest, owner, envelope, replaced_by FROM assets ORDER BY digest")
    )
    found = _lineages([tuple(row) for row in rows])
    if found:
        op.bulk_insert(table, found)


def _lineages(rows: list[tuple[Any, ...]]) -> list[dict[str, str]]:
    lineage = {row[0]: row[0] for row in rows}

    def root(asset: str) -> str:
        while lineage[asset] != asset:
            asset = lineage[asset]
        return asset

    containers: dict[str, str] = {}
    first: dict[tuple[str, str], str] = {}
    for digest, owner, envelope, _ in rows:
        containers[digest] = _container(envelope) or digest
        one = first.setdefault((owner, containers[digest]), digest)
        lineage[root(digest)] = root(one)
    for digest, _, _, replaced_by in rows:
        if replaced_by in lineage:
            lineage[root(digest)] = root(replaced_by)
    return [
        {"asset": row[0], "lineage": root(row[0]), "container": containers[row[0]]} for row in rows
    ]


def _container(envelope: str) -> str | None:
    """The container's digest that a manifest names; it was checked when it was deposited."""
    try:
        manifest = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
        return str(manifest["container"]["digest"])
    except (KeyError, ValueError, TypeError):
        return None


def downgrade() -> None:
    raise NotImplementedError("a store is never migrated to an older version")
