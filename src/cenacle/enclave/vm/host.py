"""The host's end of the link: hand over a job, carry connections, keep what the agent wrote."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cenacle.enclave.vm.link import (
    CHUNK,
    MAX_FILE,
    SERVING,
    VERSION,
    Frame,
    FrameReader,
    Kind,
    check_path,
    frame,
    json_frame,
)
from cenacle.errors import EnclaveError, InputError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

__all__ = ["GuestJob", "HostLink", "files_below"]

_EXPECTED: Final = frozenset(
    {
        *(Kind.HELLO, Kind.FILE, Kind.DATA, Kind.REMOVED, Kind.MESSAGE),
        *(Kind.OPEN, Kind.BYTES, Kind.CLOSED, Kind.ABORTED, Kind.ENDED),
    }
)
_MAX_CONNECTIONS: Final = 64


@dataclass(frozen=True)
class GuestJob:
    """What a guest is to run.

    Attributes:
        fields: configuration: ``mode``, ``job``, ``sandbox``, ``threads``,
            ``platform``.
        read_only: mount name -> file or folder of this host, sent whole.
        writable: mount name -> folder; sent whole, and written to as the agent writes.
        broker: unix socket of the relay.
        serving: unix socket of the server whose queries the guest answers, if it serves.
    """

    fields: Mapping[str, Any]
    read_only: Mapping[str, Path]
    writable: Mapping[str, Path]
    broker: Path
    serving: Path | None = None


def files_below(mounts: Mapping[str, Path]) -> Iterator[tuple[str, str, Path]]:
    """Every file of some mounts: mount name, path below it (empty for a single file), file.

    Raises:
        InputError: a name that cannot be sent.
    """
    for mount, root in mounts.items():
        if root.is_file():
            yield mount, "", root
            continue
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith(".") or not path.is_file():
                    continue  # unfinished files, sockets and the like
                relative = path.relative_to(root).as_posix()
                try:
                    check_path(relative)
                except EnclaveError:
                    raise InputError(
                        "a file cannot be sent into a virtual machine",
                        found=path,
                        expected="a name of letters, digits, dots, - and _",
                        remedy="rename it, or move it out of the folder",
                    ) from None
                yield mount, relative, path


class HostLink:
    """One job over one link.

    Args:
        reader: from the guest.
        writer: to the guest.
        job: what to hand over.
        messages: called with bytes of the agent's channel.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        job: GuestJob,
        messages: Callable[[bytes], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._job = job
        self._messages = messages
        self._broker: dict[int, asyncio.Queue[bytes | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._file: AtomicFile | None = None
        self._left = 0
        self._offset = 0

    async def run(self, started: Callable[[], None] = lambda: None) -> int | None:
        """Serve the guest until its agent has ended; its exit status, or None if it vanished.

        Args:
            started: called when the guest has answered.

        Raises:
            EnclaveError: the guest broke the protocol.
            UnavailableError: this host's disk is full, or a file cannot be read.
        """
        frames = self._frames()
        try:
            async for one in frames:
                if one.kind is not Kind.HELLO or one.fields().get("version") != VERSION:
                    raise EnclaveError(
                        "the guest is of another version than this host",
                        remedy="build the image with this version of cenacle",
                    )
                break
            else:
                return None
            started()
            hand_over = asyncio.create_task(self._hand_over())
            self._keep(hand_over)
            async for one in frames:
                if one.kind is Kind.ENDED:
                    status = one.fields().get("status")
                    return status if type(status) is int and 0 <= status < 256 else 255
                if hand_over.done() and hand_over.exception() is not None:
                    await hand_over
                await self._take(one)
            if hand_over.done():
                await hand_over
            return None
        except ConnectionError:
            return None
        finally:
            if self._file is not None:
                self._file.abort()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)

    async def _frames(self) -> AsyncIterator[Frame]:
        parser = FrameReader(_EXPECTED)
        while data := await self._reader.read(CHUNK):
            for one in parser.feed(data):
                yield one

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def _hand_over(self) -> None:
        config = json.dumps(
            {
                **self._job.fields,
                "read_only": sorted(self._job.read_only),
                "writable": sorted(self._job.writable),
            }
        ).encode()
        for at in range(0, len(config), CHUNK):
            await self._send(frame(Kind.CONFIG, config[at : at + CHUNK]))
        await self._send(frame(Kind.CONFIG))
        for mount, path, source in files_below({**self._job.read_only, **self._job.writable}):
            await self._send_file(mount, path, source)
        await self._send(frame(Kind.START))

    async def _send_file(self, mount: str, path: str, source: Path) -> None:
        with disk_errors(f"read {source}"), source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            await self._send(json_frame(Kind.FILE, {"mount": mount, "path": path, "size": size}))
            left = size
            while left:
                block = file.read(min(CHUNK, left))
                if not block:
                    raise InputError("a file became shorter while it was sent", found=source)
                left -= len(block)
                await self._send(frame(Kind.DATA, block))

    async def _take(self, one: Frame) -> None:
        match one.kind:
            case Kind.MESSAGE:
                self._messages(one.payload)
            case Kind.FILE if self._file is None:
                self._begin_file(one.fields())
            case Kind.DATA if self._file is not None:
                self._write(one.payload)
            case Kind.REMOVED if self._file is None:
                target = self._target(one.fields())
                with disk_errors(f"remove {target}"):
                    target.unlink(missing_ok=True)
            case Kind.OPEN:
                self._open(one.number, one.payload)
            case Kind.BYTES | Kind.CLOSED | Kind.ABORTED:
                self._pass_on(one)
            case _:
                raise EnclaveError(
                    "the guest sent something at the wrong time", found=one.kind.name
                )

    def _target(self, fields: Mapping[str, Any]) -> Path:
        root = self._job.writable.get(str(fields.get("mount")))
        if root is None:
            raise EnclaveError("the guest wrote to a folder that it may not write to")
        return root / check_path(fields.get("path"))

    def _begin_file(self, fields: Mapping[str, Any]) -> None:
        target, size = self._target(fields), fields.get("size")
        if type(size) is not int or not 0 <= size <= MAX_FILE:
            raise EnclaveError("the guest sent a file of an impossible size")
        with disk_errors(f"write {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        self._file = AtomicFile(target)
        self._left, self._offset = size, 0
        self._end_file()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        if len(data) > self._left:
            raise EnclaveError("the guest sent more of a file than it said")
        with disk_errors(f"write {self._file.target}"):
            pwrite_all(self._file.fd, data, self._offset)
        self._offset += len(data)
        self._left -= len(data)
        self._end_file()

    def _end_file(self) -> None:
        if self._left == 0 and self._file is not None:
            # Durable before the next frame is looked at: the broker may be told of it there.
            self._file.commit()
            self._file = None

    def _open(self, number: int, target: bytes) -> None:
        known = {b"": self._job.broker, SERVING: self._job.serving}
        if (path := known.get(target)) is None:
            raise EnclaveError("the guest opened a connection to nobody that this job has")
        if number in self._broker or len(self._broker) >= _MAX_CONNECTIONS:
            raise EnclaveError("the guest opened a connection twice, or too many")
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._broker[number] = queue
        self._keep(asyncio.create_task(self._connection(number, path, queue)))

    def _pass_on(self, one: Frame) -> None:
        queue = self._broker.get(one.number)
        if queue is None:
            return  # broken on this side while the bytes were on their way
        if one.kind is Kind.BYTES:
            queue.put_nowait(one.payload)
        elif one.kind is Kind.CLOSED:
            queue.put_nowait(b"")
        else:
            queue.put_nowait(None)

    async def _connection(
        self, number: int, path: Path, queue: asyncio.Queue[bytes | None]
    ) -> None:
        """Carry one connection between the guest and the relay, or the server."""
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._to_guest(number, reader))
                group.create_task(_to_broker(queue, writer))
            writer.close()
            await writer.wait_closed()
        except* (OSError, _AbortedError):
            with contextlib.suppress(ConnectionError):
                await self._send(frame(Kind.ABORTED, number=number))
        finally:
            self._broker.pop(number, None)
            if writer is not None:
                writer.transport.abort()

    async def _to_guest(self, number: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            await self._send(frame(Kind.BYTES, data, number))
        await self._send(frame(Kind.CLOSED, number=number))


class _AbortedError(Exception):
    """The guest's side of a connection broke."""


async def _to_broker(queue: asyncio.Queue[bytes | None], writer: asyncio.StreamWriter) -> None:
    while data := await queue.get():
        writer.write(data)
        await writer.drain()
    if data is None:
        raise _AbortedError
    writer.write_eof()
