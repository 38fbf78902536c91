"""Changes to parties, invitations, assets, contracts and nonces.

Every method is one small step that either happens or raises. ``ConflictError`` means that
somebody else came first; nothing was changed then. Who may do a thing is not decided here
(:mod:`cenacle.broker.rules`), only that it is not done twice, lost or undone.
"""

from __future__ import annotations

from cenacle.broker.store.reads import ReadTransaction
from cenacle.broker.store.session import Session
from cenacle.broker.store.waiting import INSERT_NONCE, Waiting
from cenacle.errors import ConflictError, EvidenceError, InputError, RefusedError

__all__ = ["RegistryWrites"]


class RegistryWrites(ReadTransaction):
    """The part of a :class:`~cenacle.broker.store.Transaction` about who and what exists."""

    __slots__ = ("_waiting",)

    def __init__(self, session: Session, waiting: Waiting) -> None:
        super().__init__(session)
        self._waiting = waiting

    def set_meta(self, key: str, value: str) -> None:
        """Create or overwrite one of the broker's own settings."""
        self._session.run(
            "INSERT INTO meta (key, value) VALUES (:key, :value)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            key=key,
            value=value,
        )

    def add_meta(self, key: str, value: str) -> None:
        """Create a setting that must not exist yet (ConflictError if it does)."""
        changed = self._session.run(
            "INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT DO NOTHING",
            key=key,
            value=value,
        )
        if not changed:
            raise ConflictError("this was done already", found=key)

    # Parties and invitations

    def add_party(self, name: str, digest: str, envelope: str, registered_at: str) -> None:
        """Register a party; ConflictError if the name or the document is taken."""
        changed = self._session.run(
            "INSERT INTO parties (name, digest, envelope, registered_at)"
            " VALUES (:name, :digest, :envelope, :registered_at) ON CONFLICT DO NOTHING",
            name=name,
            digest=digest,
            envelope=envelope,
            registered_at=registered_at,
        )
        if not changed:
            raise ConflictError(
                "a party is registered already", found=name, remedy="choose another name"
            )

    def add_invitation(self, token_hash: str, created_at: str, expires_at: str) -> None:
        """Keep the hash of a new one-time token."""
        changed = self._session.run(
            "INSERT INTO invitations (token_hash, created_at, expires_at)"
            " VALUES (:token_hash, :created_at, :expires_at) ON CONFLICT DO NOTHING",
            token_hash=token_hash,
            created_at=created_at,
            expires_at=expires_at,
        )
        if not changed:
            raise ConflictError("an invitation exists already")

    def use_invitation(self, token_hash: str, party: str, at: str) -> None:
        """Spend a one-time token.

        Raises:
            RefusedError: it is unknown or expired.
            ConflictError: it was used before.
        """
        changed = self._session.run(
            "UPDATE invitations SET used_by = :party"
            " WHERE token_hash = :token_hash AND used_by IS NULL AND expires_at >= :moment",
            token_hash=token_hash,
            party=party,
            moment=at,
        )
        if changed:
            return
        known = self.invitation(token_hash)
        if known is not None and known.used_by is not None:
            raise ConflictError(
                "an invitation was used already",
                found=f"used by {known.used_by}",
                expected="a token used once",
                remedy="ask the broker's owner for a new invitation",
            )
        raise RefusedError(
            "an invitation is not accepted",
            found="an unknown token" if known is None else f"expired at {known.expires_at}",
            expected="a token that this broker gave out and that has not expired",
            remedy="ask the broker's owner for a new invitation",
        )

    # Assets

    def add_asset(
        self,
        digest: str,
        name: str,
        owner: str,
        envelope: str,
        wrapped_key: bytes,
        *,
        replaces: str | None = None,
        container: str | None = None,
    ) -> None:
        """Register an asset with its wrapped key, optionally as the successor of another.

        Args:
            container: digest of the ciphertext. What an owner's manifests of one container, and
                those that replace each other, say of privacy is counted together.

        Raises:
            ConflictError: it is registered already, its owner is unknown, or the asset that it
                replaces is unknown, of another owner, or replaced already.
        """
        changed = self._session.run(
            "INSERT INTO assets (digest, name, owner, envelope, wrapped_key)"
            " VALUES (:digest, :name, :owner, :envelope, :wrapped_key) ON CONFLICT DO NOTHING",
            digest=digest,
            name=name,
            owner=owner,
            envelope=envelope,
            wrapped_key=wrapped_key,
        )
        if not changed:
            raise ConflictError("an asset is registered already", found=digest)
        self._session.run(
            "INSERT INTO asset_totals (asset, uses_reserved, uses_settled, epsilon_reserved,"
            " epsilon_settled, delta_reserved, delta_settled, unbounded)"
            " VALUES (:asset, 0, 0, 0, 0, 0, 0, 0)",
            asset=digest,
        )
        self._join_lineage(digest, owner, replaces, container or digest)
        if replaces is None:
            return
        changed = self._session.run(
            "UPDATE assets SET replaced_by = :digest WHERE digest = :replaces"
            " AND owner = :owner AND replaced_by IS NULL AND digest <> :digest",
            digest=digest,
            replaces=replaces,
            owner=owner,
        )
        if not changed:
            raise ConflictError(
                "an asset cannot be replaced",
                found=f"{replaces}: unknown, of another owner, or replaced already",
                expected="the newest version of an asset of the same owner",
            )

    def _join_lineage(self, digest: str, owner: str, replaces: str | None, container: str) -> None:
        """Put an asset among those of the same data; it may show that two of them are one."""
        # Of the same owner only: nobody spends a stranger's budget by naming his container.
        rows = self._session.all(
            "SELECT DISTINCT lineages.lineage FROM lineages"
            " JOIN assets ON assets.digest = lineages.asset"
            " WHERE assets.owner = :owner"
            " AND (lineages.container = :container OR lineages.asset = :replaces)"
            " ORDER BY lineages.lineage",
            owner=owner,
            container=container,
            replaces=replaces or digest,
        )
        known = [row[0] for row in rows] or [digest]
        for other in known[1:]:
            self._session.run(
                "UPDATE lineages SET lineage = :kept WHERE lineage = :other",
                kept=known[0],
                other=other,
            )
        self._session.run(
            "INSERT INTO lineages (asset, lineage, container)"
            " VALUES (:asset, :lineage, :container)",
            asset=digest,
            lineage=known[0],
            container=container,
        )

    def set_wrapped_key(self, digest: str, wrapped_key: bytes) -> None:
        """Exchange an asset's wrapped key (the same key, wrapped anew)."""
        if not self._session.run(
            "UPDATE assets SET wrapped_key = :wrapped_key WHERE digest = :digest",
            digest=digest,
            wrapped_key=wrapped_key,
        ):
            raise InputError("an asset is not registered", found=digest)

    # Contracts, signatures, vetoes

    def add_contract(
        self,
        digest: str,
        name: str,
        envelope: str,
        proposer: str,
        created_at: str,
        *,
        replaces: str | None = None,
    ) -> None:
        """Keep a proposal, optionally as the one successor of another contract.

        Raises:
            ConflictError: it exists already, its predecessor has another successor already
                (no lost update), or the predecessor or proposer is unknown.
        """
        if replaces is not None:
            before = self.contract(replaces)
            if before is None:
                raise ConflictError("a contract replaces an unknown one", found=replaces)
            if before.replaced_by is not None:
                raise ConflictError(
                    "a contract was replaced already",
                    found=f"{replaces} was replaced by {before.replaced_by}",
                    expected="one successor of each contract",
                    remedy="review the newer contract and replace that one",
                )
        changed = self._session.run(
            "INSERT INTO contracts (digest, name, envelope, proposer, created_at, replaces)"
            " VALUES (:digest, :name, :envelope, :proposer, :created_at, :replaces)"
            " ON CONFLICT DO NOTHING",
            digest=digest,
            name=name,
            envelope=envelope,
            proposer=proposer,
            created_at=created_at,
            replaces=replaces,
        )
        if not changed:
            raise ConflictError("a contract was proposed already", found=digest)
        if replaces is not None:
            self._session.run(
                "UPDATE contracts SET replaced_by = :digest WHERE digest = :replaces",
                digest=digest,
                replaces=replaces,
            )

    def add_signature(
        self, contract: str, party: str, keyid: str, signature: bytes, signed_at: str
    ) -> None:
        """Keep a party's signature; ConflictError if it signed before, or either is unknown."""
        changed = self._session.run(
            "INSERT INTO signatures (contract, party, keyid, signature, signed_at)"
            " VALUES (:contract, :party, :keyid, :signature, :signed_at) ON CONFLICT DO NOTHING",
            contract=contract,
            party=party,
            keyid=keyid,
            signature=signature,
            signed_at=signed_at,
        )
        if not changed:
            raise ConflictError("a party signed this contract already", found=party)

    def add_veto(self, contract: str, party: str, envelope: str) -> None:
        """Keep a party's veto; ConflictError if it vetoed before, or either is unknown."""
        changed = self._session.run(
            "INSERT INTO vetoes (contract, party, envelope)"
            " VALUES (:contract, :party, :envelope) ON CONFLICT DO NOTHING",
            contract=contract,
            party=party,
            envelope=envelope,
        )
        if not changed:
            raise ConflictError("a party vetoed this contract already", found=party)

    # Nonces

    def consume_nonce(self, nonce: bytes, used_at: str) -> None:
        """Spend a nonce; EvidenceError if it was spent before."""
        if self._session.untouched:
            new = self._waiting.nonce(nonce, used_at)
        else:
            new = bool(self._session.run(INSERT_NONCE, nonce=nonce, used_at=used_at))
        if not new:
            raise EvidenceError(
                "evidence was shown before",
                found="a nonce that was used already",
                expected="a fresh nonce from this broker",
                remedy="ask for a new nonce and attest again",
            )

    def forget_nonces(self, before: str) -> int:
        """Drop nonces spent before a time at which all given out then have expired."""
        return self._session.run("DELETE FROM nonces WHERE used_at < :moment", moment=before)
