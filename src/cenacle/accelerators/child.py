"""A worker's operating-system process: started bare, watched, and ended with all it began."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import cenacle
from cenacle.errors import AcceleratorError

__all__ = ["WORKER", "Attached", "Child", "worker_environment"]

WORKER: Final = (sys.executable, "-s", "-P", "-B", "-m", "cenacle.accelerators.worker")
"""The worker that Cenacle brings along. ``-B``: it has no business writing byte code."""

_PASSED_FOR_CUDA: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH")
_END_S: Final = 10.0


def worker_environment(threads: int, device: str) -> dict[str, str]:
    """The whole environment of a worker: nothing of ours but what CUDA needs to find a device."""
    environment = {
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "LOGNAME": "worker",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/proc",  # must exist, and nothing can be written to it
    }
    if device.startswith("cuda"):
        for name in _PASSED_FOR_CUDA:
            if name in os.environ:
                environment[name] = os.environ[name]
    source = Path(cenacle.__file__).parent.parent
    if not any(source.is_relative_to(p) for p in (Path(sys.prefix), Path(sys.base_prefix))):
        environment["PYTHONPATH"] = str(source)  # an editable install or a source tree
    return environment


class Child:
    """A process with a socket to it as its only descriptor, besides ``/dev/null``.

    A thread of its own starts the process and outlives it: ``PR_SET_PDEATHSIG`` speaks of the
    thread that made a process, and only the end of this program may end the worker. The thread
    also reaps it, so no zombie is left even if nobody asks.

    Args:
        command: gets the socket's descriptor number and this process's number appended.
        arguments: appended after those.
        environment: the whole environment.

    Attributes:
        socket: this side's end, which does not block.
        pid: the process, which leads a session and a group of its own.

    Raises:
        AcceleratorError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.pid = 0
        self._status: int | None = None
        self._alive = False
        self._lock = threading.Lock()
        self._error: OSError | None = None
        try:
            self.socket, theirs = socket.socketpair()
        except OSError as error:
            raise _not_started(error) from None
        self.socket.setblocking(False)
        started = threading.Event()
        full = [*command, str(theirs.fileno()), str(os.getpid()), *arguments]
        self._keeper = threading.Thread(
            target=self._keep,
            args=(full, dict(environment), theirs, started),
            name="cenacle-worker-keeper",
            daemon=True,
        )
        self._keeper.start()
        started.wait()
        if self._error is not None:
            self._keeper.join()
            self.socket.close()
            raise _not_started(self._error)

    def end(self, within: float = 1.0) -> str:
        """How it ended, in words; it is given a moment to do so."""
        self._keeper.join(within)
        status = self._status
        if status is None:
            return "it closed its connection"
        if status >= 0:
            return f"it ended with status {status}"
        try:
            return f"it was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"it was ended by signal {-status}"

    def kill(self) -> None:
        """End it and everything in its group, and wait for that. Safe to call twice."""
        with self._lock:
            self._signal_group()
        self.socket.close()
        self._keeper.join(_END_S)

    def _keep(
        self,
        command: list[str],
        environment: dict[str, str],
        theirs: socket.socket,
        started: threading.Event,
    ) -> None:
        try:
            with theirs:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    start_new_session=True,
                )
            self.pid = process.pid
            self._alive = True
        except OSError as error:
            self._error = error
            return
        finally:
            started.set()
        # Left a zombie until its group was ended: until then its number is its own.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._signal_group()
            self._alive = False
            self._status = process.wait()

    def _signal_group(self) -> None:
        if self._alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Attached:
    """A worker that somebody else started, of which this process has a socket and no more.

    Takes the place of a :class:`Child`; it ends when its socket is closed.

    Args:
        descriptor: of a connected Unix stream socket; taken over.
    """

    def __init__(self, descriptor: int) -> None:
        self.pid = 0
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(False)

    def end(self, within: float = 1.0) -> str:  # noqa: ARG002 - a child's signature
        """How it ended: that is known to whoever started it."""
        return "it closed its connection"

    def kill(self) -> None:
        """Hang up. Safe to call twice."""
        self.socket.close()


def _not_started(error: OSError) -> AcceleratorError:
    return AcceleratorError(
        "an accelerator's process cannot be started",
        found=error.strerror,
        remedy="free memory, processes or file descriptors; a confined enclave may start none",
    )
