"""A whole small world for tests: a broker that is served, parties, sealed assets, enclaves.

Everything is real: keys, TLS, the store, the sandbox and the enclave's processes. Only the
broker is served from a thread of the test instead of a process of its own, so that a test can
stop the world at any point of its service (:class:`Trap`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.broker.app import create_app
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.receipts import VerifiedReceipt, read_bundle, verify_receipt
from cenacle.broker.server import serving
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.broker.tls import ensure_certificate
from cenacle.cli.enclave import measure_here
from cenacle.cli.home import Home, PartyKeys
from cenacle.cli.seal import seal_asset
from cenacle.documents.asset import Asset
from cenacle.documents.base import unb64
from cenacle.documents.contract import Contract
from cenacle.documents.receipt import OutputRecord
from cenacle.documents.terms import Terms
from cenacle.enclave.channel import Failed, Finished, Message, Progress, Stage
from cenacle.enclave.launcher import LaunchRequest, ProcessLauncher, RunningEnclave
from cenacle.enclave.reference import measure_in_sandbox
from cenacle.enclave.sandbox import SandboxPlan, plan
from cenacle.errors import CenacleError
from cenacle.sealing import SealedReader

__all__ = ["House", "Outcome", "Sealed", "Trap", "house_at", "patient_rows", "recipe_job"]

TERMS: dict[str, Any] = {
    "protection": "simulated",
    "recipes": ["mlp", "logistic"],
    "privacy": "unbounded",
    "recipients": ["clinic"],
    "outputs": ["model", "metrics", "table", "file"],
    "purposes": ["research"],
    "uses": 100,
    "expires": "2036-12-31",
}


@dataclass(frozen=True)
class Sealed:
    """A deposited asset and its sealed file."""

    asset: Asset
    path: Path


@dataclass
class Outcome:
    """What one enclave said until its end."""

    out: Path
    messages: list[Message] = field(default_factory=list)
    error: CenacleError | None = None

    @property
    def stages(self) -> list[str]:
        return [message.name for message in self.messages if isinstance(message, Stage)]

    @property
    def progress(self) -> list[tuple[int, int]]:
        return [(m.done, m.total) for m in self.messages if isinstance(m, Progress)]

    @property
    def receipt(self) -> Path:
        """The receipt of a job that finished; raises what it failed with."""
        if self.error is not None:
            raise self.error
        assert isinstance(self.messages[-1], Finished)
        return self.out / "receipt.json"


_PATHS = {
    "release": "/v1/releases",
    "checkpoint": "/v1/checkpoints",
    "settle": "/v1/settlements",
}


class Trap:
    """Kills the enclave, as ``kill -9``, when the broker gets or has answered its n-th request.

    ``before``: the request is lost, the broker never acts on it. ``after``: the broker has
    acted, durably, and its answer is lost.
    """

    def __init__(self) -> None:
        self._enclave: RunningEnclave | None = None
        self._started = threading.Event()
        self._path = ""
        self._when = ""
        self._at = 0

    def set(self, request: str, *, when: str, at: int = 1) -> None:
        """``request``: release, checkpoint or settle; ``when``: before or after."""
        self._path, self._when, self._at = _PATHS[request], when, at

    def watch(self, enclave: RunningEnclave) -> None:
        """The enclave to kill, from now on."""
        self._enclave = enclave
        self._started.set()

    def _springs(self, path: str) -> bool:
        if path != self._path:
            return False
        self._at -= 1
        return self._at == 0

    def _kill(self) -> None:
        self._started.wait(30)
        assert self._enclave is not None
        self._enclave.kill()

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, with the trap in its way."""
        if not self._springs(scope.get("path", "")):
            await app(scope, receive, send)
        elif self._when == "before":
            await asyncio.to_thread(self._kill)
            await Response(status_code=503)(scope, receive, send)
        else:

            async def killing(message: AsgiMessage) -> None:
                if message["type"] == "http.response.start":
                    await asyncio.to_thread(self._kill)
                await send(message)

            await app(scope, receive, killing)


