"""What servers that face strangers share: a listening socket, and uvicorn's protocol on guard.

uvicorn's own protocol waits for ever for the rest of a request and for a client that does not
read, and takes addresses, headers and trailers of any length into memory.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cenacle.errors import UnavailableError

__all__ = ["GuardedProtocol", "bind"]

_MAX_OVERHEAD: Final = 64 * 1024
"""Bytes of one request's address, headers, chunk sizes and trailers together, at most."""
_FAREWELL_S: Final = 1.0
_MAX_FAREWELLS: Final = 30


def bind(host: str, port: int, who: str = "the broker") -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UnavailableError: the address is taken or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(
            f"{who} cannot listen",
            found=f"{error.strerror} at {host} port {port}",
            expected="a free address of this machine",
            remedy="choose another port, or stop what uses it",
        ) from None


class _Joined:
    """A transport that sends the head of an answer together with its body.

    uvicorn writes them one after the other, each as a TLS record and a system call of its own.
    A head that no body follows leaves when the event loop has nothing else to do.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head = b""
        self._parting: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.endswith(b"\r\n\r\n"):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._parting is None:
            self._wait(_MAX_FAREWELLS)

    def gone(self) -> None:
        """The connection has ended; nobody has to be waited for."""
        if self._parting is not None:
            self._parting.cancel()

    def _wait(self, left: int) -> None:
        loop = asyncio.get_running_loop()
        self._parting = loop.call_later(_FAREWELL_S, self._part, left)

    def _part(self, left: int) -> None:
        """End a connection whose peer does not answer the end of its TLS session.

        Idle clients do not read; a server that waits for them takes half a minute to stop. What
        a slow client has still to read is waited for a while longer.
        """
        if left and self._transport.get_write_buffer_size():
            self._wait(left - 1)
        else:
            self._transport.abort()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol without its access log, and with limits to size and patience.

    Attributes:
        patience_s: seconds that a whole request may take to arrive, from its first byte (or from
            the connection, for the first request of one), and that an answer may wait for its
            client to read on; ``None`` for ever.
    """

    patience_s: ClassVar[float | None] = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # paths name parties and contracts
        self._overhead = 0
        self._excess = False
        self._arriving: asyncio.TimerHandle | None = None
        self._leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._joined = _Joined(transport)
        super().connection_made(cast("asyncio.Transport", self._joined))
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._left()
        super().connection_lost(exc)
        self._joined.gone()  # after the base class, which closes once more

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        self._expect()  # until the request that these bytes belong to is whole
        super().data_received(data)
        if (self._excess or self._overhead > _MAX_OVERHEAD) and not self.transport.is_closing():
            self.send_400_response("Too many bytes beside the body.")

    def on_message_begin(self) -> None:
        self._expect()
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._excess = self._excess or self._overhead > _MAX_OVERHEAD
        self._overhead = 0
        self._arrived()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.patience_s is not None and self._leaving is None:
            self._leaving = self.loop.call_later(self.patience_s, self._give_up)

    def resume_writing(self) -> None:
        self._left()
        super().resume_writing()

    def _expect(self) -> None:
        if self.patience_s is not None and self._arriving is None:
            self._arriving = self.loop.call_later(self.patience_s, self._give_up)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _left(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _give_up(self) -> None:
        self._arriving = self._leaving = None
        self.transport.abort()
