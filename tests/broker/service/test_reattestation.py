"""Evidence of running enclaves: what goes on, what is refused, and what revokes a run for good."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from cenacle.attestation.claims import Evidence
from cenacle.attestation.ima import since
from cenacle.attestation.registry import Attester, VerifierSet
from cenacle.attestation.simulated import SimulatedAttester, SimulatedVerifier
from cenacle.attestation.tpm_endorsement import certificate_digest
from cenacle.broker.messages import EvidenceRecord, EvidenceUpload, Reattested
from cenacle.broker.release import ReleaseDesk
from cenacle.documents.base import b64, format_time
from cenacle.documents.contract import REATTEST_SECONDS, EnclaveRequirements
from cenacle.documents.dsse import Envelope
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EvidenceError,
    InputError,
    RefusedError,
    SignatureError,
)
from tests.support.ima_machine import NOW, Machine

INTERVAL = 60


class MachineAttester(Attester):
    """Evidence of the machine, as its host's hardware would make it."""

    kind = "ima"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now
        return dict(self.machine.evidence(bound).body)


class Job:
    """A released run and its enclave; each step may be done wrongly by the test."""

    def __init__(self, world: Any, **enclave: Any) -> None:
        self.world = world
        demanded = {"reference": world.reference(), "layers": [], "reattest_seconds": INTERVAL}
        self.digest = world.agree(enclave={**demanded, **enclave})
        self.enclave = world.enclave(self.digest)

    def start(self) -> Job:
        self.run: str = self.enclave.release().run
        return self

    def upload(self, nonce: bytes, evidence: Evidence, **signed: Any) -> EvidenceUpload:
        key = signed.pop("key", self.enclave.signing)
        named = signed.pop("names", evidence.digest)
        fields = {"run": self.run, "nonce": b64(nonce), "evidence": named, **signed}
        record = EvidenceRecord.from_fields({"kind": "evidence-record", "version": 1, **fields})
        return EvidenceUpload(
            record=Envelope.sign(record, key).to_fields(), evidence=evidence.to_fields()
        )

    def fresh(self) -> EvidenceUpload:
        nonce, entries = self.world.desk.reattestation.nonce(self.run)
        return self.upload(nonce, since(self.enclave.attest(nonce), entries))

    def post(self, upload: EvidenceUpload | None = None) -> Reattested:
        answer = self.world.desk.reattestation.accept(self.run, upload or self.fresh())
        assert isinstance(answer, Reattested)
        return answer

    def revocations(self) -> list[dict[str, Any]]:
        with self.world.broker.store.read() as tx:
            bodies = [json.loads(entry.body) for entry in tx.entries(0, tx.log_size())]
        return [body for body in bodies if body["kind"] == "revocation"]

    def refused_everywhere(self, match: str, *, genuine: bool = True) -> None:
        """Nothing that an enclave or a successor of it asks for is given to a revoked run.

        ``genuine``: evidence can still be made that is accepted by itself.
        """
        asked: list[Callable[[], object]] = [
            lambda: self.enclave.checkpoint(self.run, 1),
            lambda: self.enclave.settle(self.run),
            lambda: self.enclave.release(resume=self.run),
            lambda: self.world.enclave(self.digest).release(resume=self.run),
            self.post,
        ]
        if not genuine:
            del asked[2:4]  # refused too, but for their evidence
        for ask in asked:
            with pytest.raises(RefusedError, match="revoked") as caught:
                ask()
            assert match in str(caught.value.found)


@pytest.fixture
def job(world: Any) -> Job:
    return Job(world).start()