class House:
    """One broker, its parties, and an operator who starts enclaves."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.folder = folder
        self.broker = broker
        self.identity = broker.identity
        self.client = BrokerClient(self.identity)
        self.operator = self.home("operator")
        self.operator.pin(self.identity)
        self.plan = plan()
        self.trap: Trap | None = None
        self._count = 0
        self.parties: dict[str, PartyKeys] = {}
        token = broker.owner_token()
        assert token is not None
        for name in ("hospital-a", "hospital-b", "lab", "clinic"):
            keys = self.home(name).new_party(name)
            self.home(name).pin(self.identity)
            self.client.register(keys.envelope, token)
            self.parties[name] = keys
            owner = self.parties["hospital-a"]
            token = self.client.invite(owner.signing_key, "hospital-a").token
        self.spare_token = token

    def home(self, actor: str) -> Home:
        """What ``CENACLE_HOME`` names for this actor."""
        return Home(self.folder / actor / "home")

    def fresh(self, stem: str) -> str:
        """A name that nothing in this house has yet."""
        self._count += 1
        return f"{stem}-{self._count}"

    def path(self, stem: str) -> Path:
        return self.folder / self.fresh(stem)

    # ------------------------------------------------------------------ before the job

    def seal(
        self,
        owner: str,
        source: Path,
        *,
        type_: Literal["dataset", "model"] | None = None,
        allow_missing: bool = False,
        **terms: Any,
    ) -> Sealed:
        """Seal a file or a program's folder, sign its manifest, deposit its key."""
        name = self.fresh(f"{owner}-asset")
        made = seal_asset(
            self.parties[owner],
            self.client,
            source,
            self.folder / owner / f"{name}.sealed",
            Terms.from_fields({**TERMS, **terms}),
            name=name,
            type_=type_,
            allow_missing=allow_missing,
        )
        return Sealed(made.asset, made.sealed)

    def program(self, source: str, *, data: str | None = None, **terms: Any) -> Sealed:
        """A program of the lab's: one module ``main`` with this source."""
        folder = self.path("program")
        folder.mkdir()
        (folder / "main.py").write_text(source)
        if data is not None:
            (folder / "words.txt").write_text(data)
        return self.seal("lab", folder, **terms)

    def enclave(self, chosen: SandboxPlan | None = None) -> dict[str, Any]:
        """Reference values of this machine."""
        plan_ = chosen or self.plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cenacle.enclave.reference.measure_in_sandbox", _measured_once)
            return measure_here(
                self.operator,
                plan_.layers,
                accelerators=plan_.accelerators,
                serving=plan_.serving,
            )

    def contract(
        self,
        assets: Mapping[str, Sealed],
        job: Mapping[str, Any],
        outputs: Mapping[str, str],
        **fields: Any,
    ) -> Contract:
        """A contract of all parties; ``outputs`` are kinds by name, all for the clinic."""
        owners = sorted({sealed.asset.owner for sealed in assets.values()})
        return Contract.from_fields(
            {
                "name": self.fresh("job"),
                "purpose": "research",
                "broker": self.identity.digest,
                "parties": {name: self.parties[name].party.digest for name in (*owners, "clinic")},
                "assets": {
                    alias: {"digest": sealed.asset.digest, "owner": sealed.asset.owner}
                    for alias, sealed in assets.items()
                },
                "job": dict(job),
                "enclave": fields.pop("enclave", None) or self.enclave(),
                "outputs": [
                    {"name": name, "kind": kind, "recipient": "clinic"}
                    for name, kind in outputs.items()
                ],
                "approval": {"all_of": owners},
                "vetoes": ["clinic"],
                "expires": "2036-12-31",
                **fields,
            }
        )

    def agree(self, contract: Contract, *signers: str) -> str:
        """Propose by the clinic and sign, by default by every owner; returns the digest."""
        digest = self.client.propose(contract, self.parties["clinic"].signing_key)
        owners = {ref.owner for ref in contract.assets.values()}
        for name in signers or sorted(owners):
            self.client.sign(digest, self.parties[name].signing_key)
        return digest

    # ------------------------------------------------------------------ the job

    def request(
        self,
        digest: str,
        files: Mapping[str, Path],
        out: Path,
        *,
        resume: str | None = None,
        chosen: SandboxPlan | None = None,
        accelerators: Sequence[str] = (),
    ) -> LaunchRequest:
        """What ``cenacle run`` asks its launcher for."""
        out.mkdir(exist_ok=True, parents=True)
        (out / "checkpoints").mkdir(exist_ok=True)
        self.operator.installation()
        assets = self.client.contract(digest).assets
        url = urlsplit(self.identity.url or "")
        return LaunchRequest(
            broker=(url.hostname or "", url.port or 0),
            plan=chosen or self.plan,
            config={"contract": digest, "broker": self.identity.to_fields(), "resume": resume},
            read_only={
                "installation": self.operator.installation_path,
                **{f"asset-{index}": files[alias] for index, alias in enumerate(assets)},
            },
            writable={"outputs": out, "checkpoints": out / "checkpoints"},
            threads=1,
            accelerators=tuple(accelerators),
        )

    def run(
        self,
        digest: str,
        assets: Mapping[str, Sealed],
        out: Path | None = None,
        *,
        resume: str | None = None,
        files: Mapping[str, Path] | None = None,
        chosen: SandboxPlan | None = None,
        accelerators: Sequence[str] = (),
        watch: Callable[[RunningEnclave, Message], None] | None = None,
    ) -> Outcome:
        """Run a contract in an enclave to its end, good or bad."""
        found = {alias: sealed.path for alias, sealed in assets.items()} | dict(files or {})
        outcome = Outcome(out or self.path("results"))
        request = self.request(
            digest, found, outcome.out, resume=resume, chosen=chosen, accelerators=accelerators
        )
        with ProcessLauncher().launch(request) as enclave:
            try:
                for message in enclave.messages():
                    outcome.messages.append(message)
                    if isinstance(message, Failed):
                        outcome.error = message.to_error()
                    if watch is not None:
                        watch(enclave, message)
                if outcome.error is None:
                    enclave.wait(30)
            except CenacleError as error:
                outcome.error = error
        return outcome

    # ------------------------------------------------------------------ after the job

    def verify(self, receipt: Path) -> VerifiedReceipt:
        """The receipt verified as anyone would, from the pinned broker alone."""
        return verify_receipt(
            read_bundle(receipt.read_bytes()),
            broker_digest=self.identity.digest,
            verifiers=VerifierSet.of_development(SimulatedVerifier()),
        )

    def open(self, outcome: Outcome, name: str) -> bytes:
        """The plaintext of an output, as the clinic opens it."""
        receipt = self.verify(outcome.receipt).receipt
        record = next(output for output in receipt.outputs if output.name == name)
        context = OutputRecord.wrapping_context(receipt.contract, record.name, record.header)
        key = self.parties["clinic"].hpke_key.open(unb64(record.wrapped_key), *context)
        with SealedReader(
            outcome.out / f"{name}.sealed",
            key,
            expected_header=record.header,
            expected_digest=record.content,
        ) as reader:
            return reader.read_range(0, reader.size)

    def metrics(self, outcome: Outcome, name: str = "metrics") -> dict[str, Any]:
        found = json.loads(self.open(outcome, name))
        assert isinstance(found, dict)
        return found

    def uses(self, sealed: Sealed) -> int:
        """Runs that the ledger charged to an asset."""
        with self.broker.store.read() as tx:
            used = tx.ledger(sealed.asset.digest)
        return used.uses_reserved + used.uses_settled

    def open_run(self, digest: str) -> str | None:
        return self.client.open_run(digest)

    def log(self) -> list[dict[str, Any]]:
        """Every entry of the broker's log."""
        _, head = self.client.head()
        return [json.loads(body) for body in self.client.entries(head.size)]


