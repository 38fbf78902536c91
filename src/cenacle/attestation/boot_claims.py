"""What a boot event log says once its replay equals registers that hardware signed.

A digest in such a log is genuine; its text mostly is not. What an event's data says is taken as
proven only where the firmware hashed that very data (Secure Boot variables, actions, boot
options, GRUB's commands); the rest is a description for people, and no policy may read it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from cenacle.attestation.event_log import Event, EventLog, EventType, event_type_name
from cenacle.errors import EvidenceError

__all__ = [
    "authenticate_log",
    "boot_properties",
    "describe_event",
    "differences",
    "proven_text",
    "variable_of",
]

_LISTED: Final = 64
_LAST_FIRMWARE_REGISTER: Final = 7
_TEXT: Final = 120
_LOAD_OPTIONS_TAG: Final = 0x8F3B22ED
_INITRD_TAG: Final = 0x8F3B22EC
_MEDIA_PATH: Final = (4, 4)
_VENDOR_MEDIA: Final = (4, 3)
_POLICY_REGISTER, _CC_POLICY_REGISTER = 7, 1
_SEPARATORS: Final = (b"\x00" * 4, b"\xff" * 4)
_SECURE_BOOT: Final = (bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c"), "SecureBoot")
_VARIABLES: Final = frozenset(
    {
        EventType.EV_EFI_VARIABLE_DRIVER_CONFIG,
        EventType.EV_EFI_VARIABLE_BOOT,
        EventType.EV_EFI_VARIABLE_BOOT2,
        EventType.EV_EFI_VARIABLE_AUTHORITY,
    }
)
_PROGRAMS: Final = frozenset(
    {
        EventType.EV_EFI_BOOT_SERVICES_APPLICATION,
        EventType.EV_EFI_BOOT_SERVICES_DRIVER,
        EventType.EV_EFI_RUNTIME_SERVICES_DRIVER,
    }
)
_BLOBS: Final = frozenset(
    {EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB, EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB2}
)
_GRUB: Final = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ")


def authenticate_log(
    log: EventLog, algorithm: str, quoted: Mapping[int, bytes], unlogged: Sequence[int] = (10,)
) -> EventLog:
    """The part of the log that hardware signed for: the events of quoted registers.

    Args:
        quoted: register to value, from an authenticated quote.
        unlogged: registers that somebody else extends and logs (IMA's PCR 10).

    Raises:
        EvidenceError: the events of a quoted register do not replay to it, or a firmware
            register (0 to 7) was extended without the log; or an event's data is not what was
            measured, where it must be.
    """
    kept = [event for event in log.events if not event.extends or event.register in quoted]
    if any(event.register in unlogged and event.extends for event in kept):
        raise EvidenceError(
            "the boot event log extends a register that the kernel logs",
            found=", ".join(map(str, unlogged)),
            expected="events of firmware and boot loader",
        )
    genuine = replace(log, events=tuple(kept))
    replayed = genuine.replay(algorithm)
    for register, value in sorted(quoted.items()):
        shown = replayed.get(register)
        if shown is None and (register > _LAST_FIRMWARE_REGISTER or value == bytes(len(value))):
            continue
        if shown != value:
            raise EvidenceError(
                f"the boot event log does not replay to the quoted register {register}",
                found="no event" if shown is None else shown.hex()[:16],
                expected=value.hex()[:16],
                remedy="send the log of this boot, complete",
            )
    genuine.check_data()
    return genuine


def boot_properties(log: EventLog, algorithm: str) -> dict[str, Any]:
    """Facts of an authenticated log, for a claim's properties.

    ``secure_boot`` is there only if firmware's own register proves it. ``texts`` were hashed as
    they stand (firmware's actions, GRUB's commands). ``programs`` are digests of what the log
    calls EFI programs, in order; type and name are the sender's word.
    """
    programs = [
        {"digest": f"{algorithm}:{event.digests[algorithm].hex()}", "name": describe_event(event)}
        for event in log.events
        if event.type in _PROGRAMS and algorithm in event.digests
    ]
    texts = [
        {"register": event.register, "text": text}
        for event in log.events
        if (text := proven_text(event)) is not None
    ]
    facts: dict[str, Any] = {
        "events": len(log.events),
        "programs": programs[:_LISTED],
        "texts": texts[:_LISTED],
    }
    state = _secure_boot(log)
    if state is not None:
        facts["secure_boot"] = state
    return facts


def _secure_boot(log: EventLog) -> bool | None:
    """The Secure Boot variable as firmware measured it before its separator.

    An event's type is not hashed, so whoever sends the log may change it: what counts is the
    register, the place, and data that hashes to the digest.
    """
    states = set()
    for event in log.of(_CC_POLICY_REGISTER if log.header_register else _POLICY_REGISTER):
        if any(event.hashes(separator) for separator in _SEPARATORS):
            break
        found = _variable(event.data)
        if found is not None and found[:2] == _SECURE_BOOT and event.hashes(event.data):
            states.add(found[2])
    return states == {b"\x01"} if len(states) == 1 else None


def variable_of(event: Event) -> tuple[bytes, str, bytes] | None:
    """Vendor GUID, name and value of an event that measures an EFI variable."""
    return _variable(event.data) if event.type in _VARIABLES else None


def _variable(data: bytes) -> tuple[bytes, str, bytes] | None:
    """A ``UEFI_VARIABLE_DATA`` (section 10.2.6), if it is one."""
    if len(data) < 32:
        return None
    name_units, size = struct.unpack_from("<QQ", data, 16)
    if name_units > 1024 or len(data) != 32 + 2 * name_units + size:
        return None
    name = data[32 : 32 + 2 * name_units].decode("utf-16-le", "replace")
    return data[:16], name, data[32 + 2 * name_units :]


def describe_event(event: Event) -> str:
    """One line for people. It may be a lie of whoever sent the log."""
    name, data = event.type_name, event.data
    variable = variable_of(event)
    if variable is not None:
        return f"EFI variable {_clean(variable[1])}"
    if event.type in _PROGRAMS:
        return f"EFI program {_clean(_device_path(data)) or '(unnamed)'}"
    if event.type in _BLOBS and len(data) == 16:
        base, size = struct.unpack("<QQ", data)
        return f"firmware volume of {size} bytes at 0x{base:x}"
    if event.type == EventType.EV_EVENT_TAG and len(data) >= 8:
        tag, size = struct.unpack_from("<II", data)
        known = {_LOAD_OPTIONS_TAG: "kernel command line", _INITRD_TAG: "initial RAM disk"}
        return known.get(tag) or f"{name} {_clean(_text(data[8 : 8 + size]))}"
    if event.type in (EventType.EV_IPL, EventType.EV_EFI_ACTION, EventType.EV_ACTION):
        return f"{name} {_clean(_text(data))}"
    return name


def differences(found: EventLog, expected: EventLog, algorithm: str) -> list[str]:
    """What was measured otherwise than expected, register by register; empty if nothing was.

    Only registers that ``expected`` covers are compared. Digests decide; the sentences use the
    descriptions of the *expected* events where they can.
    """
    told = []
    for register in sorted({e.register for e in expected.events if e.extends}):
        theirs, ours = found.of(register), expected.of(register)
        for place, event in enumerate(ours):
            if place >= len(theirs):
                told.append(f"register {register}: {describe_event(event)} was not measured")
                break
            if theirs[place].digests.get(algorithm) != event.digests[algorithm]:
                shown = theirs[place]
                what = describe_event(event)
                if shown.type != event.type:
                    what = f"{event_type_name(shown.type)} instead of {what}"
                told.append(f"register {register}: {what} differs")
                break
        else:
            told += [
                f"register {register}: {describe_event(extra)} was measured in addition"
                for extra in theirs[len(ours) :][:1]
            ]
    return told


def _device_path(data: bytes) -> str:
    """File path or vendor text of a ``UEFI_IMAGE_LOAD_EVENT``'s device path (section 10.2.3)."""
    if len(data) < 32:
        return ""
    offset, texts = 32, []
    while offset + 4 <= len(data):
        kind = (data[offset], data[offset + 1])
        (size,) = struct.unpack_from("<H", data, offset + 2)
        node = data[offset + 4 : offset + size]
        if size < 4:
            break
        if kind == _MEDIA_PATH:
            texts.append(node.decode("utf-16-le", "replace").rstrip("\0"))
        # OVMF names what QEMU gives it by a vendor node, then a file name in a node of its own.
        elif kind == _VENDOR_MEDIA and len(node) > 16:
            texts.append(node[16:].decode("utf-16-le", "replace").rstrip("\0"))
        offset += size
    return "".join(texts)


def _text(data: bytes) -> str:
    """UTF-16 if every second byte is zero, as systemd's stub writes it; else UTF-8."""
    if len(data) >= 4 and len(data) % 2 == 0 and not any(data[1::2]):
        return data.decode("utf-16-le", "replace")
    return data.decode("utf-8", "replace")


def _clean(text: str) -> str:
    """Printable, and short: it ends up in messages."""
    shown = "".join(c if c.isprintable() else " " for c in text.rstrip("\0")).strip()
    return shown if len(shown) <= _TEXT else shown[: _TEXT - 3] + "..."


def proven_text(event: Event) -> str | None:
    """The text of an event that was hashed itself: GRUB's commands and firmware's actions."""
    if event.type in (EventType.EV_EFI_ACTION, EventType.EV_ACTION) and event.hashes(event.data):
        return _clean(_text(event.data))
    if event.type == EventType.EV_IPL:
        for prefix in _GRUB:
            text = event.data.removeprefix(prefix).rstrip(b"\0")
            if event.data.startswith(prefix) and event.hashes(text):
                return _clean(_text(event.data))
    return None
