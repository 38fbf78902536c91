"""Serving a broker: TLS 1.3 by uvicorn in this process, until told to stop."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn

from cenacle.broker.app import create_app
from cenacle.broker.http import GuardedProtocol, bind
from cenacle.broker.service import Broker
from cenacle.broker.tls import TlsFiles, server_context

__all__ = ["bind", "serve", "serving"]

_GARBAGE: Final = 20_000  # new objects, before those that refer to each other are looked for


def _server(broker: Broker, files: TlsFiles) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(broker),
        http=GuardedProtocol,
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