_MEASURED: dict[tuple[str, ...], dict[str, str]] = {}


def _measured_once(chosen: SandboxPlan) -> dict[str, str]:
    """What an enclave measures of itself: seconds of work, and the same in every house.

    Each enclave that runs a job still measures itself anew, and is compared with this.
    """
    if chosen.layers not in _MEASURED:
        _MEASURED[chosen.layers] = measure_in_sandbox(chosen)
    return _MEASURED[chosen.layers]


@contextlib.contextmanager
def house_at(folder: Path) -> Iterator[House]:
    """A house whose broker is served until the block ends."""
    keys = BrokerKeys.open(folder / "broker", "test/broker")
    files = ensure_certificate(folder / "broker")
    houses: list[House] = []

    def trapped_app(broker: Broker) -> Any:
        app = create_app(broker)

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            trap = houses[0].trap if houses else None
            await (trap.serve(app, scope, receive, send) if trap else app(scope, receive, send))

        return serve

    launch = ProcessLauncher.launch

    def watched_launch(launcher: ProcessLauncher, job: LaunchRequest) -> RunningEnclave:
        enclave = launch(launcher, job)
        if houses and houses[0].trap is not None:
            houses[0].trap.watch(enclave)
        return enclave

    with (
        pytest.MonkeyPatch.context() as patch,
        Store.open(folder / "broker" / "broker.db") as store,
    ):
        patch.setattr("cenacle.broker.server.create_app", trapped_app)
        patch.setattr(ProcessLauncher, "launch", watched_launch)
        broker = Broker.development(store, keys)
        with serving(broker, files):
            house = House(folder, broker)
            houses.append(house)
            try:
                yield house
            finally:
                house.client.close()


def patient_rows(count: int, *, seed: int = 1) -> str:
    """A CSV of made-up patients: three features and a diagnosis that they decide."""
    import numpy as np  # noqa: PLC0415

    random = np.random.default_rng(seed)
    lines = ["age,dose,pressure,diagnosis"]
    for _ in range(count):
        age, dose, pressure = random.normal(size=3).round(4)
        lines.append(f"{age},{dose},{pressure},{int(age + dose > 0)}")
    return "\n".join(lines) + "\n"


def recipe_job(assets: Sequence[str], *, epochs: int = 4, every: int = 0, **recipe: Any) -> Any:
    """A logistic regression on patients' tables."""
    return {
        "type": "recipe",
        "checkpoint_every": every,
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(assets),
                "target": "diagnosis",
                "classes": [0, 1],
            },
            "model": {"type": "logistic"},
            "optimizer": {"type": "adam", "learning_rate": 0.05},
            "epochs": epochs,
            "batch_size": 16,
            **recipe,
        },
    }
