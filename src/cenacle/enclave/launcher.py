"""Start an enclave on this machine and watch it: the host's side.

The launcher belongs to the operator and is not trusted with anything. It wraps the agent in
the outer layers of the sandbox, hands it its configuration (which holds no secret) through an
inherited file, forwards its one socket to the broker, and reads its messages. The inside is
:func:`cenacle.enclave.sandbox.entry.enclave_main`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from cenacle.attestation.platform import PlatformService
from cenacle.attestation.registry import Attester
from cenacle.enclave.bytecode import bytecode_folder
from cenacle.enclave.channel import Finished, Message
from cenacle.enclave.host_accelerators import HostAccelerators
from cenacle.enclave.relay import Relay
from cenacle.enclave.sandbox import Mount, SandboxPlan, View
from cenacle.enclave.sandbox.base import PLATFORM_SOCKET, SERVING_SOCKET
from cenacle.enclave.sandbox.entry import AgentConfig, enclave_main
from cenacle.enclave.sandbox.folders import enclave_environment, interpreter_command
from cenacle.enclave.sandbox.watch import ProcessWatch
from cenacle.errors import InputError, UnavailableError

__all__ = [
    "AgentConfig",
    "LaunchRequest",
    "Launcher",
    "ProcessLauncher",
    "RunningEnclave",
    "check_serving",
    "enclave_main",
    "launcher",
    "launchers",
    "register_launcher",
]

_MOUNT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SOCKET_NAME = "broker_socket"
_SOCKET_NAMES = (_SOCKET_NAME, PLATFORM_SOCKET, SERVING_SOCKET)


@dataclass(frozen=True)
class LaunchRequest:
    """One enclave to start.

    Attributes:
        broker: host and port of the broker, the only address the enclave can reach.
        plan: the sandbox.
        config: JSON for the agent; no secrets. It arrives as ``AgentConfig.job``.
        read_only: name -> file or folder that the enclave may read.
        writable: name -> existing folder that the enclave may write to.
        argv: arguments of the interpreter that start the agent.
        threads: for OpenMP and MKL; by default the processors this process may use.
        accelerators: kind of each accelerator to start outside the enclave, with a socket
            into it; only if the plan has accelerators.
        platform: the host's hardware, which makes the enclave's evidence; without it the
            evidence is simulated.
        serving: unix socket of the host's server, which listens there already; only if the
            plan has one.
    """

    broker: tuple[str, int]
    plan: SandboxPlan
    config: Mapping[str, Any] = field(default_factory=dict)
    read_only: Mapping[str, Path] = field(default_factory=dict)
    writable: Mapping[str, Path] = field(default_factory=dict)
    argv: tuple[str, ...] = ("-m", "cenacle.enclave")
    threads: int | None = None
    accelerators: tuple[str, ...] = ()
    platform: Attester | None = None
    serving: Path | None = None


class RunningEnclave(ABC):
    """An enclave that was started; use as a context manager, which kills it at the end."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process to watch on the host; killing it kills the enclave."""

    @abstractmethod
    def messages(self) -> Iterator[Message]:
        """Messages as they come, up to and including Finished or Failed.

        Raises EnclaveError if the enclave dies without one of those, or breaks the protocol
        (it is then killed).
        """

    @abstractmethod
    def wait(self, timeout: float | None = None) -> Finished:
        """Wait for the end of the job and of the process, dropping other messages.

        Raises:
            CenacleError: what the enclave reported in :class:`Failed`.
            EnclaveError: it died, or ``timeout`` seconds passed (it goes on running).
        """

    @abstractmethod
    def kill(self) -> None:
        """Kill the whole enclave and wait until it is gone. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Launcher(ABC):
    """One way of starting enclaves."""

    name: ClassVar[str]

    @abstractmethod
    def launch(self, job: LaunchRequest) -> RunningEnclave:
        """Start an enclave.

        Raises:
            InputError: a mount does not exist or has an unusable name.
            UnavailableError: the broker's address, the sandbox program or a kind of
                accelerator cannot be used here.
        """


_REGISTRY: dict[str, Launcher] = {}


def register_launcher(new: Launcher) -> None:
    """Add a way of starting enclaves; raises InputError if its name is taken."""
    if new.name in _REGISTRY:
        raise InputError("a launcher of this name is registered already", found=new.name)
    _REGISTRY[new.name] = new


def launcher(name: str = "process") -> Launcher:
    """The launcher of this name; raises InputError for an unknown one."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise InputError(
            "there is no such launcher", found=name, expected=", ".join(_REGISTRY)
        ) from None


def launchers() -> tuple[str, ...]:
    """The names of all launchers."""
    return tuple(_REGISTRY)


