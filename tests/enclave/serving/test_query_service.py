"""The service inside the enclave, with made-up models and desks: errors, batches, tickets, ends."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cenacle.crypto import HpkePrivateKey, SigningKey
from cenacle.cut.specs import TensorSpec
from cenacle.documents.base import b64
from cenacle.documents.dsse import Envelope
from cenacle.documents.serving import ServeJob
from cenacle.documents.ticket import Ticket, new_request, new_serial, sign_use
from cenacle.enclave.query_service import QueryService
from cenacle.enclave.sealed_query import open_answer, seal_query
from cenacle.enclave.serving_job import serve_queries
from cenacle.enclave.serving_link import ServingLink
from cenacle.enclave.serving_messages import (
    Attest,
    Drain,
    Evidence,
    Failure,
    Infer,
    Malformed,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.enclave.tensor_bytes import Tensors, input_digest
from cenacle.enclave.tickets import Presented
from cenacle.enclave.usage import Usage
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DataError,
    EnclaveError,
    InputError,
    RefusedError,
    UnavailableError,
)

CONTRACT = "sha256:" + "5a" * 32
X = TensorSpec("x", "F32", (None, 2))
Y = TensorSpec("y", "F32", (None, 2))
CANARY = 4711.25


def x(*rows: float) -> dict[str, Any]:
    return {"x": np.array([[row, -row] for row in rows], np.float32)}


class FakeModel:
    """Doubles its rows; fails where a row is negative."""

    def __init__(self, inputs: Sequence[TensorSpec] = (X,), outputs: Sequence[TensorSpec] = (Y,)):
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        self.gate.wait(30)
        self.batches.append(len(inputs["x"]))
        if (inputs["x"][:, 0] < 0).any():
            raise RuntimeError(f"canary {inputs['x']}")
        return {"y": inputs["x"] * np.float32(2)}


class FakeDesk:
    """Remembers what it was shown, and refuses as it is told to."""

    def __init__(self) -> None:
        self.seen: list[list[Presented]] = []
        self.failure: CenacleError | None = None
        self.refuse: Callable[[Presented], CenacleError | None] = lambda one: None

    def admit(self, presented: Sequence[Presented]) -> list[CenacleError | None]:
        self.seen.append(list(presented))
        return [self.refuse(one) for one in presented]


class Running:
    """A service whose answers arrive in a queue."""

    def __init__(
        self, model: FakeModel | None = None, desk: FakeDesk | None = None, **job: Any
    ) -> None:
        self.model = model or FakeModel()
        self.key = HpkePrivateKey.generate()
        self.usage = Usage()
        self.answers: queue.Queue[Any] = queue.Queue()
        fields = {"type": "serve", "model": "net", "outputs": {"form": "scores"}, **job}
        self.service = QueryService(
            self.model,
            ServeJob.from_fields({"max_batch": 4, "max_wait_ms": 0, **fields}),
            CONTRACT,
            self.key,
            self.answers.put,
            self.usage,
            desk,
        )
        self.error: CenacleError | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.service.serve()
        except CenacleError as error:
            self.error = error

    def answer(self) -> Any:
        return self.answers.get(timeout=30)

    def ask(self, message: Infer | Sealed) -> Any:
        self.service.accept(message)
        return self.answer()

    def ask_sealed(self, tensors: dict[str, Any], ticket: Any = None) -> dict[str, NDArray[Any]]:
        sealed, opener = seal_query(self.key.public_key, CONTRACT, tensors, ticket)
        answer = self.ask(Sealed(1, sealed))
        assert isinstance(answer, SealedResult)
        return open_answer(opener, answer.answer)

    def end(self) -> None:
        self.model.gate.set()
        self.service.drain()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def run(*arguments: Any, **options: Any) -> Running:
        made.append(Running(*arguments, **options))
        return made[-1]

    yield run
    for one in made:
        one.end()


def test_queries_are_answered_in_plain_and_sealed(running: Callable[..., Running]) -> None:
    here = running()
    answer = here.ask(Infer(7, x(1, 2)))
    assert isinstance(answer, Result)
    assert answer.id == 7
    np.testing.assert_array_equal(answer.tensors["y"], x(2, 4)["x"])
    np.testing.assert_array_equal(here.ask_sealed(x(3))["y"], x(6)["x"])
    assert here.usage.record().to_fields() == {"queries": 2, "rows": 3, "sealed": 1, "refused": 0}


def test_queries_that_wait_are_computed_together(running: Callable[..., Running]) -> None:
    model = FakeModel()
    model.gate.clear()
    here = running(model)
    for number in range(7):
        here.service.accept(Infer(number, x(number)))
    model.gate.set()
    found = {one.id: one.tensors["y"] for one in (here.answer() for _ in range(7))}
    assert {n: y[0, 0] for n, y in found.items()} == {n: 2 * n for n in range(7)}
    assert sum(model.batches) == 7
    assert max(model.batches) > 1


def test_a_query_that_fails_does_not_fail_the_others(running: Callable[..., Running]) -> None:
    model = FakeModel()
    model.gate.clear()
    here = running(model)
    here.service.accept(Infer(0, x(0)))
    for number, row in enumerate((1, -CANARY, 3), 1):
        here.service.accept(Infer(number, x(row)))
    sealed, opener = seal_query(here.key.public_key, CONTRACT, x(-CANARY))
    here.service.accept(Sealed(4, sealed))
    model.gate.set()
    found = {one.id: one for one in (here.answer() for _ in range(5))}
    assert [type(found[n]) for n in range(5)] == [Result, Result, Failure, Result, SealedResult]
    with pytest.raises(EnclaveError) as caught:
        open_answer(opener, found[4].answer)
    for error in (found[2].error, caught.value):
        assert error.what == "the model failed on this query"
        assert "4711" not in str(error.to_dict())
    assert here.ask(Infer(5, x(1))).tensors["y"][0, 0] == 2


@pytest.mark.parametrize("outputs", [{"y": np.zeros((9, 2), np.float32)}, {"y": None}, {}])
def test_a_model_that_gives_something_else_fails_the_query(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, outputs: Any
) -> None:
    model = FakeModel()
    model.gate.clear()
    here = running(model, outputs={"form": "label"})
    monkeypatch.setattr(model, "run", lambda _: model.gate.wait(30) and outputs)
    here.service.accept(Infer(1, x(1)))
    here.service.accept(Infer(2, x(1)))
    here.service.accept(Infer(3, x(1)))
    model.gate.set()
    assert len({here.answer().id for _ in range(3)}) == 3
    monkeypatch.undo()
    assert isinstance(here.ask(Infer(4, x(1))), Result)


def test_only_what_the_policy_allows_leaves(running: Callable[..., Running]) -> None:
    here = running(outputs={"form": "label"})
    assert list(here.ask(Infer(1, x(CANARY))).tensors) == ["y.label"]
    assert list(here.ask_sealed(x(CANARY))) == ["y.label"]
    with pytest.raises(InputError, match="has no labels"):
        Running(FakeModel(outputs=[TensorSpec("y", "F32", (None,))]), outputs={"form": "label"})


def test_a_model_without_a_batch_axis_gets_one_query_at_a_time(
    running: Callable[..., Running],
) -> None:
    model = FakeModel([TensorSpec("x", "F32", (1, 2))], [TensorSpec("y", "F32", (1, 2))])
    model.gate.clear()
    here = running(model)
    for number in range(4):
        here.service.accept(Infer(number, x(number)))
    model.gate.set()
    assert sorted(here.answer().id for _ in range(4)) == [0, 1, 2, 3]
    assert model.batches == [1] * 4


# ---------------------------------------------------------------------- limits


def test_errors_in_plain_are_fixed_words(running: Callable[..., Running]) -> None:
    here = running(sealed_only=True)
    refused = here.ask(Infer(1, x(CANARY)))
    assert (refused.id, refused.code) == (1, "sealed-only")
    sealed, _ = seal_query(here.key.public_key, CONTRACT, x(CANARY))
    bad = here.ask(Sealed(2, sealed[:-1]))
    assert (bad.code, bad.error.what) == ("malformed", "a query cannot be read")
    here.service.refuse(None)
    assert here.answer().id is None
    other = running()
    refusals: tuple[dict[str, Any], ...] = (
        {"canary": np.zeros(1)},
        {"x": np.full((1, 3), CANARY, np.float32)},
        x(*[CANARY] * 5),
    )
    for number, tensors in enumerate(refusals):
        failure = other.ask(Infer(number, tensors))
        assert isinstance(failure, Failure)
        assert "canary" not in str(failure.error.to_dict())
        assert "4711" not in str(failure.error.to_dict())
    with pytest.raises(DataError, match="too many rows"):
        other.ask_sealed(x(*[1.0] * 5))


def test_more_than_may_wait_is_told_to_ask_later_and_room_comes_back(
    running: Callable[..., Running],
) -> None:
    model = FakeModel()
    model.gate.clear()
    here = running(model)
    most = here.service.max_waiting
    for number in range(most):
        here.service.accept(Infer(number, x(number)))
    busy = here.ask(Infer(most, x(1)))
    assert (busy.id, busy.code) == (most, "busy")
    assert isinstance(busy.error, UnavailableError)
    model.gate.set()
    assert {here.answer().id for _ in range(most)} == set(range(most))
    for number in range(2 * most):  # nothing of the room is lost, whatever the answer is
        assert here.ask(Infer(number, x(-1 if number % 2 else 1))).id == number
        here.ask(Infer(number, {}))
        here.ask(Sealed(number, b"x"))


def test_bytes_that_wait_are_bounded_too(running: Callable[..., Running]) -> None:
    class Waiting(FakeModel):
        def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
            self.gate.wait(30)
            return {}

    model = Waiting([TensorSpec("x", "U8", (None, None))])
    model.gate.clear()
    here = running(model)
    half = np.broadcast_to(np.zeros(1, np.uint8), (1, 129 << 20))
    here.service.accept(Infer(0, {"x": half}))
    busy = here.ask(Infer(1, {"x": half}))
    assert (busy.id, busy.code) == (1, "busy")


def test_the_largest_query_fits_a_frame(running: Callable[..., Running]) -> None:
    here = running(max_batch=64)
    most = x(*range(64))
    sealed, _ = seal_query(here.key.public_key, CONTRACT, most, {"ticket": "t" * 5000})
    assert len(sealed) <= here.service.max_payload
    assert here.ask(Sealed(1, sealed)).id == 1


# ---------------------------------------------------------------------- tickets


class Client:
    def __init__(self) -> None:
        self.key = SigningKey.generate()
        ticket = Ticket(
            issuer="lab",
            contract=CONTRACT,
            serial=new_serial(),
            client=b64(self.key.verify_key.raw),
            queries=10,
            not_before="2020-01-01T00:00:00Z",
            expires="2036-01-01T00:00:00Z",
        )
        self.ticket = Envelope.sign(ticket, SigningKey.generate())

    def use(self, tensors: dict[str, Any]) -> dict[str, Any]:
        use = sign_use(
            self.ticket,
            self.key,
            request=new_request(),
            rows=len(tensors["x"]),
            input_digest=input_digest(tensors),
        )
        return use.to_fields()


def test_the_desk_sees_what_really_came_before_an_answer_leaves(
    running: Callable[..., Running],
) -> None:
    desk, client = FakeDesk(), Client()
    here = running(desk=desk, tickets="lab")
    query = x(1, 2)
    use = client.use(query)
    assert isinstance(here.ask(Infer(1, query, use)), Result)
    here.ask_sealed(query, use)
    for (one,) in desk.seen:
        assert (one.rows, one.input) == (2, input_digest(query))
        assert one.use.to_fields() == use
    # The use says something else than what came: that is for the desk, which is shown both.
    here.ask(Infer(2, x(3), use))
    assert (desk.seen[-1][0].rows, desk.seen[-1][0].input) == (1, input_digest(x(3)))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError("a ticket has expired", found="canary"), "ticket"),
        (ConflictError("asked before with another input", found="canary"), "ticket"),
        (UnavailableError("the broker is away", found="canary"), "busy"),
    ],
    ids=["refused", "conflict", "away"],
)
def test_without_a_burned_ticket_no_answer_leaves(
    running: Callable[..., Running], error: CenacleError, code: str
) -> None:
    desk, client = FakeDesk(), Client()
    here = running(desk=desk, tickets="lab")
    desk.refuse = lambda _: error
    refused = here.ask(Infer(1, x(1), client.use(x(1))))
    assert (refused.code, refused.error.what) == (code, error.what)
    assert "canary" not in str(refused.error.to_dict())
    with pytest.raises(type(error)) as caught:
        here.ask_sealed(x(1), client.use(x(1)))
    assert caught.value.found == "canary"  # which the client may know
    assert here.usage.record().queries == 0


@pytest.mark.parametrize("use", [None, {}, {"canary": 1}, {"ticket": {}, "rows": -1}], ids=str)
def test_a_query_without_the_use_of_a_ticket_is_not_computed(
    running: Callable[..., Running], use: Any
) -> None:
    desk = FakeDesk()
    here = running(desk=desk, tickets="lab")
    refused = here.ask(Infer(1, x(1), use))
    assert refused.code == "ticket"
    assert "canary" not in str(refused.error.to_dict())
    with pytest.raises(CenacleError):
        here.ask_sealed(x(1), use)
    assert here.model.batches == []
    assert desk.seen == []


def test_one_refused_ticket_does_not_refuse_the_others_and_a_failed_query_burns_none(
    running: Callable[..., Running],
) -> None:
    desk, client, model = FakeDesk(), Client(), FakeModel()
    model.gate.clear()
    here = running(model, desk, tickets="lab")
    spent = client.use(x(2))
    desk.refuse = lambda one: RefusedError("spent") if one.use.request == spent["request"] else None
    for number, (row, use) in enumerate(
        ((1, client.use(x(1))), (2, spent), (-3, client.use(x(-3))), (4, client.use(x(4))))
    ):
        here.service.accept(Infer(number, x(row), use))
    model.gate.set()
    found = {one.id: one for one in (here.answer() for _ in range(4))}
    assert [getattr(found[n], "code", "") for n in range(4)] == ["", "ticket", "failed", ""]
    assert sum(len(seen) for seen in desk.seen) == 3


@pytest.mark.parametrize("ticketed", [False, True], ids=["free", "sold"])
def test_an_answer_that_has_no_form_on_the_wire_is_a_failure_of_its_query(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, ticketed: bool
) -> None:
    desk, client = (FakeDesk() if ticketed else None), Client()
    here = running(desk=desk, **({"tickets": "lab"} if ticketed else {}))
    empty = {"y": np.zeros((1, 0), np.float32)}

    # Plain messages are encoded by whoever sends them.
    def send(message: Any) -> None:
        encode(message)
        here.answers.put(message)

    monkeypatch.setattr(here.service, "_send", send)
    monkeypatch.setattr(here.model, "run", lambda _: empty)
    assert here.ask(Infer(1, x(1), client.use(x(1)))).code == "failed"
    with pytest.raises(EnclaveError, match="the model failed"):
        here.ask_sealed(x(1), client.use(x(1)))


def test_a_desk_that_fails_admits_nobody_and_the_service_goes_on(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, client = FakeDesk(), Client()
    here = running(desk=desk, tickets="lab")

    def fail(_: Any) -> Any:
        raise RuntimeError("canary")

    monkeypatch.setattr(desk, "admit", fail)
    assert here.ask(Infer(1, x(1), client.use(x(1)))).code == "busy"
    monkeypatch.setattr(desk, "admit", lambda presented: [])
    assert here.ask(Infer(2, x(1), client.use(x(1)))).code == "busy"
    monkeypatch.undo()
    assert isinstance(here.ask(Infer(3, x(1), client.use(x(1)))), Result)


def test_a_desk_that_another_enclave_replaced_ends_the_service(
    running: Callable[..., Running],
) -> None:
    desk, client = FakeDesk(), Client()
    here = running(desk=desk, tickets="lab")
    assert isinstance(here.ask(Infer(1, x(1), client.use(x(1)))), Result)
    desk.failure = ConflictError("another enclave went on")
    desk.refuse = lambda _: desk.failure
    assert here.ask(Infer(2, x(1), client.use(x(1)))).code == "ticket"
    here.end()
    assert here.error is desk.failure
    assert here.ask(Infer(3, x(1), client.use(x(1)))).code == "draining"


# ---------------------------------------------------------------------- the end


def test_drained_it_answers_what_waits_and_takes_no_more(
    running: Callable[..., Running],
) -> None:
    model = FakeModel()
    model.gate.clear()
    here = running(model)
    here.service.accept(Infer(1, x(1)))
    here.service.accept(Infer(2, x(1)))
    here.service.drain()
    late = here.ask(Infer(3, x(1)))
    assert (late.id, late.code) == (3, "draining")
    model.gate.set()
    assert {here.answer().id, here.answer().id} == {1, 2}


def test_abandoned_it_forgets_what_waits_and_burns_nothing_for_it(
    running: Callable[..., Running],
) -> None:
    desk, client, model = FakeDesk(), Client(), FakeModel()
    model.gate.clear()
    here = running(model, desk, tickets="lab")
    for number in range(6):
        here.service.accept(Infer(number, x(1), client.use(x(1))))
    here.service.abandon()
    here.end()
    assert len(model.batches) <= 1
    assert desk.seen == []
    assert here.answers.empty()


class Wire:
    """A host at the other end of a real socket."""

    def __init__(self, evidence: Callable[[bytes], bytes] = lambda nonce: nonce) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        ours.settimeout(30)
        self._decoder = Decoder("from-enclave", 1 << 20)
        self._found: list[Any] = []
        self.model, self.usage = FakeModel(), Usage()
        link = ServingLink(theirs, 1 << 20)
        job = {"type": "serve", "model": "net", "outputs": {"form": "scores"}}
        service = QueryService(
            self.model,
            ServeJob.from_fields(job),
            CONTRACT,
            HpkePrivateKey.generate(),
            link.send,
            self.usage,
        )

        def serve() -> None:
            serve_queries(service, link, evidence)
            link.close()

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def send(self, *messages: Any) -> None:
        for message in messages:
            raw = message if isinstance(message, bytes) else b"".join(encode(message))
            self.socket.sendall(raw)

    def receive(self) -> Any:
        while not self._found:
            if not (data := self.socket.recv(1 << 16)):
                return None
            self._found += self._decoder.feed(data)
        return self._found.pop(0)

    def ended(self) -> bool:
        self.thread.join(30)
        return not self.thread.is_alive()

    def close(self) -> None:
        self.socket.close()
        self.model.gate.set()
        assert self.ended()


@pytest.fixture
def wires() -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def connect(*arguments: Any) -> Wire:
        made.append(Wire(*arguments))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def test_over_a_socket_until_it_is_drained(wires: Callable[..., Wire]) -> None:
    wire = wires()
    large = {"x": np.ones((30, 2), np.float32)}
    wire.send(Infer(1, x(1)), Infer(2, large), Attest(3, bytes(32)), Drain())
    found = {}
    while (message := wire.receive()) is not None:
        found[message.id] = message
    assert set(found) == {1, 2, 3}
    assert isinstance(found[3], Evidence)
    assert bytes(found[3].document) == bytes(32)
    assert wire.ended()


@pytest.mark.parametrize("end", ["close", "garbage", "half a frame", "reset"])
def test_a_host_that_goes_away_in_any_way_ends_the_service(
    wires: Callable[..., Wire], end: str
) -> None:
    wire = wires()
    wire.model.gate.clear()
    wire.send(*(Infer(number, x(number)) for number in range(20)))
    if end == "garbage":
        wire.send(b"\xff" * 100)
    elif end == "half a frame":
        wire.send(b"".join(map(bytes, encode(Infer(1, x(1)))))[:-1])
        wire.socket.shutdown(socket.SHUT_WR)
    elif end == "reset":
        wire.socket.shutdown(socket.SHUT_RDWR)
    else:
        wire.socket.close()
    wire.model.gate.set()
    assert wire.ended()
    assert sum(wire.model.batches) <= 20


def test_frames_that_cannot_be_read_are_answered_and_followed(wires: Callable[..., Wire]) -> None:
    wire = wires()
    bad = b'\0\0\0\x0a\0\0\0\0\0\0\0\x03{"id":  5}abc'
    wire.send(bad, Infer(6, x(1)), b"\0\0\0\x02\0\0\0\0\0\0\0\0[]", Drain())
    found = [wire.receive() for _ in range(3)]
    assert [
        (one.id, getattr(one, "code", "")) for one in sorted(found, key=lambda m: m.id or 0)
    ] == [
        (None, "malformed"),
        (5, "malformed"),
        (6, ""),
    ]
    assert not any(isinstance(one, Malformed) for one in found)
    assert wire.ended()


def test_a_host_that_reads_nothing_stops_nobody_but_itself(wires: Callable[..., Wire]) -> None:
    wire = wires()
    wire.send(*(Infer(n, {"x": np.ones((30, 2), np.float32)}) for n in range(300)))
    wire.socket.close()
    assert wire.ended()


def test_evidence_is_made_at_a_bounded_rate_and_a_failure_is_not_the_end(
    wires: Callable[..., Wire],
) -> None:
    calls: list[bytes] = []

    def evidence(nonce: bytes) -> bytes:
        calls.append(nonce)
        if nonce[0] == 1:
            raise RuntimeError("canary")
        return b"{}"

    wire = wires(evidence)
    wire.send(*(Attest(number, bytes([number]) * 32) for number in range(60)))
    found = {one.id: one for one in (wire.receive() for _ in range(60))}
    assert isinstance(found[0], Evidence)
    assert isinstance(found[1], Failure)
    assert found[1].error.what == "the enclave cannot make evidence now"
    assert found[1].code == "busy"
    busy = [one for one in found.values() if getattr(one, "code", "") == "busy"]
    assert len(busy) > 20
    assert len(calls) == 60 - len(busy) + 1
    wire.send(Drain())
    assert wire.receive() is None
    assert wire.ended()
