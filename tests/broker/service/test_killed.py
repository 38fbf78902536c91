"""``kill -9`` of a real broker process at every step of a job, then a new one on what is left.

No key without a log entry, no reservation lost, none doubled, and one log: every head that a
client ever saw is consistent with all later ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker.client import BrokerClient
from cenacle.broker.entries import ReleaseEntry
from cenacle.broker.log import TreeHead
from cenacle.broker.store import Store
from cenacle.documents.base import b64, unb64
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EvidenceError,
    RefusedError,
    UnavailableError,
)

pytestmark = pytest.mark.processes
Started = dict[str, Any]


class Zygote:
    """Forks broker processes (see ``zygote.py``) and waits for their deaths."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._living: set[int] = set()

    def start(self, world: Any, fault: tuple[str, int] | None = None) -> BrokerClient:
        """A process with the world's folder and store; connects the world to it."""
        order = {"folder": str(world.folder / "broker"), "target": world.target, "fault": fault}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        started = json.loads(self._process.stdout.readline())
        self.pid: int = started["pid"]
        self._living.add(self.pid)
        client: BrokerClient = world.connect(started["identity"], started["token"])
        return client

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.died()

    def died(self) -> None:
        """Wait until the process is gone, and with it its lock on the store."""
        deadline = time.monotonic() + 30
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < deadline, "the broker lives on"
            time.sleep(0.005)
        self._living.discard(self.pid)

    def close(self) -> None:
        for pid in self._living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


class Witness:
    """Follows the log across all processes, as a party's client does."""

    def __init__(self) -> None:
        self.head: TreeHead | None = None

    def look(self, client: BrokerClient) -> int:
        """The log's size now, proved to extend everything seen before."""
        _, self.head = client.head(self.head)
        return self.head.size


def killed_at(zygote: Zygote, world: Any, witness: Witness, step: Callable[[], object]) -> None:
    """One step of a job with the broker killed before, then after, its commit; then for good."""
    client = zygote.start(world, ("before", 1))
    size = witness.look(client)
    with pytest.raises(UnavailableError):
        step()
    zygote.died()

    client = zygote.start(world, ("after", 1))
    assert witness.look(client) == size, "something was kept of what was not committed"
    with pytest.raises(UnavailableError):
        step()
    zygote.died()

    client = zygote.start(world)
    assert witness.look(client) == size + 1, "what was committed was lost"


def test_killed_at_every_step(remote_world: Any, zygote: Zygote) -> None:
    world, witness = remote_world, Witness()
    zygote.start(world)
    actors = {name: world.register(name) for name in ("hospital-a", "clinic")}
    zygote.kill()

    # A registration.
    zygote.start(world)
    token = world.broker.invite(world.request_of(actors["hospital-a"], "invite")).token
    zygote.kill()
    newcomer = type(actors["clinic"])("hospital-b")

    def register() -> None:
        world.broker.client.register(newcomer.envelope, token)

    killed_at(zygote, world, witness, register)
    with pytest.raises(ConflictError):
        register()
    world.actors["hospital-b"] = newcomer
    zygote.kill()

    # Deposits: the key is there afterwards, or the owner is told to deposit again.
    uploads = {name: world.upload(_manifest(world, name)) for name in ("hospital-a", "hospital-b")}
    for upload in uploads.values():
        killed_at(zygote, world, witness, lambda upload=upload: world.broker.deposit(upload))  # type: ignore[misc]
        with pytest.raises(ConflictError, match="registered already"):
            world.broker.deposit(upload)
        zygote.kill()

    # The proposal and the signatures.
    contract = world.contract()
    killed_at(zygote, world, witness, lambda: world.propose(contract))
    with pytest.raises(ConflictError, match="proposed already"):
        world.propose(contract)
    for name in ("hospital-a", "hospital-b"):
        zygote.kill()
        killed_at(zygote, world, witness, lambda name=name: world.sign(contract.digest, name))  # type: ignore[misc]
        with pytest.raises(ConflictError, match="signed this contract already"):
            world.sign(contract.digest, name)

    # The release. Killed before the commit, nothing has happened: the same request is good.
    enclave = world.enclave(contract.digest)
    request = enclave.request()
    zygote.kill()
    killed_at(zygote, world, witness, lambda: world.desk.release(request))
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request)
    run = world.desk.open_run(contract.digest)
    assert run is not None
    successor = world.enclave(contract.digest)
    keys = successor.open(successor.release(resume=run))
    for name, upload in uploads.items():
        asset = _manifest(world, name)
        assert keys[name] == world.asset_keys[asset.digest], upload
    with pytest.raises(CenacleError):
        enclave.checkpoint(run, 1)  # the enclave whose answer was lost is fenced off

    # A checkpoint and the settlement.
    zygote.kill()
    killed_at(zygote, world, witness, lambda: successor.checkpoint(run, 1))
    with pytest.raises(ConflictError, match="not newer"):
        successor.checkpoint(run, 1)
    zygote.kill()
    killed_at(zygote, world, witness, lambda: successor.settle(run))
    index = successor.settle(run).index
    assert index == successor.settle(run).index
    size = witness.look(world.broker.client)
    zygote.kill()

    with Store.open(world.target) as store, store.read() as tx:
        kinds = [entry.kind for entry in tx.entries(0, tx.log_size())]
        assert kinds == (
            ["party"] * 3
            + ["asset"] * 2
            + ["contract"]
            + ["signature"] * 2
            + ["release"] * 2
            + ["checkpoint", "settlement"]
        )
        assert size == len(kinds)
        for name in uploads:
            digest = _manifest(world, name).digest
            assert tx.ledger(digest).uses == 1
            assert [(r.run, r.uses) for r in tx.reservations_of_asset(digest)] == [(run, 1)]


