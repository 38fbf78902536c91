"""A small world around one broker: parties, assets, contracts, enclaves, and a clock to turn."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester, SimulatedVerifier
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity, BrokerKeys
from cenacle.broker.messages import (
    AssetDeposit,
    AssetUpload,
    CheckpointRecord,
    ContractView,
    Invitation,
    PartyRequest,
    Registration,
    ReleaseRequest,
    ReleaseResponse,
    SettledOutput,
    Settlement,
    SignatureUpload,
    release_context,
)
from cenacle.broker.release import ReleaseDesk
from cenacle.broker.rules import expected_program
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.crypto import HpkePrivateKey, SigningKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, format_time, parse_json, sha256_digest, unb64
from cenacle.documents.contract import Contract, Veto
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.privacy import NOT_PRIVATE, PrivacyEvent
from cenacle.documents.receipt import (
    Binding,
    InputRecord,
    LeakageRecord,
    LogInclusion,
    OutputRecord,
    Receipt,
    ReceiptBundle,
    Statement,
)
from cenacle.errors import CenacleError, RefusedError

START = datetime(2027, 1, 31, 12, tzinfo=UTC)
EXPIRES = "2099-12-31"
LAYERS = ("no-core-dumps", "seccomp")
SOFTWARE = {name: sha256_digest(name.encode()) for name in ("interpreter", "package", "sandbox")}
PURPOSE = "diagnosis"


def digest_of(word: str) -> str:
    return sha256_digest(word.encode())


class Clock:
    """The broker's clock, turned by the test."""

    def __init__(self, moment: datetime = START) -> None:
        self.moment = moment

    def __call__(self) -> datetime:
        return self.moment

    def turn(self, **by: float) -> None:
        self.moment += timedelta(**by)


def real_time() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class Actor:
    """A party with its private keys."""

    def __init__(self, name: str, signing: SigningKey | None = None) -> None:
        self.name = name
        self.signing = signing or SigningKey.generate()
        self.hpke = HpkePrivateKey.generate()
        self.party = Party(
            name=name,
            signing_key=b64(self.signing.verify_key.raw),
            hpke_key=b64(self.hpke.public_key.raw),
            created=format_time(START),
        )

    @property
    def envelope(self) -> Envelope:
        return Envelope.sign(self.party, self.signing)


def terms(**changes: Any) -> dict[str, Any]:
    """Terms that the default contract meets."""
    return {
        "protection": "simulated",
        "recipes": ["mlp"],
        "privacy": "unbounded",
        "recipients": ["clinic"],
        "outputs": ["model", "metrics"],
        "purposes": [PURPOSE],
        "uses": 10,
        "expires": EXPIRES,
        **changes,
    }


def recipe(*aliases: str, model: str = "mlp") -> dict[str, Any]:
    shape = {"type": "mlp", "hidden": [4]} if model == "mlp" else {"type": model}
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(aliases),
                "target": "diagnosis",
                "classes": ["malignant", "benign"],
            },
            "model": shape,
            "optimizer": {"type": "adamw", "learning_rate": 0.01},
            "epochs": 2,
        },
    }


