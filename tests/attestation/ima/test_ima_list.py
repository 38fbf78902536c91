from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.ima_list import (
    MAX_LIST_BYTES,
    ImaEntry,
    boot_aggregates,
    match_prefix,
    pack_entry,
    parse_ascii_list,
    parse_ima_list,
    replay,
    show_name,
)
from cenacle.documents.base import unb64
from cenacle.errors import EvidenceError

# Lines that kernels wrote, as others published them: the IMA wiki (the oldest template), Keylime's
# tests, a replay tool's tests (with the SHA-256 template hash), and the kernel's mailing lists.
_WIKI = b"10 2c7020ad8cab6b7419e4973171cb704bdbf52f77 ima e09e048c48301268ff38645f4c006137e42951d0"
PUBLISHED = [
    (_WIKI + b" /init", "/init", None),
    (
        b"10 0c8a706a75a5689c1e168f0a573a3cbec33061b5 ima-sig sha256:"
        b"e4cb9f5709c88376b5fc3743cd88e76b9aae8f3d992d845678de5215edb31216 boot_aggregate ",
        "boot_aggregate",
        None,
    ),
    (
        b"10 5426cf3031a43f5bfca183d79950698a95a728f6 ima-sig sha256:"
        b"f1125b940480d20ad841d26d5ea253edc0704b5ec1548c891edf212cb1a9365e "
        b"/lib/modules/5.4.48-openpower1/kernel/drivers/usb/common/usb-common.ko ",
        "/lib/modules/5.4.48-openpower1/kernel/drivers/usb/common/usb-common.ko",
        None,
    ),
    (
        b"10 8aa71d146be2b1a0a53cb603be22928f1b74ae17 ima-sig sha256:"
        b"94326940137a8f59b369d1aa058bccce58cbda37e68be0f138ea45c2cb743a46 boot_aggregate ",
        "boot_aggregate",
        "cc1078d3b981e8ef52b3d4d9cffc2f27648d05947d4caa829e47f83fb8f8ed00",
    ),
    (
        b"10 49ab61dd97ea2f759edcb6c6a3387ac67f0aa576 ima-buf sha256:"
        b"0c907aab3261194f16b0c2a422a82f145bc9b9ecb8fdb633fa43e3e5379f0af2 "
        b"kernel_version 372e312e302d7263312b",
        "kernel_version",
        None,
    ),
    (
        b"10 4e5d73ebadfd8f850cb93ce4de755ba148a9a7d5 ima-ng sha256:"
        + b"0" * 64
        + b" boot_aggregate_late",
        "boot_aggregate_late",
        None,
    ),
]


def registers(boot: dict[str, Any], bank: str = "sha256") -> dict[int, bytes]:
    return {int(n): bytes.fromhex(value) for n, value in boot["pcrs"][bank].items()}


def test_a_real_list_replays_to_both_banks(real_boot: dict[str, Any]) -> None:
    entries = parse_ima_list(unb64(real_boot["list"]))
    assert [entry.name.decode() for entry in entries] == [
        "boot_aggregate",
        "kernel_version",
        "/sbin/init",
        "/bin/busybox",
        "/usr/bin/hello",
        "/etc/data_file",
        "/var/log",
        "/var/log",
    ]
    for bank in ("sha1", "sha256"):
        quoted = registers(real_boot, bank)[10]
        assert replay(entries, bank) == quoted
        assert match_prefix(entries, quoted, bank) == 8
    assert entries[0].digest in boot_aggregates(registers(real_boot), "sha256")
    assert [entry.violation for entry in entries] == [False] * 6 + [True, False]
    assert entries[1].extra == (b"6.1.0-56-cloud-amd64",)
    for name, digest in real_boot["files"].items():
        measured = [e.digest.hex() for e in entries if e.name.decode() == name.replace(" ", "_")]
        assert digest in measured
    assert b"".join(map(pack_entry, entries)) == unb64(real_boot["list"])


def test_the_ascii_list_says_the_same(real_boot: dict[str, Any]) -> None:
    text = real_boot["ascii"].encode()
    assert parse_ascii_list(text) == parse_ima_list(unb64(real_boot["list"]))


def same_but_violations(found: list[ImaEntry], whole: list[ImaEntry]) -> bool:
    """A violation extends ones, so nothing but that there was one is proven."""
    return [None if e.violation else e for e in found] == [
        None if e.violation else e for e in whole
    ]