def _manifest(world: Any, owner: str) -> Any:
    asset = world.manifest(owner)
    world.assets[f"{owner}-records"] = asset
    return asset


# ------------------------------------------------------------------ at random


class Process:
    """``cenacle broker start`` on one port, killed and started again as often as one likes."""

    def __init__(self, folder: Path, target: str) -> None:
        self._command = [sys.executable, "-m", "cenacle", "broker", "start", "--json"]
        self._command += ["--dir", str(folder), "--name", "test/broker", "--development"]
        self._command += ["--store", target]
        self._port = 0

    def start(self) -> Started:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        self._port = int(answer["url"].rpartition(":")[2])
        identity = json.loads(Path(answer["identity"]).read_bytes())
        return {"identity": identity, "token": answer["owner_token"]}

    def kill(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(30)
        self._process.stdout.close()


class Job:
    """An enclave that never gives up, and remembers every answer that it got."""

    def __init__(self, world: Any, digest: str) -> None:
        self.world = world
        self.digest = digest
        self.answers: list[Any] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with BrokerClient(self.world.broker.identity, timeout=30) as client:
                self._run(client)
        except BaseException as error:
            self.error = error

    def _persist(self, attempt: Callable[[], Any]) -> Any:
        """Until the broker answers; what it says twice is fine."""
        for _ in range(600):
            try:
                return attempt()
            except UnavailableError:
                time.sleep(0.05)
        raise TimeoutError("the broker never came back")

    def _run(self, client: BrokerClient) -> None:
        def release() -> Any:
            run = client.open_run(self.digest)
            enclave = self.world.enclave(self.digest)
            enclave.nonce = client.nonce(self.digest)
            request = enclave.request(nonce=b64(enclave.nonce), resume=run)
            answer = client.release(request)
            self.answers.append(answer)
            return enclave, answer

        for _ in range(3):
            enclave, answer = self._persist(release)
            assert set(enclave.open(answer)) == {"hospital-a", "hospital-b", "job"}
            signed = enclave.settlement(answer.run)

            def checkpoint(enclave: Any = enclave, answer: Any = answer) -> None:
                with contextlib.suppress(ConflictError):  # it was durable, the answer was lost
                    enclave.checkpoint(answer.run, answer.checkpoint_version + 1)

            self._persist(checkpoint)
            from cenacle.documents.dsse import Envelope  # noqa: PLC0415

            envelope = Envelope.sign(signed, enclave.signing)
            self._persist(lambda envelope=envelope: client.settle(envelope))  # type: ignore[misc]


def _prepare(world: Any) -> list[str]:
    for name in ("hospital-a", "hospital-b", "clinic"):
        world.register(name)
    for owner in ("hospital-a", "hospital-b"):
        world.deposit(owner, terms={**_generous(world), "uses": 1000})
    return [world.agree(name=f"study-{i}") for i in range(4)]


def _generous(world: Any) -> dict[str, Any]:
    terms: dict[str, Any] = world.manifest("hospital-a").terms.to_fields()
    return terms


# A broker that dies between connect() and getpeername() makes ssl.SSLSocket._create raise
# without closing what it made (CPython 3.11); the collector does, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_random(remote_world: Any, kills: int) -> None:
    """Enclaves at work while the command itself is killed and started again on the same port."""
    world = remote_world
    process = Process(world.folder / "broker", world.target)
    started = process.start()
    client = world.connect(started["identity"], started["token"])
    jobs = [Job(world, digest) for digest in _prepare(world)]
    witness = Witness()
    witness.look(client)
    threads = [threading.Thread(target=job.run) for job in jobs]
    for thread in threads:
        thread.start()
    chance = random.Random(kills)
    for _ in range(kills):
        # Somewhere within the first moments of service, which last a dozen changes or so.
        time.sleep(chance.uniform(0.02, 0.25))
        process.kill()
        started = process.start()
        client = world.connect(started["identity"], None)
        witness.look(client)
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for job in jobs:
        if job.error is not None:
            raise job.error
    witness.look(client)
    entries = client.entries(witness.head.size)  # type: ignore[union-attr]
    process.kill()

    # No key without a log entry.
    answers = [answer for job in jobs for answer in job.answers]
    for answer in answers:
        assert entries[answer.log.index] == unb64(answer.log.entry)
    bodies = [json.loads(entry) for entry in entries]
    released = [ReleaseEntry.from_canonical(e) for e in entries if b'"kind":"release"' in e]
    runs = {entry.run for entry in released}
    assert {answer.run for answer in answers} <= runs
    # Every run was settled once; none was lost, none charged twice.
    settled = [body["run"] for body in bodies if body["kind"] == "settlement"]
    assert sorted(settled) == sorted(runs)
    assert len(runs) == 3 * len(jobs)
    with Store.open(world.target) as store, store.read() as tx:
        for asset in tx.assets():
            reservations = tx.reservations_of_asset(asset.digest)
            assert {r.run for r in reservations} == runs
            assert tx.ledger(asset.digest).uses == len(runs)
            assert tx.ledger(asset.digest).uses_reserved == 0


def test_killed_between_release_and_settlement_the_loss_stays_charged(
    remote_world: Any, zygote: Zygote, make_terms: Callable[..., dict[str, Any]]
) -> None:
    """Whatever the job did or did not do: its plan is charged in full until it says less."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    world = remote_world
    zygote.start(world)
    for name in ("hospital-a", "clinic"):
        world.register(name)
    budget = {"epsilon": 1.0, "delta": 1e-5}
    terms = make_terms(recipes=["logistic"], privacy=budget)
    asset = world.deposit("hospital-a", "records", terms=terms)
    job = {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": ["hospital-a"],
                "target": "diagnosis",
                "classes": ["malignant", "benign"],
                "standardize": False,
            },
            "model": {"type": "logistic"},
            "optimizer": {"type": "sgd", "learning_rate": 0.1},
            "epochs": 1,
            "holdout": {"fraction": 0.0},
        },
    }
    plan = {**budget, "clipping_norm": 1.0, "noise_multiplier": 4.5, "sampling_probability": 1.0}
    digest = world.agree(world.contract(asset, job=job, privacy=plan))
    second = world.agree(world.contract(asset, job=job, privacy=plan, name="second"))
    run = world.enclave(digest).release().run
    zygote.kill()

    client = zygote.start(world)
    key = world.actors["hospital-a"].signing
    spent = client.budget(key, "hospital-a", asset.digest)
    assert (spent.jobs, spent.unbounded) == (1, 0)
    assert spent.spent is not None
    assert 0.5 < spent.spent <= 1.0
    with pytest.raises(RefusedError, match="privacy"):
        world.enclave(second).release()
    zygote.kill()

    client = zygote.start(world)
    resumed = world.enclave(digest)
    resumed.release(resume=run)
    half = {"noise_multiplier": 18.0, "sampling_probability": 1.0, "steps": 1}
    resumed.settle(run, privacy=[half])
    zygote.kill()

    client = zygote.start(world)
    assert (client.budget(key, "hospital-a", asset.digest).spent or 9) < spent.spent / 1.5
    world.enclave(second).release()
    zygote.kill()
