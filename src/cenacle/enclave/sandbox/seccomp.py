"""Layer ``seccomp``: the system calls an enclave may make (seccomp-bpf through libseccomp).

An allow-list (:mod:`cenacle.enclave.sandbox.syscalls`), with conditions on the calls that do
both harmless and harmful things. A view without a socket (that of a program's process) gets
no new socket at all, and only one with accelerators gets files in memory, to share with them.
In particular no program can be executed, no process made,
no network socket opened, no other process looked into, and no limit raised again.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import platform
import socket
from collections.abc import Mapping
from typing import Any

from cenacle.enclave.sandbox import linux
from cenacle.enclave.sandbox.base import InnerLayer, View
from cenacle.enclave.sandbox.syscalls import ALLOWED, IOCTLS, PRCTLS, REFUSED
from cenacle.enclave.sandbox.trial import trial
from cenacle.errors import EnclaveError

__all__ = ["SeccompLayer"]

_REMEDY = "needs the Debian package libseccomp2 and the PyPI package pyseccomp"
# The order of clone's arguments differs elsewhere (s390), and nothing else was tested.
_MACHINES = ("x86_64", "aarch64")
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag: cgroup, ipc, net, ns, pid, time, user, uts
_PTRACE_TRACEME = 0
_SYS_PTRACE = {"x86_64": 101, "aarch64": 117}


def _api() -> Any:
    """The module pyseccomp; raises EnclaveError where it or libseccomp is missing."""
    try:
        with linux.libraries_by_soname():
            return importlib.import_module("pyseccomp")
    except (ImportError, RuntimeError, OSError, AttributeError):
        raise EnclaveError("pyseccomp or libseccomp is not installed") from None


class SeccompLayer(InnerLayer):
    """The allow-list of system calls, for every thread, until the process ends."""

    name = "seccomp"
    protects = "no network sockets, no programs, no new processes, no debugging or mounting"

    def available(self) -> str | None:
        if platform.machine() not in _MACHINES:
            return f"it is not tested on {platform.machine()}"
        return trial(self.name, remedy=_REMEDY)

    def settings(self) -> dict[str, Any]:
        return {
            "allowed": sorted(ALLOWED),
            "conditions": {
                "clone": "threads only",
                "ioctl": sorted(IOCTLS),
                "kill": "itself",
                "prctl": sorted(PRCTLS),
                "prlimit64": "reading",
                "connect": "if the view has a socket",
                "memfd_create": "if the view has accelerators",
                "socket": "AF_UNIX, if the view has a socket",
                "socketpair": "AF_UNIX, if the view has a socket",
                "tgkill": "itself",
            },
            "foreign_architecture": "kill",
            "refused": sorted(REFUSED),
            "unlisted": "ENOSYS",
        }

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        return dict(settings) == self.settings()

    def apply(self, view: View) -> None:
        api = _api()
        try:
            self._filter(api, sockets=bool(view.sockets), memory_files=view.accelerators).load()
        except OSError as error:
            raise EnclaveError(
                "the sandbox layer seccomp cannot be applied", found=error.strerror
            ) from None

    def _filter(self, api: Any, *, sockets: bool, memory_files: bool) -> Any:
        refuse, allow = api.ERRNO(errno.EPERM), api.ALLOW
        chosen = api.SyscallFilter(api.ERRNO(errno.ENOSYS))
        chosen.set_attr(api.Attr.ACT_BADARCH, api.KILL_PROCESS)
        chosen.set_attr(api.Attr.CTL_NNP, 1)
        chosen.set_attr(api.Attr.CTL_TSYNC, 1)

        def add(action: int, name: str, *arguments: Any) -> None:
            # Calls this architecture or libseccomp does not have stay at ENOSYS.
            number = api.resolve_syscall(api.Arch.NATIVE, name)
            if number >= 0:
                chosen.add_rule(action, number, *arguments)

        for name in sorted(ALLOWED):
            add(allow, name)
        for name in sorted(REFUSED):
            add(refuse, name)
        for name in ("socket", "socketpair"):
            if sockets:
                add(allow, name, api.Arg(0, api.EQ, socket.AF_UNIX))
                add(refuse, name, api.Arg(0, api.NE, socket.AF_UNIX))
            else:
                add(refuse, name)
        add(allow if sockets else refuse, "connect")
        add(allow if memory_files else refuse, "memfd_create")
        for name in ("kill", "tgkill"):
            add(allow, name, api.Arg(0, api.EQ, os.getpid()))
            add(refuse, name, api.Arg(0, api.NE, os.getpid()))
        # clone3 hides its flags from the filter; ENOSYS makes libc use clone.
        thread = api.Arg(0, api.MASKED_EQ, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD)
        add(allow, "clone", thread)
        add(refuse, "clone", api.Arg(0, api.MASKED_EQ, _CLONE_THREAD, 0))
        add(allow, "prlimit64", api.Arg(2, api.EQ, 0))
        add(refuse, "prlimit64", api.Arg(2, api.NE, 0))
        for number in sorted(IOCTLS.values()):
            # The kernel looks at the lower 32 bits only, and so must the filter.
            add(allow, "ioctl", api.Arg(1, api.MASKED_EQ, 0xFFFFFFFF, number))
        for number in sorted(PRCTLS.values()):
            add(allow, "prctl", api.Arg(0, api.MASKED_EQ, 0xFFFFFFFF, number))
        return chosen

    def verify(self, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        mode = linux.process_status().get("Seccomp")
        if mode != "2":
            raise self._inactive(f"seccomp mode {mode}", "seccomp mode 2, filter")
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        except PermissionError:
            pass
        except OSError as error:
            raise self._inactive(f"socket() fails with {error.strerror}", "EPERM") from None
        else:
            raise self._inactive("a network socket can be opened", "EPERM")
        try:
            os.execve("/nonexistent", ["/nonexistent"], {})  # noqa: S606
        except OSError as error:
            if error.errno != errno.EPERM:
                raise self._inactive("programs can be executed", "EPERM") from None
        libc = ctypes.CDLL(None, use_errno=True)
        number = _SYS_PTRACE[platform.machine()]
        if libc.syscall(number, _PTRACE_TRACEME, 0, 0, 0) == 0 or (
            ctypes.get_errno() != errno.EPERM
        ):
            raise self._inactive("ptrace is possible", "EPERM")
