"""Layer ``landlock``: a process that can open only what its job needs (Linux 5.13 and later).

Reading is allowed in the interpreter, the packages, the system's libraries and the job's
read-only mounts; writing only in the job's writable folders. Executing is allowed nowhere.
Where the kernel can, TCP is refused (ABI 4), device ioctls too (5), and signals and abstract
unix sockets stay inside (6). Not covered by Landlock: UDP, and unix sockets that have a path.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cenacle.enclave.sandbox import linux
from cenacle.enclave.sandbox.base import InnerLayer, View
from cenacle.enclave.sandbox.folders import (
    SYSTEM_FILES,
    SYSTEM_LIBRARIES,
    interpreter_folders,
)
from cenacle.enclave.sandbox.trial import trial
from cenacle.errors import EnclaveError

__all__ = ["LandlockLayer"]

_REMEDY = "needs Linux 5.13 or later with Landlock enabled, and the PyPI package py-landlock"
_KERNEL_FILES = tuple(
    Path(name)
    for name in (
        "/proc/self",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/stat",
        "/sys/devices/system/cpu",
        "/sys/devices/system/node",
        "/dev/random",
        "/dev/urandom",
        "/dev/zero",
    )
)
_NULL_DEVICE = Path("/dev/null")


def _api() -> Any:
    """The package py_landlock; raises EnclaveError where it is not installed."""
    try:
        return importlib.import_module("py_landlock")
    except ImportError:
        raise EnclaveError("py-landlock is not installed") from None


def _abi() -> int:
    api = _api()
    try:
        with linux.libraries_by_soname():
            return int(api.get_abi_version())
    except (api.LandlockError, OSError) as error:
        raise EnclaveError(f"this kernel has no Landlock: {error}") from None


def _names(flags: Any) -> list[str]:
    return sorted(str(flag.name).lower() for flag in flags)


class LandlockLayer(InnerLayer):
    """Files, TCP, signals and abstract sockets confined by the kernel's Landlock module."""

    name = "landlock"
    protects = "no file but the interpreter's and the job's own, no TCP, no signals to others"

    def available(self) -> str | None:
        return trial(self.name, remedy=_REMEDY)

    def settings(self) -> dict[str, Any]:
        """What this kernel can enforce, by the names of Landlock's rights."""
        abi = _abi()
        flags = importlib.import_module("py_landlock.abi")
        return {
            "execute": [],
            "read": ["interpreter", "job", "kernel information", "system libraries"],
            "restricted_files": _names(flags.get_supported_fs(abi)),
            "restricted_network": _names(flags.get_supported_net(abi)),
            "scoped": _names(flags.get_supported_scope(abi)),
            "write": ["job"],
        }

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        return dict(settings) == self.settings()

    def apply(self, view: View) -> None:
        api = _api()
        read_file, write_file = api.AccessFs.READ_FILE, api.AccessFs.WRITE_FILE
        read_folder = read_file | api.AccessFs.READ_DIR
        write_folder = (
            read_folder
            | write_file
            | api.AccessFs.TRUNCATE
            | api.AccessFs.REFER
            | api.AccessFs.MAKE_REG
            | api.AccessFs.MAKE_DIR
            | api.AccessFs.REMOVE_FILE
            | api.AccessFs.REMOVE_DIR
        )
        if (threads := linux.thread_count()) != 1:
            # Landlock binds the calling thread and its later children only.
            raise EnclaveError(
                "the sandbox layer landlock must be applied before any thread starts",
                found=f"{threads} threads",
                expected="one thread",
                remedy="import numpy, torch and the like after the layers are applied",
            )
        job_read = [mount.inside for mount in view.read_only]
        if sys.pycache_prefix:  # byte code that this interpreter was started with
            job_read += _existing([Path(sys.pycache_prefix)])
        job_write = [mount.inside for mount in view.writable]
        try:
            rules = api.Landlock(strict=False)
            for path in _existing(
                [*interpreter_folders(), *SYSTEM_LIBRARIES, *SYSTEM_FILES, *_KERNEL_FILES]
            ):
                rules.add_path_rule(path, access=read_folder if path.is_dir() else read_file)
            for path in job_read:
                rules.add_path_rule(path, access=read_folder if path.is_dir() else read_file)
            for path in job_write:
                rules.add_path_rule(path, access=write_folder)
            rules.add_path_rule(_NULL_DEVICE, access=read_file | write_file)
            with linux.libraries_by_soname():
                rules.apply()
        except (api.LandlockError, OSError) as error:
            raise EnclaveError(
                "the sandbox layer landlock cannot be applied", found=type(error).__name__
            ) from None

    def verify(self, settings: Mapping[str, Any]) -> None:
        # No rule grants "/", and its mode lets everybody read it: only Landlock says EACCES.
        try:
            fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EACCES:
                raise self._inactive(f"'/' fails with {error.strerror}", "EACCES") from None
        else:
            os.close(fd)
            raise self._inactive("the root folder can be opened", "EACCES")
        if settings["restricted_network"]:
            self._verify_no_tcp()

    def _verify_no_tcp(self) -> None:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
                tcp.bind(("127.0.0.1", 0))
        except OSError as error:
            # EPERM: seccomp was there first and refused the socket itself.
            if error.errno not in {errno.EACCES, errno.EPERM}:
                raise self._inactive(f"TCP fails with {error.strerror}", "EACCES") from None
        else:
            raise self._inactive("a TCP socket can be bound", "EACCES")


def _existing(paths: Iterable[Path]) -> Iterable[Path]:
    return (path for path in paths if path.exists())
