"""The few Linux calls that the layers share: prctl, capabilities, ``/proc/self`` and libc."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
from collections.abc import Iterator
from pathlib import Path

from cenacle.errors import EnclaveError

__all__ = [
    "PR_GET_DUMPABLE",
    "PR_GET_PDEATHSIG",
    "PR_SET_DUMPABLE",
    "PR_SET_NO_NEW_PRIVS",
    "PR_SET_PDEATHSIG",
    "close_inherited",
    "drop_capabilities",
    "libraries_by_soname",
    "parent_death_signal",
    "prctl",
    "process_status",
    "thread_count",
    "unshare",
]

PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def prctl(option: int, *arguments: int) -> int:
    """``prctl(2)``; raises ``OSError`` when the kernel refuses."""
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = _libc.prctl(ctypes.c_int(option), *padded)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def parent_death_signal() -> int:
    """The signal that this process gets when the thread that made it ends; 0 for none."""
    number = ctypes.c_int(0)
    prctl(PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def unshare(flags: int) -> bool:
    """Whether ``unshare(2)`` succeeds. It is called to see it refused: success must be fatal."""
    return bool(_libc.unshare(ctypes.c_int(flags)) == 0)


def drop_capabilities() -> None:
    """Give up every capability for good: bounding, ambient, inheritable, permitted, effective.

    An ordinary user has none to give up, and the calls change nothing.
    """
    for capability in range(64):
        try:
            present = prctl(PR_CAPBSET_READ, capability)
        except OSError:
            break  # past the last capability this kernel knows
        if present:
            # Without CAP_SETPCAP the bounding set stays, and no_new_privs makes it moot.
            with contextlib.suppress(PermissionError):
                prctl(PR_CAPBSET_DROP, capability)
    with contextlib.suppress(OSError):  # kernels before 4.3 have no ambient set
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if _libc.capset(ctypes.byref(header), ctypes.byref(none)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def process_status() -> dict[str, str]:
    """``/proc/self/status`` as a dictionary; raises EnclaveError where there is no ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise EnclaveError(
            "the enclave cannot inspect itself",
            found=f"/proc/self/status: {error.strerror}",
            expected="a mounted /proc",
        ) from None
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def thread_count() -> int:
    """The number of threads of this process."""
    return int(process_status()["Threads"])


def close_inherited(keep: frozenset[int]) -> None:
    """Close every file descriptor that is not in ``keep``."""
    limit = max((int(path.name) for path in Path("/proc/self/fd").iterdir()), default=2) + 1
    for fd in range(limit):
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def libraries_by_soname() -> Iterator[None]:
    """Let ``ctypes.util.find_library`` answer for libc and libseccomp without running programs.

    The standard library finds a library by running ``ldconfig`` or ``gcc``, which a sandbox
    does not have; pyseccomp and py-landlock ask for these two when they are first used.
    """
    original = ctypes.util.find_library
    known = {"c": ("libc.so.6", "libc.so"), "seccomp": ("libseccomp.so.2",)}

    def find(name: str) -> str | None:
        for soname in known.get(name, ()):
            with contextlib.suppress(OSError):
                ctypes.CDLL(soname)
                return soname
        return original(name)

    ctypes.util.find_library = find
    try:
        yield
    finally:
        ctypes.util.find_library = original
