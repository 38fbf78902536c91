"""The connection to an enclave that serves: one unix socket, many requests in flight.

The host listens and the enclave connects, since its sandbox lets it open nothing else. What
arrives goes straight into the decoder's buffer, and tensors leave as they lie in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast

from cenacle.enclave.serving_messages import (
    Attest,
    Drain,
    Evidence,
    Failure,
    Infer,
    Malformed,
    Ready,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.enclave.tensor_bytes import Parts, Tensors, byte_count
from cenacle.errors import DataError, EnclaveError, UnavailableError
from cenacle.serving.backend import QueryError, Tail, enclave_gone

__all__ = ["EnclaveLink", "LinkListener"]

A = TypeVar("A", Result, SealedResult, Evidence)

_MAX_ANSWER: Final = 256 * 1024 * 1024
_Answer = Result | SealedResult | Evidence


class EnclaveLink(asyncio.BufferedProtocol, Tail):
    """One enclave's connection, from its first frame to its end.

    Args:
        patience_s: how long a request may wait for its answer.

    When the enclave dies or breaks the protocol, every request in flight fails at once.
    """

    def __init__(self, *, patience_s: float = 60.0) -> None:
        loop = asyncio.get_running_loop()
        self.arrived: asyncio.Future[Ready] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._patience = patience_s
        self._decoder = Decoder("from-enclave", _MAX_ANSWER)
        self._transport: asyncio.Transport | None = None
        self._pending: dict[int, tuple[type[_Answer], asyncio.Future[_Answer]]] = {}
        self._next = 0
        self._places = asyncio.Semaphore(1)
        self._writable = asyncio.Event()
        self._writable.set()

    # ------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(4 * 1024 * 1024)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            message = self._decoder.received(nbytes)
            if message is not None:
                self._take(message)
        except EnclaveError as error:
            self._end(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._end(UnavailableError("the enclave closed its connection"))

    def close(self) -> None:
        """End the connection at once; what is in flight fails. Safe to call twice."""
        self._end(UnavailableError("the connection to the enclave was closed"))

    def _end(self, error: Exception) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.arrived.done():
            self.arrived.set_exception(error)
            self.arrived.exception()  # may be read by nobody
        if not self.closed.done():
            self.closed.set_result(None)
        self._writable.set()
        pending, self._pending = self._pending, {}
        for _, future in pending.values():
            self._settle(future, enclave_gone())

    def _take(self, message: object) -> None:
        match message:
            case Ready() if not self.arrived.done():
                # Set before anyone can use it: the enclave counts what it was sent itself.
                self._places = asyncio.Semaphore(message.max_waiting)
                self.arrived.set_result(message)
            case Result() | SealedResult() | Evidence() if self._asked(message.id, type(message)):
                self._settle(self._pending.pop(message.id)[1], message)
            case Failure(id=int(number)) if number in self._pending:
                self._settle(self._pending.pop(number)[1], QueryError(message.code, message.error))
            case Malformed(error=found) | Failure(error=found):
                raise EnclaveError("the enclave broke the protocol", found=found.what)
            case _:
                raise EnclaveError("the enclave broke the protocol", found="an unexpected message")

    def _asked(self, number: int, kind: type[_Answer]) -> bool:
        return number in self._pending and self._pending[number][0] is kind

    def _settle(self, future: asyncio.Future[_Answer], found: _Answer | QueryError) -> None:
        self._places.release()
        if future.done():
            return  # whoever asked has stopped waiting
        if isinstance(found, QueryError):
            future.set_exception(found)
        else:
            future.set_result(found)

    # ------------------------------------------------------------------ requests

    @property
    def ready(self) -> Ready:
        return self.arrived.result()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    async def infer(self, tensors: Tensors, ticket: Mapping[str, Any] | None = None) -> Tensors:
        number = self._number()
        return (await self._ask(number, encode(Infer(number, tensors, ticket)), Result)).tensors

    async def sealed(self, query: bytes) -> bytes | bytearray | memoryview:
        number = self._number()
        return (await self._ask(number, encode(Sealed(number, query)), SealedResult)).answer

    async def attest(self, nonce: bytes) -> bytes | bytearray | memoryview:
        number = self._number()
        return (await self._ask(number, encode(Attest(number, nonce)), Evidence)).document

    async def drain(self) -> None:
        if self._transport is not None and not self.closed.done():
            self._transport.writelines(encode(Drain()))
        await asyncio.shield(self.closed)

    def _number(self) -> int:
        self._next += 1
        return self._next

    async def _ask(self, number: int, parts: Parts, kind: type[A]) -> A:
        size = byte_count(parts[1:])
        if size > self.ready.max_payload:
            raise QueryError(
                "too-large",
                DataError(
                    "a query is larger than the enclave takes",
                    found=f"{size} bytes",
                    expected=f"at most {self.ready.max_payload}",
                    remedy="send fewer rows at a time",
                ),
            )
        try:
            async with asyncio.timeout(self._patience):
                future = await self._send(number, parts, kind)
                answer = await asyncio.shield(future)
        except TimeoutError:
            raise QueryError(
                "late",
                UnavailableError(
                    "the enclave does not answer in time", expected=f"within {self._patience:g} s"
                ),
            ) from None
        assert isinstance(answer, kind)  # or it would not have been taken
        return answer

    async def _send(
        self, number: int, parts: Parts, kind: type[_Answer]
    ) -> asyncio.Future[_Answer]:
        await self._places.acquire()
        try:
            await self._writable.wait()
            if self.closed.done() or self._transport is None:
                raise enclave_gone()
        except BaseException:
            self._places.release()
            raise
        # From here on the place is held until the enclave answers, whoever still waits for it.
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(_looked_at)
        self._pending[number] = kind, future
        self._transport.writelines(parts)
        return future


def _looked_at(future: asyncio.Future[_Answer]) -> None:
    """An answer that nobody waits for any more is no error of the event loop's."""
    if not future.cancelled():
        future.exception()


class LinkListener:
    """A socket in a folder of its own that one enclave may connect to, once."""

    def __init__(self, folder: Path, server: asyncio.Server, link: EnclaveLink) -> None:
        self.path = folder / "s"
        self.link = link
        self._folder = folder
        self._server = server

    @classmethod
    async def open(cls, *, patience_s: float = 60.0) -> Self:
        """Listen; the folder is readable by this user alone."""
        folder = Path(tempfile.mkdtemp(prefix="cenacle-"))
        link = EnclaveLink(patience_s=patience_s)
        taken = False

        def connected() -> asyncio.BaseProtocol:
            nonlocal taken
            if taken:
                return _Refused()
            taken = True
            return link

        server = await asyncio.get_running_loop().create_unix_server(
            connected, str(folder / "s"), backlog=1
        )
        return cls(folder, server, link)

    def close(self) -> None:
        """Stop listening and remove the folder; the enclave's connection stays."""
        self._server.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self._folder.rmdir()


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
