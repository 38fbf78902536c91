from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.boot_claims import boot_properties
from cenacle.attestation.event_log import (
    CC_REGISTERS,
    MAX_EVENTS,
    MAX_LOG_BYTES,
    Event,
    EventLog,
    EventType,
    event_type_name,
    extend,
    parse_event_log,
)
from cenacle.errors import EvidenceError

BANKS = ("sha1", "sha256")


def made(*events: Event, algorithms: tuple[str, ...] = BANKS) -> EventLog:
    """A log with its events numbered, as parsing gives it."""
    return EventLog(algorithms, tuple(replace(e, number=n) for n, e in enumerate(events)))


def event(register: int, kind: int, data: bytes, measured: bytes | None = None) -> Event:
    return Event.measuring(register, kind, data, BANKS, measured)


SEPARATOR = event(0, EventType.EV_SEPARATOR, bytes(4))
ACTION = event(4, EventType.EV_EFI_ACTION, b"Calling EFI Application from Boot Option")
LOCALITY = event(0, EventType.EV_NO_ACTION, b"StartupLocality\0\x03")


def test_a_genuine_cc_log_replays_to_the_quoted_registers(evidence_folder: Path) -> None:
    raw = (evidence_folder / "tdx-ccel" / "ccel_data.dat").read_bytes()
    quote = (evidence_folder / "tdx-ccel" / "cos-113-tdx-quote.dat").read_bytes()
    log = parse_event_log(raw, CC_REGISTERS)
    log.check_data()
    registers = log.replay("sha384")
    assert len(log.events) == 43
    assert sorted(registers) == [1, 2, 3]
    body = 48  # of a TDX quote; the four RTMRs stand at byte 328 of it
    quoted = [quote[body + 328 + 48 * n : body + 376 + 48 * n] for n in range(4)]
    assert [registers.get(n, bytes(48)) for n in range(1, 5)] == quoted
    assert log.to_bytes() == raw.rstrip(b"\xff")


def test_a_real_boot_replays_to_every_bank(real_boot: Any) -> None:
    boot = real_boot
    log = parse_event_log(boot.log)
    log.check_data()
    assert log.algorithms == ("sha1", "sha256", "sha384", "sha512")
    for bank in ("sha1", "sha256"):
        registers = log.replay(bank)
        assert sorted(registers) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
        assert all(boot.pcrs(bank)[n] == value for n, value in registers.items())
    assert log.to_bytes() == boot.log


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_the_genuine_log_counts(evidence_folder: Path, stride: int) -> None:
    """A flip is refused, or moves a register, or is in text that nobody proved."""
    padded = (evidence_folder / "tdx-ccel" / "ccel_data.dat").read_bytes()
    raw = padded.rstrip(b"\xff")
    log = parse_event_log(raw, CC_REGISTERS)
    registers, facts = log.replay("sha384"), boot_properties(log, "sha384")
    assert facts["secure_boot"] is False
    texts = {(t["register"], t["text"]) for t in facts["texts"]}
    outcomes = {"refused": 0, "moved": 0, "unproven": 0}
    for place in range(0, len(raw), stride):
        altered = bytearray(raw)
        altered[place] ^= 0xFF
        try:
            other = parse_event_log(bytes(altered), CC_REGISTERS)
            other.check_data()
            moved = other.replay("sha384") != registers
        except EvidenceError:
            outcomes["refused"] += 1
            continue
        outcomes["moved" if moved else "unproven"] += 1
        if not moved:
            found = boot_properties(other, "sha384")
            assert found.get("secure_boot") in (False, None)
            assert {(t["register"], t["text"]) for t in found["texts"]} <= texts
    assert outcomes["refused"] > 0.4 * len(raw) / stride
    assert outcomes["moved"] > 0.05 * len(raw) / stride
    for place in (len(raw), len(raw) + 1000, len(padded) - 1):
        altered = bytearray(padded)
        altered[place] ^= 0x01
        with pytest.raises(EvidenceError):
            parse_event_log(bytes(altered), CC_REGISTERS)


def test_every_truncation_is_refused_or_a_shorter_log(real_boot: Any) -> None:
    raw = real_boot.log
    whole = parse_event_log(raw)
    registers = whole.replay("sha256")
    shorter = 0
    ends = {len(replace(whole, events=whole.events[:n]).to_bytes()) for n in range(24)}
    for size in sorted({*range(0, len(raw), 5), *ends}):
        try:
            log = parse_event_log(raw[:size])
        except EvidenceError:
            continue
        shorter += 1
        assert log.events == whole.events[: len(log.events)]
        assert log.replay("sha256") != registers
    assert shorter >= len(ends)  # some others end in zeros, like padding


