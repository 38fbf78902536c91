"""The boot event log of a TPM or of a confidential VM: parsed, replayed, written.

Format: TCG PC Client Platform Firmware Profile 1.06, section 10 (crypto-agile log: a
``TCG_PCR_EVENT`` that holds the ``TCG_EfiSpecIdEvent``, then ``TCG_PCR_EVENT2`` structures).
The CC event log of UEFI 2.10, section 38, is the same with measurement-register indices
(for TDX: 1 to 4 are RTMR 0 to 3).

A log is hostile input until its replay equals registers that hardware signed. Even then only
the *digests* are genuine: what an event's data says is proven only where the digest is the
data's own hash (:meth:`Event.hashes`), and events of type ``EV_NO_ACTION`` prove nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NoReturn, Self

from cenacle.errors import EvidenceError

__all__ = [
    "CC_REGISTERS",
    "MAX_EVENTS",
    "MAX_LOG_BYTES",
    "TPM_REGISTERS",
    "Event",
    "EventLog",
    "EventType",
    "event_type_name",
    "extend",
    "parse_event_log",
]

MAX_LOG_BYTES: Final = 2 * 1024 * 1024
MAX_EVENTS: Final = 10_000
TPM_REGISTERS: Final = range(24)
CC_REGISTERS: Final = range(1, 5)

_SIGNATURE: Final = b"Spec ID Event03\x00"
_LOCALITY: Final = b"StartupLocality\x00"
_PADDING: Final = (0x00, 0xFF)

# TPM 2.0 Library Part 2, table 9 (TPM_ALG_ID): hash algorithms, and their digests' sizes.
_ALGORITHMS: Final = {
    0x0004: ("sha1", 20),
    0x000B: ("sha256", 32),
    0x000C: ("sha384", 48),
    0x000D: ("sha512", 64),
    0x0012: ("sm3", 32),
    0x0027: ("sha3_256", 32),
    0x0028: ("sha3_384", 48),
    0x0029: ("sha3_512", 64),
}
_IDS: Final = {name: identifier for identifier, (name, _) in _ALGORITHMS.items()}
_SIZES: Final = dict(_ALGORITHMS.values())
_COMPUTED: Final = frozenset(_SIZES) & hashlib.algorithms_available  # a build may lack SM3


class EventType:
    """Event types by the names of the specification (section 10.4.1)."""

    EV_PREBOOT_CERT: Final = 0x00
    EV_POST_CODE: Final = 0x01
    EV_NO_ACTION: Final = 0x03
    EV_SEPARATOR: Final = 0x04
    EV_ACTION: Final = 0x05
    EV_EVENT_TAG: Final = 0x06
    EV_S_CRTM_CONTENTS: Final = 0x07
    EV_S_CRTM_VERSION: Final = 0x08
    EV_CPU_MICROCODE: Final = 0x09
    EV_PLATFORM_CONFIG_FLAGS: Final = 0x0A
    EV_TABLE_OF_DEVICES: Final = 0x0B
    EV_COMPACT_HASH: Final = 0x0C
    EV_IPL: Final = 0x0D
    EV_IPL_PARTITION_DATA: Final = 0x0E
    EV_NONHOST_CODE: Final = 0x0F
    EV_NONHOST_CONFIG: Final = 0x10
    EV_NONHOST_INFO: Final = 0x11
    EV_OMIT_BOOT_DEVICE_EVENTS: Final = 0x12
    EV_POST_CODE2: Final = 0x13
    EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
    EV_EFI_VARIABLE_BOOT: Final = 0x80000002
    EV_EFI_BOOT_SERVICES_APPLICATION: Final = 0x80000003
    EV_EFI_BOOT_SERVICES_DRIVER: Final = 0x80000004
    EV_EFI_RUNTIME_SERVICES_DRIVER: Final = 0x80000005
    EV_EFI_GPT_EVENT: Final = 0x80000006
    EV_EFI_ACTION: Final = 0x80000007
    EV_EFI_PLATFORM_FIRMWARE_BLOB: Final = 0x80000008
    EV_EFI_HANDOFF_TABLES: Final = 0x80000009
    EV_EFI_PLATFORM_FIRMWARE_BLOB2: Final = 0x8000000A
    EV_EFI_HANDOFF_TABLES2: Final = 0x8000000B
    EV_EFI_VARIABLE_BOOT2: Final = 0x8000000C
    EV_EFI_GPT_EVENT2: Final = 0x8000000D
    EV_EFI_HCRTM_EVENT: Final = 0x80000010
    EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0
    EV_EFI_SPDM_FIRMWARE_BLOB: Final = 0x800000E1
    EV_EFI_SPDM_FIRMWARE_CONFIG: Final = 0x800000E2
    EV_EFI_SPDM_DEVICE_POLICY: Final = 0x800000E3
    EV_EFI_SPDM_DEVICE_AUTHORITY: Final = 0x800000E4


_NAMES: Final = {v: name for name, v in vars(EventType).items() if name.startswith("EV_")}

# Types for which the specification (table 27) says that the digest is the event data's own hash.
_SELF_HASHED: Final = frozenset(
    {
        EventType.EV_SEPARATOR,
        EventType.EV_ACTION,
        EventType.EV_S_CRTM_VERSION,
        EventType.EV_OMIT_BOOT_DEVICE_EVENTS,
        EventType.EV_EFI_VARIABLE_DRIVER_CONFIG,
        EventType.EV_EFI_GPT_EVENT,
        EventType.EV_EFI_ACTION,
        EventType.EV_EFI_VARIABLE_BOOT2,
        EventType.EV_EFI_GPT_EVENT2,
        EventType.EV_EFI_VARIABLE_AUTHORITY,
    }
)
_SEPARATORS: Final = (b"\x00" * 4, b"\xff" * 4)


def event_type_name(number: int) -> str:
    """The specification's name, or the number in hexadecimal."""
    return _NAMES.get(number, f"0x{number:08x}")


