from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.boot_claims import (
    authenticate_log,
    boot_properties,
    describe_event,
    differences,
    proven_text,
    variable_of,
)
from cenacle.attestation.event_log import Event, EventLog, EventType, parse_event_log
from cenacle.documents.base import canonical_json
from cenacle.errors import EvidenceError

BANKS = ("sha256",)
GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")


def event(register: int, kind: int, data: bytes, measured: bytes | None = None) -> Event:
    return Event.measuring(register, kind, data, BANKS, measured)


def log_of(*events: Event, cc: bool = False) -> EventLog:
    return EventLog(BANKS, tuple(events), 1 if cc else 0)


def secure_boot(value: bytes, name: str = "SecureBoot", guid: bytes = GLOBAL) -> bytes:
    return guid + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


CONFIG = EventType.EV_EFI_VARIABLE_DRIVER_CONFIG
END = event(7, EventType.EV_SEPARATOR, bytes(4))


def test_a_real_log_is_authentic(real_boot: Any) -> None:
    log, quoted = parse_event_log(real_boot.log), real_boot.pcrs()
    assert authenticate_log(log, "sha256", quoted) == log
    assert authenticate_log(log, "sha1", real_boot.pcrs("sha1")) == log
    facts = boot_properties(log, "sha256")
    assert facts["secure_boot"] is False
    assert facts["events"] == 24
    assert [program["name"] for program in facts["programs"]] == ["EFI program kernel"]
    assert [t["text"] for t in facts["texts"]][-1] == ("Exit Boot Services Returned with Success")


def test_only_the_part_that_is_quoted_is_believed(real_boot: Any) -> None:
    log, quoted = parse_event_log(real_boot.log), real_boot.pcrs()
    part = authenticate_log(log, "sha256", {n: quoted[n] for n in (4, 9)})
    assert {event.register for event in part.events} == {4, 9}
    assert "secure_boot" not in boot_properties(part, "sha256")


@pytest.mark.parametrize("register", [0, 1, 2, 3, 4, 5, 6, 7, 9])
def test_a_register_that_the_log_does_not_give(real_boot: Any, register: int) -> None:
    log, quoted = parse_event_log(real_boot.log), real_boot.pcrs()
    with pytest.raises(EvidenceError, match=f"quoted register {register}"):
        authenticate_log(log, "sha256", {**quoted, register: b"\x01" * 32})
    silent = replace(log, events=tuple(e for e in log.events if e.register != register))
    if register < 8:
        with pytest.raises(EvidenceError, match=f"quoted register {register}.*no event"):
            authenticate_log(silent, "sha256", quoted)


def test_registers_of_the_system_need_no_boot_log(real_boot: Any) -> None:
    log, quoted = parse_event_log(real_boot.log), real_boot.pcrs()
    assert authenticate_log(log, "sha256", {**quoted, 11: b"\x01" * 32, 17: b"\xff" * 32})


def test_events_in_the_kernels_register_are_refused(real_boot: Any) -> None:
    log, quoted = parse_event_log(real_boot.log), real_boot.pcrs()
    extra = Event.measuring(10, EventType.EV_IPL, b"x", log.algorithms)
    with pytest.raises(EvidenceError, match="that the kernel logs"):
        authenticate_log(replace(log, events=(*log.events, extra)), "sha256", quoted)


def test_the_state_of_secure_boot_is_what_firmware_measured() -> None:
    on, off = event(7, CONFIG, secure_boot(b"\x01")), event(7, CONFIG, secure_boot(b"\0"))
    assert boot_properties(log_of(on, END), "sha256")["secure_boot"] is True
    assert boot_properties(log_of(off, END), "sha256")["secure_boot"] is False


@pytest.mark.parametrize(
    "events",
    [
        (),
        (event(7, CONFIG, secure_boot(b"\x01")), event(7, CONFIG, secure_boot(b"\0"))),
        (END, event(7, CONFIG, secure_boot(b"\x01"))),
        (event(4, CONFIG, secure_boot(b"\x01")), END),
        (event(7, CONFIG, secure_boot(b"\x01"), b"something else"), END),
        (event(7, CONFIG, secure_boot(b"\x01", guid=bytes(16))), END),
        (event(7, CONFIG, secure_boot(b"\x01", "SetupMode")), END),
        (event(7, EventType.EV_NO_ACTION, secure_boot(b"\x01")), END),
    ],
    ids=["none", "both", "late", "other register", "not hashed", "vendor", "name", "no action"],
)
def test_a_state_of_secure_boot_that_is_not_proven(events: tuple[Event, ...]) -> None:
    assert "secure_boot" not in boot_properties(log_of(*events), "sha256")


def test_another_type_does_not_hide_or_invent_secure_boot() -> None:
    """Types are not hashed: the sender may write what he likes there."""
    hidden = replace(event(7, CONFIG, secure_boot(b"\0")), type=EventType.EV_POST_CODE)
    relabelled = replace(END, type=EventType.EV_POST_CODE)
    invented = event(7, CONFIG, secure_boot(b"\x01"))
    facts = boot_properties(log_of(hidden, relabelled, invented), "sha256")
    assert facts["secure_boot"] is False