def test_every_byte_of_a_real_list_counts(real_boot: dict[str, Any]) -> None:
    raw = unb64(real_boot["list"])
    quoted = registers(real_boot)[10]
    whole = parse_ima_list(raw)
    for place in range(len(raw)):
        for bits in (0x01, 0xFF):
            altered = bytearray(raw)
            altered[place] ^= bits
            try:
                entries = parse_ima_list(bytes(altered))
                match_prefix(entries, quoted, "sha256")
            except EvidenceError:
                continue
            assert same_but_violations(entries, whole)


def test_every_byte_of_a_real_ascii_list_counts(real_boot: dict[str, Any]) -> None:
    text = real_boot["ascii"].encode()
    quoted = registers(real_boot)[10]
    whole = parse_ascii_list(text)
    for place in range(len(text)):
        altered = bytearray(text)
        altered[place] ^= 0x01
        try:
            entries = parse_ascii_list(bytes(altered))
            match_prefix(entries, quoted, "sha256")
        except EvidenceError:
            continue
        assert same_but_violations(entries, whole)


def test_every_truncation_is_refused(real_boot: dict[str, Any]) -> None:
    raw = unb64(real_boot["list"])
    quoted = registers(real_boot)[10]
    for size in range(len(raw)):
        with pytest.raises(EvidenceError):
            match_prefix(parse_ima_list(raw[:size]), quoted, "sha256")


def test_a_list_read_after_the_quote_is_longer(
    real_boot: dict[str, Any], make_entry: Callable[..., ImaEntry]
) -> None:
    entries = parse_ima_list(unb64(real_boot["list"]))
    quoted = registers(real_boot)[10]
    assert match_prefix([*entries, make_entry("/tmp/later", b"x")], quoted, "sha256") == 8
    assert match_prefix(entries, bytes(32), "sha256") == 0
    half = replay(entries[:4])
    assert match_prefix(entries, half, "sha256") == 4
    assert match_prefix(entries[4:], quoted, "sha256", half) == 4
    for fewer in (entries[1:], entries[:-1], entries[::-1], []):
        with pytest.raises(EvidenceError, match="does not replay"):
            match_prefix(fewer, quoted, "sha256")


def test_padded_hashes_of_old_kernels_are_refused(make_entry: Callable[..., ImaEntry]) -> None:
    entries = [make_entry("boot_aggregate", b"a"), make_entry("/x", violation=True)]
    value = bytes(32)
    for entry in entries:
        sha1 = hashlib.sha1(entry.data).digest() + bytes(12)
        value = hashlib.sha256(value + (b"\xff" * 32 if entry.violation else sha1)).digest()
    with pytest.raises(EvidenceError, match="extends SHA-1 template hashes"):
        match_prefix(entries, value, "sha256")


def test_entries_of_other_registers_are_refused(make_entry: Callable[..., ImaEntry]) -> None:
    entries = [make_entry("boot_aggregate"), make_entry("/x", register=11)]
    with pytest.raises(EvidenceError, match="other registers"):
        match_prefix(entries, replay(entries), "sha256")


def test_violations_extend_ones(make_entry: Callable[..., ImaEntry]) -> None:
    violated = make_entry("/var/log/syslog", violation=True)
    expected = hashlib.sha256(bytes(32) + b"\xff" * 32).digest()
    assert replay([violated]) == expected
    (read,) = parse_ima_list(pack_entry(violated))
    assert read == violated
    assert read.violation


def big_endian(entry: ImaEntry) -> bytes:
    """As a kernel of such a machine writes it without ``ima_canonical_fmt``."""
    fields = (entry.algorithm.encode() + b":\0" + entry.digest, entry.name + b"\0", *entry.extra)
    data = b"".join(len(part).to_bytes(4, "big") + part for part in fields)
    shown = hashlib.sha1(data).digest()
    head = struct.pack(">I20sI", entry.register, shown, len(entry.template)) + entry.template
    return head + len(data).to_bytes(4, "big") + data


def test_both_byte_orders(make_entry: Callable[..., ImaEntry]) -> None:
    entries = [make_entry("boot_aggregate", b"1"), make_entry("/bin/sh", b"2", b"ima-ng")]
    big = parse_ima_list(b"".join(map(big_endian, entries)))
    assert [(e.name, e.digest) for e in big] == [(e.name, e.digest) for e in entries]
    assert replay(big) != replay(entries)  # lengths are hashed in the machine's order
    mixed = big_endian(entries[0]) + pack_entry(entries[1])
    with pytest.raises(EvidenceError):
        parse_ima_list(mixed)