@dataclass
class Enclave:
    """An enclave's keys and what it shows. Change an attribute to make it misbehave."""

    world: World
    contract: str
    measurements: dict[str, str]
    layers: tuple[str, ...] = LAYERS
    attester: SimulatedAttester | None = None
    hpke: HpkePrivateKey = field(default_factory=HpkePrivateKey.generate)
    signing: SigningKey = field(default_factory=SigningKey.generate)
    nonce: bytes = b""
    evidence: Evidence | None = None

    def attest(self, nonce: bytes, contract: str | None = None) -> Evidence:
        public = (self.hpke.public_key.raw, self.signing.verify_key.raw)
        attester = self.attester or SimulatedAttester(self.world.installation)
        bound = report_data(nonce, contract or self.contract, *public)
        return attester.attest(bound, self.measurements, self.layers, self.world.clock())

    def request(self, **changes: Any) -> ReleaseRequest:
        """A correct request with a fresh nonce and evidence, but for ``changes``."""
        if not self.nonce or "nonce" not in changes:
            self.nonce = self.world.desk.nonce(self.contract)
        self.evidence = self.attest(self.nonce)
        fields: dict[str, Any] = {
            "contract": self.contract,
            "nonce": b64(self.nonce),
            "evidence": self.evidence.to_fields(),
            "hpke_key": b64(self.hpke.public_key.raw),
            "signing_key": b64(self.signing.verify_key.raw),
        }
        return ReleaseRequest.from_fields({**fields, **changes})

    def release(self, **changes: Any) -> ReleaseResponse:
        return self.world.desk.release(self.request(**changes))

    def open(self, answer: ReleaseResponse) -> dict[str, Any]:
        """The keys by alias, and the job's secret under ``job``."""
        context = release_context(self.contract, answer.run, self.nonce)
        with self.hpke.open(unb64(answer.sealed_keys), *context) as message:
            fields = parse_json(bytes(message.view()))
        keys = {alias: unb64(key) for alias, key in fields["assets"].items()}
        return {**keys, "job": unb64(fields["job"])}

    def checkpoint(self, run: str, number: int, content: str = "checkpoint") -> None:
        record = CheckpointRecord(run=run, number=number, content=digest_of(content))
        self.world.desk.checkpoint(Envelope.sign(record, self.signing))

    def settlement(self, run: str, **changes: Any) -> Settlement:
        fields = {
            "run": run,
            "contract": self.contract,
            "receipt": digest_of("receipt"),
            "outputs": [
                {
                    "name": "model",
                    "kind": "model",
                    "recipient": "clinic",
                    "content": digest_of("model"),
                }
            ],
        }
        return Settlement.from_fields({**fields, **changes})

    def settle(self, run: str, **changes: Any) -> LogInclusion:
        signed = Envelope.sign(self.settlement(run, **changes), self.signing)
        return self.world.desk.settle(signed)

    def finish(
        self,
        answer: ReleaseResponse,
        privacy: Any = NOT_PRIVATE,
        spent: tuple[PrivacyEvent, ...] = (),
    ) -> ReceiptBundle:
        """Seal outputs (in name only), sign the statement, settle: the whole receipt."""
        world, view = self.world, self.world.broker.contract(self.contract)
        contract = Envelope.from_fields(view.contract).peek(Contract)
        assets = {a: Envelope.from_fields(e).peek(Asset) for a, e in view.assets.items()}
        assert self.evidence is not None
        outputs = tuple(
            OutputRecord(
                name=output.name,
                kind=output.kind,
                recipient=output.recipient,
                header=digest_of(f"header {output.name}"),
                content=digest_of(f"content {output.name}"),
                size=1,
                wrapped_key=b64(b"wrapped"),
            )
            for output in contract.outputs
        )
        receipt = Receipt(
            contract=self.contract,
            run=answer.run,
            broker=world.broker.identity.digest,
            evidence_kind=self.evidence.kind,
            evidence=self.evidence.digest,
            protection="simulated",
            measurements=self.measurements,
            layers=self.layers,
            inputs={
                alias: InputRecord(
                    asset=asset.digest, content=asset.container.digest, owner=asset.owner
                )
                for alias, asset in assets.items()
            },
            outputs=outputs,
            privacy=privacy,
            offload=LeakageRecord(
                scheme="enclave",
                inputs="hidden",
                weights="hidden",
                activations="hidden",
                gradients="hidden",
                labels="hidden",
                note="none",
            ),
            resumed=answer.resumed,
            started=answer.started,
            finished=format_time(world.clock()),
            release=answer.log,
        )
        statement = Envelope.sign(Statement.of(receipt), self.signing)
        settled = self.settle(
            answer.run,
            receipt=statement.digest,
            outputs=[
                SettledOutput(
                    name=o.name, kind=o.kind, recipient=o.recipient, content=o.content
                ).to_fields()
                for o in outputs
            ],
            privacy=[event.to_fields() for event in spent] or None,
        )
        return ReceiptBundle(
            statement=statement.to_fields(),
            binding=Binding(
                nonce=b64(self.nonce),
                hpke_key=b64(self.hpke.public_key.raw),
                signing_key=b64(self.signing.verify_key.raw),
            ),
            settlement=settled,
            evidence=self.evidence.to_fields(),
            contract=view.contract,
            parties=view.parties,
            assets=view.assets,
            broker=world.broker.identity.to_fields(),
        )


