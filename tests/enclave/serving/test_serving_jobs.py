"""A model that is served from a real sandboxed enclave, from the contract to the receipt."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.broker.receipts import read_bundle
from cenacle.crypto import HpkePrivateKey, HpkePublicKey, SigningKey
from cenacle.documents.base import b64, parse_json, unb64
from cenacle.documents.contract import Contract
from cenacle.documents.dsse import Envelope
from cenacle.documents.ticket import Ticket, new_request, new_serial, sign_use
from cenacle.enclave.client_evidence import ClientEvidence, verify_for_client
from cenacle.enclave.sealed_query import open_answer, seal_query
from cenacle.enclave.serving_messages import (
    Attest,
    Drain,
    Evidence,
    Failure,
    Infer,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.tensor_bytes import input_digest
from cenacle.errors import (
    DataError,
    EvidenceError,
    RefusedError,
    SealError,
)
from tests.support.house import House
from tests.support.house import Sealed as SealedAsset
from tests.support.served_enclave import WIDTH, ServedEnclave, serving_plan, tiny_tail, weights

pytestmark = pytest.mark.processes

VERIFIERS = VerifierSet.of_development(SimulatedVerifier())


@pytest.fixture(scope="module")
def model(house: House, tmp_path_factory: pytest.TempPathFactory) -> SealedAsset:
    return house.seal(
        "lab",
        tiny_tail(tmp_path_factory.mktemp("tail") / "tail.safetensors"),
        type_="model",
        outputs=["metrics"],
        recipients=["clinic", "lab"],
        purposes=["inference"],
        serving={"outputs": {"form": "top-k", "k": 2, "decimals": 2}, "tickets": False},
    )


def contract(house: House, model: SealedAsset, **job: Any) -> Contract:
    return house.contract(
        {"net": model},
        {
            "type": "serve",
            "model": "net",
            "outputs": {"form": "top-k", "k": 2, "decimals": 2},
            "max_batch": 8,
            **job,
        },
        {"usage": "metrics"},
        purpose="inference",
        enclave=house.enclave(serving_plan()),
    )


def expected(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    matrix, bias = weights()
    z = np.exp(x @ matrix + bias)
    y = z / z.sum(axis=-1, keepdims=True)
    labels = np.argsort(-y, axis=-1)[:, :2]
    return labels, np.round(np.take_along_axis(y, labels, -1).astype(np.float64), 2)


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)}


def attested(house: House, served: ServedEnclave, agreed: Contract, digest: str) -> HpkePublicKey:
    nonce = bytes(range(32))
    answer = served.host.ask(Attest(1, nonce))
    assert isinstance(answer, Evidence)
    shown = ClientEvidence.from_fields(parse_json(bytes(answer.document)))
    found = verify_for_client(shown, nonce, digest, agreed, {}, VERIFIERS, datetime.now(UTC))
    ready = served.host.ready
    assert (found.hpke_key.raw, found.signing_key.raw) == (ready.hpke_key, ready.signing_key)
    # Neither another challenge, nor another contract or key, nor another measurement.
    for changed, challenge, under in (
        (shown, bytes(32), digest),
        (shown, nonce, "sha256:" + "0" * 64),
        (
            shown.model_copy(update={"hpke_key": b64(HpkePrivateKey.generate().public_key.raw)}),
            nonce,
            digest,
        ),
        (shown.model_copy(update={"signing_key": b64(bytes(32))}), nonce, digest),
    ):
        with pytest.raises(EvidenceError):
            verify_for_client(changed, challenge, under, agreed, {}, VERIFIERS, datetime.now(UTC))
    fields = agreed.to_fields()
    other = Contract.from_fields({**fields, "job": {**fields["job"], "max_batch": 9}})
    with pytest.raises(EvidenceError, match="program"):
        verify_for_client(shown, nonce, digest, other, {}, VERIFIERS, datetime.now(UTC))
    return found.hpke_key


def test_a_model_is_served_from_evidence_to_receipt(house: House, model: SealedAsset) -> None:
    agreed = contract(house, model)
    digest = house.agree(agreed)
    with ServedEnclave.launched(house, digest, {"net": model}) as served:
        host, ready = served.host, served.host.ready
        assert ready.contract == digest
        assert [(s.name, s.dtype, s.shape) for s in ready.inputs] == [("x", "F32", (None, WIDTH))]
        assert [(s.name, s.dtype, s.shape) for s in ready.outputs] == [
            ("y.label", "I64", (None, 2)),
            ("y.score", "F32", (None, 2)),
        ]
        key = attested(house, served, agreed, digest)

        # In plain, many at once, answered by number and each with its own rows.
        queries = {number: rows(1 + number % 3, seed=number) for number in range(20)}
        host.send(*(Infer(number, query) for number, query in queries.items()))
        answers = host.answers(20)
        for number, query in queries.items():
            labels, scores = expected(query["x"])
            answer = answers[number]
            assert isinstance(answer, Result)
            np.testing.assert_array_equal(answer.tensors["y.label"], labels)
            np.testing.assert_allclose(answer.tensors["y.score"], scores, atol=1e-6)

        # Sealed: the same query again gives the same answer, and different bytes.
        query = rows(2, seed=99)
        sealed, opener = seal_query(key, digest, query)
        first, again = host.ask(Sealed(50, sealed)), host.ask(Sealed(51, sealed))
        assert isinstance(first, SealedResult)
        assert bytes(first.answer) != bytes(again.answer)
        for one in (first, again):
            found = open_answer(opener, one.answer)
            np.testing.assert_array_equal(found["y.label"], expected(query["x"])[0])

        # What cannot be answered gets an error, in words that never change, and harms nobody.
        for bad in (
            {"x": np.zeros((1, 5), np.float32)},
            {"x": np.zeros((1, WIDTH), np.float64)},
            {"z": np.zeros((1, WIDTH), np.float32)},
            {},
        ):
            refused = host.ask(Infer(60, bad))
            assert isinstance(refused, Failure)
            assert (refused.id, refused.code) == (60, "input")
            assert refused.error.what == "the query's tensors are not the model's"
        large = host.ask(Infer(61, rows(9)))
        assert (large.id, large.code) == (61, "too-large")
        altered = host.ask(Sealed(62, sealed[:-1] + bytes([sealed[-1] ^ 1])))
        assert (altered.id, altered.code) == (62, "malformed")
        stranger, _ = seal_query(HpkePrivateKey.generate().public_key, digest, query)
        assert host.ask(Sealed(63, stranger)).code == "malformed"
        wrong, opener = seal_query(key, digest, {"x": np.zeros((1, 5), np.float32)})
        told = host.ask(Sealed(64, wrong))
        assert isinstance(told, SealedResult)
        with pytest.raises(DataError, match="of another type or shape"):
            open_answer(opener, told.answer)
        host.send_raw(bytes.fromhex("000000040000000000000000") + b"nope")
        unread = host.receive()
        assert isinstance(unread, Failure)
        assert (unread.id, unread.code) == (None, "malformed")

        # Drain: what waits is answered, and nothing more is taken.
        host.send(Infer(70, rows(1)), Drain())
        assert isinstance(host.receive(), Result)
        outcome = served.end(drain=False)
    assert outcome.stages == ["attesting", "keys", "running", "outputs", "receipt"]
    assert outcome.progress == []
    receipt = house.verify(outcome.receipt).receipt
    assert receipt.serving is not None
    assert receipt.serving.to_fields() == {"queries": 23, "rows": 44, "sealed": 2, "refused": 9}
    usage = house.metrics(outcome, "usage")
    assert usage["refused"] == {"input": 5, "malformed": 3, "too-large": 1}
    assert (usage["plain"], usage["sealed"], usage["attestations"]) == (21, 2, 1)
    assert 3 < usage["batches"] <= 23
    # The key that vouched for the answers signed the receipt.
    bundle = read_bundle(outcome.receipt.read_bytes())
    assert unb64(bundle.binding.signing_key) == ready.signing_key
    assert unb64(bundle.binding.hpke_key) != ready.hpke_key
    # Nothing of queries or weights is on the host's disk.
    for path in outcome.out.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert weights()[0].tobytes()[:8] not in data
            assert rows(1)["x"].tobytes()[:8] not in data


@pytest.fixture(scope="module")
def sold(house: House, tmp_path_factory: pytest.TempPathFactory) -> SealedAsset:
    return house.seal(
        "lab",
        tiny_tail(tmp_path_factory.mktemp("tail") / "tail.safetensors"),
        type_="model",
        outputs=["metrics"],
        recipients=["clinic", "lab"],
        purposes=["inference"],
        serving={"outputs": {"form": "label"}, "tickets": True},
    )


@pytest.mark.parametrize(
    "again",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["in one run", "across runs"],
)
def test_queries_that_are_sold_are_sealed_paid_once_and_counted(
    house: House, sold: SealedAsset, tmp_path: Path, again: bool
) -> None:
    agreed = contract(house, sold, outputs={"form": "label"}, tickets="lab", sealed_only=True)
    digest = house.agree(agreed)
    client = SigningKey.generate()
    ticket = Envelope.sign(
        Ticket(
            issuer="lab",
            contract=digest,
            serial=new_serial(),
            client=b64(client.verify_key.raw),
            queries=5,
            not_before="2020-01-01T00:00:00Z",
            expires="2036-01-01T00:00:00Z",
        ),
        house.parties["lab"].signing_key,
    )
    tickets = tmp_path / "tickets"
    tickets.mkdir()

    def ask(served: ServedEnclave, count: int, request: bytes, *, seed: int = 0) -> Any:
        query = rows(count, seed=seed)
        use = sign_use(
            ticket, client, request=request, rows=count, input_digest=input_digest(query)
        )
        key = HpkePublicKey(served.host.ready.hpke_key)
        sealed, opener = seal_query(key, digest, query, use.to_fields())
        answer = served.host.ask(Sealed(1, sealed))
        assert isinstance(answer, SealedResult)
        labels = open_answer(opener, answer.answer)["y.label"]
        np.testing.assert_array_equal(labels, expected(query["x"])[0][:, 0])
        return labels

    lost = new_request()
    with ServedEnclave.launched(house, digest, {"net": sold}, tickets=tickets) as served:
        host = served.host
        plain = host.ask(Infer(1, rows(1)))
        assert (plain.code, plain.error.what) == (
            "sealed-only",
            "the contract allows sealed queries alone",
        )
        key = HpkePublicKey(host.ready.hpke_key)
        unpaid, opener = seal_query(key, digest, rows(1))
        with pytest.raises(RefusedError, match="demands the use of a ticket"):
            open_answer(opener, host.ask(Sealed(2, unpaid)).answer)
        ask(served, 3, lost)
        ask(served, 3, lost)  # an answer that was lost, asked for again: not paid twice
        with pytest.raises(RefusedError, match="not enough queries left"):
            ask(served, 3, new_request())
        # A host that goes away ends the service as one that drains it, without an answer.
        outcome = served.end(drain=False)
    usage = house.metrics(outcome, "usage")
    assert list(usage["tickets"]["burned"].values()) == [3]
    assert usage["refused"] == {"sealed-only": 1, "ticket": 2}
    found = house.verify(outcome.receipt).receipt.serving
    assert found is not None
    assert (found.queries, found.rows) == (2, 6)

    if not again:
        return
    # Another run, another enclave, the same tickets; and the folder cannot be exchanged.
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        pytest.raises(SealError, match="journal"),
        ServedEnclave.launched(house, digest, {"net": sold}, tickets=empty),
    ):
        pass
    resume = house.open_run(digest)
    with ServedEnclave.launched(
        house, digest, {"net": sold}, tickets=tickets, resume=resume
    ) as served:
        ask(served, 2, new_request(), seed=1)
        with pytest.raises(RefusedError, match="not enough queries left"):
            ask(served, 1, new_request())
        outcome = served.end()
    assert list(house.metrics(outcome, "usage")["tickets"]["burned"].values()) == [5]