class ProcessLauncher(Launcher):
    """Enclaves that are sandboxed processes of this machine, under this user."""

    name = "process"

    def launch(self, job: LaunchRequest) -> RunningEnclave:
        if sys.platform != "linux":
            raise UnavailableError("a process enclave needs Linux", found=sys.platform)
        outer = job.plan.outer()
        root = outer[0].root if outer else None
        read_only = _mounts(job.read_only, root, writable=False)
        writable = _mounts(job.writable, root, writable=True)
        if same := set(job.read_only) & set(job.writable):
            raise InputError("two mounts have the same name", found=", ".join(sorted(same)))
        if bool(job.accelerators) != job.plan.accelerators:
            raise InputError(
                "the sandbox plan and the request differ in whether there are accelerators",
                found=f"{len(job.accelerators)} accelerators",
                expected="one or more" if job.plan.accelerators else "none",
            )
        if (job.platform is not None) != job.plan.platform:
            raise InputError(
                "the sandbox plan and the request differ in whether hardware makes the evidence",
                found="an attester" if job.platform is not None else "no attester",
                expected="an attester" if job.plan.platform else "none",
            )
        check_serving(job)
        threads = job.threads or len(os.sched_getaffinity(0))
        bytecode = bytecode_folder()
        outside = HostAccelerators(job.accelerators, threads)
        services: list[Relay | PlatformService] = []
        try:
            relay = Relay(job.broker).start()
            services.append(relay)
            sockets = {_SOCKET_NAME: _place(_SOCKET_NAME, relay.path, root)}
            if job.platform is not None:
                platform = PlatformService(job.platform).start()
                services.append(platform)
                sockets[PLATFORM_SOCKET] = _place(PLATFORM_SOCKET, platform.path, root)
            if job.serving is not None:
                server = Path(job.serving).resolve()
                sockets[SERVING_SOCKET] = _place(SERVING_SOCKET, server, root)
            view = View(
                (*read_only.values(), Mount(bytecode, bytecode)),
                tuple(writable.values()),
                sockets=tuple(sockets.values()),
            )
            mounts = {**read_only, **writable, **sockets}
            config = {
                "accelerators": outside.described(),
                "job": dict(job.config),
                # Under an outer layer the parent is the layer's own, which dies with us.
                "parent": None if outer else os.getpid(),
                "paths": {name: str(mount.inside) for name, mount in mounts.items()},
                "read_only": sorted(read_only),
                "sandbox": job.plan.to_dict(),
                "sockets": sorted(sockets),
                "writable": sorted(writable),
            }
            try:
                document = json.dumps(config, allow_nan=False).encode()
            except (TypeError, ValueError):
                raise InputError("the configuration of an enclave must be JSON") from None
            environment = enclave_environment(threads)
            outside.start()

            def command(channel_fd: int) -> list[str]:
                descriptors = ",".join(map(str, (channel_fd, *outside.descriptors)))
                line = [*interpreter_command(bytecode), *job.argv, descriptors]
                for layer in reversed(outer):
                    line = layer.wrap(line, view, environment)
                return line

            return _ProcessEnclave(
                ProcessWatch(
                    command,
                    environment,
                    document,
                    services,
                    outside,
                    wrapped=bool(outer),
                )
            )
        except BaseException:
            outside.close()
            for service in services:
                service.close()
            raise


class _ProcessEnclave(RunningEnclave):
    def __init__(self, watch: ProcessWatch) -> None:
        self._watch = watch

    @property
    def pid(self) -> int:
        return self._watch.pid

    def messages(self) -> Iterator[Message]:
        return self._watch.messages()

    def wait(self, timeout: float | None = None) -> Finished:
        return self._watch.wait(timeout)

    def kill(self) -> None:
        self._watch.kill()


register_launcher(ProcessLauncher())


def check_serving(job: LaunchRequest) -> None:
    """Raises InputError unless plan and request agree on the server's socket, and it exists."""
    if (job.serving is not None) != job.plan.serving:
        raise InputError(
            "the sandbox plan and the request differ in whether the enclave serves",
            found="a socket" if job.serving is not None else "no socket",
            expected="a socket" if job.plan.serving else "none",
        )
    if job.serving is not None and not Path(job.serving).is_socket():
        raise InputError("the server's socket does not exist", found=job.serving)


def _place(name: str, source: Path, root: Path | None) -> Mount:
    return Mount(source, source if root is None else root / name)


def _mounts(given: Mapping[str, Path], root: Path | None, *, writable: bool) -> dict[str, Mount]:
    mounts = {}
    for name, path in sorted(given.items()):
        if not _MOUNT_NAME.fullmatch(name) or name in _SOCKET_NAMES:
            raise InputError(
                "a mount has an unusable name",
                found=name,
                expected=f"lower-case letters, digits, - and _, not {' or '.join(_SOCKET_NAMES)}",
            )
        source = Path(path).resolve()
        if writable and not source.is_dir():
            raise InputError("a writable mount must be an existing folder", found=path)
        if not writable and not (source.is_dir() or source.is_file()):
            raise InputError("a read-only mount must be an existing file or folder", found=path)
        mounts[name] = _place(name, source, root)
    return mounts
