"""The enclave's only way out: a unix socket on the host, forwarded to one broker.

The relay runs on the host and is not trusted: it carries TLS records that only the enclave
and the broker can read. What it does guarantee to the host is that the enclave reaches
exactly one TCP address, resolved once, whatever the enclave asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import Self

from cenacle.errors import UnavailableError

__all__ = ["Relay"]

_CHUNK = 64 * 1024
_CONNECT_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 64
_MAX_SOCKET_PATH = 107  # sun_path holds 108 bytes with the final zero
# A broker that vanished without a word is noticed after 15 + 3 * 15 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3))

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Forward connections to a unix socket in a private folder to one TCP address.

    Use as a context manager, or call :meth:`start` and :meth:`close`.

    Args:
        broker: host name or address, and port.
        connect_timeout_s: how long one attempt to reach the broker may take.

    Attributes:
        refused: why the broker could not be reached last, or None.
    """

    def __init__(
        self, broker: tuple[str, int], *, connect_timeout_s: float = _CONNECT_TIMEOUT_S
    ) -> None:
        self._broker = broker
        self._timeout = connect_timeout_s
        self._addresses: list[tuple[str, int]] = []
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._error: OSError | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.refused: str | None = None

    @property
    def path(self) -> Path:
        """The unix socket; raises RuntimeError unless the relay is running."""
        if self._folder is None:
            raise RuntimeError("the relay is not running")
        return self._folder / "broker.sock"

    def start(self) -> Self:
        """Resolve the broker's address and listen; raises UnavailableError."""
        if self._thread is not None:
            raise RuntimeError("the relay was started already")
        host, port = self._broker
        try:
            if not 0 < port < 1 << 16:
                raise OverflowError  # getaddrinfo would take it modulo 65536
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "not a host name and port"
            raise UnavailableError(
                "the broker's address cannot be resolved",
                found=f"{host}:{port} ({reason})",
                remedy="check the broker's address and the network",
            ) from None
        # Addresses, not names, from here on: a name could mean another machine tomorrow.
        self._addresses = [(str(address[0]), int(address[1])) for *_, address in found]
        self._folder = _private_folder()
        self._thread = threading.Thread(target=self._run, name="cenacle-relay", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            reason = self._error.strerror
            self.close()
            raise UnavailableError("the socket to the broker cannot be made", found=reason)
        return self

    def close(self) -> None:
        """Stop listening, cut every connection and wait for the end. Safe to call twice."""
        if self._thread is not None and self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_unix_server(self._accept, self.path, limit=_CHUNK)
        self.path.chmod(0o600)
        self._ready.set()
        try:
            await self._stop.wait()
        finally:
            # A server closed while it accepts would lose that socket (CPython 3.11): accept no
            # more, let what was accepted become a connection within a few rounds, then close.
            for listener in server.sockets:
                self._loop.remove_reader(listener.fileno())
            for _ in range(5):
                await asyncio.sleep(0)
            server.close()
            for task, writer in self._open.items():
                task.cancel()
                writer.transport.abort()
            await asyncio.gather(*self._open, return_exceptions=True)
            await asyncio.sleep(0)  # aborted transports close their sockets in the next round

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A plain function: a task that is cancelled before it starts would leave its socket open.
        if len(self._open) >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._forward(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._open.pop)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker: asyncio.StreamWriter | None = None
        try:
            broker_reader, broker = await self._connect()
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, broker))
                group.create_task(_pump(broker_reader, writer))
            for end in (broker, writer):  # close() still sends what is buffered
                end.close()
                await end.wait_closed()
        except* (OSError, TimeoutError):
            pass  # the enclave sees its connection cut, and asks again or gives up
        finally:
            for one in (writer, broker):
                if one is not None:
                    one.transport.abort()

    async def _connect(self) -> _Streams:
        refusal: OSError = ConnectionRefusedError("no address")
        for host, port in self._addresses:
            try:
                async with asyncio.timeout(self._timeout):
                    reader, writer = await asyncio.open_connection(host, port, limit=_CHUNK)
            except OSError as error:  # TimeoutError is one
                refusal = error
                self.refused = error.strerror or type(error).__name__
                continue
            self.refused = None
            tcp = writer.get_extra_info("socket")
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                if hasattr(socket, option):
                    tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            return reader, writer
        raise refusal


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy until the source's end, then pass the end on: the other direction goes on."""
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()  # a slow reader slows the writer down
    target.write_eof()


def _private_folder() -> Path:
    """A fresh folder that only this user can enter, short enough for a unix socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="cenacle-"))
    if len(bytes(folder / "broker.sock")) > _MAX_SOCKET_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="cenacle-", dir="/tmp"))
    return folder
