"""The host's end of the connection to an enclave: many requests, and every way it can end."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cenacle.cut.specs import TensorSpec
from cenacle.enclave.serving_messages import (
    Attest,
    Drain,
    Evidence,
    Failure,
    Infer,
    Ready,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.errors import CenacleError, EnclaveError, InputError
from cenacle.serving.backend import QueryError
from cenacle.serving.link import EnclaveLink, LinkListener
from tests.support.serving_world import CONTRACT, Loop

READY = Ready(
    contract=CONTRACT,
    inputs=(TensorSpec("x", "F32", (None, 2)),),
    outputs=(TensorSpec("y", "F32", (None, 2)),),
    hpke_key=b"h",
    signing_key=b"s",
    max_batch=4,
    max_payload=1 << 23,
    max_waiting=3,
)


class Enclave:
    """An enclave's end, played by the test."""

    def __init__(self, path: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._decoder = Decoder("to-enclave", 1 << 24)
        self._waiting: list[Any] = []

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.socket.sendall(b"".join(bytes(part) for part in encode(message)))

    def next(self) -> Any:
        while not self._waiting:
            data = self.socket.recv(1 << 20)
            assert data, "the host closed the connection"
            self._waiting += self._decoder.feed(data)
        return self._waiting.pop(0)

    def ended(self) -> bool:
        try:
            while self.socket.recv(1 << 16):
                pass  # what was on its way
            return True
        except ConnectionError:
            return True


class Host:
    """A loop with a link, and the enclave at its other end."""

    def __init__(self, patience_s: float) -> None:
        self.loop = Loop()
        self.listener = self.loop.run(self._open(patience_s))
        self.link: EnclaveLink = self.listener.link
        self.enclave = Enclave(self.listener.path)

    @staticmethod
    async def _open(patience_s: float) -> LinkListener:
        return await LinkListener.open(patience_s=patience_s)

    def ask(self, call: Callable[[], Any]) -> Any:
        async def awaited() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop.loop)

    def begin(self) -> Ready:
        self.enclave.send(READY)

        async def ready() -> Ready:
            return await self.link.arrived

        return self.loop.run(ready())

    def close(self) -> None:
        async def closed() -> None:
            self.listener.close()
            self.link.close()

        self.loop.run(closed())
        self.enclave.socket.close()
        self.loop.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host(20.0)
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Host]:
    made = Host(0.3)
    yield made
    made.close()


def _x(value: float = 1.0) -> dict[str, Any]:
    return {"x": np.full((1, 2), value, np.float32)}


def test_each_request_gets_its_own_answer(host: Host) -> None:
    assert host.begin() == READY
    one = host.ask(lambda: host.link.infer(_x(1), {"t": 1}))
    first = host.enclave.next()
    two = host.ask(lambda: host.link.sealed(b"query"))
    second = host.enclave.next()
    three = host.ask(lambda: host.link.attest(bytes(32)))
    third = host.enclave.next()
    assert isinstance(first, Infer)
    assert (first.tensors["x"].tolist(), first.ticket) == ([[1, 1]], {"t": 1})
    assert isinstance(second, Sealed)
    assert bytes(second.query) == b"query"
    assert isinstance(third, Attest)
    assert host.link.waiting == 3
    host.enclave.send(
        Evidence(third.id, b"{}"), SealedResult(second.id, b"answer"), Result(first.id, _x(2))
    )
    assert one.result(20)["x"].tolist() == [[2, 2]]
    assert bytes(two.result(20)) == b"answer"
    assert bytes(three.result(20)) == b"{}"
    assert host.link.waiting == 0


def test_large_tensors_cross_whole(host: Host) -> None:
    host.begin()
    x = np.random.default_rng(0).normal(size=(1 << 20, 1)).astype(np.float32)
    asked = host.ask(lambda: host.link.infer({"x": x}))
    sent = host.enclave.next()
    np.testing.assert_array_equal(sent.tensors["x"], x)
    threading.Thread(target=host.enclave.send, args=(Result(sent.id, {"y": x}),)).start()
    np.testing.assert_array_equal(asked.result(20)["y"], x)


