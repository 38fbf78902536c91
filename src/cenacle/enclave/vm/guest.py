"""The first process of the guest: take a job over the link, run the agent, carry its bytes.

It is part of the measured image, and its host is not trusted. The host chooses the contract,
the sealed files and when to stop; it cannot choose what is executed: that is the agent, or
its measuring variant, as a user of its own, from the verified root.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cenacle.enclave.vm import guest_system
from cenacle.enclave.vm.guest_files import FolderWatch, Received
from cenacle.enclave.vm.link import (
    CHUNK,
    PORT,
    SERVING,
    VERSION,
    Frame,
    FrameReader,
    Kind,
    frame,
    json_frame,
)
from cenacle.errors import CenacleError, EnclaveError

__all__ = ["COMMANDS", "PLATFORM", "Job", "Supervisor", "agent_command", "main"]

COMMANDS: Final = {
    "run": ("-m", "cenacle.enclave"),
    "measure": ("-m", "cenacle.enclave", "measure"),
    "registers": ("-m", "cenacle.enclave.vm.guest_registers"),
}
"""All that a host can have executed."""

PLATFORM: Final = ("-m", "cenacle.enclave.vm.guest_platform")
"""And beside it, in a machine whose hardware makes evidence."""

_SOCKET: Final = "broker_socket"
_PLATFORM: Final = "platform_socket"
_SERVING: Final = "serving_socket"
_EXPECTED: Final = frozenset(
    {Kind.CONFIG, Kind.FILE, Kind.DATA, Kind.START, Kind.BYTES, Kind.CLOSED, Kind.ABORTED}
)
_FIELDS: Final = {
    *("mode", "job", "sandbox", "threads", "read_only", "writable", "platform"),
}
_MAX_CONFIG: Final = 4 << 20
_MAX_BUFFER: Final = 64 << 20
_MAX_CONNECTIONS: Final = 64
_MAX_THREADS: Final = 1024
_NOWHERE: Final = "/nonexistent/cenacle-bytecode"


@dataclass(frozen=True)
class Job:
    """What the host asks for, checked.

    Attributes:
        mode: one of :data:`COMMANDS`.
        config: for the agent, with the paths of this machine.
        threads: for the agent's algebra.
        read_only: names of mounts.
        writable: names of mounts.
        platform: what the machine's evidence needs, if its hardware makes evidence; see
            :mod:`cenacle.enclave.vm.guest_platform`.
    """

    mode: str
    config: dict[str, Any]
    threads: int
    read_only: tuple[str, ...]
    writable: tuple[str, ...]
    platform: dict[str, Any] | None = None

    @classmethod
    def parse(cls, raw: bytes) -> Job:
        """Raises EnclaveError for anything else than a launcher of this version sends."""
        try:
            fields = json.loads(raw)
            job = cls(
                mode=fields["mode"],
                config={"job": dict(fields["job"]), "sandbox": dict(fields["sandbox"])},
                threads=fields["threads"],
                read_only=tuple(fields["read_only"]),
                writable=tuple(fields["writable"]),
                platform=None if fields["platform"] is None else dict(fields["platform"]),
            )
            names = (*job.read_only, *job.writable)
            if (
                set(fields) != _FIELDS
                or job.mode not in COMMANDS
                or type(job.threads) is not int
                or not 1 <= job.threads <= _MAX_THREADS
                or len(set(names)) != len(names)
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise EnclaveError("the host's configuration of a job does not parse") from None
        return job


def agent_command(module: tuple[str, ...], descriptor: int) -> list[str]:
    """The interpreter's command line: fixed but for the number of a descriptor."""
    flags = ("-s", "-P", "-B", "-X", f"pycache_prefix={_NOWHERE}")
    return [sys.executable or "/usr/bin/python3.11", *flags, *module, str(descriptor)]


@dataclass
class _Connection:
    """One of the agent's connections to the outside, with what it has not read yet."""

    socket: socket.socket
    number: int
    unsent: bytearray = field(default_factory=bytearray)
    host_closed: bool = False
    agent_closed: bool = False


