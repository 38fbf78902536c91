"""Nonce, evidence, decision, keys; then checkpoints and the settlement of a run.

The order is the point. Evidence is checked first, without touching the store. Then one change
in the store's single writer reads every fact, decides, consumes the nonce, charges every
asset, names the enclave and appends to the log. Only when that is durable are keys unwrapped
and sealed to the enclave. So a crash anywhere leaves either no trace and no key, or a charge
and a log entry with or without a key: never a key without them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Claims, Evidence
from cenacle.broker.entries import CheckpointEntry, ReleaseEntry, SettlementEntry
from cenacle.broker.ledger import Charge
from cenacle.broker.messages import (
    CheckpointRecord,
    PartyRequest,
    ReleaseRequest,
    ReleaseResponse,
    Settlement,
    release_context,
)
from cenacle.broker.records import load_asset
from cenacle.broker.rules import Facts, decide, require
from cenacle.broker.service import Broker
from cenacle.broker.store import ReadTransaction, RunRow, Transaction
from cenacle.crypto import HpkePublicKey, SecretBytes, VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, canonical_json, format_time, parse_time, unb64
from cenacle.documents.dsse import Envelope
from cenacle.documents.receipt import LogInclusion
from cenacle.errors import ConflictError, EvidenceError, InputError, RefusedError

__all__ = ["ReleaseDesk", "job_context"]


def job_context(contract: str, run: str) -> tuple[bytes, ...]:
    """What a run's job secret is bound to while the broker keeps it wrapped."""
    return (b"cenacle/job-secret", contract.encode(), run.encode())


@dataclass(frozen=True)
class _Committed:
    """What a durable release leaves for the steps after it."""

    row: RunRow
    inclusion: LogInclusion
    assets: Mapping[str, tuple[Asset, bytes]]