@pytest.fixture
def any_job(any_world: Any) -> Job:
    """On each kind of store."""
    return Job(any_world).start()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def ima_job(world: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run on a machine whose kernel measures what it runs."""
    world.clock.moment = NOW
    verifiers = VerifierSet.of_development(SimulatedVerifier(), machine.verifier())
    monkeypatch.setattr(world.broker, "verifiers", verifiers)
    shown = machine.verifier().inspect(machine.evidence(), NOW).claims.measurements
    made = Job(
        world,
        reference={
            "ima": {
                **{name: [value] for name, value in shown.items()},
                **{n: v for n, v in world.reference()["simulated"].items() if n != "installation"},
            }
        },
        policy={"ima": {"roots": [certificate_digest(machine.root)]}},
    )
    made.enclave.attester = MachineAttester(machine)
    return made.start()


# ------------------------------------------------------------------ it goes on


def test_each_proof_moves_the_deadline_and_the_run_settles(any_job: Job) -> None:
    job, world = any_job, any_job.world
    for _ in range(5):
        world.clock.turn(seconds=1.5 * INTERVAL)
        answer = job.post()
        assert answer.accepted
        world.clock.turn(seconds=2 * INTERVAL)
        assert answer.due == format_time(world.clock())
        world.clock.turn(seconds=-INTERVAL)
        job.post()
    assert world.desk.reattestation.sweep() == ()
    job.enclave.checkpoint(job.run, 1)
    job.enclave.settle(job.run)
    assert job.revocations() == []
    with pytest.raises(ConflictError, match="not open"):
        job.post()
    world.clock.turn(days=1)
    assert world.desk.reattestation.sweep() == ()
    job.enclave.settle(job.run)  # once more, as after a lost answer


def test_a_run_that_owes_nothing_lives_on(world: Any) -> None:
    job = Job(world, reattest_seconds=0).start()
    world.clock.turn(days=2)
    assert world.desk.reattestation.sweep() == ()
    with pytest.raises(InputError, match="nothing to prove"):
        job.post()
    job.enclave.settle(job.run)


@pytest.mark.parametrize(
    ("kind", "given", "policy", "expected"),
    [
        ("simulated", None, None, None),
        ("snp", None, None, None),
        ("tpm", None, None, REATTEST_SECONDS),
        ("ima", None, None, REATTEST_SECONDS),
        ("ima", 0, None, 0),
        ("ima", 30, None, 30),
        ("simulated", 30, None, 30),
        ("composite", None, {"kinds": ["tdx", "nvidia"]}, None),
        ("composite", None, {"kinds": ["ima", "nvidia"]}, REATTEST_SECONDS),
        ("composite", None, {"kinds": "ima"}, None),
        ("composite", 45, {"kinds": ["tdx", "nvidia"]}, 45),
    ],
)
def test_how_often_in_a_draft(
    kind: str, given: int | None, policy: Any, expected: int | None
) -> None:
    digest = "sha256:" + "0" * 64
    fields: dict[str, Any] = {"reference": {kind: {"package": [digest]}}}
    fields |= {} if given is None else {"reattest_seconds": given}
    fields |= {} if policy is None else {"policy": {kind: policy}}
    written = EnclaveRequirements.from_fields(fields)
    assert written.completed().reattest_seconds == expected
    assert ("reattest_seconds" in written.to_fields()) == (given is not None)


def test_a_resumed_run_gets_a_new_deadline_and_the_old_enclave_none(job: Job) -> None:
    world, old = job.world, job.enclave
    world.clock.turn(seconds=1.9 * INTERVAL)
    job.enclave = world.enclave(job.digest)
    job.enclave.release(resume=job.run)
    world.clock.turn(seconds=1.9 * INTERVAL)
    assert job.post().accepted
    nonce, _ = world.desk.reattestation.nonce(job.run)
    with pytest.raises(SignatureError):
        job.post(job.upload(nonce, old.attest(nonce), key=old.signing))
    assert job.revocations() == []


# ------------------------------------------------------------------ refused, and the run goes on


def test_a_proof_counts_once(job: Job) -> None:
    sent = job.fresh()
    job.post(sent)
    for _ in range(2):
        with pytest.raises(EvidenceError, match="shown before"):
            job.post(sent)
    assert job.post().accepted


def test_what_is_not_this_enclaves_proof_of_this_run(world: Any, job: Job) -> None:
    other = Job(world, reattest_seconds=INTERVAL + 1)
    other.start()
    nonce, _ = world.desk.reattestation.nonce(job.run)
    evidence = job.enclave.attest(nonce)
    foreign, _ = world.desk.reattestation.nonce(other.run)
    of_release = world.desk.nonce(job.digest)
    cases: list[tuple[type[CenacleError], str, EvidenceUpload]] = [
        (InputError, "another run", other.fresh()),
        (InputError, "another run", job.upload(nonce, evidence, run=other.run)),
        (InputError, "another evidence", job.upload(nonce, evidence, names=other.digest)),
        (SignatureError, "signature", job.upload(nonce, evidence, key=other.enclave.signing)),
        (EvidenceError, "not one that", job.upload(foreign, job.enclave.attest(foreign))),
        (EvidenceError, "not one that", job.upload(of_release, job.enclave.attest(of_release))),
        (EvidenceError, "not one that", job.upload(b"", job.enclave.attest(b""))),
    ]
    for kind, match, upload in cases:
        with pytest.raises(kind, match=match):
            job.post(upload)
    late = job.fresh()
    for _ in range(4):
        world.clock.turn(seconds=1.3 * INTERVAL)
        job.post()
    with pytest.raises(EvidenceError, match="expired"):
        job.post(late)
    with pytest.raises(InputError, match="does not exist"):
        world.desk.reattestation.accept("x", job.upload(nonce, evidence, run="x"))
    assert job.revocations() == []
    assert job.post().accepted
    # A nonce of a run is none for a release.
    with pytest.raises(RefusedError, match="evidence"):
        job.enclave.release(nonce=b64(nonce))


def test_a_party_gives_up_a_watched_run(job: Job) -> None:
    world = job.world
    owner = world.actors["hospital-a"]
    world.desk.abandon(world.request_of(owner, "abandon", job.run))
    world.clock.turn(days=1)
    assert world.desk.reattestation.sweep() == ()
    with pytest.raises(ConflictError, match="not open"):
        job.post()


# ------------------------------------------------------------------ drift


def _package(job: Job) -> None:
    job.enclave.measurements["package"] = "sha256:" + "0" * 64


def _sandbox(job: Job) -> None:
    del job.enclave.measurements["sandbox"]


def _layers(job: Job) -> None:
    job.enclave.layers = (*job.enclave.layers, "another")


class _Stale(SimulatedAttester):
    """Signs with a clock that is a year behind."""

    def attest(self, *given: Any) -> Evidence:
        bound, measurements, layers, now = given
        return super().attest(bound, measurements, layers, now.replace(year=now.year - 1))


def _stale(job: Job) -> None:
    job.enclave.attester = _Stale(job.world.installation)


@pytest.mark.parametrize(
    ("drift", "named"),
    [
        (_package, "measurement package"),
        (_sandbox, "measurement sandbox"),
        (_layers, "layers"),
        (_stale, "not fresh"),
    ],
)
def test_drift_revokes_the_run_for_good(job: Job, drift: Callable[[Job], None], named: str) -> None:
    world = job.world
    assert job.post().accepted
    drift(job)
    with pytest.raises(RefusedError, match="revoked") as caught:
        job.post()
    assert named in str(caught.value.found)
    (entry,) = job.revocations()
    assert (entry["run"], entry["contract"], entry["reason"]) == (job.run, job.digest, "drift")
    assert named in entry["found"]
    assert entry["evidence"].startswith("sha256:")
    genuine = drift is not _stale
    job.refused_everywhere(named, genuine=genuine)
    world.restart()
    job.refused_everywhere(named, genuine=genuine)
    assert len(job.revocations()) == 1
    # What it cost stays, and a new run is one more use.
    uses = {name: world.uses(asset) for name, asset in world.assets.items()}
    assert world.enclave(job.digest).release().run != job.run
    assert all(world.uses(asset) == uses[name] + 1 for name, asset in world.assets.items())


def test_old_evidence_under_a_fresh_nonce(job: Job) -> None:
    """Whoever makes an enclave sign another moment's evidence ends its run."""
    first, _ = job.world.desk.reattestation.nonce(job.run)
    old = job.enclave.attest(first)
    nonce, _ = job.world.desk.reattestation.nonce(job.run)
    with pytest.raises(RefusedError, match="revoked") as caught:
        job.post(job.upload(nonce, old))
    assert "another nonce" in str(caught.value.found)


def test_another_kind_than_the_release_showed(job: Job) -> None:
    nonce, _ = job.world.desk.reattestation.nonce(job.run)
    with pytest.raises(RefusedError, match="revoked") as caught:
        job.post(job.upload(nonce, Evidence(kind="tpm", body={"quote": "x"})))
    assert "no verifier" in str(caught.value.found)


# ------------------------------------------------------------------ deadlines


@pytest.mark.parametrize("swept", [False, True])
def test_a_missed_deadline_revokes_the_run(any_job: Job, *, swept: bool) -> None:
    job, world = any_job, any_job.world
    sent = job.fresh()
    world.clock.turn(seconds=2 * INTERVAL)
    assert world.desk.reattestation.sweep() == ()
    world.clock.turn(seconds=1)
    if swept:
        assert world.desk.reattestation.sweep() == (job.run,)
    with pytest.raises(RefusedError, match="revoked"):
        job.post(sent)  # made in time, and delayed by the host
    job.refused_everywhere("due at")
    assert [entry["reason"] for entry in job.revocations()] == ["deadline"]
    assert world.desk.open_run(job.digest) is None
    assert world.desk.reattestation.sweep() == ()


def test_a_broker_that_was_away_too_long_revokes_at_its_start(job: Job) -> None:
    world = job.world
    world.broker.close()
    world.clock.turn(hours=1)
    world.start()
    job.refused_everywhere("due at")


def test_an_overdue_run_is_refused_before_anybody_wrote_it_down(job: Job) -> None:
    job.world.clock.turn(seconds=2 * INTERVAL + 1)
    asked: list[Callable[[], object]] = [
        lambda: job.enclave.checkpoint(job.run, 1),
        lambda: job.enclave.settle(job.run),
        lambda: job.enclave.release(resume=job.run),
    ]
    for ask in asked:
        with pytest.raises(RefusedError, match="revoked"):
            ask()
    assert job.revocations() == []


# ------------------------------------------------------------------ lists of files


def test_a_list_is_continued_and_an_unlisted_executable_named(
    ima_job: Job, machine: Machine
) -> None:
    job = ima_job
    answer = job.post()
    assert (answer.accepted, answer.entries) == (True, 3)
    machine.run("/usr/bin/agent", b"agent")
    sent = job.fresh()
    assert sent.evidence["body"]["first"] == 3
    assert job.post(sent).entries == 4
    machine.run("/tmp/miner", b"miner")
    with pytest.raises(RefusedError, match="revoked") as caught:
        job.post()
    assert "/tmp/miner, unknown" in str(caught.value.found)
    assert "/tmp/miner, unknown" in job.revocations()[0]["found"]
    job.refused_everywhere("/tmp/miner", genuine=False)


def test_a_restarted_broker_is_shown_the_whole_list_again(ima_job: Job, machine: Machine) -> None:
    job = ima_job
    job.post()
    late = job.fresh()
    job.world.desk = ReleaseDesk(job.world.broker)
    answer = job.post(late)
    assert (answer.accepted, answer.entries) == (False, 0)
    assert job.post().entries == 3
    machine.run("/sbin/init", b"init")
    nonce, _ = job.world.desk.reattestation.nonce(job.run)
    assert job.post(job.upload(nonce, job.enclave.attest(nonce))).entries == 4
    assert job.revocations() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "restarts", 2), "restarted"),
        (lambda m: setattr(m, "resets", 8), "restarted"),
        (lambda m: m.entries.pop(), "not replay"),
        (lambda m: m.entries.insert(1, m.entries[2]), "not replay"),
        (lambda m: m.changed.update({4: bytes(32)}), "pcr4|registers"),
    ],
    ids=["restart", "reset", "cut", "inserted", "register"],
)
@pytest.mark.parametrize("followed", [False, True])
def test_another_history_of_the_machine(
    ima_job: Job, machine: Machine, change: Callable[[Machine], Any], named: str, *, followed: bool
) -> None:
    job = ima_job
    machine.run("/usr/bin/agent", b"agent")
    if followed:
        job.post()
    else:
        job.world.desk = ReleaseDesk(job.world.broker)  # the facts of the release are what is left
    genuine = machine.registers()[10]
    change(machine)
    if machine.registers()[10] != genuine:
        machine.changed = {10: genuine}  # its host can change the list, not the register
        if followed:
            assert job.post().accepted  # what was judged is not looked at again
            return
    with pytest.raises(RefusedError, match="revoked") as caught:
        job.post()
    assert re.search(named, str(caught.value.found))
    assert len(job.revocations()) == 1