class Supervisor:
    """One job on one link, from the first frame to the agent's end.

    Args:
        port: descriptor of the link.
        work: folder for the job's files.
        user: to run the agent as; None for this process's.
    """

    def __init__(self, port: int, work: Path, user: int | None) -> None:
        self._port = port
        self._work = work
        self._user = user
        self._reader = FrameReader(_EXPECTED)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._next = 1
        self._watch = FolderWatch({})

    def run(self) -> int:
        """Take a job, run it, and return the agent's exit status.

        Raises:
            EnclaveError: the host broke the protocol, or is gone.
        """
        self._send(json_frame(Kind.HELLO, {"version": VERSION}))
        frames = self._frames()
        job = Job.parse(self._config(frames))
        files = Received(self._work, job.read_only, job.writable, self._user)
        with contextlib.closing(files):
            for one in frames:
                if one.kind is Kind.START:
                    files.finish()
                    break
                files.take(one)
        self._watch = FolderWatch({name: files.paths[name] for name in job.writable})
        status = self._agent(job, files.paths)
        self._sync()
        self._send(json_frame(Kind.ENDED, {"status": status}))
        return status

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._port, view) :]

    def _read(self) -> list[Frame]:
        data = os.read(self._port, CHUNK)
        if not data:
            raise EnclaveError("the host of this enclave is gone")
        return list(self._reader.feed(data))

    def _frames(self) -> Iterator[Frame]:
        while True:
            yield from self._read()

    def _config(self, frames: Iterator[Frame]) -> bytes:
        raw = bytearray()
        for one in frames:
            if one.kind is not Kind.CONFIG or len(raw) > _MAX_CONFIG:
                raise EnclaveError("the host sent no configuration of a job")
            if not one.payload:
                break
            raw += one.payload
        return bytes(raw)

    def _agent(self, job: Job, paths: dict[str, Path]) -> int:
        """Start the agent and carry bytes until it has ended."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            sockets = {_SOCKET: self._work / "broker.sock"}
            listeners = {b"": stack.enter_context(self._listen(sockets[_SOCKET]))}
            if job.config["sandbox"].get("serving") is True:
                sockets[_SERVING] = self._work / "serving.sock"
                listeners[SERVING] = stack.enter_context(self._listen(sockets[_SERVING]))
            if job.platform is not None:
                sockets[_PLATFORM] = self._work / "platform.sock"
                with self._listen(sockets[_PLATFORM]) as service:
                    stack.callback(self._start_platform(job, service, sockets[_SOCKET]).kill)
            reader, process = self._start(job, paths, sockets)
            stack.callback(os.close, reader)
            stack.callback(process.kill)
            self._selector.register(self._port, selectors.EVENT_READ)
            self._selector.register(reader, selectors.EVENT_READ)
            for target, listener in listeners.items():
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, target)
            while True:
                for key, events in self._selector.select():
                    if key.fileobj == self._port:
                        for one in self._read():
                            self._from_host(one)
                    elif key.fileobj == reader:
                        if not (data := os.read(reader, CHUNK)):
                            return _exit_status(process)
                        self._sync()
                        self._send(frame(Kind.MESSAGE, data))
                    elif key.data in listeners:
                        self._accept(listeners[key.data], key.data)
                    elif key.data in self._connections:
                        self._serve(self._connections[key.data], events)

    def _listen(self, path: Path) -> socket.socket:
        """A socket for the agent's user, which takes connections from now on."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        if self._user is not None:
            os.chown(path, self._user, self._user)
        path.chmod(0o600)
        listener.listen(_MAX_CONNECTIONS)
        return listener

    def _start(
        self, job: Job, paths: dict[str, Path], sockets: dict[str, Path]
    ) -> tuple[int, subprocess.Popen[bytes]]:
        config = {
            **job.config,
            "accelerators": [],
            "parent": os.getpid(),
            "paths": {name: str(path) for name, path in {**paths, **sockets}.items()},
            "read_only": sorted(job.read_only),
            "sockets": sorted(sockets),
            "writable": sorted(job.writable),
        }
        reader, writer = os.pipe()
        try:
            process = self._spawn(
                agent_command(COMMANDS[job.mode], writer), config, job.threads, writer
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return reader, process

    def _start_platform(
        self, job: Job, service: socket.socket, broker: Path
    ) -> subprocess.Popen[bytes]:
        """The process that answers the agent with the machine's evidence.

        A TPM that is not used from inside the agent's sandbox need not stand open in there.
        """
        config = {
            "platform": job.platform,
            "broker": job.config["job"].get("broker"),
            "socket": str(broker),
        }
        return self._spawn(agent_command(PLATFORM, service.fileno()), config, 1, service.fileno())

    def _spawn(
        self, command: list[str], config: dict[str, Any], threads: int, descriptor: int
    ) -> subprocess.Popen[bytes]:
        # Imported late: a module less to measure before the machine answers its host.
        from cenacle.enclave.sandbox.folders import enclave_environment  # noqa: PLC0415

        stdin = os.memfd_create("cenacle-config")
        try:
            with os.fdopen(os.dup(stdin), "wb") as file:
                file.write(json.dumps(config).encode())
            os.lseek(stdin, 0, os.SEEK_SET)
            return subprocess.Popen(
                command,
                env=enclave_environment(threads),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(descriptor,),
                cwd="/",
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )
        finally:
            os.close(stdin)

    def _accept(self, listener: socket.socket, target: bytes) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            if len(self._connections) >= _MAX_CONNECTIONS:
                accepted.close()
                return
            accepted.setblocking(False)
            one = _Connection(accepted, self._next)
            self._next += 1
            self._connections[one.number] = one
            self._selector.register(accepted, selectors.EVENT_READ, one.number)
            self._send(frame(Kind.OPEN, target, one.number))

    def _serve(self, one: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                del one.unsent[: one.socket.send(one.unsent)]
            if events & selectors.EVENT_READ and not one.agent_closed:
                data = one.socket.recv(CHUNK)
                self._sync()
                if data:
                    self._send(frame(Kind.BYTES, data, one.number))
                else:
                    one.agent_closed = True
                    self._send(frame(Kind.CLOSED, number=one.number))
            self._settle(one)
        except BlockingIOError:
            return
        except OSError:
            self._drop(one)
            self._send(frame(Kind.ABORTED, number=one.number))

    def _settle(self, one: _Connection) -> None:
        """Wait for what a connection can still do, or forget it."""
        if one.host_closed and not one.unsent:
            if one.agent_closed:
                self._drop(one)
                return
            with contextlib.suppress(OSError):
                one.socket.shutdown(socket.SHUT_WR)
        events = 0 if one.agent_closed else selectors.EVENT_READ
        events |= selectors.EVENT_WRITE if one.unsent else 0
        known = one.socket in self._selector.get_map()
        if events and known:
            self._selector.modify(one.socket, events, one.number)
        elif events:
            self._selector.register(one.socket, events, one.number)
        elif known:
            self._selector.unregister(one.socket)

    def _drop(self, one: _Connection) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(one.socket)
        one.socket.close()
        self._connections.pop(one.number, None)

    def _from_host(self, received: Frame) -> None:
        one = self._connections.get(received.number)
        if one is None:
            return  # closed on this side while the bytes were on their way
        match received.kind:
            case Kind.BYTES:
                one.unsent += received.payload
            case Kind.CLOSED:
                one.host_closed = True
            case Kind.ABORTED:
                self._drop(one)
                return
            case _:
                raise EnclaveError("the host sent more files after its last one")
        if len(one.unsent) > _MAX_BUFFER:
            self._drop(one)
            self._send(frame(Kind.ABORTED, number=one.number))
            return
        self._settle(one)

    def _close(self) -> None:
        for one in list(self._connections.values()):
            self._drop(one)
        self._selector.close()

    def _sync(self) -> None:
        """Send what the agent wrote, before anything that it says afterwards."""
        for data in self._watch.changes():
            self._send(data)


def _exit_status(process: subprocess.Popen[bytes]) -> int:
    status = process.wait()
    return status if status >= 0 else 128 - status


def main() -> None:
    """Run as the first process of the machine; never returns."""
    try:
        guest_system.mount_all()
        port = guest_system.open_port(PORT)
        guest_system.provide_attestation()
        Supervisor(port, guest_system.WORK, guest_system.AGENT_ID).run()
    except CenacleError as error:
        _tell(error.diagnostics())
    except BaseException as error:
        _tell(f"{type(error).__name__}: {error}")
    finally:
        guest_system.power_off()


def _tell(text: str) -> None:
    """The last words of the machine, on its console; nothing of a job is ever in them."""
    with contextlib.suppress(OSError), Path("/dev/console").open("w", encoding="utf-8") as console:
        console.write(f"cenacle: {text}\n")


if __name__ == "__main__":
    main()
