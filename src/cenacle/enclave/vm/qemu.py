"""The machine of an image: QEMU's command line, its programs, and what this host can really do.

No network device, no display, no monitor: the machine has a verified disk, a TPM, and one
virtio port. Golden values depend on firmware, kernel, first root folder and command line, and
on the size of the machine: QEMU writes the address of the first root folder into the kernel's
header (register 4), and the firmware measures a volume that it wrote memory and processors
into (register 0).

Sources: QEMU's documentation (docs/system/i386/amd-memory-encryption.rst, tdx.rst, and
docs/specs/tpm.rst).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cenacle.enclave.vm.link import PORT
from cenacle.enclave.vm.manifest import FILES
from cenacle.errors import InputError, UnavailableError

__all__ = [
    "CPU_EMULATED",
    "Accelerator",
    "Confidential",
    "Machine",
    "accelerator",
    "firmware",
    "missing_programs",
    "payload_runs",
    "probe_payload",
    "program",
    "switches",
]

Accelerator = Literal["kvm", "tcg"]
Confidential = Literal["sev-snp", "tdx"]

CPU_EMULATED: Final = "Nehalem,+aes,+pclmulqdq,+rdrand"
"""Under emulation: enough for every Python wheel, and 20 times faster than ``max``."""

_PROGRAMS: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
}
_FIRMWARE: Final = (
    (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")),
    (Path("/usr/share/OVMF/OVMF_CODE.fd"), Path("/usr/share/OVMF/OVMF_VARS.fd")),
    (Path("/usr/share/edk2/ovmf/OVMF_CODE.fd"), Path("/usr/share/edk2/ovmf/OVMF_VARS.fd")),
)
# Confidential machines take a firmware without variables, measured whole by the hardware.
_CONFIDENTIAL_FIRMWARE: Final[dict[str, tuple[Path, ...]]] = {
    "sev-snp": (
        Path("/usr/share/ovmf/OVMF.amdsev.fd"),
        Path("/usr/share/edk2/ovmf/OVMF.amdsev.fd"),
    ),
    "tdx": (
        Path("/usr/share/ovmf/OVMF.inteltdx.fd"),
        Path("/usr/share/edk2/ovmf/OVMF.inteltdx.fd"),
    ),
}
_ROM_BYTES: Final = 64 * 1024
_EXIT_CODE: Final = 0x10
_PROBE_S: Final = 5.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Machine:
    """One virtual machine.

    Attributes:
        image: an image folder.
        memory: in MiB.
        processors: virtual ones.
        accelerator: how its instructions are executed.
        confidential: the hardware that keeps its memory from the host, if there is one.
        c_bit: position of the encryption bit in a page table entry, and the physical address
            bits that encryption costs (CPUID 8000_001F, EBX); for ``sev-snp``.
    """

    image: Path
    memory: int = 3072
    processors: int = 2
    accelerator: Accelerator = "tcg"
    confidential: Confidential | None = None
    c_bit: tuple[int, int] = (51, 1)

    def __post_init__(self) -> None:
        if not 256 <= self.memory <= 1 << 24 or not 1 <= self.processors <= 255:
            raise InputError(
                "a virtual machine cannot have this size",
                found=f"{self.memory} MiB, {self.processors} processors",
                expected="256 MiB or more, 1 to 255 processors",
            )
        if self.confidential is not None and self.accelerator != "kvm":
            raise InputError("a confidential virtual machine needs KVM", found=self.accelerator)

    def command(self, cmdline: str, link: int, tpm: int | None, variables: Path) -> list[str]:
        """The whole command line of QEMU.

        Args:
            cmdline: of the kernel, exactly as the manifest has it.
            link: descriptor of a connected stream socket, the other end of the virtio port.
            tpm: descriptor of a stream socket to swtpm's control channel, or None without TPM.
            variables: a writable copy of the firmware's variables; ignored if confidential.
        """
        files = {kind: str(self.image / name) for kind, name in FILES.items()}
        line = [
            program("qemu-system-x86_64"),
            *("-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-nic", "none", "-monitor", "none"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"),
            *("-name", "cenacle-enclave,debug-threads=off"),
            *("-smp", str(self.processors)),
            *switches(self, variables),
            *("-kernel", files["kernel"], "-initrd", files["initrd"], "-append", cmdline),
            *("-blockdev", _blockdev("root", files["root"])),
            *("-device", self._device("virtio-blk-pci", "drive=root")),
            *("-chardev", f"socket,id=link,fd={link}"),
            *("-device", self._device("virtio-serial-pci", "id=serial0")),
            *("-device", f"virtserialport,bus=serial0.0,chardev=link,name={PORT}"),
            *("-serial", "stdio"),
        ]
        if tpm is not None:
            line += [
                *("-chardev", f"socket,id=tpm,fd={tpm}"),
                *("-tpmdev", "emulator,id=tpm0,chardev=tpm"),
                *("-device", "tpm-tis,tpmdev=tpm0"),
            ]
        return line

    def _device(self, kind: str, options: str) -> str:
        # A confidential guest shares only what it says that it shares.
        shared = ",disable-legacy=on,iommu_platform=on" if self.confidential else ""
        return f"{kind},{options}{shared}"


def switches(machine: Machine, variables: Path) -> list[str]:
    """Machine, processor, memory and firmware: all that differs between kinds of machine."""
    memory = f"memory-backend-memfd,id=ram,size={machine.memory}M"
    common = f"q35,accel={machine.accelerator},memory-backend=ram"
    match machine.confidential:
        case None:
            code, _ = firmware()
            cpu = CPU_EMULATED if machine.accelerator == "tcg" else "host"
            return [
                *("-machine", f"{common},pflash0=code,pflash1=vars"),
                *("-cpu", cpu, "-object", memory, "-m", f"{machine.memory}M"),
                *("-blockdev", _blockdev("code", str(code))),
                *("-blockdev", _blockdev("vars", str(variables), read_only=False)),
            ]
        case "sev-snp":
            position, bits = machine.c_bit
            guest = (
                f"sev-snp-guest,id=cgs,cbitpos={position},reduced-phys-bits={bits},kernel-hashes=on"
            )
            return [
                *("-machine", f"{common},confidential-guest-support=cgs,vmport=off"),
                *("-cpu", "EPYC-v4", "-object", f"{memory},share=on", "-m", f"{machine.memory}M"),
                *("-object", guest, "-bios", str(_confidential_firmware("sev-snp"))),
            ]
        case "tdx":
            return [
                *("-machine", f"{common},confidential-guest-support=cgs,kernel-irqchip=split"),
                *("-cpu", "host", "-object", f"{memory},share=on", "-m", f"{machine.memory}M"),
                *("-object", "tdx-guest,id=cgs", "-bios", str(_confidential_firmware("tdx"))),
            ]


def _blockdev(name: str, path: str, *, read_only: bool = True) -> str:
    return json.dumps(
        {
            "driver": "raw",
            "node-name": name,
            "read-only": read_only,
            "file": {"driver": "file", "filename": path},
        },
        separators=(",", ":"),
    )


def program(name: str) -> str:
    """Where a program is; raises UnavailableError naming the Debian package that has it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")
    if found is None:
        package = _PROGRAMS.get(name, name)
        raise UnavailableError(
            "a program that a virtual machine needs is not here",
            found=f"no {name}",
            remedy=f"install the Debian package {package}",
        )
    return found


