"""What can be asked of the store: the read half of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from cenacle.broker import merkle
from cenacle.broker.ledger import LedgerView
from cenacle.broker.store.rows import (
    AssetRow,
    ContractRow,
    InvitationRow,
    LogEntry,
    PartyRow,
    Reservation,
    RunRow,
    SignatureRow,
    StateRow,
    VetoRow,
    WatchRow,
)
from cenacle.broker.store.session import Session
from cenacle.errors import InputError, ProofError

__all__ = ["ReadTransaction"]

_TOGETHER: Final = 64


@cache
def _dossiers(count: int) -> str:
    """One statement for ``count`` contracts: rows of each, its document first."""
    asked = ", ".join(f":contract{number}" for number in range(count))
    statement = (
        "SELECT 0 AS part, digest, name, envelope, proposer, created_at, replaces, replaced_by,"
        " NULL AS signature FROM contracts WHERE digest IN (#) UNION ALL"
        " SELECT 1, contract, party, keyid, signed_at, NULL, NULL, NULL, signature"
        " FROM signatures WHERE contract IN (#) UNION ALL"
        " SELECT 2, contract, party, envelope, NULL, NULL, NULL, NULL, NULL"
        " FROM vetoes WHERE contract IN (#) ORDER BY part, name"
    )
    return statement.replace("#", asked)


class ReadTransaction:
    """A consistent view of the store. Lookups of one row return None when there is none."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def meta(self, key: str) -> str | None:
        row = self._session.one("SELECT value FROM meta WHERE key = :key", key=key)
        return None if row is None else row[0]

    # Parties and invitations

    def party(self, name: str) -> PartyRow | None:
        row = self._session.one(
            "SELECT name, digest, envelope, registered_at FROM parties WHERE name = :name",
            name=name,
        )
        return None if row is None else PartyRow(*row)

    def parties(self) -> list[PartyRow]:
        """All parties, by name."""
        rows = self._session.all(
            "SELECT name, digest, envelope, registered_at FROM parties ORDER BY name"
        )
        return [PartyRow(*row) for row in rows]

    def invitation(self, token_hash: str) -> InvitationRow | None:
        row = self._session.one(
            "SELECT token_hash, created_at, expires_at, used_by FROM invitations"
            " WHERE token_hash = :token_hash",
            token_hash=token_hash,
        )
        return None if row is None else InvitationRow(*row)

    # Assets

    def asset(self, digest: str) -> AssetRow | None:
        row = self._session.one(
            "SELECT digest, name, owner, envelope, wrapped_key, replaced_by FROM assets"
            " WHERE digest = :digest",
            digest=digest,
        )
        return None if row is None else AssetRow(*row)

    def assets(self) -> list[AssetRow]:
        """All assets, by owner and name."""
        rows = self._session.all(
            "SELECT digest, name, owner, envelope, wrapped_key, replaced_by FROM assets"
            " ORDER BY owner, name, digest"
        )
        return [AssetRow(*row) for row in rows]

    def assets_of(self, owner: str) -> list[AssetRow]:
        """One party's assets, by name."""
        rows = self._session.all(
            "SELECT digest, name, owner, envelope, wrapped_key, replaced_by FROM assets"
            " WHERE owner = :owner ORDER BY name, digest",
            owner=owner,
        )
        return [AssetRow(*row) for row in rows]

    # Contracts, signatures, vetoes

    def contract(self, digest: str) -> ContractRow | None:
        row = self._session.one(
            "SELECT digest, name, envelope, proposer, created_at, replaces, replaced_by"
            " FROM contracts WHERE digest = :digest",
            digest=digest,
        )
        return None if row is None else ContractRow(*row)

    def contracts(self) -> list[ContractRow]:
        """All contracts, oldest first."""
        rows = self._session.all(
            "SELECT digest, name, envelope, proposer, created_at, replaces, replaced_by"
            " FROM contracts ORDER BY created_at, digest"
        )
        return [ContractRow(*row) for row in rows]

    def signatures(self, contract: str) -> list[SignatureRow]:
        """A contract's signatures, by party."""
        rows = self._session.all(
            "SELECT contract, party, keyid, signature, signed_at FROM signatures"
            " WHERE contract = :contract ORDER BY party",
            contract=contract,
        )
        return [SignatureRow(*row) for row in rows]

    def vetoes(self, contract: str) -> list[VetoRow]:
        """A contract's vetoes, by party."""
        rows = self._session.all(
            "SELECT contract, party, envelope FROM vetoes"
            " WHERE contract = :contract ORDER BY party",
            contract=contract,
        )
        return [VetoRow(*row) for row in rows]

    def dossier(self, digest: str) -> tuple[ContractRow, list[SignatureRow], list[VetoRow]] | None:
        """A contract with its signatures and vetoes, both by party, in one round trip."""
        rows = self._session.known("dossiers", digest)
        if rows is None:
            rows = self._session.all(_dossiers(1), contract0=digest)
        if not rows or rows[0][0] != 0:
            return None
        contract = ContractRow(*rows[0][1:8])
        signatures = [
            SignatureRow(digest, party, keyid, bytes(signature), signed_at)
            for part, _, party, keyid, signed_at, _, _, _, signature in rows
            if part == 1
        ]
        vetoes = [VetoRow(digest, row[2], row[3]) for row in rows if row[0] == 2]
        return contract, signatures, vetoes

    def look_up(self, digests: Sequence[str]) -> None:
        """Read the dossiers of several contracts at once, for closures that follow."""
        asked = list(dict.fromkeys(digests))
        found: dict[str, list[tuple[Any, ...]]] = {digest: [] for digest in asked}
        for start in range(0, len(asked), _TOGETHER):
            some = asked[start : start + _TOGETHER]
            # Few different statements: the last digest is repeated up to a power of two.
            size = 1 << (len(some) - 1).bit_length()
            some += some[-1:] * (size - len(some))
            parameters = {f"contract{number}": digest for number, digest in enumerate(some)}
            for row in self._session.all(_dossiers(size), **parameters):
                found[row[1]].append(row)
        for digest, rows in found.items():
            self._session.learn("dossiers", digest, rows)

    # Runs and reservations

    def run(self, run: str) -> RunRow | None:
        row = self._session.one(
            "SELECT id, contract, state, created_at, releases, enclave_key, job_secret_wrapped,"
            " checkpoint_version, checkpoint_digest, settled_at, receipt_digest"
            " FROM runs WHERE id = :run",
            run=run,
        )
        return None if row is None else RunRow(*row)

    def open_run(self, contract: str) -> RunRow | None:
        """The contract's one open run; there is never a second."""
        row = self._session.one(
            "SELECT id, contract, state, created_at, releases, enclave_key, job_secret_wrapped,"
            " checkpoint_version, checkpoint_digest, settled_at, receipt_digest"
            " FROM runs WHERE open_contract = :contract",
            contract=contract,
        )
        return None if row is None else RunRow(*row)

    def runs(self, contract: str) -> list[RunRow]:
        """A contract's runs, oldest first."""
        rows = self._session.all(
            "SELECT id, contract, state, created_at, releases, enclave_key, job_secret_wrapped,"
            " checkpoint_version, checkpoint_digest, settled_at, receipt_digest"
            " FROM runs WHERE contract = :contract ORDER BY created_at, id",
            contract=contract,
        )
        return [RunRow(*row) for row in rows]

    def watch(self, run: str) -> WatchRow | None:
        """What an open run has to prove again; None: nothing."""
        row = self._session.one(
            "SELECT run, interval_s, due_at, hpke_key, facts, rounds FROM watches WHERE run = :run",
            run=run,
        )
        return None if row is None else WatchRow(*row)

    def overdue(self, now: str) -> list[str]:
        """Runs that had to prove themselves before ``now``, the longest overdue first."""
        rows = self._session.all(
            "SELECT run FROM watches WHERE due_at < :now ORDER BY due_at, run LIMIT 100", now=now
        )
        return [row[0] for row in rows]

    def revocation(self, run: str) -> str | None:
        """Why a run was revoked; None: it was not."""
        row = self._session.one("SELECT reason FROM revocations WHERE run = :run", run=run)
        return None if row is None else str(row[0])

    def state(self, contract: str) -> StateRow | None:
        """The newest state of a contract, whichever run recorded it."""
        row = self._session.one(
            "SELECT contract, number, digest, previous, told_at FROM states"
            " WHERE contract = :contract",
            contract=contract,
        )
        return None if row is None else StateRow(*row)

    def reservation(self, run: str, asset: str) -> Reservation | None:
        row = self._session.one(
            "SELECT run, asset, uses, epsilon, delta, event, state FROM reservations"
            " WHERE run = :run AND asset = :asset",
            run=run,
            asset=asset,
        )
        return None if row is None else Reservation(*row)

    def reservations_of_run(self, run: str) -> list[Reservation]:
        rows = self._session.all(
            "SELECT run, asset, uses, epsilon, delta, event, state FROM reservations"
            " WHERE run = :run ORDER BY asset",
            run=run,
        )
        return [Reservation(*row) for row in rows]

    def reservations_of_asset(self, asset: str) -> list[Reservation]:
        rows = self._session.all(
            "SELECT run, asset, uses, epsilon, delta, event, state FROM reservations"
            " WHERE asset = :asset ORDER BY run",
            asset=asset,
        )
        return [Reservation(*row) for row in rows]

    def charged_events(self, asset: str, *, without: str = "") -> list[tuple[str, bool, int]]:
        """What jobs were charged for on an asset's data, over all manifests of that data.

        Args:
            without: a run that is left out.

        Returns:
            Each different event with whether it is bounded, and how many runs were charged it.
        """
        rows = self._session.all(
            "SELECT event, epsilon, count(*) FROM reservations"
            " WHERE run <> :without AND asset IN (SELECT mine.asset FROM lineages AS mine"
            " JOIN lineages AS given ON mine.lineage = given.lineage WHERE given.asset = :asset)"
            " GROUP BY event, epsilon ORDER BY event, epsilon",
            asset=asset,
            without=without,
        )
        return [(event, epsilon is not None, count) for event, epsilon, count in rows]

    def ledger(self, asset: str) -> LedgerView:
        """An asset's charges in one read: running totals, equal to the sum of its reservations.

        Raises:
            InputError: there is no such asset.
        """
        row = self._session.one(
            "SELECT uses_reserved, uses_settled, epsilon_reserved, epsilon_settled,"
            " delta_reserved, delta_settled, unbounded FROM asset_totals WHERE asset = :asset",
            asset=asset,
        )
        if row is None:
            raise InputError("an asset is not registered", found=asset)
        return LedgerView(*row)

    # The transparency log

    def log_size(self) -> int:
        """How many entries the log has."""
        row = self._session.one("SELECT max(leaf_index) FROM log_entries")
        return 0 if row is None or row[0] is None else row[0] + 1

    def get(self, level: int, index: int) -> bytes:
        """A node of the log's tree (:class:`cenacle.broker.merkle.NodeReader`)."""
        if level == 0:
            row = self._session.one(
                "SELECT leaf_hash FROM log_entries WHERE leaf_index = :node", node=index
            )
        else:
            row = self._session.one(
                "SELECT hash FROM log_nodes WHERE level = :level AND node_index = :node",
                level=level,
                node=index,
            )
        if row is None:
            raise ProofError(
                "the log's tree has a hole",
                found=f"no node {index} on level {level}",
                expected="every node of the perfect subtrees",
                remedy="restore the store from a backup; do not sign heads of this one",
            )
        return bytes(row[0])

    def check_log(self) -> None:
        """Check the log's right edge: its newest entry and the peaks of its tree.

        Raises:
            ProofError: the store was damaged or altered.
        """
        size = self.log_size()
        newest = self.entry(size - 1) if size else None
        if newest is not None and newest.leaf_hash != self.get(0, newest.index):
            raise ProofError(
                "the log's newest entry is not what was logged",
                found=f"entry {newest.index} with another hash",
                expected=self.get(0, newest.index).hex(),
                remedy="restore the store from a backup; do not sign heads of this one",
            )
        merkle.root(size, self)

    def log_root(self, size: int | None = None) -> bytes:
        """The root of the tree at ``size`` entries (default: all)."""
        return merkle.root(self._known(size), self)

    def inclusion_path(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """The path from entry ``index`` to the root at ``size`` entries (default: all)."""
        return merkle.inclusion_proof(index, self._known(size), self)

    def consistency_path(self, first: int, second: int | None = None) -> tuple[bytes, ...]:
        """That the tree of ``second`` entries (default: all) extends the one of ``first``."""
        return merkle.consistency_proof(first, self._known(second), self)

    def _known(self, size: int | None) -> int:
        newest = self.log_size()
        if size is None:
            return newest
        if not 0 <= size <= newest:
            raise InputError(
                "the log never had that size", found=size, expected=f"0 to {newest} entries"
            )
        return size

    def entry(self, index: int) -> LogEntry | None:
        found = self.entries(index, index + 1)
        return found[0] if found else None

    def entries(self, start: int, end: int) -> list[LogEntry]:
        """The entries of ``[start, end)`` that exist, in order."""
        rows = self._session.all(
            "SELECT leaf_index, kind, body FROM log_entries"
            " WHERE leaf_index >= :first AND leaf_index < :beyond ORDER BY leaf_index",
            first=start,
            beyond=end,
        )
        return [LogEntry(index, kind, bytes(body)) for index, kind, body in rows]