class ReleaseDesk:
    """The part of a broker that enclaves talk to."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def nonce(self, contract: str) -> bytes:
        """A nonce for one attempt to get one contract's keys."""
        with self.broker.store.read() as tx:
            if tx.contract(contract) is None:
                raise InputError("a contract is not known to this broker", found=contract)
        return self.broker.nonces.issue(contract, self.broker.clock())

    # ------------------------------------------------------------------ release

    def release(self, request: ReleaseRequest) -> ReleaseResponse:
        """Decide on an enclave's request and, if every clause is met, release the keys.

        Raises:
            RefusedError: naming every clause that failed.
            EvidenceError: the nonce was used before.
            ConflictError: another run of the contract is open.
        """
        broker = self.broker
        moment = broker.clock()
        nonce, enclave_key = unb64(request.nonce), VerifyKey(unb64(request.signing_key))
        recipient = HpkePublicKey(unb64(request.hpke_key))
        evidence = Evidence.from_fields(request.evidence)
        claims: Claims | None = None
        problem: str | None = None
        try:
            broker.nonces.check(nonce, request.contract, moment)
            bound = report_data(nonce, request.contract, recipient.raw, enclave_key.raw)
            verifier = broker.verifiers.for_kind(evidence.kind)
            claims = verifier.authenticate(evidence, bound, moment)
        except EvidenceError as error:
            problem = error.diagnostics()  # becomes a clause, beside all others that fail

        if claims is None:
            # Certain to be refused: strangers without evidence do not reach the writer.
            with broker.store.read() as tx:
                facts = broker.facts(tx, request.contract, excluded_run=request.resume or "")
            require(decide(replace(facts, evidence_error=problem, now=moment)))
        assert claims is not None  # a missing claim is a failed clause

        # Made before the change, so that the writer does no public-key work for it.
        run = request.resume or secrets.token_hex(16)
        job_secret = SecretBytes.random(32)
        view = job_secret.view()
        wrapped = broker.identity.hpke_public.seal(view, *job_context(request.contract, run))
        view.release()

        def change(tx: Transaction) -> _Committed:
            if request.resume is not None:
                self._resumable(tx, request)
            facts = broker.facts(tx, request.contract, excluded_run=request.resume or "")
            facts = replace(facts, claims=claims, now=moment)
            require(decide(facts))
            return self._commit(tx, request, facts, claims, evidence, enclave_key, run, wrapped)

        done = broker.write(change)
        row = done.row
        if request.resume is not None:
            assert row.job_secret_wrapped is not None
            job_secret.wipe()
            job_secret = broker.keys.hpke_key.open(
                row.job_secret_wrapped, *job_context(request.contract, run)
            )
        message = self._open_keys(done.assets, job_secret)
        sealed = recipient.seal(message, *release_context(request.contract, run, nonce))
        return ReleaseResponse(
            run=run,
            resumed=row.releases - 1,
            started=row.created_at,
            checkpoint_version=row.checkpoint_version,
            checkpoint_digest=row.checkpoint_digest,
            sealed_keys=b64(sealed),
            log=done.inclusion,
        )

    def _resumable(self, tx: ReadTransaction, request: ReleaseRequest) -> None:
        row = tx.run(request.resume or "")
        if row is None or row.contract != request.contract or row.state != "open":
            raise ConflictError(
                "the run cannot be resumed",
                found="no such run of this contract"
                if row is None or row.contract != request.contract
                else f"a run that is {row.state}",
                expected="an open run of this contract",
                remedy="start a new run with `cenacle run` without --resume",
            )

    def _commit(
        self,
        tx: Transaction,
        request: ReleaseRequest,
        facts: Facts,
        claims: Claims,
        evidence: Evidence,
        enclave_key: VerifyKey,
        run: str,
        wrapped_secret: bytes,
    ) -> _Committed:
        at = format_time(facts.now)
        tx.consume_nonce(unb64(request.nonce), at)
        refs = facts.contract.assets
        if request.resume is None:
            tx.create_run(run, request.contract, at, job_secret_wrapped=wrapped_secret)
            for ref in refs.values():
                tx.reserve(run, ref.digest, Charge(uses=1))
        releases = tx.record_release(run, enclave_key.raw)
        entry = ReleaseEntry(
            time=at,
            contract=request.contract,
            run=run,
            resumed=releases - 1,
            evidence=evidence.digest,
            evidence_kind=claims.kind,
            protection=claims.protection,
            enclave_key=enclave_key.keyid,
            uses={ref.digest: facts.uses[alias] + 1 for alias, ref in refs.items()},
        )
        index = self.broker.record(tx, entry)
        row = tx.run(run)
        assert row is not None
        assets = {alias: load_asset(tx, ref.digest)[:2] for alias, ref in refs.items()}
        return _Committed(row, self._inclusion(tx, index, entry.canonical_bytes()), assets)

    def _open_keys(
        self, assets: Mapping[str, tuple[Asset, bytes]], job_secret: SecretBytes
    ) -> bytes:
        """The message that is sealed to the enclave: every asset's key and the job's secret."""
        opened: dict[str, SecretBytes] = {}
        try:
            for alias, (asset, wrapped) in assets.items():
                opened[alias] = self.broker.keys.hpke_key.open(wrapped, *asset.wrapping_context())
            return canonical_json(
                {
                    "assets": {alias: b64(bytes(key.view())) for alias, key in opened.items()},
                    "job": b64(bytes(job_secret.view())),
                }
            )
        finally:
            for key in (*opened.values(), job_secret):
                key.wipe()

    def _inclusion(self, tx: ReadTransaction, index: int, body: bytes) -> LogInclusion:
        head = self.broker.log.signed_head(tx)
        path = tx.inclusion_path(index)
        return LogInclusion(
            index=index, entry=b64(body), path=tuple(b64(step) for step in path), head=head
        )

    # ------------------------------------------------------------------ while it runs

    def _by_current_enclave(self, tx: ReadTransaction, run: str, envelope: Envelope) -> RunRow:
        """The run, if the enclave that last got its keys signed; a replaced one is fenced off."""
        row = tx.run(run)
        if row is None or row.enclave_key is None:
            raise InputError("a run does not exist", found=run)
        envelope.verify_signature(VerifyKey(row.enclave_key))
        return row

    def checkpoint(self, envelope: Envelope) -> None:
        """Make a checkpoint the newest of its run; every older one is void from now on."""
        stated = envelope.peek(CheckpointRecord)

        def change(tx: Transaction) -> None:
            self._by_current_enclave(tx, stated.run, envelope)
            tx.advance_checkpoint(stated.run, stated.number, stated.content)
            entry = CheckpointEntry(
                time=format_time(self.broker.clock()),
                run=stated.run,
                number=stated.number,
                content=stated.content,
            )
            self.broker.record(tx, entry)

        self.broker.write(change)

    def settle(self, envelope: Envelope) -> LogInclusion:
        """Close a run with the enclave's account of it. Repeating the same account is harmless."""
        stated = envelope.peek(Settlement)

        def change(tx: Transaction) -> LogInclusion:
            row = self._by_current_enclave(tx, stated.run, envelope)
            if row.contract != stated.contract:
                raise InputError(
                    "a settlement names another contract",
                    found=stated.contract,
                    expected=row.contract,
                )
            key = f"settlement/{row.id}"
            if row.state == "settled" and row.receipt_digest == stated.receipt:
                index = int(tx.meta(key) or -1)
                logged = tx.entry(index)
                assert logged is not None
                return self._inclusion(tx, index, logged.body)
            at = format_time(self.broker.clock())
            tx.settle_run(row.id, at, stated.receipt)
            for reservation in tx.reservations_of_run(row.id):
                tx.settle(row.id, reservation.asset)
            entry = SettlementEntry(
                time=at,
                run=row.id,
                contract=row.contract,
                receipt=stated.receipt,
                outputs=stated.outputs,
            )
            index = self.broker.record(tx, entry)
            tx.add_meta(key, str(index))
            return self._inclusion(tx, index, entry.canonical_bytes())

        return self.broker.write(change)

    def open_run(self, contract: str) -> RunRow | None:
        """The contract's unfinished run, to be resumed or abandoned."""
        with self.broker.store.read() as tx:
            return tx.open_run(contract)

    def abandon(self, envelope: Envelope) -> None:
        """Give up an open run at a party's request. Its charges stay."""
        asked: PartyRequest = self.broker.party_request(envelope, "abandon")

        def change(tx: Transaction) -> None:
            row = tx.run(asked.subject)
            if row is None:
                raise InputError("a run does not exist", found=asked.subject)
            if asked.party not in self.broker.facts(tx, row.contract).contract.parties:
                raise RefusedError("only a party of its contract abandons a run", found=asked.party)
            self.broker.once(tx, asked)
            tx.abandon_run(row.id, format_time(parse_time(asked.issued)))

        self.broker.write(change)