def test_in_a_cc_log_it_stands_in_the_first_register() -> None:
    on, end = event(1, CONFIG, secure_boot(b"\x01")), event(1, EventType.EV_SEPARATOR, bytes(4))
    assert boot_properties(log_of(on, end, cc=True), "sha256")["secure_boot"] is True
    elsewhere = event(7, CONFIG, secure_boot(b"\x01"))
    assert "secure_boot" not in boot_properties(log_of(elsewhere, cc=True), "sha256")


def test_texts_that_were_hashed() -> None:
    grub = event(8, EventType.EV_IPL, b"grub_cmd: linux /vmlinuz quiet\0", b"linux /vmlinuz quiet")
    assert proven_text(grub) == "grub_cmd: linux /vmlinuz quiet"
    assert proven_text(replace(grub, data=b"grub_cmd: linux /vmlinuz\0")) is None
    assert proven_text(event(4, EventType.EV_EFI_ACTION, b"Calling")) == "Calling"
    assert proven_text(event(4, EventType.EV_EFI_ACTION, b"Calling", b"other")) is None
    assert proven_text(event(9, EventType.EV_EVENT_TAG, b"text")) is None


def image_event(*nodes: tuple[int, int, bytes]) -> bytes:
    path = b"".join(struct.pack("<BBH", k, s, 4 + len(d)) + d for k, s, d in nodes)
    return bytes(24) + struct.pack("<Q", len(path)) + path


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (event(7, CONFIG, secure_boot(b"\0")), "EFI variable SecureBoot"),
        (
            event(4, 0x80000003, image_event((4, 4, "\\EFI\\shim.efi\0".encode("utf-16-le")))),
            "EFI program \\EFI\\shim.efi",
        ),
        (event(4, 0x80000003, image_event((4, 4, b"a\0\x07\0\n\0"))), "EFI program a"),
        (event(4, 0x80000004, b"short"), "EFI program (unnamed)"),
        (event(4, 0x80000003, bytes(32) + b"\4\4\1\0"), "EFI program (unnamed)"),
        (event(0, 0x80000008, struct.pack("<QQ", 0x820000, 64)), "firmware volume of 64 bytes"),
        (event(9, 6, struct.pack("<II", 0x8F3B22EC, 0)), "initial RAM disk"),
        (event(9, 6, struct.pack("<II", 0x8F3B22ED, 0)), "kernel command line"),
        (event(9, 6, struct.pack("<II", 1, 3) + b"abc"), "EV_EVENT_TAG abc"),
        (event(8, 13, "text".encode("utf-16-le")), "EV_IPL text"),
        (event(8, 13, b"x" * 500), "EV_IPL xxx"),
        (event(0, 8, b"1"), "EV_S_CRTM_VERSION"),
        (event(0, 0x4242, b"1"), "0x00004242"),
    ],
)
def test_descriptions(found: Event, shown: str) -> None:
    text = describe_event(found)
    assert text.startswith(shown)
    assert text.isprintable()
    assert len(text) < 200


@pytest.mark.parametrize(
    "data",
    [b"", bytes(31), GLOBAL + struct.pack("<QQ", 1 << 60, 0), secure_boot(b"\0") + b"x"],
    ids=["empty", "short", "huge", "longer"],
)
def test_variables_that_are_none(data: bytes) -> None:
    assert variable_of(event(7, CONFIG, data)) is None


@settings(max_examples=150)
@given(
    st.sampled_from([1, 4, 5, 6, 13, 0x80000001, 0x80000002, 0x80000003, 0x80000008, 0x800000E0]),
    st.binary(max_size=120),
    st.booleans(),
)
def test_hostile_data_is_described_in_a_printable_line(kind: int, data: bytes, own: bool) -> None:
    if kind == 0x80000003:
        data = bytes(32) + data
    found = event(7, kind, data, None if own else b"other")
    text = describe_event(found)
    assert text.isprintable()
    assert len(text) < 200
    canonical_json(boot_properties(log_of(found, END), "sha256"))


def test_differences_name_what_was_changed() -> None:
    expected = log_of(event(9, 6, struct.pack("<II", 0x8F3B22ED, 0), b"quiet"), END)
    assert differences(expected, expected, "sha256") == []
    other = log_of(event(9, 6, struct.pack("<II", 0x8F3B22ED, 0), b"quiet init=/bin/sh"), END)
    assert differences(other, expected, "sha256") == ["register 9: kernel command line differs"]
    assert differences(log_of(END), expected, "sha256") == [
        "register 9: kernel command line was not measured"
    ]
    more = log_of(*expected.events, event(7, EventType.EV_EFI_ACTION, b"DMA Protection Disabled"))
    assert differences(more, expected, "sha256") == [
        "register 7: EV_EFI_ACTION DMA Protection Disabled was measured in addition"
    ]
    swapped = log_of(event(9, 13, b"grub"), END)
    assert differences(swapped, expected, "sha256") == [
        "register 9: EV_IPL instead of kernel command line differs"
    ]
