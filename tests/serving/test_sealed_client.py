"""What a sealed client makes of servers, honest and other; and that it asks again when it may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cenacle.attestation.simulated import InstallationKey, SimulatedAttester
from cenacle.broker.messages import ContractView
from cenacle.broker.rules import expected_program
from cenacle.crypto import HpkePrivateKey, SigningKey
from cenacle.documents.base import b64
from cenacle.documents.dsse import Envelope
from cenacle.documents.serving import ServeJob
from cenacle.enclave.client_evidence import attest_to_client
from cenacle.enclave.sealed_query import open_query, read_query, seal_answer
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.errors import (
    CenacleError,
    DataError,
    EvidenceError,
    InputError,
    ProofError,
    RefusedError,
    SealError,
    SignatureError,
    UnavailableError,
    VerificationError,
)
from cenacle.serving.backend import QueryError, enclave_gone
from cenacle.serving.client import Client, SealedClient
from cenacle.serving.deployment import Deployment, Served
from cenacle.serving.front import Front
from tests.support.house import House
from tests.support.serving_house import Model, make_model, seal_tail
from tests.support.serving_world import FakeTail, World

X = np.ones((2, 8), np.float32)
MEASURED = {"package": "sha256:" + "ab" * 32}


class Enclave(FakeTail):
    """A tail that attests and opens sealed queries as an enclave does, without one."""

    def __init__(self, agreed: Agreed, front: Front) -> None:
        super().__init__(contract=agreed.digest)
        object.__setattr__(self._ready, "inputs", front.outputs)
        self.agreed = agreed
        self.measured = {**MEASURED, "program": agreed.program}
        self.key, self.signing = HpkePrivateKey.generate(), SigningKey.generate()
        self.answers: list[CenacleError] = []
        self.tickets: list[Any] = []
        self.alter: Callable[[bytes], bytes] = bytes
        self.shown_key: bytes | None = None
        self.nonce: bytes | None = None

    async def attest(self, nonce: bytes) -> bytes:
        keys = (self.key.public_key.raw, self.signing.verify_key.raw)
        shown = attest_to_client(
            SimulatedAttester(self.agreed.installation),
            self.nonce or nonce,
            self.agreed.digest,
            keys,
            self.measured,
            (),
        ).to_fields()
        if self.shown_key is not None:
            shown["hpke_key"] = b64(self.shown_key)
        return json.dumps(shown).encode()

    async def sealed(self, query: bytes) -> bytes:
        try:
            plain, answer_key = open_query(self.key, self.agreed.digest, query)
        except SealError as error:
            raise QueryError("malformed", error) from None
        found = read_query(plain)
        self.tickets.append(found.ticket)
        answer: Tensors | CenacleError = {"y": found.tensors["b"] @ self.agreed.model.weights}
        if self.answers:
            answer = self.answers.pop(0)
        return self.alter(seal_answer(answer_key, answer))


@dataclass(frozen=True)
class Agreed:
    """A contract that serves a model, and what its enclave would show."""

    model: Model
    digest: str
    view: ContractView
    job: ServeJob
    program: str
    installation: InstallationKey


@pytest.fixture(scope="module")
def agreed(house: House, tmp_path_factory: pytest.TempPathFactory) -> Agreed:
    model = make_model(tmp_path_factory.mktemp("model"))
    tail = seal_tail(house, model)
    installation = house.operator.installation()
    reference = {name: [value] for name, value in MEASURED.items()}
    reference["installation"] = [installation.measurement]
    contract = house.contract(
        {"net": tail},
        {
            "type": "serve",
            "model": "net",
            "front": model.front_digest,
            "outputs": {"form": "scores"},
        },
        {"usage": "metrics"},
        enclave={"reference": {"simulated": reference}},
    )
    digest = house.agree(contract)
    assert isinstance(contract.job, ServeJob)
    program = expected_program(contract, {"net": tail.asset})
    view = house.client.contract_view(digest)
    return Agreed(model, digest, view, contract.job, program, installation)


class Server:
    """The real HTTP server before the played enclave."""

    def __init__(self, agreed: Agreed) -> None:
        front = Front.open(agreed.model.front, agreed.model.front_digest, threads=1)
        self.enclave = Enclave(agreed, front)
        self.agreed = agreed
        self.world = World()
        self.deploy(agreed.view, front)

    def deploy(self, view: ContractView, front: Front) -> None:
        served = Served(self.agreed.digest, self.agreed.job, view)

        async def begin() -> None:
            self.world.app.current = Deployment(served, self.enclave, front)

        self.world.loop.run(begin())

    def show(self, **fields: Any) -> None:
        """Show clients other documents than the contract's own."""
        assert self.world.app.current is not None
        view = self.agreed.view.model_copy(update=fields)
        served = Served(self.agreed.digest, self.agreed.job, view)
        self.world.app.current.served = served

    def client(self, **options: Any) -> SealedClient:
        given = {"front": self.agreed.model.front, "development": True, "timeout": 10.0, **options}
        return SealedClient(self.world.url, self.agreed.digest, **given)


@pytest.fixture
def server(agreed: Agreed) -> Iterator[Server]:
    made = Server(agreed)
    yield made
    made.world.close()


def test_a_sealed_query(server: Server) -> None:
    with server.client() as client:
        found = client.infer({"x": X})
        np.testing.assert_allclose(found["y"], server.agreed.model.outputs(X), rtol=1e-5)
        assert client.metadata()["name"] == "net"
        assert server.enclave.tickets == [None]


