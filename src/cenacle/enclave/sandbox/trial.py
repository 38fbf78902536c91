"""Find out whether a layer works by really using it, in a process made for the purpose."""

from __future__ import annotations

import functools
import subprocess
import sys

from cenacle.enclave.sandbox.folders import enclave_environment, interpreter_command

__all__ = ["trial"]

_TIMEOUT_S = 60
_PROGRAM = """
import sys
from cenacle.enclave.sandbox import base, layer
from cenacle.errors import CenacleError
one = layer(sys.argv[1])
try:
    settings = one.settings()
    one.apply(base.View())
    one.verify(settings)
except CenacleError as error:
    sys.stderr.write(error.diagnostics())
    sys.stderr.flush()
    sys.exit(3)
"""


@functools.cache
def trial(name: str, remedy: str) -> str | None:
    """Apply the inner layer ``name`` to a fresh process and verify it there.

    Returns None if it holds, else one sentence on what went wrong, ending in ``remedy``.
    """
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        run = subprocess.run(
            [*interpreter_command(), "-c", _PROGRAM, name],
            env=enclave_environment(1),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its trial did not run: {type(error).__name__}"
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"its trial ended with status {run.returncode}"
    return f"{reason}; {remedy}" if remedy else reason
