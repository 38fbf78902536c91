"""Evidence while a job runs: an enclave proves itself again and again, or its run is revoked.

Keys are released for what a machine showed at one moment. Kinds of evidence that show a running
system can show something else later: another program was started, the machine was restarted. So
a contract may demand fresh evidence every so often (``enclave.reattest_seconds``), made with the
keys of the release and judged by the same verifier and policy; and nothing that the release showed
may change meanwhile. What drifts, or comes later than twice that time, revokes the run, for good:
no checkpoint, no settlement, no resumption.

Deadlines hold by themselves: a run that missed one is refused from then on, whether or not the
revocation was written yet (:meth:`Reattestation.sweep`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NoReturn

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.ima import ImaMonitor, ImaVerifier
from cenacle.broker.entries import RevocationEntry
from cenacle.broker.messages import EvidenceRecord, EvidenceUpload, Reattested
from cenacle.broker.records import load_asset, load_contract
from cenacle.broker.rules import evidence_clauses
from cenacle.broker.service import Broker
from cenacle.broker.store import ReadTransaction, RunRow, Transaction, WatchRow
from cenacle.crypto import VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import canonical_json, format_time, parse_time, unb64
from cenacle.documents.clauses import failed
from cenacle.documents.contract import Contract
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, ConflictError, EvidenceError, InputError, RefusedError

__all__ = ["GRACE", "Reattestation", "require_kept"]

GRACE: Final = 2
"""Evidence is due this many intervals after the last: one may fail, and be tried again."""

_MONITORS: Final = 64  # lists that are followed from entry to entry; others are judged whole
_FOUND: Final = 500
_COUNTERS: Final = ("key_name", "reset_count", "restart_count")

_Reason = Literal["drift", "deadline"]


def require_kept(tx: ReadTransaction, row: RunRow, now: datetime) -> None:
    """Raises RefusedError if a run was revoked, or has missed its deadline and will be."""
    if row.state == "abandoned" and (reason := tx.revocation(row.id)) is not None:
        raise _refusal(reason)
    watch = tx.watch(row.id) if row.state == "open" else None
    if watch is not None and now > parse_time(watch.due_at):
        raise _refusal(_missed(watch))


def _missed(watch: WatchRow) -> str:
    return f"no evidence since it was due at {watch.due_at}, every {watch.interval} s"


def _refusal(reason: str) -> RefusedError:
    return RefusedError(
        "the run was revoked: its enclave no longer proves what the contract demands",
        found=reason,
        expected="fresh evidence of the same machine and software, in time",
        remedy="find out what changed on that machine; then start a new run, which is charged anew",
    )


def _subject(run: str) -> str:
    """What a nonce for a run's evidence is bound to; no contract is called so."""
    return f"run/{run}"


@dataclass
class _Followed:
    """One machine's list of files, as far as it was judged."""

    enclave_key: bytes
    monitor: ImaMonitor
    lock: threading.Lock = field(default_factory=threading.Lock)