class World:
    """A broker and everyone around it. ``restart`` is what a new process would find."""

    def __init__(
        self, folder: Path, target: str, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.folder = folder
        self.target = target
        self.clock: Any = clock or Clock()
        self.actors: dict[str, Actor] = {}
        self.asset_keys: dict[str, bytes] = {}
        self.assets: dict[str, Asset] = {}
        self.installation = InstallationKey(SigningKey.generate())
        self.start()

    # The broker

    def start(self) -> None:
        keys = BrokerKeys.open(self.folder / "broker", "test/broker")
        self.store = Store.open(self.target)
        verifiers = VerifierSet.of_development(SimulatedVerifier())
        self.broker = Broker(self.store, keys, verifiers, self.clock)
        self.desk = ReleaseDesk(self.broker)

    def restart(self) -> None:
        self.broker.close()
        self.start()

    # Parties

    def register(self, name: str) -> Actor:
        """Admit a party: the first with the owner's token, the others by invitation."""
        token = self.broker.owner_token()
        if token is None:
            token = self.broker.invite(self.request_of(self.owner, "invite")).token
        actor = Actor(name)
        self.broker.register(Registration(party=actor.envelope.to_fields(), token=token))
        self.actors[name] = actor
        return actor

    @property
    def owner(self) -> Actor:
        return next(iter(self.actors.values()))

    def request_of(self, actor: Actor, action: Any, subject: str = "", **changes: Any) -> Envelope:
        fields = {
            "broker": self.broker.identity.digest,
            "party": actor.name,
            "action": action,
            "subject": subject,
            "issued": format_time(self.clock()),
            "nonce": b64(secrets.token_bytes(16)),
        }
        return Envelope.sign(PartyRequest.from_fields({**fields, **changes}), actor.signing)

    # Assets

    def manifest(self, owner: str, name: str = "records", /, **changes: Any) -> Asset:
        content = digest_of(f"{owner} {name}")
        fields = {
            "name": name,
            "owner": owner,
            "owner_digest": self.actors[owner].party.digest,
            "type": "dataset",
            "content": "table",
            "container": {"header": content, "digest": content, "size": 9, "plaintext_bytes": 8},
            "layout": {"columns": ["radius", "diagnosis"]},
            "broker": self.broker.identity.digest,
            "terms": terms(),
            "created": format_time(START),
        }
        return Asset.from_fields({**fields, **changes})

    def upload(
        self, asset: Asset, key: bytes | None = None, /, signer: Actor | None = None, **deposit: Any
    ) -> AssetUpload:
        key = secrets.token_bytes(32) if key is None else key
        signer = signer or self.actors[asset.owner]
        wrapped = self.broker.identity.hpke_public.seal(key, *asset.wrapping_context())
        fields = {
            "asset": asset.digest,
            "broker": self.broker.identity.digest,
            "wrapped_key": b64(wrapped),
        }
        signed = Envelope.sign(AssetDeposit.from_fields({**fields, **deposit}), signer.signing)
        self.asset_keys[asset.digest] = key
        return AssetUpload(
            manifest=Envelope.sign(asset, signer.signing).to_fields(), deposit=signed.to_fields()
        )

    def deposit(self, owner: str, name: str = "records", **changes: Any) -> Asset:
        asset = self.manifest(owner, name, **changes)
        self.broker.deposit(self.upload(asset))
        self.assets[f"{owner}-{name}"] = asset
        return asset

    # Contracts

    def reference(self) -> dict[str, Any]:
        shown = {**SOFTWARE, "installation": self.installation.measurement}
        return {"simulated": {name: [value] for name, value in shown.items()}}

    def contract(self, *assets: Asset, **changes: Any) -> Contract:
        """The default contract over ``assets`` (default: all), aliased by their owners."""
        used = assets or tuple(self.assets.values())
        aliases = [asset.owner for asset in used]
        fields: dict[str, Any] = {
            "name": "study",
            "purpose": PURPOSE,
            "broker": self.broker.identity.digest,
            "parties": {name: actor.party.digest for name, actor in self.actors.items()},
            "assets": {a.owner: {"digest": a.digest, "owner": a.owner} for a in used},
            "job": recipe(*aliases),
            "enclave": {"reference": self.reference(), "layers": list(LAYERS)},
            "outputs": [{"name": "model", "kind": "model", "recipient": "clinic"}],
            "approval": {"all_of": aliases},
            "vetoes": ["clinic"],
            "expires": EXPIRES,
        }
        return Contract.from_fields({**fields, **changes})

    def propose(self, contract: Contract, by: str = "clinic") -> str:
        return self.broker.propose(Envelope.sign(contract, self.actors[by].signing)).digest

    def sign(self, digest: str, *names: str) -> None:
        contract = self.broker.contract(digest).contract
        for name in names:
            key = self.actors[name].signing
            envelope = Envelope.from_fields(contract).signed_by(key)
            signature = envelope.signatures[key.verify_key.keyid]
            self.broker.add_signature(
                digest, SignatureUpload(keyid=key.verify_key.keyid, signature=b64(signature))
            )

    def agree(self, contract: Contract | None = None, by: str = "clinic", **changes: Any) -> str:
        """Propose, and have every asset's owner sign."""
        contract = contract or self.contract(**changes)
        digest = self.propose(contract, by)
        self.sign(digest, *sorted({ref.owner for ref in contract.assets.values()}))
        return digest

    def veto(self, digest: str, name: str, reason: str = "no") -> None:
        veto = Veto(contract=digest, party=name, reason=reason)
        self.broker.veto(Envelope.sign(veto, self.actors[name].signing))

    # Enclaves

    def enclave(self, digest: str, **changes: Any) -> Enclave:
        contract = Envelope.from_fields(self.broker.contract(digest).contract).peek(Contract)
        digests = {ref.digest: alias for alias, ref in contract.assets.items()}
        assets = {digests[a.digest]: a for a in self.assets.values() if a.digest in digests}
        program = expected_program(contract, assets)
        return Enclave(self, digest, {**SOFTWARE, "program": program}, **changes)

    def race(self, requests: Sequence[ReleaseRequest]) -> list[str]:
        """Ask for releases at the same moment: of each its run, or what clauses it failed on."""
        barrier = threading.Barrier(len(requests))

        def ask(request: ReleaseRequest) -> str:
            barrier.wait()
            try:
                return str(self.desk.release(request).run)
            except RefusedError as error:
                return ", ".join(clause["name"] for clause in error.clauses)

        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(ask, requests))

    # What is on record

    def state(self) -> tuple[Any, ...]:
        """Everything that a refused request must leave as it was."""
        with self.store.read() as tx:
            nonces = tx._session.one("SELECT count(*) FROM nonces")
            return (
                nonces,
                tx.log_size(),
                tuple((asset.digest, tx.ledger(asset.digest)) for asset in tx.assets()),
                tuple(tuple(tx.runs(contract.digest)) for contract in tx.contracts()),
            )

    def uses(self, asset: Asset) -> int:
        with self.store.read() as tx:
            view = tx.ledger(asset.digest)
            charged = sum(r.uses for r in tx.reservations_of_asset(asset.digest))
        assert view.uses == charged
        return view.uses

    def kinds(self) -> list[str]:
        """The kinds of the log's entries, in order."""
        with self.store.read() as tx:
            return [entry.kind for entry in tx.entries(0, tx.log_size())]

    def close(self) -> None:
        self.broker.close()