def extend(algorithm: str, register: bytes, digest: bytes) -> bytes:
    """The register after ``digest`` was extended into it: H(register || digest)."""
    return hashlib.new(algorithm, register + digest, usedforsecurity=False).digest()


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        number: its place in the log, from 0 (the header is not counted).
        register: PCR or measurement register that it was extended into.
        type: see :class:`EventType`.
        digests: algorithm name to the digest that was extended.
        data: what the firmware says was measured, or where it lay.
    """

    number: int
    register: int
    type: int
    digests: Mapping[str, bytes]
    data: bytes

    @classmethod
    def measuring(
        cls,
        register: int,
        event_type: int,
        data: bytes,
        algorithms: Sequence[str],
        measured: bytes | None = None,
    ) -> Self:
        """An event as firmware makes it: digests of ``measured``, or of the data itself."""
        if event_type == EventType.EV_NO_ACTION:
            digests = {name: bytes(_SIZES[name]) for name in algorithms}
        else:
            content = data if measured is None else measured
            digests = {name: _hash(name, content) for name in algorithms}
        return cls(0, register, event_type, MappingProxyType(digests), data)

    @property
    def type_name(self) -> str:
        return event_type_name(self.type)

    @property
    def extends(self) -> bool:
        """Whether the event changed a register: all do but ``EV_NO_ACTION``."""
        return self.type != EventType.EV_NO_ACTION

    def hashes(self, content: bytes) -> bool:
        """Whether every digest of the event (of a known algorithm) is the hash of ``content``."""
        known = [(name, d) for name, d in self.digests.items() if name in _COMPUTED]
        return (
            self.extends
            and bool(known)
            and all(_hash(name, content) == digest for name, digest in known)
        )


@dataclass(frozen=True, slots=True)
class EventLog:
    """A parsed log.

    Attributes:
        algorithms: the banks' names, in the order of the header.
        events: all events, in order.
        header_register: where the header event claims to belong: 0, or 1 in a CC event log.
        vendor: the header's vendor information.
    """

    algorithms: tuple[str, ...]
    events: tuple[Event, ...]
    header_register: int = 0
    vendor: bytes = b""

    @property
    def startup_locality(self) -> int:
        """The locality of TPM2_Startup that PCR 0 begins with; 0 unless an event says else."""
        stated = [
            (place, event)
            for place, event in enumerate(self.events)
            if event.data.startswith(_LOCALITY) and not event.extends
        ]
        if not stated:
            return 0
        place, event = stated[0]
        if len(stated) > 1 or event.register != 0 or len(event.data) != len(_LOCALITY) + 1:
            _refuse("the startup locality is stated twice, or wrongly", f"event {place}")
        if any(e.extends and e.register == 0 for e in self.events[:place]):
            _refuse("the startup locality comes after PCR 0 was extended", f"event {place}")
        if event.data[-1] not in (0, 3, 4):
            _refuse("the startup locality is impossible", event.data[-1], "0, 3 or 4")
        return event.data[-1]

    def replay(self, algorithm: str) -> dict[int, bytes]:
        """Every register that the log extends, as one bank holds it after all events.

        PCR 0 begins with the startup locality (section 10.4.5.3), everything else with zeros.

        Raises:
            EvidenceError: the log has no such bank, or an event lacks its digest.
        """
        if algorithm not in self.algorithms or algorithm not in _COMPUTED:
            _refuse("the event log has no such bank", " ".join(self.algorithms), algorithm)
        size = _SIZES[algorithm]
        initial = {0: bytes(size - 1) + bytes([self.startup_locality])}
        registers: dict[int, bytes] = {}
        for event in self.events:
            if not event.extends:
                continue
            digest = event.digests.get(algorithm)
            if digest is None:
                _refuse(f"event {event.number} has no {algorithm} digest", event.type_name)
            before = registers.get(event.register) or initial.get(event.register) or bytes(size)
            registers[event.register] = extend(algorithm, before, digest)
        return registers

    def check_data(self) -> None:
        """Events whose data must be what was hashed really have their data's hash.

        Raises:
            EvidenceError: naming the first that does not, or a separator that reports an error.
        """
        for event in self.events:
            if event.type not in _SELF_HASHED:
                continue
            if event.type == EventType.EV_SEPARATOR and event.data not in _SEPARATORS:
                _refuse(
                    f"event {event.number}: the separator of register {event.register} reports "
                    "an error of the firmware",
                    event.data[:16].hex() or "nothing",
                    "00000000 or ffffffff",
                )
            if not event.hashes(event.data):
                _refuse(
                    f"event {event.number} ({event.type_name}) is not what was measured",
                    "data with another hash than the event's digest",
                    "data that hashes to the event's digest",
                )

    def of(self, register: int) -> tuple[Event, ...]:
        """The events that were extended into one register."""
        return tuple(e for e in self.events if e.register == register and e.extends)

    def to_bytes(self) -> bytes:
        """The log in its binary form, without padding; :func:`parse_event_log` reads it."""
        banks = [struct.pack("<HH", _IDS[name], _SIZES[name]) for name in self.algorithms]
        spec = _SIGNATURE + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks)) + b"".join(banks)
        spec += bytes([len(self.vendor)]) + self.vendor
        head = struct.pack("<II20xI", self.header_register, EventType.EV_NO_ACTION, len(spec))
        parts = [head, spec]
        for event in self.events:
            parts.append(struct.pack("<III", event.register, event.type, len(event.digests)))
            parts += [struct.pack("<H", _IDS[n]) + digest for n, digest in event.digests.items()]
            parts += [struct.pack("<I", len(event.data)), event.data]
        return b"".join(parts)


def parse_event_log(raw: bytes, registers: Container[int] = TPM_REGISTERS) -> EventLog:
    """Read a log; bytes after the last event must be padding of zeros or of 0xFF.

    Args:
        raw: the log, e.g. ``/sys/kernel/security/tpm0/binary_bios_measurements`` or
            ``/sys/firmware/acpi/tables/data/CCEL``; at most :data:`MAX_LOG_BYTES`.
        registers: which registers an event may extend (:data:`CC_REGISTERS` for a CCEL).

    Raises:
        EvidenceError: the log is not exactly understood.
    """
    if len(raw) > MAX_LOG_BYTES:
        _refuse("the event log is too large", f"{len(raw)} bytes", f"<= {MAX_LOG_BYTES}")
    reader = _Reader(raw)
    register, event_type = reader.numbers("<II", "the header")
    digest = reader.take(20, "the header")
    (size,) = reader.numbers("<I", "the header")
    spec = _Reader(reader.take(size, "the header"))
    if event_type != EventType.EV_NO_ACTION or not spec.raw.startswith(_SIGNATURE):
        _refuse(
            "the event log is not crypto-agile",
            f"a first event of type {event_type_name(event_type)}",
            "a TCG_EfiSpecIdEvent with signature 'Spec ID Event03'",
        )
    if any(digest) or register not in TPM_REGISTERS:
        _refuse("the event log's header is not a header", f"register {register}, with a digest")
    sizes, vendor = _parse_spec(spec)
    events: list[Event] = []
    while not reader.at_padding():
        if len(events) == MAX_EVENTS:
            _refuse("the event log has too many events", f"> {MAX_EVENTS}", f"<= {MAX_EVENTS}")
        events.append(_parse_event(reader, len(events), sizes, registers))
    names = tuple(name for name, _ in sizes.values())
    return EventLog(names, tuple(events), register, vendor)


def _parse_spec(spec: _Reader) -> tuple[dict[int, tuple[str, int]], bytes]:
    """The banks (identifier to name and digest size), and the vendor's bytes."""
    spec.take(len(_SIGNATURE), "the header")
    _, minor, major, _, width, count = spec.numbers("<IBBBBI", "the header")
    if major != 2 or width not in (1, 2):
        _refuse("the event log has another version", f"{major}.{minor}", "2.x, of 32 or 64 bits")
    if not 1 <= count <= 16:
        _refuse("the event log's header names an odd number of algorithms", count, "1 to 16")
    sizes: dict[int, tuple[str, int]] = {}
    for _ in range(count):
        identifier, size = spec.numbers("<HH", "the header's algorithms")
        name, expected = _ALGORITHMS.get(identifier, (f"0x{identifier:04x}", size))
        if identifier in sizes or size != expected or not 1 <= size <= 64:
            _refuse("the event log's header names an impossible bank", f"{name}, {size} bytes")
        sizes[identifier] = (name, size)
    (vendor_size,) = spec.numbers("<B", "the header's vendor information")
    vendor = spec.take(vendor_size, "the header's vendor information")
    if spec.offset != len(spec.raw):
        _refuse("the event log's header has bytes left over", len(spec.raw) - spec.offset, 0)
    return sizes, vendor


