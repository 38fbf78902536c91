"""What the first process of the guest does to its machine: mounts, devices, the end."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = [
    "AGENT_ID",
    "EVENT_LOG",
    "IMA_LIST",
    "TPM_DEVICE",
    "WORK",
    "mount_all",
    "open_port",
    "power_off",
    "provide_attestation",
]

AGENT_ID: Final = 1000
"""User and group that the agent runs as."""

WORK: Final = Path("/work")
TPM_DEVICE: Final = Path("/dev/tpmrm0")
IMA_LIST: Final = Path("/sys/kernel/security/ima/binary_runtime_measurements")
EVENT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")

_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_SAFE: Final = _NOSUID | _NODEV | _NOEXEC
_PORTS: Final = Path("/sys/class/virtio-ports")
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(kind: str, target: Path, flags: int, options: str = "") -> None:
    done = _libc.mount(
        kind.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def mount_all() -> None:
    """Memory for files, from which nothing can be executed, and the kernel's own files."""
    _mount("tmpfs", WORK, _SAFE, "mode=755,size=100%")
    _mount("tmpfs", Path("/tmp"), _SAFE, "mode=1777,size=50%")  # noqa: S108 - the guest's own
    _mount("securityfs", Path("/sys/kernel/security"), _SAFE)


def open_port(name: str) -> int:
    """The virtio port of this name; raises FileNotFoundError if the machine has none."""
    for entry in sorted(_PORTS.iterdir()):
        if (entry / "name").read_text("ascii").strip() == name:
            return os.open(Path("/dev", entry.name), os.O_RDWR | os.O_CLOEXEC)
    raise FileNotFoundError(name)


def provide_attestation() -> None:
    """Let the agent's user use the TPM and read what was measured, where the machine has them."""
    for path in (TPM_DEVICE, IMA_LIST, EVENT_LOG):
        if path.exists():
            os.chown(path, AGENT_ID, AGENT_ID)


def power_off() -> None:
    """End the machine at once."""
    os.sync()
    Path("/proc/sysrq-trigger").write_text("o", "ascii")