class _RemoteBroker:
    """What a :class:`World` asks of its broker, asked over the network."""

    def __init__(self, client: BrokerClient, token: str | None) -> None:
        self.client = client
        self.identity = client.identity
        self._token = token

    def owner_token(self) -> str | None:
        token, self._token = self._token, None
        return token

    def register(self, registration: Registration) -> None:
        self.client.register(Envelope.from_fields(registration.party), registration.token)

    def invite(self, request: Envelope) -> Invitation:
        return Invitation.from_fields(self.client._post(request.to_fields(), "invitations"))

    def deposit(self, upload: AssetUpload) -> None:
        self.client._post(upload.to_fields(), "assets")

    def propose(self, envelope: Envelope) -> Envelope:
        self.client._post(envelope.to_fields(), "contracts")
        return envelope

    def contract(self, digest: str) -> ContractView:
        return self.client.contract_view(digest)

    def add_signature(self, digest: str, upload: SignatureUpload) -> None:
        self.client._post(upload.to_fields(), "contracts", digest, "signatures")

    def close(self) -> None:
        self.client.close()


class _RemoteDesk:
    """The same for the desk."""

    def __init__(self, client: BrokerClient) -> None:
        self.client = client
        self.nonce, self.release = client.nonce, client.release
        self.settle, self.open_run = client.settle, client.open_run

    def checkpoint(self, envelope: Envelope) -> None:
        self.client._post(envelope.to_fields(), "checkpoints")