def test_simulated_evidence_is_refused_by_default(server: Server) -> None:
    client = server.client(development=False)
    with client, pytest.raises(EvidenceError, match="does not accept"):
        client.infer({"x": X})
    assert server.enclave.tickets == []


def _swapped(server: Server) -> None:
    server.enclave.shown_key = HpkePrivateKey.generate().public_key.raw


def _replayed(server: Server) -> None:
    server.enclave.nonce = bytes(32)


def _other_code(server: Server) -> None:
    server.enclave.measured["package"] = "sha256:" + "cd" * 32


def _other_job(server: Server) -> None:
    server.enclave.measured["program"] = "sha256:" + "cd" * 32


def _unsigned(server: Server) -> None:
    envelope = {**server.agreed.view.contract, "signatures": []}
    server.show(contract=envelope)


def _stranger(server: Server) -> None:
    stranger = SigningKey.generate()
    envelope = Envelope.from_fields(server.agreed.view.contract).signed_by(stranger)
    server.show(contract=envelope.to_fields())


def _missing_party(server: Server) -> None:
    server.show(parties=server.agreed.view.parties[:1])


def _missing_manifest(server: Server) -> None:
    server.show(assets={})


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (_swapped, EvidenceError),
        (_replayed, EvidenceError),
        (_other_code, EvidenceError),
        (_other_job, EvidenceError),
        (_unsigned, CenacleError),
        (_stranger, CenacleError),
        (_missing_party, ProofError),
        (_missing_manifest, ProofError),
    ],
)
def test_nothing_is_sent_to_a_server_that_is_not_what_the_contract_demands(
    server: Server, attack: Callable[[Server], None], error: type[Exception]
) -> None:
    attack(server)
    with server.client() as client, pytest.raises(error) as caught:
        client.infer({"x": X})
    assert isinstance(caught.value, VerificationError | RefusedError | InputError | SignatureError)
    assert server.enclave.tickets == []


def test_another_contract_is_another_service(server: Server) -> None:
    with (
        SealedClient(
            server.world.url,
            "sha256:" + "00" * 32,
            front=server.agreed.model.front,
            development=True,
        ) as client,
        pytest.raises(ProofError, match="another contract"),
    ):
        client.infer({"x": X})


def test_the_front_is_the_contracts_own(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "front.onnx"
    other.write_bytes(server.agreed.model.front.read_bytes() + b"\x00")
    with server.client(front=other) as client, pytest.raises(VerificationError, match="front"):
        client.infer({"x": X})
    with server.client(front=None) as client, pytest.raises(InputError, match="has a front"):
        client.infer({"x": X})


def test_an_enclave_that_was_started_anew_proves_itself_again(server: Server) -> None:
    with server.client() as client:
        client.infer({"x": X})
        server.enclave.key = HpkePrivateKey.generate()
        client.infer({"x": X})
        server.enclave.key = HpkePrivateKey.generate()
        server.enclave.measured["package"] = "sha256:" + "cd" * 32
        with pytest.raises(EvidenceError):
            client.infer({"x": X})


def test_an_altered_answer_is_refused(server: Server) -> None:
    server.enclave.alter = lambda answer: answer[:-1] + bytes([answer[-1] ^ 1])
    with server.client() as client, pytest.raises(SealError, match="does not open"):
        client.infer({"x": X})


def test_what_the_enclave_refuses_is_raised_and_what_it_cannot_say_yet_is_asked_again(
    server: Server,
) -> None:
    server.enclave.answers = [DataError("rows of another shape")]
    with server.client() as client:
        with pytest.raises(DataError, match="another shape"):
            client.infer({"x": X})
        server.enclave.answers = [UnavailableError("the broker is away")] * 2
        assert "y" in client.infer({"x": X})
        assert len(server.enclave.tickets) == 4


def test_a_busy_service_is_asked_again() -> None:
    with World.opened() as world:
        tail = world.tail
        assert isinstance(tail, FakeTail)
        left = [enclave_gone(), enclave_gone()]

        def act(tensors: Tensors) -> Mapping[str, Any]:
            if left:
                raise left.pop()
            return {"y": tensors["x"]}

        tail.act = act
        with Client(world.url, "net") as client:
            x = np.ones((1, 4), np.float32)
            assert client.infer({"x": x})["y"].tolist() == x.tolist()
        assert len(tail.sent) == 3


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "https://127.0.0.1:1"])
def test_a_service_that_is_not_there(url: str) -> None:
    client = Client(url, "net", timeout=0.5)
    with client, pytest.raises(UnavailableError, match="cannot be reached"):
        client.infer({"x": np.ones((1, 4), np.float32)})


def test_a_ticket_and_its_key_go_together() -> None:
    with pytest.raises(InputError, match="go together"):
        Client("http://127.0.0.1:1", "net", key=SigningKey.generate())


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[1]", b"<html>", b'{"details": 3}', b'{"details": {"error": 7}}']
)
@pytest.mark.parametrize("status", [200, 418])
def test_answers_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int
) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=answer)

    client = Client("http://service", "net")
    client._http._http = httpx.Client(transport=httpx.MockTransport(handle))
    for call in (client.metadata, lambda: client.infer({"x": np.ones(1)})):
        with pytest.raises(CenacleError):
            call()
    client.close()
