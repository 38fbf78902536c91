"""A service without an enclave: the real HTTP server before a made-up tail, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from cenacle.broker.http import bind
from cenacle.broker.messages import ContractView
from cenacle.broker.tls import TlsFiles
from cenacle.cut.specs import TensorSpec
from cenacle.documents.serving import OutputPolicy, ServeJob
from cenacle.enclave.serving_messages import Ready
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.serving.answers import Limits
from cenacle.serving.app import ServingApp
from cenacle.serving.backend import QueryError, Tail
from cenacle.serving.deployment import Deployment, Served
from cenacle.serving.front import Front
from cenacle.serving.metrics import Metrics
from cenacle.serving.server import Listening, event_loop

__all__ = ["CONTRACT", "FakeTail", "Loop", "World", "serve_job", "served"]

T = TypeVar("T")

CONTRACT = "sha256:" + "c0" * 32
WIDTH = 4


class FakeTail(Tail):
    """Doubles what it gets, or does what ``act`` says; remembers what it was sent."""

    def __init__(self, *, contract: str = CONTRACT, out: int = WIDTH, max_batch: int = 8) -> None:
        self.sent: list[tuple[Tensors, Mapping[str, Any] | None]] = []
        self.queries: list[bytes] = []
        self.act: Callable[[Tensors], Tensors] | None = None
        self.gate: asyncio.Event | None = None
        self.error: QueryError | None = None
        self.drained = False
        self._ready = Ready(
            contract=contract,
            inputs=(TensorSpec("x", "F32", (None, WIDTH)),),
            outputs=(TensorSpec("y", "F32", (None, out)),),
            hpke_key=b"",
            signing_key=b"",
            max_batch=max_batch,
            max_payload=1 << 20,
            max_waiting=64,
        )

    @property
    def ready(self) -> Ready:
        return self._ready

    @property
    def waiting(self) -> int:
        return 0

    async def _pass(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def infer(self, tensors: Tensors, ticket: Mapping[str, Any] | None = None) -> Tensors:
        self.sent.append((dict(tensors), ticket))
        await self._pass()
        if self.act is not None:
            return self.act(tensors)
        return {"y": np.asarray(tensors["x"] * np.float32(2))}

    async def sealed(self, query: bytes) -> bytes:
        self.queries.append(bytes(query))
        await self._pass()
        return bytes(query)[::-1]

    async def attest(self, nonce: bytes) -> bytes:
        await self._pass()
        return json.dumps({"nonce": nonce.hex()}).encode()

    async def drain(self) -> None:
        self.drained = True


def serve_job(**fields: Any) -> ServeJob:
    return ServeJob(model="net", outputs=OutputPolicy(form="scores"), **fields)


def served(contract: str = CONTRACT, **fields: Any) -> Served:
    view = ContractView(contract={"a": 1}, parties=({"b": 2},), assets={}, vetoes=())
    return Served(contract, serve_job(**fields), view)


class Loop:
    """An event loop in a thread, for tests that speak to it as strangers do."""

    def __init__(self) -> None:
        self.loop = event_loop()()
        self.faults: list[str] = []
        self.loop.set_exception_handler(
            lambda _, context: self.faults.append(
                f"{context['message']}: {context.get('exception')}"
            )
        )
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 30) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert self.faults == []


class World:
    """One service on a loopback port."""

    def __init__(
        self,
        tail: Tail | None = None,
        *,
        limits: Limits | None = None,
        front: Front | None = None,
        tls: TlsFiles | None = None,
        **job: Any,
    ) -> None:
        self.tail = tail or FakeTail()
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.app = ServingApp(self.metrics, self.limits)
        self.loop = Loop()
        self.loop.run(self._deploy(front, job))
        self.server = Listening(self.app, bind("127.0.0.1", 0, "a test"), tls, self.limits)
        self.port = self.server.port
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._done = asyncio.run_coroutine_threadsafe(self.server.run_until_told(), self.loop.loop)

    async def _deploy(self, front: Front | None, job: Mapping[str, Any]) -> None:
        contract = self.tail.ready.contract
        self.app.current = Deployment(served(contract, **job), self.tail, front, self.metrics)

    def close(self) -> None:
        self.server.should_exit = True
        self._done.result(30)
        self.loop.close()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, *arguments: Any, **options: Any) -> Iterator[World]:
        world = cls(*arguments, **options)
        try:
            yield world
        finally:
            world.close()