def legacy(name: bytes, content: bytes) -> bytes:
    digest = hashlib.sha1(content).digest()
    shown = hashlib.sha1(digest + name.ljust(256, b"\0")).digest()
    return (
        struct.pack("<I20sI3s", 10, shown, 3, b"ima") + digest + struct.pack("<I", len(name)) + name
    )


def test_the_oldest_template() -> None:
    raw = legacy(b"boot_aggregate", b"x") + legacy(b"/init", b"y")
    entries = parse_ima_list(raw)
    assert [(e.name, e.algorithm) for e in entries] == [
        (b"boot_aggregate", "sha1"),
        (b"/init", "sha1"),
    ]
    assert b"".join(map(pack_entry, entries)) == raw
    lines = b"".join(
        b"10 %s ima %s %s\n"
        % (hashlib.sha1(e.data).hexdigest().encode(), e.digest.hex().encode(), e.name)
        for e in entries
    )
    assert parse_ascii_list(lines) == entries
    with pytest.raises(EvidenceError, match="impossible name"):
        parse_ima_list(legacy(b"n" * 256, b"x"))


@pytest.mark.parametrize(
    ("line", "name", "template_hash"), PUBLISHED, ids=[name for _, name, _ in PUBLISHED]
)
def test_published_lines(line: bytes, name: str, template_hash: str | None) -> None:
    """Parsing checks the SHA-1 template hash that the line gives."""
    (entry,) = parse_ascii_list(line + b"\n")
    assert entry.name.decode() == name
    if template_hash is not None:
        assert hashlib.sha256(entry.data).hexdigest() == template_hash


@pytest.mark.parametrize(
    ("template", "fields", "algorithm"),
    [
        (b"ima-ngv2", (b"ima:sha256:\0" + bytes(32), b"/x\0"), "sha256"),
        (b"ima-sigv2", (b"verity:sha256:\0" + bytes(32), b"/x\0", b"sig"), "verity:sha256"),
        (b"ima-modsig", (b"sha256:\0" + bytes(32), b"/x\0", b"", b"", b"pkcs7"), "sha256"),
        (b"evm-sig", (b"sha512:\0" + bytes(64), b"/x\0", *[b""] * 7), "sha512"),
        (b"d-ng|n-ng|iuid", (b"sha256:\0" + bytes(32), b"/x\0", b"\0\0\0\0"), "sha256"),
    ],
)
def test_other_templates(template: bytes, fields: tuple[bytes, ...], algorithm: str) -> None:
    data = b"".join(struct.pack("<I", len(part)) + part for part in fields)
    head = struct.pack("<I20sI", 10, hashlib.sha1(data).digest(), len(template)) + template
    (entry,) = parse_ima_list(head + struct.pack("<I", len(data)) + data)
    assert (entry.algorithm, entry.name, entry.extra) == (algorithm, b"/x", fields[2:])


def raw_entry(template: bytes, *fields: bytes, tail: bytes = b"") -> bytes:
    data = b"".join(struct.pack("<I", len(part)) + part for part in fields) + tail
    head = struct.pack("<I20sI", 10, hashlib.sha1(data).digest(), len(template)) + template
    return head + struct.pack("<I", len(data)) + data


