"""Serving a broker: TLS 1.3 by uvicorn in this process, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cenacle.broker.app import create_app
from cenacle.broker.service import Broker
from cenacle.broker.tls import TlsFiles, server_context
from cenacle.errors import UnavailableError

__all__ = ["bind", "serve", "serving"]

_GARBAGE: Final = 20_000  # new objects, before those that refer to each other are looked for
_MAX_OVERHEAD: Final = 64 * 1024
"""Bytes of one request's address, headers, chunk sizes and trailers together, at most."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UnavailableError: the address is taken or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(
            "the broker cannot listen",
            found=f"{error.strerror} at {host} port {port}",
            expected="a free address of this machine",
            remedy="choose another --port, or stop what uses it",
        ) from None


class _Joined:
    """A transport that sends the head of an answer together with its body.

    uvicorn writes them one after the other, each as a TLS record and a system call of its own.
    A head that no body follows leaves when the event loop has nothing else to do.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head = b""

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

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Quiet(HttpToolsProtocol):
    """uvicorn's protocol without its access log, and with a limit to what is no body.

    The parser itself takes addresses, headers and trailers of any length into memory.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # paths name parties and contracts
        self._overhead = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("asyncio.Transport", _Joined(transport)))

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > _MAX_OVERHEAD and not self.transport.is_closing():
            self.send_400_response("Too many bytes beside the body.")

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        super().on_message_complete()


def _server(broker: Broker, files: TlsFiles) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(broker),
        http=_Quiet,
        ws="none",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        limit_concurrency=512,
        ssl_context_factory=lambda _config, _default: server_context(files),
    )
    return uvicorn.Server(config)


def serve(broker: Broker, listener: socket.socket, files: TlsFiles) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress are finished.

    The process is the broker's own: what it has loaded by now stays, and is not searched for
    garbage over and over, which would stop every request for a tenth of a second now and then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])
    _server(broker, files).run(sockets=[listener])


@contextlib.contextmanager
def serving(broker: Broker, files: TlsFiles, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve from a thread of this process; yields the URL. For tests and embedding."""
    listener = bind(host, 0)
    url = f"https://{host}:{listener.getsockname()[1]}"
    broker.keys.published_at(url, Path(files.certificate).read_text())
    server = _server(broker, files)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="broker", daemon=True
    )
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