class Reattestation:
    """The part of a broker that watches runs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._followed: OrderedDict[str, _Followed] = OrderedDict()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ the release

    def begin(
        self, tx: Transaction, run: str, contract: Contract, claims: Claims, hpke_key: bytes
    ) -> None:
        """Within the change of a release: from now on the run has to prove itself, if it has to."""
        interval = contract.enclave.reattest_seconds
        if not interval:
            return
        due = self._due(self._broker.clock(), interval)
        facts = canonical_json(_facts(contract, claims)).decode()
        tx.watch_run(run, interval, due, hpke_key, facts)

    @staticmethod
    def _due(moment: datetime, interval: int) -> str:
        return format_time(moment + timedelta(seconds=GRACE * interval))

    # ------------------------------------------------------------------ while it runs

    def kept_run(self, tx: ReadTransaction, run: str, envelope: Envelope) -> RunRow:
        """The run that an enclave speaks of, for whatever it asks of its broker.

        Raises:
            InputError: there is no such run.
            SignatureError: the enclave that last got its keys did not sign; a replaced one is
                fenced off.
            RefusedError: the run was revoked, or has missed its deadline.
        """
        row = tx.run(run)
        if row is None or row.enclave_key is None:
            raise InputError("a run does not exist", found=run)
        envelope.verify_signature(VerifyKey(row.enclave_key))
        require_kept(tx, row, self._broker.clock())
        return row

    def nonce(self, run: str) -> tuple[bytes, int]:
        """A nonce for one proof of a run, and how many entries of its list are judged already."""
        if not run or len(run) > 200:
            raise InputError("a run has another name", found=repr(run[:80]))
        with self._lock:
            followed = self._followed.get(run)
        entries = 0 if followed is None else followed.monitor.entries
        return self._broker.nonces.issue(_subject(run), self._broker.clock()), entries

    def accept(self, run: str, upload: EvidenceUpload) -> Reattested:
        """Judge fresh evidence of a run; revoke the run if it is not what the release showed.

        Raises:
            RefusedError: it drifted, or the run was revoked before, or is overdue.
            EvidenceError: the nonce is not of this run, too old, or used. The run goes on.
            ConflictError: the run is closed.
            SignatureError: the run's current enclave did not sign.
        """
        broker = self._broker
        envelope = Envelope.from_fields(upload.record)
        stated = envelope.peek(EvidenceRecord)
        moment, nonce = broker.clock(), unb64(stated.nonce)
        if stated.run != run:
            raise InputError("a record of evidence names another run", found=stated.run)

        def spend(tx: Transaction) -> tuple[RunRow, WatchRow | None]:
            row = self.kept_run(tx, run, envelope)
            tx.consume_nonce(nonce, format_time(moment))
            return row, tx.watch(run) if row.state == "open" else None

        try:
            with broker.store.read() as tx:  # strangers do not reach the writer
                self.kept_run(tx, run, envelope)
            broker.nonces.check(nonce, _subject(run), moment)
            evidence = Evidence.from_fields(upload.evidence)
            if evidence.digest != stated.evidence:
                raise InputError(
                    "a record of evidence names another evidence",
                    found=evidence.digest,
                    expected=stated.evidence,
                )
            row, watch = broker.write(spend)
        except RefusedError:
            self.sweep()
            raise
        if row.state != "open":
            raise ConflictError(
                "a run is not open", found=f"{run}: {row.state}", expected="an open run"
            )
        if watch is None:
            raise InputError(
                "a run has nothing to prove again",
                found=run,
                expected="a contract that demands it: enclave.reattest_seconds",
            )
        assert row.enclave_key is not None
        bound = report_data(nonce, row.contract, watch.hpke_key, row.enclave_key)
        followed = self._follow(row, evidence)
        if followed is None:
            return self._judged(row, watch, evidence, bound, moment, None)
        with followed.lock:  # of two at once for one machine, the second continues the first
            if evidence.body.get("first", 0) not in (0, followed.monitor.entries):
                return Reattested(
                    accepted=False, entries=followed.monitor.entries, due=watch.due_at
                )
            return self._judged(row, watch, evidence, bound, moment, followed)

    def _follow(self, row: RunRow, evidence: Evidence) -> _Followed | None:
        """Who follows the list of files in the evidence; None: it has none of its own."""
        verifier = self._verifier(evidence.kind)
        if not isinstance(verifier, ImaVerifier):
            return None
        assert row.enclave_key is not None
        with self._lock:
            followed = self._followed.get(row.id)
            if followed is None or followed.enclave_key != row.enclave_key:
                followed = _Followed(row.enclave_key, ImaMonitor(verifier))
                self._followed[row.id] = followed
            self._followed.move_to_end(row.id)
            while len(self._followed) > _MONITORS:
                self._followed.popitem(last=False)
            return followed

    def _verifier(self, kind: str) -> Any:
        try:
            return self._broker.verifiers.for_kind(kind)
        except EvidenceError:
            return None

    def _judged(
        self,
        row: RunRow,
        watch: WatchRow,
        evidence: Evidence,
        bound: bytes,
        moment: datetime,
        followed: _Followed | None,
    ) -> Reattested:
        broker = self._broker
        with broker.store.read() as tx:
            contract = load_contract(tx, row.contract).contract
            assets = {a: load_asset(tx, ref.digest)[0] for a, ref in contract.assets.items()}
        monitor = None if followed is None else followed.monitor
        if monitor is not None and evidence.body.get("first", 0) == 0 and monitor.entries:
            # The enclave knows of no place to continue at: its whole list is judged again.
            monitor = ImaMonitor(self._verifier(evidence.kind))
        try:
            if monitor is not None:
                claims = monitor.follow(evidence, bound, moment)
            else:
                verifier = broker.verifiers.for_kind(evidence.kind)
                claims = verifier.authenticate(evidence, bound, moment)
            _require_unchanged(watch, contract, assets, claims)
        except EvidenceError as error:
            self._revoke(row, "drift", error, evidence)
        due = self._due(moment, watch.interval)

        def prolong(tx: Transaction) -> None:
            now = tx.run(row.id)
            if now is None or (now.state, now.enclave_key) != ("open", row.enclave_key):
                raise ConflictError(
                    "a run was closed or taken over meanwhile", found=row.id, expected="an open run"
                )
            require_kept(tx, now, moment)
            tx.prolong_watch(row.id, due)

        broker.write(prolong)
        if followed is not None and monitor is not None:
            followed.monitor = monitor
        return Reattested(accepted=True, entries=0 if monitor is None else monitor.entries, due=due)

    # ------------------------------------------------------------------ revocation

    def sweep(self) -> tuple[str, ...]:
        """Revoke every run that missed its deadline; returns which.

        It only writes down what holds already, so nothing depends on when it is done.
        """
        moment = self._broker.clock()
        with self._broker.store.read() as tx:
            overdue = tx.overdue(format_time(moment))
        return tuple(run for run in overdue if self._expire(run, moment))

    def _expire(self, run: str, moment: datetime) -> bool:
        def change(tx: Transaction) -> bool:
            row, watch = tx.run(run), tx.watch(run)
            if row is None or watch is None or parse_time(watch.due_at) >= moment:
                return False  # proved in time, or closed, since we looked
            if row.state != "open":
                tx.unwatch_run(run)
                return False
            self._write(tx, row, "deadline", _missed(watch))
            return True

        done = self._broker.write(change)
        self._forget(run)
        return done

    def _revoke(
        self, row: RunRow, reason: _Reason, error: CenacleError, evidence: Evidence
    ) -> NoReturn:
        # The remedy speaks to the operator; the log needs what was found.
        told = CenacleError(error.what, found=error.found, expected=error.expected)
        found = "".join(c if c.isprintable() else "?" for c in told.diagnostics())[:_FOUND]

        def change(tx: Transaction) -> None:
            now = tx.run(row.id)
            if now is None or (now.state, now.enclave_key) != ("open", row.enclave_key):
                return  # closed or taken over meanwhile: nothing is left to revoke
            self._write(tx, row, reason, found, evidence.digest)

        self._broker.write(change)
        self._forget(row.id)
        raise _refusal(found)

    def _write(
        self,
        tx: Transaction,
        row: RunRow,
        reason: _Reason,
        found: str,
        evidence: str | None = None,
    ) -> None:
        at = self._broker.time()
        tx.revoke_run(row.id, at, found)
        entry = RevocationEntry(
            time=at,
            run=row.id,
            contract=row.contract,
            reason=reason,
            found=found,
            evidence=evidence,
        )
        self._broker.record(tx, entry)

    def _forget(self, run: str) -> None:
        with self._lock:
            self._followed.pop(run, None)


def _facts(contract: Contract, claims: Claims) -> dict[str, Any]:
    """What may not change while a run is open.

    Of the measurements those that the contract lists: others are judged by the kind's policy each
    time anew. Counters and key of a TPM: the machine was not restarted or exchanged.
    """
    listed = {*contract.enclave.reference.get(claims.kind, {}), "program"}
    members = claims.properties.get("members")
    shown = members[0]["properties"] if isinstance(members, list) and members else claims.properties
    return {
        "kind": claims.kind,
        "protection": claims.protection,
        "layers": list(claims.layers),
        "measurements": {n: v for n, v in claims.measurements.items() if n in listed},
        "machine": {name: shown[name] for name in _COUNTERS if name in shown},
    }


def _require_unchanged(
    watch: WatchRow, contract: Contract, assets: Mapping[str, Asset], claims: Claims
) -> None:
    """Raises EvidenceError naming what is not as the contract demands, or as it was."""
    if wrong := failed(evidence_clauses(contract, assets, claims)):
        raise EvidenceError(
            f"the enclave drifted ({', '.join(clause.name for clause in wrong)})",
            found="; ".join(clause.found for clause in wrong),
            expected="; ".join(clause.demanded for clause in wrong),
        )
    before, now = json.loads(watch.facts), json.loads(canonical_json(_facts(contract, claims)))
    old, new = _flat(before), _flat(now)
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if changed:
        raise EvidenceError(
            f"another machine than got the keys, or restarted since ({', '.join(changed)})",
            found=", ".join(str(new.get(name))[:40] for name in changed),
            expected=", ".join(str(old.get(name))[:40] for name in changed),
        )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= {str(inner): found for inner, found in value.items()}
        else:
            flat[name] = value
    return flat