@pytest.mark.parametrize("padding", [b"", b"\xff" * 7, b"\xff" * 4096, bytes(1), bytes(4096)])
def test_padding(padding: bytes) -> None:
    log = made(SEPARATOR, ACTION)
    assert parse_event_log(log.to_bytes() + padding) == log


@pytest.mark.parametrize(
    "padding",
    [b"\xff" * 40 + b"\0", bytes(40) + b"\xff", b"\x01", b"\xff\0" * 20, bytes(12) + b"\xff" * 50],
    ids=["ones then zero", "zeros then one", "one", "mixed", "halves"],
)
def test_what_follows_the_events_is_padding_only(padding: bytes) -> None:
    with pytest.raises(EvidenceError):
        parse_event_log(made(SEPARATOR).to_bytes() + padding)


def header(**changed: int) -> bytes:
    fields = {
        "register": 0,
        "type": 3,
        "platform": 0,
        "minor": 0,
        "major": 2,
        "errata": 0,
        "width": 2,
        "count": 1,
        "algorithm": 0x0B,
        "size": 32,
        "vendor": 0,
        **changed,
    }
    spec = b"Spec ID Event03\0" + struct.pack(
        "<IBBBBIHHB", *[fields[n] for n in list(fields) if n not in ("register", "type")]
    )
    return struct.pack("<II20xI", fields["register"], fields["type"], len(spec)) + spec


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"type": 4}, "not crypto-agile"),
        ({"register": 24}, "not a header"),
        ({"major": 1}, "another version"),
        ({"width": 3}, "another version"),
        ({"count": 0}, "odd number of algorithms"),
        ({"count": 17}, "odd number of algorithms"),
        ({"count": 2}, "ends inside"),
        ({"size": 20}, "impossible bank"),
        ({"algorithm": 0x99, "size": 0}, "impossible bank"),
        ({"algorithm": 0x99, "size": 65}, "impossible bank"),
        ({"vendor": 1}, "ends inside"),
    ],
)
def test_a_header_that_is_none(changed: dict[str, int], reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        parse_event_log(header(**changed))


def test_a_header_of_its_own() -> None:
    assert parse_event_log(header()) == EventLog(("sha256",), ())
    spec = header()[32:] + b"\0"
    with pytest.raises(EvidenceError, match="left over"):
        parse_event_log(struct.pack("<II20xI", 0, 3, len(spec)) + spec)
    raw = bytearray(header())
    raw[8] = 1  # a digest in the header event
    with pytest.raises(EvidenceError, match="not a header"):
        parse_event_log(bytes(raw))
    with pytest.raises(EvidenceError, match="ends inside the header"):
        parse_event_log(b"")


def packed(register: int, kind: int, digests: list[tuple[int, bytes]], data: bytes) -> bytes:
    parts = [struct.pack("<III", register, kind, len(digests))]
    parts += [struct.pack("<H", identifier) + digest for identifier, digest in digests]
    return b"".join(parts) + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (packed(24, 4, [(0x0B, bytes(32))], b""), "no event may extend"),
        (packed(0, 4, [], b""), "odd number of digests"),
        (packed(0, 4, [(0x0B, bytes(32))] * 2, b""), "odd number of digests"),
        (packed(0, 4, [(0x04, bytes(20))], b""), "algorithm that it may not have"),
        (packed(0, 4, [(0x0B, bytes(32))], b"")[:-1], "ends inside event 0"),
        (struct.pack("<IIIH", 0, 4, 1, 0x0B) + bytes(32) + b"\xff\xff\xff\xff", "ends inside"),
    ],
    ids=["register", "no digest", "too many", "algorithm", "cut", "huge"],
)
def test_an_event_that_is_none(tail: bytes, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        parse_event_log(header() + tail)


def test_limits() -> None:
    with pytest.raises(EvidenceError, match="too large"):
        parse_event_log(bytes(MAX_LOG_BYTES + 1))
    many = packed(0, 4, [(0x0B, bytes(32))], b"") * (MAX_EVENTS + 1)
    with pytest.raises(EvidenceError, match="too many events"):
        parse_event_log(header() + many)


def test_an_event_may_lack_a_bank_but_then_it_is_not_replayed() -> None:
    partial = Event(0, 0, EventType.EV_POST_CODE, {"sha1": bytes(20)}, b"")
    log = parse_event_log(made(partial).to_bytes())
    assert log.replay("sha1")
    with pytest.raises(EvidenceError, match="has no sha256 digest"):
        log.replay("sha256")
    with pytest.raises(EvidenceError, match="no such bank"):
        log.replay("sha384")
    with pytest.raises(EvidenceError, match="no such bank"):
        log.replay("md5")


def test_replay_is_the_specifications() -> None:
    digest = hashlib.sha256(bytes(4)).digest()
    log = made(SEPARATOR, LOCALITY, ACTION)
    with pytest.raises(EvidenceError, match="after PCR 0"):
        log.replay("sha256")
    log = made(LOCALITY, SEPARATOR)
    start = bytes(31) + b"\x03"
    assert log.replay("sha256") == {0: hashlib.sha256(start + digest).digest()}
    assert extend("sha256", start, digest) == log.replay("sha256")[0]
    assert made(SEPARATOR).replay("sha256") == {0: hashlib.sha256(bytes(32) + digest).digest()}


@pytest.mark.parametrize(
    "stated",
    [
        [b"StartupLocality\0\x03", b"StartupLocality\0\x03"],
        [b"StartupLocality\0"],
        [b"StartupLocality\0\x03\0"],
        [b"StartupLocality\0\x01"],
    ],
    ids=["twice", "absent", "long", "impossible"],
)
def test_a_startup_locality_that_is_none(stated: list[bytes]) -> None:
    log = made(*[event(0, EventType.EV_NO_ACTION, data) for data in stated], SEPARATOR)
    with pytest.raises(EvidenceError, match="startup locality"):
        log.replay("sha256")
    other = made(event(1, EventType.EV_NO_ACTION, b"StartupLocality\0\x03"), SEPARATOR)
    with pytest.raises(EvidenceError, match="startup locality"):
        other.replay("sha256")


def test_an_event_without_action_proves_nothing() -> None:
    assert not LOCALITY.extends
    assert not LOCALITY.hashes(LOCALITY.data)
    assert not Event(0, 0, EventType.EV_IPL, {}, b"").hashes(b"")
    unknown = Event(0, 0, EventType.EV_IPL, {"0x0099": b"x"}, b"")
    assert not unknown.hashes(b"")


@pytest.mark.parametrize(
    ("altered", "reason"),
    [
        (replace(ACTION, data=b"Something else"), "not what was measured"),
        (event(7, EventType.EV_SEPARATOR, b"\x01\0\0\0"), "reports an error"),
        (event(7, EventType.EV_SEPARATOR, b""), "reports an error"),
        (
            replace(
                ACTION,
                digests=MappingProxyType({**ACTION.digests, "sha1": bytes(20)}),
            ),
            "not what was measured",
        ),
    ],
    ids=["text", "error", "empty", "one bank"],
)
def test_data_that_must_be_what_was_hashed(altered: Event, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        made(SEPARATOR, altered).check_data()


def test_names_of_types() -> None:
    assert event_type_name(0x80000003) == "EV_EFI_BOOT_SERVICES_APPLICATION"
    assert event_type_name(0x80001234) == "0x80001234"


events = st.builds(
    event,
    st.integers(0, 23),
    st.sampled_from([1, 3, 4, 6, 13, 0x80000002, 0xFFFFFFFF]),
    st.binary(max_size=40),
    st.binary(max_size=8),
)


@settings(max_examples=60)
@given(st.lists(events, max_size=6), st.integers(0, 30), st.booleans())
def test_what_is_written_is_read_again(found: list[Event], padding: int, ones: bool) -> None:
    log = made(*found)
    raw = log.to_bytes() + (b"\xff" if ones else b"\0") * padding
    assert parse_event_log(raw) == log


@settings(max_examples=150)
@given(st.binary(max_size=200), st.data())
def test_hostile_bytes_raise_evidence_errors_only(noise: bytes, data: st.DataObject) -> None:
    raw = bytearray(made(LOCALITY, SEPARATOR, ACTION).to_bytes())
    place = data.draw(st.integers(0, len(raw)))
    raw[place : place + len(noise)] = noise
    for candidate in (noise, bytes(raw), header() + noise):
        try:
            log = parse_event_log(candidate)
            log.check_data()
            for bank in log.algorithms:
                log.replay(bank)
        except EvidenceError:
            pass
