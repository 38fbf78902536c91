"""The inside of a launch: confine this process, prove it to itself, then run the agent.

In this order, before the agent is even imported: standard streams to ``/dev/null``, every
other file descriptor closed, configuration read, inner layers applied, every planned layer
verified. Only then the agent runs, and only the agent fetches keys.

A second process, for a program that is not ours, is forked before any of that, while there is
nothing to inherit; it sees what the agent may read and nothing that it may write or call.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenacle.enclave.channel import Channel
from cenacle.enclave.sandbox import Mount, SandboxPlan, View, apply_inner, linux, verify_active
from cenacle.enclave.sandbox.base import PLATFORM_SOCKET, SERVING_SOCKET
from cenacle.errors import EnclaveError

__all__ = ["EXIT_FAILED", "Agent", "AgentConfig", "enclave_main"]

EXIT_FAILED = 70  # EX_SOFTWARE of sysexits(3): the message before it says why
_CONFIG_FD = 0


@dataclass(frozen=True)
class AgentConfig:
    """What an agent is told by its launcher. Nothing here is authenticated.

    Attributes:
        job: the launcher's configuration for the agent, as parsed from JSON.
        paths: mount name -> path inside, and ``broker_socket``.
        plan: the sandbox that this process runs in.
        layers: the layers that were verified to be active: all of the plan's.
        worker: descriptor of a socket to the second process, if there is one.
        accelerators: what the launcher says of each accelerator, and the descriptor of the
            socket to it.
    """

    job: Mapping[str, Any]
    paths: Mapping[str, Path]
    plan: SandboxPlan
    layers: tuple[str, ...]
    worker: int | None = None
    accelerators: tuple[tuple[Mapping[str, Any], int], ...] = ()


Agent = Callable[[AgentConfig, Channel], None]


def enclave_main(agent: Agent | str, worker: str | None = None, worker_mounts: str = "") -> None:
    """Confine this process as its launcher planned, then run ``agent`` and exit.

    Args:
        agent: the agent, or ``module:function`` to import only once the process is confined
            (which is needed if its imports start threads, as numpy's do).
        worker: ``module:function`` that serves a second process over a socket; it is called
            with the socket, the sandbox plan and its readable mounts, once confined.
        worker_mounts: how the names of the read-only mounts begin that it may read.
    """
    status = EXIT_FAILED
    pipe, sockets = _take_descriptors()
    channel = Channel(pipe)
    try:
        told = _read_config(sockets)
        connection = None if worker is None else _fork_worker(worker, worker_mounts, told, channel)
        config = _confine(told, connection)
        chosen = _load(agent) if isinstance(agent, str) else agent
        chosen(config, channel)
        if not channel.ended:
            raise EnclaveError(
                "the agent ended without a result", expected="Channel.finished as its last act"
            )
        status = 0
    except BaseException as error:  # nothing may leave by another way
        channel.failed(error)
    channel.close()
    # Finalizers of libraries could block or print; there is nothing left to save.
    os._exit(status)


def _take_descriptors() -> tuple[int, tuple[int, ...]]:
    """The pipe's number and those of sockets to accelerators, from the command line.

    Every stream and descriptor else is closed.
    """
    try:
        fd, *sockets = (int(number) for number in sys.argv.pop().split(","))
        if not stat.S_ISFIFO(os.fstat(fd).st_mode) or len({0, 1, 2, fd, *sockets}) < 4 + len(
            sockets
        ):
            raise ValueError
        for number in sockets:
            with socket.socket(fileno=os.dup(number)) as one:
                if (one.family, one.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
                    raise ValueError
            os.set_inheritable(number, False)
    except (IndexError, ValueError, OSError):
        sys.exit("this program is an enclave's inside: start it with `cenacle run`")
    linux.close_inherited(frozenset({0, 1, 2, fd, *sockets}))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
    os.set_inheritable(fd, False)
    return fd, tuple(sockets)


@dataclass(frozen=True)
class _Told:
    """The launcher's configuration, parsed."""

    job: Mapping[str, Any]
    paths: Mapping[str, Path]
    plan: SandboxPlan
    view: View
    parent: int | None
    accelerators: tuple[tuple[Mapping[str, Any], int], ...]


def _read_config(sockets: tuple[int, ...]) -> _Told:
    with os.fdopen(os.dup(_CONFIG_FD), "rb") as file:
        file.seek(0)
        raw = file.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _CONFIG_FD)
    os.close(null)
    try:
        fields = json.loads(raw)
        plan = SandboxPlan.from_dict(fields["sandbox"])
        paths = {str(name): Path(path) for name, path in fields["paths"].items()}
        names = {kind: tuple(fields[kind]) for kind in ("read_only", "writable", "sockets")}
        mounts = {
            kind: tuple(Mount(paths[name], paths[name]) for name in listed)
            for kind, listed in names.items()
        }
        view = View(**mounts, accelerators=plan.accelerators)
        accelerators = tuple(zip(map(dict, fields["accelerators"]), sockets, strict=True))
        if accelerators and not plan.accelerators:
            raise EnclaveError(
                "the sandbox plan has no accelerators, but there are sockets to some",
                found=str(len(accelerators)),
                remedy="run with the same version of cenacle that made the contract",
            )
        if (PLATFORM_SOCKET in names["sockets"]) != plan.platform:
            raise EnclaveError(
                "the sandbox plan and the sockets differ in whether the host's hardware answers",
                found=", ".join(names["sockets"]),
                remedy="run with the same version of cenacle that made the contract",
            )
        if (SERVING_SOCKET in names["sockets"]) != plan.serving:
            raise EnclaveError(
                "the sandbox plan and the sockets differ in whether the host's server is there",
                found=", ".join(names["sockets"]),
                remedy="start a contract that serves with `cenacle serve`, and any other with "
                "`cenacle run`",
            )
        return _Told(fields["job"], paths, plan, view, fields["parent"], accelerators)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnclaveError("the launcher's configuration does not parse") from None


def _confine(told: _Told, worker: int | None) -> AgentConfig:
    apply_inner(told.plan, told.view)
    if told.parent is not None and os.getppid() != told.parent:
        # The launcher died before this process had asked to die with it.
        raise EnclaveError("the launcher of this enclave is gone")
    active = tuple(verify_active(told.plan))
    return AgentConfig(
        job=told.job,
        paths=told.paths,
        plan=told.plan,
        layers=active,
        worker=worker,
        accelerators=told.accelerators,
    )


def _fork_worker(worker: str, prefix: str, told: _Told, channel: Channel) -> int:
    """Make the second process; returns this side's socket to it."""
    ours, theirs = socket.socketpair()
    agent = os.getpid()
    if os.fork() != 0:
        theirs.close()
        return ours.detach()
    status = EXIT_FAILED
    try:
        ours.close()
        channel.close()
        for _, accelerator in told.accelerators:
            os.close(accelerator)  # a way out, if the program had it
        readable = {
            name: path
            for name, path in told.paths.items()
            if name.startswith(prefix) and any(m.inside == path for m in told.view.read_only)
        }
        view = View(read_only=tuple(Mount(path, path) for path in readable.values()))
        apply_inner(told.plan, view)
        if os.getppid() != agent:
            raise EnclaveError("the agent of this process is gone")
        verify_active(told.plan)
        _load(worker)(theirs, told.plan, readable)
        status = 0
    finally:
        # Nothing of a traceback may reach a stream, and nothing is left to finalize.
        os._exit(status)


def _load(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found
