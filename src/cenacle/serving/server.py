"""Serving over HTTPS: uvicorn on guard, in the event loop that also talks to the enclave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from cenacle.broker.http import GuardedProtocol
from cenacle.broker.tls import TlsFiles, server_context
from cenacle.serving.answers import Limits
from cenacle.serving.app import ServingApp

__all__ = ["Listening", "event_loop"]

_GRACE_S: Final = 10
_KEEP_ALIVE_S: Final = 30


def event_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop of a service: uvloop's where it is installed."""
    return auto_loop_factory()


def _guarded(patience: float) -> type[GuardedProtocol]:
    return type("_Guarded", (GuardedProtocol,), {"patience_s": patience})


class Listening(uvicorn.Server):
    """A service that listens; ``serve`` runs until ``should_exit`` is set.

    Signals stay with whoever runs the event loop.

    Args:
        files: certificate and key; ``None`` for plain HTTP, which suits a loopback address.
        limits: as the application's.
    """

    def __init__(
        self, app: ServingApp, listener: socket.socket, files: TlsFiles | None, limits: Limits
    ) -> None:
        self.listener = listener
        config = uvicorn.Config(
            app,
            http=_guarded(limits.patience_s),
            ws="none",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(limits.answer_s + _GRACE_S),
            limit_concurrency=limits.connections,
            ssl_context_factory=None
            if files is None
            else lambda _config, _default: server_context(files),
        )
        super().__init__(config)

    async def run_until_told(self) -> None:
        """Serve until ``should_exit``; requests in progress are finished."""
        await self._serve([self.listener])

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])
