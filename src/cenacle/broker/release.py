"""Nonce, evidence, decision, keys; then checkpoints and the settlement of a run.

The order is the point. Evidence is checked first, without touching the store. Then one change
in the store's single writer reads every fact, decides, consumes the nonce, charges every
asset, names the enclave and appends to the log. Only when that is durable are keys unwrapped
and sealed to the enclave. So a crash anywhere leaves either no trace and no key, or a charge
and a log entry with or without a key: never a key without them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Final, NoReturn, Self

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Claims, Evidence
from cenacle.broker.entries import (
    AbandonmentEntry,
    CheckpointEntry,
    LogRecord,
    ReleaseEntry,
    SettlementEntry,
)
from cenacle.broker.job_secrets import JobSecret, JobSecrets
from cenacle.broker.ledger import Charge
from cenacle.broker.losses import event_text, require_covered, until_accounted
from cenacle.broker.messages import (
    CheckpointRecord,
    PartyRequest,
    ReleaseRequest,
    ReleaseResponse,
    Settlement,
    release_context,
)
from cenacle.broker.reattestation import Reattestation, require_kept
from cenacle.broker.records import load_contract
from cenacle.broker.rules import Facts, decide, require
from cenacle.broker.service import Broker
from cenacle.broker.store import AssetRow, Place, ReadTransaction, RunRow, StateRow, Transaction
from cenacle.broker.unwrapping import UnwrappedKeys
from cenacle.crypto import HpkePublicKey, SecretBytes, VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, canonical_json, format_time, unb64
from cenacle.documents.contract import Contract
from cenacle.documents.dsse import Envelope
from cenacle.documents.receipt import LogInclusion
from cenacle.errors import ConflictError, EvidenceError, InputError, ProofError, RefusedError

__all__ = ["Asked", "Committed", "ReleaseDesk", "job_context"]

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def job_context(contract: str, run: str) -> tuple[bytes, ...]:
    """What a run's job secret is bound to while the broker keeps it wrapped."""
    return (b"cenacle/job-secret", contract.encode(), run.encode())


@dataclass(frozen=True)
class Asked:
    """A request whose evidence was judged, and what was made for it: wiped when its block ends.

    Attributes:
        moment: when it came; every clause is judged as of then.
        evidence: digest of the evidence.
        claims: ``None``: the evidence was not accepted, as ``problem`` says.
        run: of an accepted request: the run that is begun or taken over.
        job_secret: of a run that is begun.
    """

    request: ReleaseRequest
    nonce: bytes
    moment: datetime
    evidence: str
    enclave_key: VerifyKey
    recipient: HpkePublicKey
    claims: Claims | None = None
    problem: str | None = None
    run: str = ""
    job_secret: JobSecret | None = None
    job_secret_wrapped: bytes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.job_secret is not None:
            self.job_secret.wipe()


@dataclass(frozen=True)
class Committed:
    """What a durable release leaves for the steps after it.

    Attributes:
        resumed: the run taken over.
        entry: what the log says of it, and ``place`` where, once it is durable.
    """

    resumptions: int
    resumed: RunRow | None
    entry: bytes
    place: Place
    assets: Mapping[str, Asset]
    rows: Mapping[str, AssetRow]
    state: StateRow | None