DIGEST = b"sha256:\0" + bytes(31) + b"\x01"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff" * 64, "does not begin with a register"),
        (bytes(27), "ends inside"),
        (raw_entry(b"ima-ng", DIGEST), "does not fit its template"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0", b""), "does not fit its template"),
        (raw_entry(b"ima-ng", DIGEST, b"/x"), "does not fit its template"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0y\0"), "does not fit its template"),
        (raw_entry(b"ima-ng", DIGEST[:-1], b"/x\0"), "digest is malformed"),
        (raw_entry(b"ima-ng", b"sha256" + bytes(33), b"/x\0"), "digest is malformed"),
        (raw_entry(b"ima-ng", b"rot13:\0" + bytes(32), b"/x\0"), "digest is malformed"),
        (raw_entry(b"ima-ng", b"ima:" + DIGEST, b"/x\0"), "digest is malformed"),
        (raw_entry(b"ima-ngv2", b"evm:" + DIGEST, b"/x\0"), "unknown type"),
        (raw_entry(b"ima-nope", DIGEST, b"/x\0"), "unknown template"),
        (raw_entry(b"n-ng|d-ng", b"/x\0", DIGEST), "unknown template"),
        (raw_entry(b"ima-buf", DIGEST, b"/x\0", b"buffer"), "shows another buffer"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0", tail=b"\xff\0\0\0"), "field is cut off"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0", tail=b"\xff"), "ends inside"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0")[:-1], "field is cut off"),
        (raw_entry(b"ima-ng", DIGEST, b"/x\0")[:30], "ends inside"),
    ],
)
def test_entries_that_are_none(raw: bytes, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        parse_ima_list(raw)


def test_a_template_hash_of_other_data(make_entry: Callable[..., ImaEntry]) -> None:
    raw = bytearray(pack_entry(make_entry("/bin/sh", b"shell")))
    raw[4] ^= 1
    with pytest.raises(EvidenceError, match="not what its template hash covers"):
        parse_ima_list(bytes(raw))


@pytest.mark.parametrize(
    "line",
    [
        b"ten " + b"0" * 40 + b" ima-ng sha256:00 /x",
        b"10 00 ima-ng sha256:00 /x",
        b"10 " + b"0" * 40 + b" ima-ng sha256:" + b"0" * 64,
        b"10 " + b"0" * 40 + b" evm-sig sha256:" + b"0" * 64 + b" /x",
        b"10 " + b"0" * 40 + b" ima 00 /x",
        b"10 " + b"A" * 40 + b" ima-ng sha256:" + b"0" * 64 + b" /x",
        b"",
    ],
    ids=["register", "short hash", "no name", "template", "digest", "upper case", "empty"],
)
def test_lines_that_are_none(line: bytes) -> None:
    with pytest.raises(EvidenceError, match="line 1"):
        parse_ascii_list(line + b"\n")


def test_a_name_with_a_line_break_cannot_forge_a_line(make_entry: Callable[..., ImaEntry]) -> None:
    """The kernel writes names as they are: the ascii list is refused, the binary list is read."""
    innocent = make_entry("/usr/bin/true", b"true", b"ima-ng")
    shown = hashlib.sha1(innocent.data).hexdigest()
    forged = f"10 {shown} ima-ng sha256:{innocent.digest.hex()} /usr/bin/true"
    evil = make_entry(b"/tmp/a\n" + forged.encode(), b"evil", b"ima-ng")
    line = b"10 %s ima-ng sha256:%s %s\n" % (
        hashlib.sha1(evil.data).hexdigest().encode(),
        evil.digest.hex().encode(),
        evil.name,
    )
    with pytest.raises(EvidenceError, match="not what its template hash covers"):
        parse_ascii_list(line)
    (read,) = parse_ima_list(pack_entry(evil))
    assert read.name == evil.name
    assert "\n" not in show_name(read.name)


def test_limits() -> None:
    for read in (parse_ima_list, parse_ascii_list):
        with pytest.raises(EvidenceError, match="too large"):
            read(bytes(MAX_LIST_BYTES + 1))
    assert parse_ima_list(b"") == []
    assert parse_ascii_list(b"") == []


def test_the_boot_aggregate_needs_ten_registers() -> None:
    values = {n: bytes([n]) * 32 for n in range(10)}
    joined = b"".join(values[n] for n in range(10))
    assert boot_aggregates(values, "sha256") == {
        hashlib.sha256(joined).digest(),
        hashlib.sha256(joined[: 8 * 32]).digest(),
    }
    assert boot_aggregates({n: values[n] for n in range(9)}, "sha256") == frozenset()


names = st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name)


@settings(max_examples=60)
@given(st.lists(st.tuples(names, st.binary(max_size=8), st.booleans()), max_size=5))
def test_what_is_written_is_read_again(found: list[tuple[bytes, bytes, bool]]) -> None:
    raw, entries = b"", []
    for name, content, violation in found:
        digest = bytes(32) if violation else hashlib.sha256(content).digest()
        fields = (b"sha256:\0" + digest, name + b"\0")
        data = b"".join(struct.pack("<I", len(part)) + part for part in fields)
        entry = ImaEntry(10, b"ima-ng", "sha256", digest, name, data, (), violation)
        entries.append(entry)
        raw += pack_entry(entry)
    assert parse_ima_list(raw) == entries


@settings(max_examples=150)
@given(st.binary(max_size=120), st.data())
def test_hostile_bytes_raise_evidence_errors_only(noise: bytes, data: st.DataObject) -> None:
    raw = bytearray(raw_entry(b"ima-sig", DIGEST, b"/usr/bin/x\0", b"") + legacy(b"/y", b"y"))
    place = data.draw(st.integers(0, len(raw)))
    raw[place : place + len(noise)] = noise
    for candidate in (bytes(raw), noise, b"\x0a\0\0\0" + noise):
        for read in (parse_ima_list, parse_ascii_list):
            try:
                replay(read(candidate))
            except EvidenceError:
                continue