def _parse_event(
    reader: _Reader, number: int, sizes: dict[int, tuple[str, int]], registers: Container[int]
) -> Event:
    where = f"event {number}"
    register, event_type, count = reader.numbers("<III", where)
    if event_type != EventType.EV_NO_ACTION and register not in registers:
        _refuse(f"{where} names a register that no event may extend", register, registers)
    if not 1 <= count <= len(sizes):
        _refuse(f"{where} has an odd number of digests", count, f"1 to {len(sizes)}")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        (identifier,) = reader.numbers("<H", where)
        name, size = sizes.get(identifier, (f"0x{identifier:04x}", 0))
        if size == 0 or name in digests:
            _refuse(f"{where} has a digest of an algorithm that it may not have", name)
        digests[name] = reader.take(size, where)
    (length,) = reader.numbers("<I", where)
    return Event(
        number, register, event_type, MappingProxyType(digests), reader.take(length, where)
    )


class _Reader:
    """Bounds-checked reading from hostile bytes."""

    __slots__ = ("offset", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = bytes(raw)
        self.offset = 0

    def take(self, size: int, where: str) -> bytes:
        left = len(self.raw) - self.offset
        if size > left:
            _refuse(f"the event log ends inside {where}", f"{left} bytes", f"{size} more bytes")
        self.offset += size
        return self.raw[self.offset - size : self.offset]

    def numbers(self, form: str, where: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form), where))

    def at_padding(self) -> bool:
        """The end, or nothing but padding; an event cannot begin so, for lack of a digest."""
        rest = self.raw[self.offset :] if self._may_pad() else b"\x01"
        return not rest or (rest[0] in _PADDING and rest.count(rest[0]) == len(rest))

    def _may_pad(self) -> bool:
        head = self.raw[self.offset : self.offset + 12]
        return head in (bytes(len(head)), b"\xff" * len(head))


def _hash(algorithm: str, content: bytes) -> bytes:
    return hashlib.new(algorithm, content, usedforsecurity=False).digest()


def _refuse(what: str, found: object, expected: object = None) -> NoReturn:
    raise EvidenceError(what, found=found, expected=expected)
