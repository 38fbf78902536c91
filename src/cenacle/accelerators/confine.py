"""What a worker gives up before it sees its first tensor.

A worker needs to read its interpreter and to compute; not to open a network connection, start
a program, look into another process or write a file. Three layers take that away, each where
the system has it: ``process`` (always), ``landlock`` and ``seccomp``. The enclave does not
depend on them: they keep a worker that a hostile tensor took over from the rest of its machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import platform
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import cenacle

__all__ = ["confine", "die_with"]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_CLONE_THREAD: Final = 0x00010000

_READABLE: Final = (
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/lib", "/lib32", "/lib64"),
    *("/nix/store", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
    *("/dev/random", "/dev/urandom", "/dev/zero"),
)
_READABLE_FOR_CUDA: Final = ("/proc", "/sys", "/usr/local/cuda", "/etc/alternatives")

_REFUSED: Final = """
accept accept4 acct add_key adjtimex bind bpf capset chown chroot clock_adjtime clock_settime
connect delete_module execve execveat fanotify_init fanotify_mark fchown fchownat finit_module
fork fsconfig fsmount fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup
ioperm iopl kcmp kexec_file_load kexec_load keyctl lchown listen lookup_dcookie migrate_pages
mknod mknodat mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl
open_by_handle_at open_tree perf_event_open personality pidfd_getfd pidfd_open
pidfd_send_signal pivot_root process_madvise process_mrelease process_vm_readv
process_vm_writev ptrace quotactl quotactl_fd reboot request_key rt_sigqueueinfo
rt_tgsigqueueinfo setdomainname setfsgid setfsuid setgid setgroups sethostname setns setregid
setresgid setresuid setreuid setrlimit setsid setpgid settimeofday setuid shmat shmctl shmdt
shmget socket socketpair swapoff swapon symlink symlinkat sync syncfs syslog tkill umount
umount2 unshare uselib userfaultfd vfork vhangup
"""

_libc = ctypes.CDLL(None, use_errno=True)


def confine(parent: int, *, cuda: bool) -> list[str]:
    """Give up whatever this system lets a process give up; needs a single thread.

    Args:
        parent: the process that must have started this one, or it is gone already.
        cuda: leave open what CUDA's libraries need: device files, and reading /proc and /sys.

    Returns:
        the layers that hold.

    Raises:
        OSError: the layer ``process`` does not hold, or the parent is gone.
    """
    _process(parent, cuda)
    layers = ["process"]
    for name, apply in (("landlock", _landlock), ("seccomp", _seccomp)):
        # Missing packages and old kernels: the greeting says so by leaving the layer out.
        with contextlib.suppress(ImportError, OSError, RuntimeError, AttributeError, ValueError):
            apply(cuda)
            layers.append(name)
    return layers


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with(parent: int) -> None:
    """Have the kernel end this process with ``parent``; raises ``OSError`` if it is gone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the enclave of this worker is gone")


def _process(parent: int, cuda: bool) -> None:
    die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not cuda:  # whose libraries size files in memory
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _drop_capabilities() -> None:
    for capability in range(64):
        with contextlib.suppress(OSError):  # unknown to this kernel, or not ours to drop
            _prctl(_PR_CAPBSET_DROP, capability)
    with contextlib.suppress(OSError):
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _interpreter() -> Iterator[Path]:
    for name in (
        *(sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix),
        *(sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")),
        *sys.path,
        str(Path(cenacle.__file__).parent),
    ):
        path = Path(name)
        if name and path.exists() and path.resolve() != Path("/"):
            yield path
            yield path.resolve()


def _landlock(cuda: bool) -> None:
    api: Any = importlib.import_module("py_landlock")
    read_file, write_file = api.AccessFs.READ_FILE, api.AccessFs.WRITE_FILE
    read_folder = read_file | api.AccessFs.READ_DIR
    names = (*_READABLE, *(_READABLE_FOR_CUDA if cuda else ()))
    try:
        rules = api.Landlock(strict=False)
        for path in {*_interpreter(), *(Path(name) for name in names)}:
            if path.exists():
                rules.add_path_rule(path, access=read_folder if path.is_dir() else read_file)
        devices = sorted(Path("/dev").glob("nvidia*")) if cuda else []
        for path in (Path("/dev/null"), *devices):
            access = read_file | write_file
            if cuda and path in devices:
                access |= api.AccessFs.IOCTL_DEV
            rules.add_path_rule(path, access=access)
        with _libraries_by_soname():
            rules.apply()
    except api.LandlockError as error:
        raise OSError(errno.EPERM, str(error)) from None


def _seccomp(cuda: bool) -> None:  # noqa: ARG001 - CUDA needs none of these either
    if platform.machine() not in {"x86_64", "aarch64"}:
        raise OSError(errno.ENOSYS, "clone's arguments have another order elsewhere")
    with _libraries_by_soname():
        api: Any = importlib.import_module("pyseccomp")
    chosen = api.SyscallFilter(api.ALLOW)
    chosen.set_attr(api.Attr.ACT_BADARCH, api.KILL_PROCESS)
    chosen.set_attr(api.Attr.CTL_NNP, 1)
    chosen.set_attr(api.Attr.CTL_TSYNC, 1)

    def refuse(name: str, *conditions: Any, code: int = errno.EPERM) -> None:
        number = api.resolve_syscall(api.Arch.NATIVE, name)
        if number >= 0:
            chosen.add_rule(api.ERRNO(code), number, *conditions)

    for name in _REFUSED.split():
        refuse(name)
    for name in ("kill", "tgkill"):
        refuse(name, api.Arg(0, api.NE, os.getpid()))
    refuse("prlimit64", api.Arg(2, api.NE, 0))
    refuse("clone", api.Arg(0, api.MASKED_EQ, _CLONE_THREAD, 0))
    refuse("clone3", code=errno.ENOSYS)  # hides its flags; libc falls back to clone
    chosen.load()


@contextlib.contextmanager
def _libraries_by_soname() -> Iterator[None]:
    """Let ``find_library`` answer for the two libraries in use without starting programs."""
    find_library = importlib.import_module("ctypes.util")
    original = find_library.find_library
    known = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}

    def find(name: str) -> str | None:
        with contextlib.suppress(OSError, KeyError):
            ctypes.CDLL(known[name])
            return known[name]
        found: str | None = original(name)
        return found

    find_library.find_library = find  # type: ignore[attr-defined]
    try:
        yield
    finally:
        find_library.find_library = original  # type: ignore[attr-defined]
