"""Serving a broker: TLS 1.3 by uvicorn in this process, until told to stop."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cenacle.broker.app import create_app
from cenacle.broker.service import Broker
from cenacle.broker.tls import TlsFiles, server_context
from cenacle.errors import UnavailableError

__all__ = ["bind", "serve", "serving"]


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


class _Quiet(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol without its access log, whatever the process's logging is set to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # paths name parties and contracts


def _server(broker: Broker, files: TlsFiles) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(broker),
        http=_Quiet,
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
    """Serve until SIGINT or SIGTERM; requests in progress are finished."""
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