def firmware() -> tuple[Path, Path]:
    """The UEFI firmware's code and its empty variables; raises UnavailableError."""
    for code, variables in _FIRMWARE:
        if code.is_file() and variables.is_file():
            return code, variables
    raise UnavailableError(
        "a virtual machine needs a UEFI firmware",
        found="no OVMF",
        remedy="install the Debian package ovmf",
    )


def _confidential_firmware(kind: Confidential) -> Path:
    for path in _CONFIDENTIAL_FIRMWARE[kind]:
        if path.is_file():
            return path
    raise UnavailableError(
        f"a {kind} machine needs a firmware of its own",
        found="none of " + ", ".join(map(str, _CONFIDENTIAL_FIRMWARE[kind])),
        remedy="install your distribution's edk2 for confidential machines",
    )


def missing_programs() -> list[str]:
    """Debian packages without which no virtual machine starts here."""
    missing = []
    for name, package in _PROGRAMS.items():
        try:
            program(name)
        except UnavailableError:
            missing.append(package)
    try:
        firmware()
    except UnavailableError:
        missing.append("ovmf")
    return missing


def probe_payload() -> bytes:
    """A ROM that exits QEMU after 2000 port writes and ten million steps.

    Port writes leave the machine, which is what a hypervisor without proper nesting is slow at.
    """
    code = bytes.fromhex(
        "fa"  # cli
        "b9d007e680e2fc"  # mov cx,2000; out 0x80,al; loop
        "66b980969800"  # mov ecx,10000000
        "664975fc"  # dec ecx; jnz
        f"b0{_EXIT_CODE:02x}e6f4"  # out 0xf4,al: isa-debug-exit
        "f4"  # hlt
    )
    rom = bytearray(b"\xf4" * _ROM_BYTES)
    rom[: len(code)] = code
    # The processor starts 16 bytes before the end: jump to the beginning.
    rom[-16:-13] = b"\xe9" + ((0 - (_ROM_BYTES - 13)) & 0xFFFF).to_bytes(2, "little")
    return bytes(rom)


def payload_runs(arguments: Sequence[str], seconds: float = _PROBE_S) -> bool:
    """Whether QEMU with these arguments really executes instructions, in reasonable time.

    ``/dev/kvm`` may open on a host whose own hypervisor then lets a guest crawl.
    """
    with tempfile.NamedTemporaryFile(prefix="cenacle-probe-", suffix=".rom") as rom:
        rom.write(probe_payload())
        rom.flush()
        command = [
            program("qemu-system-x86_64"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
            *("-m", "64", "-bios", rom.name),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            *arguments,
        ]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == _EXIT_CODE * 2 + 1


@functools.cache
def accelerator() -> Accelerator:
    """``kvm`` if it works here, found out by using it; the answer is kept until a reboot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    kept = _kept_answer()
    if kept is not None:
        return kept
    answer: Accelerator = "kvm" if payload_runs(("-machine", "pc,accel=kvm")) else "tcg"
    _keep_answer(answer)
    return answer


def _answer_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home if home else Path("~/.cache").expanduser()) / "cenacle" / "accelerator.json"


def _kept_answer() -> Accelerator | None:
    try:
        kept = json.loads(_answer_file().read_bytes())
        if kept["boot"] == _BOOT_ID.read_text("ascii").strip():
            return "kvm" if kept["accelerator"] == "kvm" else "tcg"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _keep_answer(answer: Accelerator) -> None:
    path = _answer_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        boot = _BOOT_ID.read_text("ascii").strip()
        part.write_text(json.dumps({"boot": boot, "accelerator": answer}), "utf-8")
        part.replace(path)
    except OSError:
        return  # it is found out again next time