def test_no_more_are_in_flight_than_the_enclave_takes(host: Host) -> None:
    host.begin()
    asked = [host.ask(lambda: host.link.sealed(b"q")) for _ in range(5)]
    sent = [host.enclave.next() for _ in range(3)]
    host.enclave.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        host.enclave.next()
    host.enclave.socket.settimeout(20)
    for number in range(5):
        host.enclave.send(SealedResult(sent[number].id, b"a"))
        if number < 2:
            sent.append(host.enclave.next())
    assert [bytes(future.result(20)) for future in asked] == [b"a"] * 5


def test_a_failure_reaches_who_asked(host: Host) -> None:
    host.begin()
    asked = host.ask(lambda: host.link.infer(_x()))
    sent = host.enclave.next()
    host.enclave.send(Failure(sent.id, "input", InputError("no such tensor")))
    with pytest.raises(QueryError) as caught:
        asked.result(20)
    assert caught.value.code == "input"
    assert isinstance(caught.value.error, InputError)


def test_what_the_enclave_does_not_take_is_not_sent(host: Host) -> None:
    host.begin()
    with pytest.raises(QueryError) as caught:
        host.ask(lambda: host.link.sealed(bytes((1 << 23) + 1))).result(20)
    assert caught.value.code == "too-large"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff" * 100,
        b"".join(bytes(p) for p in encode(READY)),
        b"".join(bytes(p) for p in encode(Drain())),
        b"".join(bytes(p) for p in encode(Result(999, {}))),
        b"".join(bytes(p) for p in encode(SealedResult(1, b"another kind of answer"))),
        b"".join(bytes(p) for p in encode(Failure(None, "failed", EnclaveError("no number")))),
    ],
    ids=["nothing", "noise", "ready", "drain", "number", "kind", "failure"],
)
def test_an_enclave_that_ends_or_breaks_the_protocol_fails_all_at_once(
    host: Host, sent: bytes
) -> None:
    host.begin()
    asked = [host.ask(lambda: host.link.infer(_x())) for _ in range(5)]
    assert all(isinstance(host.enclave.next(), Infer) for _ in range(READY.max_waiting))
    if sent:
        host.enclave.socket.sendall(sent)
        assert host.enclave.ended()
    else:
        host.enclave.socket.close()
    for future in asked:
        with pytest.raises(QueryError) as caught:
            future.result(20)
        assert caught.value.code == "gone"
    with pytest.raises(QueryError):
        host.ask(lambda: host.link.infer(_x())).result(20)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x00" * 100, b"".join(bytes(p) for p in encode(Result(1, {})))],
    ids=["nothing", "noise", "result"],
)
def test_an_enclave_that_is_never_ready(host: Host, sent: bytes) -> None:
    host.enclave.socket.sendall(sent)
    if not sent:
        host.enclave.socket.close()

    async def ready() -> None:
        await host.link.arrived

    with pytest.raises(CenacleError):
        host.loop.run(ready())


def test_an_enclave_that_does_not_answer_is_not_waited_for(hasty: Host) -> None:
    hasty.begin()
    late = hasty.ask(lambda: hasty.link.sealed(b"1"))
    sent = hasty.enclave.next()
    with pytest.raises(QueryError) as caught:
        late.result(20)
    assert caught.value.code == "late"
    hasty.enclave.send(SealedResult(sent.id, b"too late"))  # and harms nobody
    asked = hasty.ask(lambda: hasty.link.sealed(b"2"))
    hasty.enclave.send(SealedResult(hasty.enclave.next().id, b"in time"))
    assert bytes(asked.result(20)) == b"in time"


def test_draining_ends_with_the_connection(host: Host) -> None:
    host.begin()
    draining = host.ask(host.link.drain)
    assert isinstance(host.enclave.next(), Drain)
    assert not draining.done()
    host.enclave.socket.close()
    draining.result(20)


def test_one_enclave_alone_connects_to_a_folder_of_its_own(host: Host) -> None:
    folder = host.listener.path.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    stranger = Enclave(host.listener.path)
    assert stranger.ended()
    stranger.socket.close()
    assert host.begin() == READY

    async def close() -> None:
        host.listener.close()

    host.loop.run(close())
    assert not folder.exists()
    asked = host.ask(lambda: host.link.sealed(b"q"))
    host.enclave.send(SealedResult(host.enclave.next().id, b"a"))
    assert bytes(asked.result(20)) == b"a"
