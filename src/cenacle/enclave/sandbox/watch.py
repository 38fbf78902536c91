"""One running process enclave: its keeper thread, its messages, and its end in one sentence."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cenacle.attestation.platform import PlatformService
from cenacle.enclave.channel import Failed, Finished, Message, read_messages
from cenacle.enclave.host_accelerators import HostAccelerators
from cenacle.enclave.relay import Relay
from cenacle.errors import CenacleError, EnclaveError, UnavailableError

__all__ = ["ProcessWatch"]

_GRACE_S = 10.0  # from the last message to the end of the process
_STDERR_TAIL = 400
_WRAPPED_SIGNAL = 128  # a shell's and bwrap's way to say that their child got a signal


class ProcessWatch:
    """Starts a command and keeps it until its end.

    A thread of its own starts the process and outlives it: the kernel kills a process with
    ``PR_SET_PDEATHSIG`` when the *thread* that made it ends, so a worker thread that calls the
    launcher and returns would take the enclave with it, and only our own end must.

    Args:
        command: number of the channel's descriptor -> command line.
        environment: the whole environment.
        config: the agent's configuration, which it finds as its standard input.
        services: what the host serves to the process; closed when it has ended.
        accelerators: whose sockets the process inherits; likewise closed.
        wrapped: whether the command reports its child's signals as exit code 128 + signal.
    """

    def __init__(
        self,
        command: Callable[[int], list[str]],
        environment: Mapping[str, str],
        config: bytes,
        services: Sequence[Relay | PlatformService],
        accelerators: HostAccelerators,
        *,
        wrapped: bool,
    ) -> None:
        self._services = tuple(services)
        self._accelerators = accelerators
        self._wrapped = wrapped
        self._changed = threading.Condition()
        self._messages: list[Message] = []
        self._result: Finished | CenacleError | None = None
        self._killed = False
        self._alive = False
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        started = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep,
            args=(command, environment, config, started),
            name="cenacle-enclave",
            daemon=True,
        )
        self._keeper.start()
        started.wait()
        if self._start_error is not None:
            self._keeper.join()
            raise UnavailableError(
                "the enclave's process cannot be started",
                found=self._start_error.strerror,
                remedy="free memory or processes, or plan without the layer bubblewrap",
            )

    def messages(self) -> Iterator[Message]:
        """All messages from the first one on, as they come; see RunningEnclave."""
        position = 0
        while True:
            with self._changed:
                while len(self._messages) <= position and self._result is None:
                    self._changed.wait()
                if len(self._messages) > position:
                    message = self._messages[position]
                elif isinstance(self._result, CenacleError) and not (
                    self._messages and isinstance(self._messages[-1], Failed)
                ):
                    raise self._result
                else:
                    return
            position += 1
            yield message

    def wait(self, timeout: float | None) -> Finished:
        """The last message; see RunningEnclave."""
        with self._changed:
            self._changed.wait_for(lambda: self._result is not None, timeout)
            result = self._result
        if result is None:
            raise EnclaveError(
                "the enclave has not finished in time",
                expected=f"an end within {timeout} seconds",
                remedy="wait longer, or stop it",
            )
        if isinstance(result, CenacleError):
            raise result
        return result

    def kill(self) -> None:
        """Kill the process group and wait for the end."""
        with self._changed:
            if self._alive:
                self._killed = True
            self._signal_group()
        self._keeper.join()

    def _signal_group(self) -> None:
        # Under the lock, the leader is running or an unreaped zombie: its number is its own.
        if self._alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _keep(
        self,
        command: Callable[[int], list[str]],
        environment: Mapping[str, str],
        config: bytes,
        started: threading.Event,
    ) -> None:
        with contextlib.ExitStack() as stack:
            for service in self._services:
                stack.callback(service.close)
            stack.callback(self._accelerators.close)
            try:
                reader, errors = self._start(stack, command, environment, config)
            except OSError as error:
                self._start_error = error
                return
            finally:
                started.set()
            before = _oom_kills()
            # A child that outlives the agent would keep the channel open.
            reaper = threading.Thread(target=self._end_group, name="cenacle-reaper", daemon=True)
            reaper.start()
            violation: CenacleError | None = None
            try:
                for message in read_messages(reader):
                    with self._changed:
                        self._messages.append(message)
                        self._changed.notify_all()
                    if isinstance(message, Finished | Failed):
                        break
            except CenacleError as error:
                violation = error
            status = self._reap(reaper, at_once=violation is not None)
            result = violation or self._judge(status, _oom_kills() > before, errors)
            with self._changed:
                self._result = result
                self._changed.notify_all()

    def _start(
        self,
        stack: contextlib.ExitStack,
        command: Callable[[int], list[str]],
        environment: Mapping[str, str],
        config: bytes,
    ) -> tuple[int, int]:
        """Start the process; return the channel's read end and the file with early errors."""
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        with contextlib.ExitStack() as handed_over:
            handed_over.callback(os.close, writer)
            # Files in memory: nothing of a job is written to a disk by its launcher.
            stdin = os.memfd_create("cenacle-config")
            handed_over.callback(os.close, stdin)
            with os.fdopen(os.dup(stdin), "wb") as file:
                file.write(config)
            errors = os.memfd_create("cenacle-errors")
            stack.callback(os.close, errors)
            process = subprocess.Popen(
                command(writer),
                env=dict(environment),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                # Only until the agent's first act, which is to replace it by /dev/null.
                stderr=errors,
                pass_fds=(writer, *self._accelerators.descriptors),
                cwd="/",
                start_new_session=True,
            )
        # Only the enclave holds them now: when it ends, the workers see it.
        self._accelerators.handed_over()
        self._process = process
        self.pid = process.pid
        self._alive = True
        return reader, errors

    def _end_group(self) -> None:
        """Wait for the process, leave it a zombie, and kill what it left behind."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._stop()

    def _reap(self, reaper: threading.Thread, *, at_once: bool) -> int:
        """Wait for the process, which has little time left if it is done, for its status."""
        ended = bool(self._messages) and isinstance(self._messages[-1], Finished | Failed)
        overdue = threading.Timer(0.0 if at_once else _GRACE_S, self._stop)
        overdue.daemon = True
        if at_once or ended:
            overdue.start()
        reaper.join()
        overdue.cancel()
        with self._changed:
            status = 0 if self._process is None else self._process.wait()
            self._alive = False
        return status

    def _stop(self) -> None:
        with self._changed:
            self._signal_group()

    def _judge(self, status: int, oom: bool, errors: int) -> Finished | CenacleError:
        last = self._messages[-1] if self._messages else None
        match last:
            case Finished():
                return last
            case Failed():
                return last.to_error()
        if self._killed:
            return EnclaveError("the enclave was stopped before its job was done")
        number = -status if status < 0 else status - _WRAPPED_SIGNAL if self._wrapped else 0
        if number > 0:
            return _killed_by(number, oom)
        return EnclaveError(
            "the enclave ended without a result",
            found=f"exit code {status}" + _tail(errors, silent=last is None),
            remedy="run cenacle's sandbox check to see which layers work on this machine",
        )


def _killed_by(number: int, oom: bool) -> EnclaveError:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and oom:
        return EnclaveError(
            "the enclave was killed because the machine ran out of memory",
            found=name,
            remedy="use smaller batches, close other programs, or take a larger machine",
        )
    remedies: dict[int, str] = {
        signal.SIGKILL: "somebody killed it, or the system was short of memory; run it again",
        signal.SIGSYS: "it made a system call of a foreign architecture, which is forbidden",
    }
    otherwise = "run the program on made-up data outside the enclave to find the fault"
    return EnclaveError(
        "the enclave was killed by a signal", found=name, remedy=remedies.get(number, otherwise)
    )


def _tail(errors: int, *, silent: bool) -> str:
    """The last line that bwrap or the interpreter wrote before there was an agent."""
    if not silent:
        return ""
    size = os.fstat(errors).st_size
    text = os.pread(errors, _STDERR_TAIL, max(0, size - _STDERR_TAIL)).decode("utf-8", "replace")
    lines = text.strip().splitlines()
    return ": " + "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


def _oom_kills() -> int:
    """How often this machine's kernel has killed for want of memory (proc(5), since 4.13)."""
    try:
        text = Path("/proc/vmstat").read_text("ascii")
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in text.splitlines())
    return int(counts.get("oom_kill", 0))
