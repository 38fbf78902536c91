"""``python -m cenacle.enclave.vm FD``: run a machine for a launcher, as a process of its own.

Its standard input is the description of the machine; the descriptor gets the agent's messages.
It stands between launcher and emulator so that a machine is watched like any other enclave: a
process that sends messages and ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Final

from cenacle.enclave.channel import Channel
from cenacle.enclave.sandbox import linux
from cenacle.enclave.vm.machine import MachineJob, run_machine
from cenacle.errors import CenacleError

__all__ = ["main"]

_FAILED: Final = 70
_ENDS: Final = (b'{"kind":"finished"', b'{"kind":"failed"')


class _Messages:
    """Passes the agent's bytes on, and knows where in its messages they stopped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line = bytearray()
        self.ended = False

    def __call__(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._line += data
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        self.ended = self.ended or any(line.startswith(_ENDS) for line in lines)

    def fail(self, error: CenacleError) -> None:
        """Say why, unless the agent has said its last word or stopped in the middle of one."""
        if not self.ended and not self._line:
            Channel(self._fd).failed(error)


def main() -> None:
    """Run the machine; exits with the agent's status, never returns."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    messages = _Messages(int(sys.argv[1]))
    try:
        sys.stdin.buffer.seek(0)  # a file in memory, whose position the launcher left at its end
        job = MachineJob.from_fields(json.loads(sys.stdin.buffer.read()))
        status = run_machine(job, messages)
    except CenacleError as error:
        messages.fail(error)
        status = _FAILED
    sys.exit(status)


if __name__ == "__main__":
    main()
