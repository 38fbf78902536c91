"""Golden values: what a measured virtual machine's PCRs hold, computed before it ever runs.

The machine is QEMU with OVMF and ``-kernel``, ``-initrd``, ``-append``. Everything is computed
from the files; nothing is run. Sources: QEMU's ``x86_load_linux`` (what it writes into the
kernel's setup header), the Linux boot protocol (``Documentation/arch/x86/boot.rst``), the
kernel's EFI stub (PCR 9), edk2's ``Tcg2Dxe`` and OVMF's boot manager (PCRs 0 to 7), and the TCG
PC Client Platform Firmware Profile 1.06.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from cenacle.attestation.authenticode import authenticode_hash
from cenacle.attestation.event_log import Event, EventLog, EventType
from cenacle.attestation.ovmf import Firmware, below_4g
from cenacle.errors import InputError

__all__ = ["DirectBoot", "golden_log", "golden_pcrs", "patch_setup_header"]

_ALGORITHMS: Final = ("sha256",)
_GLOBAL_VARIABLE: Final = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
_SECURITY_DATABASE: Final = bytes.fromhex("cbb219d73a3d9645a3bcdad00e67656f")
_KERNEL_VENDOR: Final = bytes.fromhex("72f728144ab61e44b8c39ebdd7f893c7")  # OVMF: QEMU's kernel
_UI_APP: Final = bytes.fromhex("21aa2c4614760345836e8ab6f4662331")
_END_OF_PATH: Final = bytes.fromhex("7fff0400")
_LOAD_OPTIONS: Final = b"LOADED_IMAGE::LoadOptions\0"
_INITRD: Final = b"Linux initrd\0"

# QEMU's hw/i386: where it puts things.
_ACPI_BYTES: Final = 0x28000
_COMMAND_LINE_AT: Final = 0x20000
_SETUP_AT: Final = 0x10000
_ABOVE_4G: Final = 0x02


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """One way to start a virtual machine.

    Attributes:
        kernel: the bzImage; its EFI stub must measure (Linux 5.17 or later).
        initrd: the initial RAM disk; empty if there is none.
        command_line: what ``-append`` gets.
        memory: of the machine, in bytes; QEMU writes an address that depends on it into the
            kernel's header.
        model: QEMU's machine type.
        firmware: the unpacked OVMF, for PCRs 0 and 1.
        pei_digest: SHA-256 of the PEI volume as it is measured: one of
            :func:`~cenacle.attestation.ovmf.pei_digests`, or from the log of a boot of such a
            machine; PCR 0 is left out without it.
        patched: QEMU fills in the kernel's header; not so in an SEV or TDX machine, nor for a
            firmware that reads the kernel as it is (QEMU 10 offers it as ``etc/boot/kernel``).
    """

    kernel: bytes
    initrd: bytes
    command_line: str
    memory: int
    model: Literal["q35", "pc"] = "q35"
    firmware: Firmware | None = None
    pei_digest: bytes | None = None
    patched: bool = True


def golden_pcrs(boot: DirectBoot) -> dict[int, bytes]:
    """PCR to SHA-256 value after the kernel took over.

    PCRs 2 to 9 always (8 is a boot loader's, and there is none), 1 with the firmware, 0 with the
    PEI volume's digest too. The variable store is taken to be OVMF's empty one: no boot entries,
    Secure Boot off.

    Raises:
        InputError: a file is not what it should be.
    """
    return {8: bytes(32)} | golden_log(boot).replay("sha256")


def golden_log(boot: DirectBoot) -> EventLog:
    """The events that such a boot must give, register by register, with SHA-256 digests.

    The order of events is right within a register, which is all that replay depends on.

    Raises:
        InputError: a file is not what it should be.
    """
    events = [*_firmware_events(boot), *_boot_option_events(boot), *_secure_boot_events()]
    kernel = authenticode_hash(patch_setup_header(boot))
    events.append(
        Event(
            0,
            4,
            EventType.EV_EFI_BOOT_SERVICES_APPLICATION,
            {"sha256": kernel},
            bytes(24) + struct.pack("<Q", 42) + _kernel_path(),
        )
    )
    events.append(
        _measured(4, EventType.EV_EFI_ACTION, b"Calling EFI Application from Boot Option")
    )
    covered = [r for r in range(7) if any(e.register == r for e in events) or r in (2, 3, 5, 6)]
    events += [_measured(register, EventType.EV_SEPARATOR, bytes(4)) for register in covered]
    events += _stub_events(boot)
    events += [
        _measured(5, EventType.EV_EFI_ACTION, b"Exit Boot Services Invocation"),
        _measured(5, EventType.EV_EFI_ACTION, b"Exit Boot Services Returned with Success"),
    ]
    return EventLog(_ALGORITHMS, tuple(events))


def patch_setup_header(boot: DirectBoot) -> bytes:
    """The kernel as the firmware gets it from QEMU: loader fields of its setup header filled in.

    Raises:
        InputError: no bzImage of boot protocol 2.10 or later, or too large an initial RAM disk.
    """
    kernel = bytearray(boot.kernel)
    if len(kernel) < 0x268 or kernel[0x202:0x206] != b"HdrS":
        _refuse("the kernel is not a bzImage", f"{len(kernel)} bytes", "the HdrS signature")
    (protocol,) = struct.unpack_from("<H", kernel, 0x206)
    if protocol < 0x20A or not kernel[0x211] & 0x01:
        _refuse(
            "the kernel is too old", f"boot protocol {protocol:#x}", "2.10 or later, loaded high"
        )
    if not boot.patched:
        return bytes(kernel)
    (highest,) = struct.unpack_from("<I", kernel, 0x22C)
    if protocol >= 0x20C and kernel[0x236] & _ABOVE_4G:
        highest = 0xFFFFFFFF
    highest = min(highest, below_4g(boot.memory, boot.model) - _ACPI_BYTES - 1)
    if len(boot.initrd) >= highest:
        _refuse("the initial RAM disk does not fit the machine's memory", len(boot.initrd), highest)
    struct.pack_into("<I", kernel, 0x228, _COMMAND_LINE_AT)
    kernel[0x210] = 0xB0
    kernel[0x211] |= 0x80
    struct.pack_into("<H", kernel, 0x224, _COMMAND_LINE_AT - _SETUP_AT - 0x200)
    if boot.initrd:
        address = (highest - len(boot.initrd)) & ~0xFFF
        struct.pack_into("<II", kernel, 0x218, address, len(boot.initrd))
    return bytes(kernel)


def _firmware_events(boot: DirectBoot) -> list[Event]:
    """PCR 0: the (empty) version, then both volumes."""
    if boot.firmware is None or boot.pei_digest is None:
        return []
    blob = EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB
    volumes = (struct.pack("<QQ", 0, len(boot.firmware.pei)), len(boot.firmware.dxe))
    return [
        _measured(0, EventType.EV_S_CRTM_VERSION, b"\0\0"),
        Event(0, 0, blob, {"sha256": boot.pei_digest}, volumes[0]),
        _measured(0, blob, struct.pack("<QQ", 0, volumes[1]), boot.firmware.dxe),
    ]


def _boot_option_events(boot: DirectBoot) -> list[Event]:
    """PCR 1: the boot order of an empty variable store, and its only entry, OVMF's menu."""
    if boot.firmware is None:
        return []
    path = b"\x04\x07\x14\x00" + boot.firmware.dxe_name + b"\x04\x06\x14\x00" + _UI_APP
    path += _END_OF_PATH
    active_hidden_application = 0x109
    entry = struct.pack("<IH", active_hidden_application, len(path))
    entry += "UiApp\0".encode("utf-16-le") + path
    return [
        _boot_variable("BootOrder", b"\0\0"),
        _boot_variable("Boot0000", entry),
    ]


def _secure_boot_events() -> list[Event]:
    """PCR 7: Secure Boot off and no keys, then the separator."""
    variables = (
        (_GLOBAL_VARIABLE, "SecureBoot", b"\0"),
        (_GLOBAL_VARIABLE, "PK", b""),
        (_GLOBAL_VARIABLE, "KEK", b""),
        (_SECURITY_DATABASE, "db", b""),
        (_SECURITY_DATABASE, "dbx", b""),
    )
    config = EventType.EV_EFI_VARIABLE_DRIVER_CONFIG
    events = [_measured(7, config, _variable(*fields)) for fields in variables]
    return [*events, _measured(7, EventType.EV_SEPARATOR, bytes(4))]


def _stub_events(boot: DirectBoot) -> list[Event]:
    """PCR 9: command line and initial RAM disk, by the kernel's EFI stub."""
    if _LOAD_OPTIONS not in boot.kernel or _INITRD not in boot.kernel:
        _refuse(
            "the kernel does not measure its command line and initial RAM disk",
            "an EFI stub without these events",
            "Linux 5.17 or later with CONFIG_EFI_STUB",
        )
    if not boot.command_line.isascii() or "\0" in boot.command_line:
        _refuse("the command line is not ASCII text", repr(boot.command_line))
    if "vga=" in boot.command_line:
        _refuse("QEMU reads vga= on the command line and changes the kernel by it", "vga=")
    events = []
    # OVMF tells the stub where the initial RAM disk is by adding to the command line.
    options = boot.command_line + (" initrd=initrd" if boot.initrd else "")
    if options:
        measured = (options + "\0").encode("utf-16-le")
        events.append(
            _measured(9, EventType.EV_EVENT_TAG, _tagged(0x8F3B22ED, _LOAD_OPTIONS), measured)
        )
    if boot.initrd:
        events.append(
            _measured(9, EventType.EV_EVENT_TAG, _tagged(0x8F3B22EC, _INITRD), boot.initrd)
        )
    return events


def _kernel_path() -> bytes:
    name = "kernel\0".encode("utf-16-le")
    return (
        b"\x04\x03\x14\x00"
        + _KERNEL_VENDOR
        + b"\x04\x04"
        + struct.pack("<H", 4 + len(name))
        + name
        + _END_OF_PATH
    )


def _tagged(tag: int, text: bytes) -> bytes:
    return struct.pack("<II", tag, len(text)) + text


def _variable(guid: bytes, name: str, value: bytes) -> bytes:
    return guid + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def _boot_variable(name: str, value: bytes) -> Event:
    # Tcg2Dxe hashes only the value of a boot variable, unlike that of any other.
    data = _variable(_GLOBAL_VARIABLE, name, value)
    return _measured(1, EventType.EV_EFI_VARIABLE_BOOT, data, value)


def _measured(register: int, kind: int, data: bytes, measured: bytes | None = None) -> Event:
    return Event.measuring(register, kind, data, _ALGORITHMS, measured)


def _refuse(what: str, found: object, expected: object = None) -> NoReturn:
    raise InputError(what, found=found, expected=expected)