class ReleaseDesk:
    """The part of a broker that enclaves talk to."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._hpke = broker.keys.hpke_key.public_key
        self._secrets = JobSecrets()
        self.reattestation = Reattestation(broker)

    def nonce(self, contract: str) -> bytes:
        """A nonce for one attempt to get one contract's keys.

        Nothing is stored and nothing is read for it, so it costs strangers more than the
        broker. Whether the contract exists is asked when the nonce is used.

        Raises:
            InputError: it is no digest.
        """
        if _DIGEST.fullmatch(contract) is None:
            raise InputError(
                "a contract is named by its digest",
                found=repr(contract[:80]),
                expected="sha256: and 64 hexadecimal digits",
            )
        return self.broker.nonces.issue(contract, self.broker.clock())

    # ------------------------------------------------------------------ release

    def release(self, request: ReleaseRequest) -> ReleaseResponse:
        """Decide on an enclave's request and, if every clause is met, release the keys.

        The same as :meth:`appraise`, then :meth:`commit` in the store's writer, then
        :meth:`seal` once that is durable.

        Raises:
            RefusedError: naming every clause that failed.
            EvidenceError: the nonce was used before.
            ConflictError: another run of the contract is open.
        """
        with self.appraise(request) as asked:
            if asked.claims is None:
                self.refuse(asked)
            return self.seal(asked, self.decide_patiently(asked))

    def decide_patiently(self, asked: Asked) -> Committed:
        """:meth:`commit` in the store's writer, composing privacy losses between tries."""
        return until_accounted(
            self.broker.losses, lambda: self.broker.write(lambda tx: self.commit(tx, asked))
        )

    def appraise(self, request: ReleaseRequest) -> Asked:
        """Judge the evidence, without the store; what does not hold becomes a clause."""
        broker = self.broker
        moment = broker.clock()
        nonce, enclave_key = unb64(request.nonce), VerifyKey(unb64(request.signing_key))
        recipient = HpkePublicKey(unb64(request.hpke_key))
        evidence = Evidence.from_fields(request.evidence)
        made = partial(Asked, request, nonce, moment, evidence.digest, enclave_key, recipient)
        try:
            broker.nonces.check(nonce, request.contract, moment)
            bound = report_data(nonce, request.contract, recipient.raw, enclave_key.raw)
            verifier = broker.verifiers.for_kind(evidence.kind)
            claims = verifier.authenticate(evidence, bound, moment)
        except EvidenceError as error:
            return made(problem=error.diagnostics())
        if request.resume is not None:
            return made(claims=claims, run=request.resume)
        # Made before the change, so that the writer does no public-key work for it.
        run, secret = secrets.token_hex(16), self._secrets.take()
        with secret.view() as view:
            wrapped = self._hpke.seal(view, *job_context(request.contract, run))
        return made(claims=claims, run=run, job_secret=secret, job_secret_wrapped=wrapped)

    def refuse(self, asked: Asked) -> NoReturn:
        """Raise every clause that failed, beside that of the evidence that was not accepted.

        It is certain to be refused: strangers without evidence do not reach the writer.
        """
        contract, run = asked.request.contract, asked.request.resume or ""

        def look() -> Facts:
            with self.broker.store.read() as tx:
                return self.broker.facts(tx, contract, excluded_run=run)

        facts = until_accounted(self.broker.losses, look)
        require(decide(replace(facts, evidence_error=asked.problem, now=asked.moment)))
        raise AssertionError("no evidence, no claims")

    def commit(self, tx: Transaction, asked: Asked) -> Committed:
        """The one change of a release: every fact read, decided on, and acted upon, or nothing.

        Raises:
            UnaccountedError: privacy losses have to be composed first, beside the writer.
        """
        request, claims, run = asked.request, asked.claims, asked.run
        assert claims is not None
        resumed = self._resumable(tx, request)
        facts, rows = self.broker.gather(tx, request.contract, excluded_run=request.resume or "")
        require(decide(replace(facts, claims=claims, now=asked.moment)))
        at = format_time(asked.moment)
        tx.consume_nonce(asked.nonce, at)
        refs = facts.contract.assets
        if resumed is None:
            tx.create_run(
                run,
                request.contract,
                at,
                job_secret_wrapped=asked.job_secret_wrapped,
                enclave_key=asked.enclave_key.raw,
            )
            self._reserve(tx, run, facts.contract)
            resumptions = 0
        else:
            resumptions = tx.record_release(run, asked.enclave_key.raw) - 1
        self.reattestation.begin(tx, run, facts.contract, claims, asked.recipient.raw)
        entry = ReleaseEntry(
            time=at,
            contract=request.contract,
            run=run,
            resumed=resumptions,
            evidence=asked.evidence,
            evidence_kind=claims.kind,
            protection=claims.protection,
            enclave_key=asked.enclave_key.keyid,
            uses={ref.digest: facts.uses[alias] + 1 for alias, ref in refs.items()},
            privacy=facts.contract.privacy_events or None,
        )
        index, body = self.broker.record(tx, entry)
        # Read here, where the enclave before is fenced off, it is the newest there can be.
        state = tx.state(request.contract)
        return Committed(resumptions, resumed, body, tx.place(index), facts.assets, rows, state)

    def _reserve(self, tx: Transaction, run: str, contract: Contract) -> None:
        """Charge every asset: what the plan protects with its events, the rest without bound."""
        plan, refs = contract.privacy, contract.assets
        protected = {ref.digest for alias, ref in refs.items() if contract.protects(alias)}
        if plan is not None and protected:
            bounded = Charge(uses=1, epsilon=plan.epsilon, delta=plan.delta)
            event = event_text(contract.privacy_events)
            tx.reserve_all(run, dict.fromkeys(sorted(protected), bounded), event)
        rest = [ref.digest for ref in refs.values() if ref.digest not in protected]
        if rest:
            tx.reserve_all(run, dict.fromkeys(rest, Charge(uses=1)))

    def seal(self, asked: Asked, done: Committed) -> ReleaseResponse:
        """The keys for the enclave; only for a change that is durable."""
        with UnwrappedKeys(self.broker.keys.hpke_key) as unwrapped:
            return self._seal(asked, done, unwrapped)

    def seal_all(
        self, releases: Sequence[tuple[Asked, Committed]]
    ) -> list[ReleaseResponse | Exception]:
        """:meth:`seal` for several changes that are durable, or why one of them cannot be sealed.

        What more than one of them needs is unwrapped once.
        """
        answers: list[ReleaseResponse | Exception] = []
        with UnwrappedKeys(self.broker.keys.hpke_key) as unwrapped:
            for asked, done in releases:
                try:
                    answers.append(self._seal(asked, done, unwrapped))
                except Exception as error:
                    answers.append(error)
        return answers

    def _seal(self, asked: Asked, done: Committed, unwrapped: UnwrappedKeys) -> ReleaseResponse:
        row, contract, run = done.resumed, asked.request.contract, asked.run
        secret: JobSecret | SecretBytes | None = asked.job_secret
        if row is not None:
            secret = self.broker.keys.hpke_key.open(
                row.job_secret_wrapped or b"", *job_context(contract, run)
            )
        assert secret is not None
        with secret:
            keys = unwrapped.of(done.assets, done.rows)
            message = canonical_json(
                {
                    "assets": {alias: b64(bytes(key.view())) for alias, key in keys.items()},
                    "job": b64(bytes(secret.view())),
                }
            )
        sealed = asked.recipient.seal(message, *release_context(contract, run, asked.nonce))
        # Not validated, since it is made of what was just written.
        return ReleaseResponse.model_construct(
            run=run,
            resumed=done.resumptions,
            started=format_time(asked.moment) if row is None else row.created_at,
            checkpoint_version=0 if row is None else row.checkpoint_version,
            checkpoint_digest=None if row is None else row.checkpoint_digest,
            state_number=0 if done.state is None else done.state.number,
            state_digest=None if done.state is None else done.state.digest,
            sealed_keys=b64(sealed),
            log=LogInclusion.model_construct(
                index=done.place.index,
                entry=b64(done.entry),
                path=tuple(b64(step) for step in done.place.path),
                head=self.broker.log.signed_place(done.place),
            ),
        )

    def _resumable(self, tx: ReadTransaction, request: ReleaseRequest) -> RunRow | None:
        """The run that is to be taken over, if one is."""
        if request.resume is None:
            return None
        row = tx.run(request.resume)
        if row is not None and row.contract == request.contract:
            require_kept(tx, row, self.broker.clock())
        if row is None or row.contract != request.contract or row.state != "open":
            raise ConflictError(
                "the run cannot be resumed",
                found="no such run of this contract"
                if row is None or row.contract != request.contract
                else f"a run that is {row.state}",
                expected="an open run of this contract",
                remedy="start a new run with `cenacle run` without --resume",
            )
        return row

    def _logged(self, tx: Transaction, entry: LogRecord) -> LogInclusion:
        """Append an entry, with the proof that the newest head includes it."""
        index, body = self.broker.record(tx, entry)
        return self._inclusion(tx, index, body)

    def _inclusion(self, tx: ReadTransaction, index: int, body: bytes) -> LogInclusion:
        head = self.broker.log.signed_head(tx)
        path = tx.inclusion_path(index)
        return LogInclusion(
            index=index, entry=b64(body), path=tuple(b64(step) for step in path), head=head
        )

    # ------------------------------------------------------------------ while it runs

    def checkpoint(self, envelope: Envelope) -> None:
        """Make a checkpoint the newest of its run; every older one is void from now on."""
        stated = envelope.peek(CheckpointRecord)

        def change(tx: Transaction) -> None:
            self.reattestation.kept_run(tx, stated.run, envelope)
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
            row = self.reattestation.kept_run(tx, stated.run, envelope)
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
                if logged is None:
                    raise ProofError(
                        "the broker's store was altered: a settlement is not in the log",
                        found=f"run {row.id} without its entry",
                        remedy="the broker's operator restores the store from a backup",
                    )
                return self._inclusion(tx, index, logged.body)
            at = format_time(self.broker.clock())
            tx.settle_run(row.id, at, stated.receipt)
            for reservation in tx.reservations_of_run(row.id):
                require_covered(reservation.event, stated.privacy or ())
                tx.settle(
                    row.id,
                    reservation.asset,
                    reservation.epsilon,
                    reservation.delta,
                    event=None if reservation.epsilon is None else event_text(stated.privacy or ()),
                )
            entry = SettlementEntry(
                time=at,
                run=row.id,
                contract=row.contract,
                receipt=stated.receipt,
                outputs=stated.outputs,
                privacy=stated.privacy,
            )
            inclusion = self._logged(tx, entry)
            tx.add_meta(key, str(inclusion.index))
            return inclusion

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
            parties = load_contract(tx, row.contract).contract.parties
            if asked.party not in parties:
                raise RefusedError(
                    "only a party of its contract abandons a run",
                    found=asked.party,
                    expected=" or ".join(sorted(parties)),
                )
            self.broker.once(tx, asked)
            at = self.broker.time()
            tx.abandon_run(row.id, at)
            entry = AbandonmentEntry(time=at, run=row.id, contract=row.contract, party=asked.party)
            self.broker.record(tx, entry)

        self.broker.write(change)
