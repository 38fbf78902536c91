"""Layer ``process``: what a process can give up by itself.

No core dumps, no reading by other processes (``PR_SET_DUMPABLE`` 0 makes ``/proc/PID/mem``,
``environ`` and ``maps`` root's and refuses ptrace), no new privileges, no capabilities, death
with its launcher, and an environment and interpreter flags that hold nothing of the host's.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

from cenacle.enclave.sandbox import linux
from cenacle.enclave.sandbox.base import InnerLayer, View
from cenacle.enclave.sandbox.folders import ENVIRONMENT, NO_BYTECODE, THREAD_VARIABLES
from cenacle.enclave.sandbox.trial import trial
from cenacle.errors import EnclaveError

__all__ = ["ProcessLayer"]

# bwrap adds PWD; PYTHONPATH names the folder of this package in a source tree.
_ALLOWED_VARIABLES = frozenset(ENVIRONMENT) | frozenset(THREAD_VARIABLES) | {"PWD", "PYTHONPATH"}


class ProcessLayer(InnerLayer):
    """Core dumps off, memory unreadable to others, no privileges, a bare environment."""

    name = "process"
    protects = "no core dumps, no debugging, memory unreadable to other users, no privileges"

    def available(self) -> str | None:
        return trial(self.name, remedy="")

    def settings(self) -> dict[str, Any]:
        return {
            "capabilities": [],
            "core_dump_bytes": 0,
            "dies_with_launcher": True,
            "dumpable": False,
            "environment": dict(ENVIRONMENT),
            "no_new_privileges": True,
            "reads_bytecode": "measured",
        }

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        return dict(settings) == self.settings()

    def apply(self, view: View) -> None:  # noqa: ARG002 - the same for every job
        try:
            # apply_inner did this already; a layer tried alone must hold as well.
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            # Keys in locked memory count against this limit.
            hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            linux.drop_capabilities()
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
        except OSError as error:
            raise EnclaveError(
                "the sandbox layer process cannot be applied", found=error.strerror
            ) from None

    def verify(self, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        status = linux.process_status()
        if linux.prctl(linux.PR_GET_DUMPABLE) != 0:
            raise self._inactive("a dumpable process", "PR_SET_DUMPABLE 0")
        if linux.parent_death_signal() != signal.SIGKILL:
            raise self._inactive("outlives its launcher", "PR_SET_PDEATHSIG SIGKILL")
        if resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
            raise self._inactive("core dumps allowed", "RLIMIT_CORE 0")
        if status.get("NoNewPrivs") != "1":
            raise self._inactive("new privileges allowed", "no_new_privs")
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            if int(status.get(kind, "f"), 16) != 0:
                raise self._inactive(f"capabilities in {kind}", "no capabilities")
        foreign = set(os.environ) - _ALLOWED_VARIABLES
        if foreign or any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
            # Values may be secrets of the host; names are enough to act on.
            raise self._inactive(
                "environment variables of the host: " + (", ".join(sorted(foreign)) or "changed"),
                "the fixed environment",
            )
        # Without a prefix Python reads what lies beside the sources; below one it reads what
        # cenacle.attestation.measure measures.
        if not sys.pycache_prefix or os.path.lexists(NO_BYTECODE) or not sys.dont_write_bytecode:
            raise self._inactive("byte code that nobody measured", "none, or a measured folder")
