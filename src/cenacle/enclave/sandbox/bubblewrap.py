"""Layer ``bubblewrap``: namespaces made by the launcher with bwrap(1).

The enclave sees a read-only file system made of the interpreter, its packages, the system's
libraries and the job's own folders under ``/cenacle``; it has process, network, user, mount,
IPC, host-name and control-group namespaces of its own; no capability; no way back to a user
namespace; and no network interface but an unused loopback. What is left is one unix socket.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cenacle.enclave.sandbox import linux
from cenacle.enclave.sandbox.base import OuterLayer, View
from cenacle.enclave.sandbox.folders import (
    SYSTEM_FILES,
    SYSTEM_LIBRARIES,
    enclave_environment,
    interpreter_command,
    interpreter_folders,
)
from cenacle.errors import CenacleError, UnavailableError

__all__ = ["BubblewrapLayer"]

_REMEDY = "needs the Debian package bubblewrap and a kernel that lets users make user namespaces"
_TIMEOUT_S = 60
_NAMESPACES = ("cgroup", "ipc", "mount", "network", "process", "user", "uts")
_KERNEL_MOUNTS = frozenset({"/proc", "/dev"})
_CLONE_NEWUSER = 0x10000000


class BubblewrapLayer(OuterLayer):
    """Namespaces with a read-only view of the interpreter and no network."""

    name = "bubblewrap"
    protects = "no network at all, no other process or file in sight, one socket to the broker"
    root = Path("/cenacle")

    def available(self) -> str | None:
        if sys.platform != "linux" or shutil.which("bwrap") is None:
            return f"bwrap is not installed; {_REMEDY}"
        return _try_out(self)[0]

    def settings(self) -> dict[str, Any]:
        return self._describe(userns_disabled=_try_out(self)[1])

    @staticmethod
    def _describe(*, userns_disabled: bool) -> dict[str, Any]:
        return {
            "capabilities": [],
            "namespaces": list(_NAMESPACES),
            "new_session": True,
            "read": ["interpreter", "job", "system libraries"],
            "sockets": ["broker"],
            "user_namespaces_disabled": userns_disabled,
            "write": ["job"],
        }

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        return any(dict(settings) == self._describe(userns_disabled=d) for d in (True, False))

    def wrap(self, command: Sequence[str], view: View, environment: Mapping[str, str]) -> list[str]:
        return self._wrap(command, view, environment, userns_disabled=_try_out(self)[1])

    def _wrap(
        self,
        command: Sequence[str],
        view: View,
        environment: Mapping[str, str],
        *,
        userns_disabled: bool,
    ) -> list[str]:
        # --unshare-all makes a user namespace only if it can; here it must.
        options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
        options += ["--uid", "1000", "--gid", "1000", "--hostname", "enclave"]
        options += ["--disable-userns"] if userns_disabled else []
        options += ["--cap-drop", "ALL", "--clearenv"]
        for name, value in sorted(environment.items()):
            options += ["--setenv", name, value]
        options += ["--proc", "/proc", "--dev", "/dev"]
        options += _system()
        for path in interpreter_folders():
            options += ["--ro-bind", str(path), str(path)]
        for mount in (*view.read_only, *view.sockets):
            options += ["--ro-bind", str(mount.source), str(mount.inside)]
        for mount in view.writable:
            options += ["--bind", str(mount.source), str(mount.inside)]
        # The root and /dev are memory file systems that would otherwise take files.
        options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
        return [shutil.which("bwrap") or "bwrap", *options, "--", *command]

    def verify(self, settings: Mapping[str, Any]) -> None:
        interfaces = Path("/proc/self/net/dev").read_text("utf-8").splitlines()[2:]
        names = {line.partition(":")[0].strip() for line in interfaces}
        if names - {"lo"}:
            raise self._inactive(
                "network interfaces " + ", ".join(sorted(names)), "a loopback interface only"
            )
        routes = Path("/proc/self/net/route").read_text("utf-8").splitlines()[1:]
        if routes:
            raise self._inactive(f"{len(routes)} network routes", "none")
        mounts = _mounts()
        if mounts.get("/", ("", frozenset()))[0] != "tmpfs" or "/cenacle" in mounts:
            raise self._inactive("the host's root file system", "one made for the enclave")
        for path, (_, options) in mounts.items():
            inside = Path(path).is_relative_to(self.root)
            kernel = any(Path(path).is_relative_to(other) for other in _KERNEL_MOUNTS - {path})
            if path != "/proc" and not inside and not kernel and "ro" not in options:
                raise self._inactive(f"{path} can be written to", "a read-only mount")
        status = linux.process_status()
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            if int(status.get(kind, "f"), 16) != 0:
                raise self._inactive(f"capabilities in {kind}", "no capabilities")
        if settings["user_namespaces_disabled"] and linux.unshare(_CLONE_NEWUSER):
            raise self._inactive("a user namespace can be made", "none")


def _mounts() -> dict[str, tuple[str, frozenset[str]]]:
    """Mount point -> (file system, mount options), from proc(5) mountinfo."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        found[fields[4]] = (after.split(" ")[0], frozenset(fields[5].split(",")))
    return found


def _system() -> list[str]:
    options = []
    for path in SYSTEM_LIBRARIES:
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    for path in SYSTEM_FILES:
        if path.exists():
            options += ["--ro-bind", str(path), str(path)]
    return options


@functools.cache
def _try_out(layer: BubblewrapLayer) -> tuple[str | None, bool]:
    """Start the interpreter in it: (None or why it fails, whether --disable-userns works)."""
    reason = ""
    for disabled in (True, False):
        try:
            command = layer._wrap(
                [*interpreter_command(), "-c", "import cenacle"],
                View(),
                enclave_environment(1),
                userns_disabled=disabled,
            )
            run = subprocess.run(
                command,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except UnavailableError as error:
            return error.diagnostics(), False
        except (OSError, subprocess.TimeoutExpired, CenacleError) as error:
            return f"bwrap did not run: {type(error).__name__}; {_REMEDY}", False
        if run.returncode == 0:
            return None, disabled
        lines = run.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"bwrap ended with status {run.returncode}"
    return f"{reason}; {_REMEDY}", False