class RemoteWorld(World):
    """The same world around a broker in another process, which may die at any moment."""

    def __init__(self, folder: Path, target: str) -> None:
        super().__init__(folder, target, real_time)

    def start(self) -> None:
        """Nothing yet: :meth:`connect` says where the process is."""

    def connect(self, identity: dict[str, Any], token: str | None) -> BrokerClient:
        if hasattr(self, "broker"):
            self.broker.close()
        client = BrokerClient(BrokerIdentity.from_fields(identity), timeout=30)
        remote: Any = _RemoteBroker(client, token)
        desk: Any = _RemoteDesk(client)
        self.broker, self.desk = remote, desk
        return client


def _world(folder: Path, target: str, clock: Callable[[], datetime] | None = None) -> World:
    world = World(folder, target, clock)
    for name in ("hospital-a", "hospital-b", "clinic"):
        world.register(name)
    for owner in ("hospital-a", "hospital-b"):
        world.deposit(owner)
    return world


@pytest.fixture(scope="session")
def make_world() -> Callable[[Path], World]:
    """A world in a folder, closed by who asked for it."""
    return lambda folder: _world(folder, f"sqlite:///{folder}/broker.db")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Two hospitals with an asset each, and a clinic, at a broker on SQLite."""
    made = _world(tmp_path, f"sqlite:///{tmp_path}/broker.db")
    yield made
    made.close()


@pytest.fixture(scope="session")
def make_live_world() -> Callable[[Path], World]:
    """A world at the real time, closed by who asked for it."""
    return lambda folder: _world(folder, f"sqlite:///{folder}/broker.db", real_time)


@pytest.fixture
def live_world(tmp_path: Path) -> Iterator[World]:
    """The same at the real time, which clients over the network have."""
    made = _world(tmp_path, f"sqlite:///{tmp_path}/broker.db", real_time)
    yield made
    made.close()


@pytest.fixture
def remote_world(tmp_path: Path, store_target: str) -> Iterator[RemoteWorld]:
    """Nobody yet, on SQLite and on PostgreSQL."""
    made = RemoteWorld(tmp_path, store_target)
    yield made
    if hasattr(made, "broker"):
        made.close()


@pytest.fixture
def any_world(tmp_path: Path, store_target: str) -> Iterator[World]:
    """The same, once on SQLite and once on PostgreSQL."""
    made = _world(tmp_path, store_target)
    yield made
    made.close()


@pytest.fixture
def empty_world(tmp_path: Path) -> Iterator[World]:
    """A broker that nobody has registered at."""
    made = World(tmp_path, f"sqlite:///{tmp_path}/broker.db")
    yield made
    made.close()


@pytest.fixture(scope="session")
def make_terms() -> Callable[..., dict[str, Any]]:
    return terms


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., dict[str, Any]]:
    return recipe


@pytest.fixture
def refused(world: World) -> Callable[[Callable[[], object]], CenacleError]:
    """Run what must fail, and check that nothing at all was changed by it."""

    def run(attempt: Callable[[], object]) -> CenacleError:
        before = world.state()
        with pytest.raises(CenacleError) as caught:
            attempt()
        assert world.state() == before
        return caught.value

    return run
