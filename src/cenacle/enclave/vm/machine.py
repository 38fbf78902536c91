"""Run one machine for one job: its TPM, its emulator, its link, and its end in one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from cenacle.enclave.sandbox import linux
from cenacle.enclave.vm import qemu
from cenacle.enclave.vm.host import GuestJob, HostLink
from cenacle.enclave.vm.tpm import TpmIdentity
from cenacle.errors import EnclaveError, InputError

__all__ = ["MachineJob", "run_machine"]

_BOOT_S: Final = 300.0
_CONSOLE: Final = 4096
_SHOWN: Final = 200
_SIGNALLED: Final = 128
_NOISE: Final = ("---[", "Call Trace", "RIP:", "Kernel Offset", "</TASK>", "<TASK>")


@dataclass(frozen=True)
class MachineJob:
    """A machine, and what it runs.

    Attributes:
        cmdline: of the kernel, from the image's manifest.
        tpm: folder of the TPM's identity, or None for a machine without TPM.
        folder: private and empty, for the machine's state; whoever made it removes it.
    """

    machine: qemu.Machine
    cmdline: str
    tpm: Path | None
    folder: Path
    job: GuestJob

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What the launcher hands to the process that runs the machine; raises InputError."""
        try:
            machine = dict(fields["machine"])
            machine["image"] = Path(machine["image"])
            machine["c_bit"] = tuple(machine["c_bit"])
            return cls(
                machine=qemu.Machine(**machine),
                cmdline=str(fields["cmdline"]),
                tpm=None if fields["tpm"] is None else Path(fields["tpm"]),
                folder=Path(fields["folder"]),
                job=GuestJob(
                    fields=dict(fields["job"]),
                    read_only={n: Path(p) for n, p in fields["read_only"].items()},
                    writable={n: Path(p) for n, p in fields["writable"].items()},
                    broker=Path(fields["broker"]),
                    serving=None if fields["serving"] is None else Path(fields["serving"]),
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("the description of a virtual machine does not parse") from None


def run_machine(
    job: MachineJob,
    messages: Callable[[bytes], None],
    started: Callable[[], None] = lambda: None,
) -> int:
    """Start the machine, serve it, and return its agent's exit status.

    Args:
        messages: called with bytes of the agent's channel.
        started: called when the guest has answered for the first time.

    Raises:
        EnclaveError: the machine ended before its agent, or broke the protocol.
        UnavailableError: a program is missing, or this host's disk is full.
    """
    return asyncio.run(_run(job, messages, started))


async def _run(
    job: MachineJob, messages: Callable[[bytes], None], started: Callable[[], None]
) -> int:
    job.folder.mkdir(mode=0o700, exist_ok=True)
    variables = job.folder / "vars.fd"
    if job.machine.confidential is None:
        shutil.copyfile(qemu.firmware()[1], variables)
        variables.chmod(0o600)
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        handed = [theirs]
        control: int | None = None
        if job.tpm is not None:
            control_ours, control_theirs = socket.socketpair()
            handed += [control_ours, control_theirs]
            stack.callback(_end, _start_tpm(job, control_theirs))
            control = control_ours.fileno()
        try:
            line = job.machine.command(job.cmdline, theirs.fileno(), control, variables)
            passed = [theirs.fileno(), *([] if control is None else [control])]
            process = _start(line, passed, subprocess.PIPE)
        finally:
            for one in handed:
                one.close()  # the machine's alone: when it ends, this side sees it
        stack.callback(_end, process)
        reader, writer = await asyncio.open_connection(sock=ours)
        stack.callback(writer.transport.abort)
        console = asyncio.create_task(_console(process))
        booted = asyncio.Event()

        def answered() -> None:
            booted.set()
            started()

        link = asyncio.create_task(HostLink(reader, writer, job.job, messages).run(answered))
        overdue = asyncio.create_task(_limit(booted, link))
        try:
            status = await link
        except asyncio.CancelledError:
            raise EnclaveError(
                "the virtual machine does not start",
                found=f"no answer in {_BOOT_S:.0f} s",
                remedy="give it more memory or a less loaded host",
            ) from None
        finally:
            overdue.cancel()
        if status is not None:
            return status
        return _vanished(process, await console)


async def _limit(booted: asyncio.Event, link: asyncio.Task[int | None]) -> None:
    try:
        async with asyncio.timeout(_BOOT_S):
            await booted.wait()
    except TimeoutError:
        link.cancel()


def _vanished(process: subprocess.Popen[bytes], console: bytes) -> int:
    """The machine is gone without a word of its agent: why, as far as it can be known."""
    status = process.wait()
    if status < 0:
        return _SIGNALLED - status
    raise EnclaveError(
        "the virtual machine ended before its enclave did",
        found=_last_line(console) or f"exit code {status}",
        remedy="build the image again; if it goes on, start it with more memory",
    )


async def _console(process: subprocess.Popen[bytes]) -> bytes:
    """The end of what the machine writes to its serial console, until it ends."""
    assert process.stdout is not None
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    tail = bytearray()
    try:
        while data := await reader.read(_CONSOLE):
            tail += data
            del tail[:-_CONSOLE]
    finally:
        transport.close()
    return bytes(tail)


def _last_line(console: bytes) -> str:
    """The line that tells why; a machine's console is not trusted with more than that."""
    lines = [
        "".join(c for c in line if c.isprintable()).strip()
        for line in console.decode("utf-8", "replace").splitlines()
    ]
    for mark in ("cenacle:", "Kernel panic"):
        for line in lines:
            if mark in line:
                return line[line.index(mark) :][:_SHOWN]
    lines = [line for line in lines if line and not any(noise in line for noise in _NOISE)]
    return lines[-1][:_SHOWN] if lines else ""


def _start_tpm(job: MachineJob, control: socket.socket) -> subprocess.Popen[bytes]:
    assert job.tpm is not None
    identity = TpmIdentity(job.tpm)
    identity.prepare()
    state = job.folder / "tpm"
    state.mkdir(mode=0o700)
    identity.copy_to(state)
    return _start(identity.command(state, control.fileno()), [control.fileno()], subprocess.DEVNULL)


def _start(line: Sequence[str], descriptors: Sequence[int], output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output == subprocess.PIPE else subprocess.DEVNULL,
        pass_fds=descriptors,
        # This process has one thread, so the call between fork and exec is safe.
        preexec_fn=_die_with_parent,  # noqa: PLW1509
    )


def _die_with_parent() -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
