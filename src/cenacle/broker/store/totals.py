"""The writer's memory of what assets were charged in the running transaction.

Many closures of one batch charge the same few assets. Their totals are read once, changed here,
and written once before the commit; a closure that fails is undone by :meth:`undo`.
"""

from __future__ import annotations

from cenacle.broker.ledger import LedgerView
from cenacle.broker.store.session import Session

__all__ = ["Totals"]


class Totals:
    """Ledger views by asset over one transaction."""

    def __init__(self) -> None:
        self._views: dict[str, LedgerView] = {}
        self._before: dict[str, LedgerView | None] = {}  # as of the last savepoint
        self._changed: set[str] = set()

    def find(self, asset: str) -> LedgerView | None:
        """What is known of an asset; None: ask the database."""
        return self._views.get(asset)

    def set(self, asset: str, view: LedgerView, *, changed: bool) -> None:
        """Remember what was read, or what is to be written."""
        self._before.setdefault(asset, self._views.get(asset))
        self._views[asset] = view
        if changed:
            self._changed.add(asset)

    def mark(self) -> None:
        """From here on, :meth:`undo` goes back to this point."""
        self._before.clear()

    def undo(self) -> None:
        """Forget the changes since :meth:`mark`."""
        for asset, view in self._before.items():
            if view is None:
                self._views.pop(asset, None)
                self._changed.discard(asset)
            else:
                self._views[asset] = view  # written again if it was changed before; harmless
        self._before.clear()

    def flush(self, session: Session) -> None:
        """Write what changed into the transaction, which is about to commit."""
        rows = [
            {
                "asset": asset,
                "uses_reserved": view.uses_reserved,
                "uses_settled": view.uses_settled,
                "epsilon_reserved": view.epsilon_reserved_units,
                "epsilon_settled": view.epsilon_settled_units,
                "delta_reserved": view.delta_reserved_units,
                "delta_settled": view.delta_settled_units,
                "unbounded": view.unbounded,
            }
            for asset in sorted(self._changed)
            for view in [self._views[asset]]
        ]
        if rows:
            session.run_many(
                "UPDATE asset_totals SET uses_reserved = :uses_reserved,"
                " uses_settled = :uses_settled, epsilon_reserved = :epsilon_reserved,"
                " epsilon_settled = :epsilon_settled, delta_reserved = :delta_reserved,"
                " delta_settled = :delta_settled, unbounded = :unbounded WHERE asset = :asset",
                rows,
            )
