"""The process in which a program runs: a second one, made before any key exists.

The agent holds the enclave's signing key; a program never shares its memory. It runs in a
process forked at the very start, confined more tightly than the agent: no writable folder, no
socket of any kind but the one connection to the agent. It receives the keys of the contract's
assets, decrypts what the program reads, and hands values back over the connection.

Little is imported here: a job without a program never needs the rest.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.errors import EnclaveError

__all__ = ["require_no_sockets", "work"]


def require_no_sockets(plan: SandboxPlan) -> None:
    """Try to make a socket: the seccomp layer must refuse it to a process without mounts for one.

    Raises:
        EnclaveError: the plan has seccomp, and a socket can be made all the same.
    """
    if "seccomp" not in plan.layers:
        return
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
    except PermissionError:
        return
    raise EnclaveError("the program's process can open sockets", expected="EPERM")


def work(connection: socket.socket, plan: SandboxPlan, paths: Mapping[str, Path]) -> None:
    """Serve one job: read it, run the program, send its outputs.

    Whatever the program raises crosses as its class name alone: a message may quote a record.
    """
    require_no_sockets(plan)
    send_frame(connection, {"kind": "ready"})
    # Raises when the agent ends without a job for us.
    _, payload = read_frame(connection)
    phase = "loading"
    try:
        from cenacle.enclave.program_runner import load  # noqa: PLC0415

        with load(payload, connection, paths) as program:
            phase = "running"
            program.run()
    except BaseException as error:
        name = type(error).__name__[:100]
        send_frame(connection, {"kind": "failed", "class": name, "phase": phase})
    else:
        send_frame(connection, {"kind": "done"})
