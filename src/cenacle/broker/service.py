"""The broker: who may deposit, propose, sign and see; see ``release`` for the keys."""

from __future__ import annotations

from typing import Self

from cenacle.attestation.policies import check_policies
from cenacle.attestation.registry import Verifier, VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.broker.entries import AssetEntry, ContractEntry, SignatureEntry, VetoEntry
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.losses import events_charged, until_accounted
from cenacle.broker.membership import Membership, now
from cenacle.broker.messages import (
    AssetDeposit,
    AssetUpload,
    BudgetView,
    ContractView,
    ReviewView,
    SignatureUpload,
)
from cenacle.broker.records import (
    MAX_LINEAGE,
    ContractRecord,
    load_asset,
    load_contract,
    load_document,
    load_lineage,
    load_party,
)
from cenacle.broker.rules import Facts, decide, superseded_by
from cenacle.broker.store import AssetRow, ReadTransaction, Store, Transaction
from cenacle.documents.asset import Asset
from cenacle.documents.base import unb64
from cenacle.documents.contract import Contract, Veto
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import ConflictError, InputError, RefusedError, SignatureError

__all__ = ["Broker", "now"]


class Broker(Membership):
    """One broker over one store. Make it with :meth:`production` or :meth:`development`.

    The two differ in which verifiers exist. No argument, setting or request turns one into
    the other.
    """

    @classmethod
    def production(cls, store: Store, keys: BrokerKeys, *hardware: Verifier) -> Self:
        """A broker that accepts evidence of real hardware only."""
        return cls(store, keys, VerifierSet.of_production(*hardware))

    @classmethod
    def development(cls, store: Store, keys: BrokerKeys, *hardware: Verifier) -> Self:
        """A broker that also accepts simulated evidence: for demonstrations and tests."""
        return cls(store, keys, VerifierSet.of_development(SimulatedVerifier(), *hardware))

    # ------------------------------------------------------------------ assets

    def deposit(self, upload: AssetUpload) -> Asset:
        """Take an asset's manifest and its key, wrapped to this broker for this manifest."""
        manifest, deposited = (
            Envelope.from_fields(upload.manifest),
            Envelope.from_fields(upload.deposit),
        )
        asset = manifest.peek(Asset)
        with self.store.read() as tx:
            owner = load_party(tx, asset.owner)
        asset = manifest.open(Asset, owner.verify_key)
        deposit = deposited.open(AssetDeposit, owner.verify_key)
        for what, found, expected in (
            ("owner's document", asset.owner_digest, owner.digest),
            ("broker", asset.broker, self.digest),
            ("broker", deposit.broker, self.digest),
            ("manifest", deposit.asset, asset.digest),
        ):
            if found != expected:
                raise InputError(
                    f"an asset names another {what}",
                    found=found,
                    expected=expected,
                    remedy="seal the asset again for this broker",
                )
        wrapped = unb64(deposit.wrapped_key)
        # Opening it now shows the owner a wrong key at once, not at the first job.
        key = self.keys.hpke_key.open(wrapped, *asset.wrapping_context())
        try:
            if len(key) != 32:
                raise InputError(
                    "an asset key has the wrong length", found=len(key), expected="32 bytes"
                )
        finally:
            key.wipe()

        def change(tx: Transaction) -> None:
            tx.add_asset(
                asset.digest,
                asset.name,
                asset.owner,
                manifest.to_json(),
                wrapped,
                replaces=asset.replaces,
                container=asset.container.digest,
            )
            entry = AssetEntry(
                time=self.time(), asset=asset.digest, owner=asset.owner, replaces=asset.replaces
            )
            self.record(tx, entry)

        self.write(change)
        return asset

    def budget(self, request: Envelope) -> BudgetView:
        """What jobs have spent of an asset's privacy budget; told to its owner alone."""
        asked = self.party_request(request, "budget")

        def look() -> BudgetView:
            with self.store.read() as tx:
                asset, _ = load_asset(tx, asked.subject)
                if asset.owner != asked.party:
                    raise RefusedError(
                        "only the owner of an asset asks what was spent of its budget",
                        found=asked.party,
                        expected=asset.owner,
                    )
                return self.losses.budget(asset, tx.charged_events(asset.digest))

        self.write(lambda tx: self.once(tx, asked))
        return until_accounted(self.losses, look)

    # ------------------------------------------------------------------ contracts

    def propose(self, envelope: Envelope) -> Contract:
        """Take a contract, signed by the party that proposes it.

        Raises:
            CenacleError: it is not well made, names what is not here, or is there already.
        """
        contract = envelope.peek(Contract)
        if contract.broker != self.digest:
            raise InputError(
                "a contract names another broker",
                found=contract.broker,
                expected=self.digest,
                remedy="propose it to the broker that it names",
            )
        check_policies(contract.enclave.policy or {})  # or no enclave could ever meet it
        with self.store.read() as tx:
            parties = self._pinned_parties(tx, contract)
            for ref in contract.assets.values():
                load_asset(tx, ref.digest)
            replaced = None if contract.replaces is None else load_contract(tx, contract.replaces)
            depth = 0 if replaced is None else 1 + len(load_lineage(tx, replaced).ancestors)
        by_key = {party.verify_key.keyid: party for party in parties.values()}
        signers = [by_key.get(keyid) for keyid in envelope.signatures]
        proposer = signers[0] if len(signers) == 1 else None
        if proposer is None:
            raise SignatureError(
                "a proposal carries the signature of its proposer alone",
                found=f"{len(signers)} signatures, by {[k[:16] for k in envelope.signatures]}",
                expected="one, by a party of the contract",
                remedy="propose with `cenacle propose`; the others sign with `cenacle sign`",
            )
        envelope.verify_signature(proposer.verify_key)
        if replaced is not None:
            self._may_replace(proposer, replaced, depth)

        def change(tx: Transaction) -> None:
            at = self.time()
            tx.add_contract(
                contract.digest,
                contract.name,
                Envelope(envelope.payload, envelope.payload_type, {}).to_json(),
                proposer.name,
                at,
                replaces=contract.replaces,
            )
            entry = ContractEntry(
                time=at,
                contract=contract.digest,
                proposer=proposer.name,
                replaces=contract.replaces,
            )
            self.record(tx, entry)

        self.write(change)
        return contract

    def _may_replace(self, proposer: Party, replaced: ContractRecord, depth: int) -> None:
        # Each contract has one successor: a stranger must not be able to take the place.
        if replaced.contract.parties.get(proposer.name) != proposer.digest:
            raise RefusedError(
                "only a party of a contract proposes what replaces it",
                found=proposer.name,
                expected=" or ".join(sorted(replaced.contract.parties)),
                remedy="draft a contract that replaces none",
            )
        if depth > MAX_LINEAGE:
            raise InputError(
                "a contract was replaced too often",
                found=f"{depth} contracts before this one",
                expected=f"at most {MAX_LINEAGE}",
                remedy="draft a contract that replaces none, and veto the old one",
            )

    def _pinned_parties(self, tx: ReadTransaction, contract: Contract) -> dict[str, Party]:
        parties = {name: load_party(tx, name) for name in contract.parties}
        for name, party in parties.items():
            if party.digest != contract.parties[name]:
                raise InputError(
                    f"the contract means another {name} than is registered here",
                    found=contract.parties[name],
                    expected=party.digest,
                    remedy=f"draft the contract again with {name}'s current document",
                )
        if len({party.verify_key.keyid for party in parties.values()}) != len(parties):
            raise InputError(
                "two parties of the contract have the same key",
                found=", ".join(sorted(parties)),
                expected="a key for each party, so that a signature tells whose it is",
                remedy="register one of them again, under another name, with a key of its own",
            )
        return parties

    def add_signature(self, digest: str, upload: SignatureUpload) -> str:
        """Take a party's signature of a contract; returns the party's name."""
        with self.store.read() as tx:
            record = load_contract(tx, digest)
            parties = self._pinned_parties(tx, record.contract)
        party = next((p for p in parties.values() if p.verify_key.keyid == upload.keyid), None)
        if party is None:
            raise SignatureError(
                "a stranger signed the contract",
                found=f"key {upload.keyid[:16]}",
                expected=f"a key of {', '.join(sorted(parties))}",
            )
        signature = unb64(upload.signature)
        record.envelope.with_signature(upload.keyid, signature).verify_signature(party.verify_key)

        def change(tx: Transaction) -> None:
            row = tx.contract(digest)
            if row is not None and row.replaced_by is not None:
                record = load_contract(tx, digest)
                newer = superseded_by(
                    record.contract, record.signed | {party.name}, load_lineage(tx, record)
                )
                if newer is not None:
                    raise ConflictError(
                        "the contract was replaced by one that took effect",
                        found=newer.digest,
                        expected="the newest contract",
                        remedy="review and sign the newer one",
                    )
            at = self.time()
            tx.add_signature(digest, party.name, upload.keyid, signature, at)
            self.record(tx, SignatureEntry(time=at, contract=digest, party=party.name))

        self.write(change)
        return party.name

    def veto(self, envelope: Envelope) -> Veto:
        """Take a party's signed veto of a contract."""
        veto = envelope.peek(Veto)
        with self.store.read() as tx:
            record = load_contract(tx, veto.contract)
            parties = self._pinned_parties(tx, record.contract)
        if veto.party not in record.contract.vetoes:
            raise RefusedError(
                "the contract gives this party no veto",
                found=veto.party,
                expected=", ".join(record.contract.vetoes) or "nobody",
                remedy="withhold the signature instead",
            )
        envelope.verify_signature(parties[veto.party].verify_key)

        def change(tx: Transaction) -> None:
            tx.add_veto(veto.contract, veto.party, envelope.to_json())
            entry = VetoEntry(time=self.time(), contract=veto.contract, party=veto.party)
            self.record(tx, entry)

        self.write(change)
        return veto

    def contract(self, digest: str) -> ContractView:
        """A contract with its parties, manifests, signatures and vetoes.

        Not a secret: the log, which anyone may read, names contracts by digest.
        """
        with self.store.read() as tx:
            record = load_contract(tx, digest)
            manifests = {
                alias: tx.asset(ref.digest) for alias, ref in record.contract.assets.items()
            }
            parties = [tx.party(name) for name in record.contract.parties]
            return ContractView(
                contract=record.envelope.to_fields(),
                parties=tuple(Envelope.from_json(p.envelope).to_fields() for p in parties if p),
                assets={
                    alias: Envelope.from_json(row.envelope).to_fields()
                    for alias, row in manifests.items()
                    if row
                },
                vetoes=tuple(
                    Envelope.from_json(row.envelope).to_fields() for row in tx.vetoes(digest)
                ),
                replaced_by=record.replaced_by,
            )

    def contracts_of(self, request: Envelope) -> list[tuple[str, str]]:
        """Digest and name of every contract that the asking party is in, oldest first."""
        asked = self.party_request(request, "list-contracts")
        self.write(lambda tx: self.once(tx, asked))
        with self.store.read() as tx:
            found = [load_document(row) for row in tx.contracts()]
        return [(c.digest, c.name) for c in found if asked.party in c.parties]

    def review(self, digest: str) -> ReviewView:
        """Every clause as it stands now; what the enclave will show is pending."""

        def look() -> ReviewView:
            with self.store.read() as tx:
                return ReviewView(clauses=decide(self.facts(tx, digest, review=True)))

        return until_accounted(self.losses, look)

    def facts(
        self, tx: ReadTransaction, digest: str, *, review: bool = False, excluded_run: str = ""
    ) -> Facts:
        """What the store knows about a contract now; the run being resumed is not counted."""
        return self.gather(tx, digest, review=review, excluded_run=excluded_run)[0]

    def gather(
        self, tx: ReadTransaction, digest: str, *, review: bool = False, excluded_run: str = ""
    ) -> tuple[Facts, dict[str, AssetRow]]:
        """:meth:`facts`, and each asset's row, whose wrapped key they are about."""
        record = load_contract(tx, digest)
        assets, replaced, uses = {}, {}, {}
        rows: dict[str, AssetRow] = {}
        for alias, ref in record.contract.assets.items():
            assets[alias], row = load_asset(tx, ref.digest)
            rows[alias] = row
            if row.replaced_by is not None:
                replaced[alias] = row.replaced_by
            used = tx.ledger(ref.digest)
            mine = tx.reservation(excluded_run, ref.digest) if excluded_run else None
            uses[alias] = used.uses_reserved + used.uses_settled - (mine.uses if mine else 0)
        promised, losses = self.losses.compose(
            record.contract,
            assets,
            lambda asset: events_charged(tx.charged_events(asset, without=excluded_run)),
        )
        facts = Facts(
            broker=self.digest,
            contract=record.contract,
            assets=assets,
            replaced=replaced,
            signed=record.signed,
            vetoes=record.vetoes,
            uses=uses,
            lineage=load_lineage(tx, record),
            promised=promised,
            losses=losses,
            now=self.clock(),
            review=review,
        )
        return facts, rows
