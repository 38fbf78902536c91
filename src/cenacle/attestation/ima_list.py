"""The kernel's list of files that it measured (IMA), parsed and replayed.

Sources: Linux ``Documentation/security/IMA-templates.rst``, and ``ima_fs.c``, ``ima_queue.c``,
``ima_crypto.c``, ``ima_template_lib.c`` of ``security/integrity/ima``. The list is hostile input
until its replay equals a register that the TPM signed. It is read from
``/sys/kernel/security/ima/binary_runtime_measurements`` (preferred: any file name is unambiguous
there) or from ``ascii_runtime_measurements``.

What the TPM's SHA-256 bank is extended with is the SHA-256 of an entry's template data, by
kernels since 5.8. Older ones extend the SHA-1 template hash, padded with zeros: refused, since
collisions of SHA-1 are made at will.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from cenacle.errors import EvidenceError

__all__ = [
    "BOOT_AGGREGATE",
    "IMA_REGISTER",
    "MAX_ENTRIES",
    "MAX_LIST_BYTES",
    "ImaEntry",
    "boot_aggregates",
    "match_prefix",
    "pack_entry",
    "parse_ascii_list",
    "parse_ima_list",
    "replay",
    "show_name",
]

IMA_REGISTER: Final = 10
BOOT_AGGREGATE: Final = b"boot_aggregate"
MAX_LIST_BYTES: Final = 32 * 1024 * 1024
MAX_ENTRIES: Final = 200_000

_NO_HASH: Final = bytes(20)
_NAME_BYTES: Final = 256  # IMA_EVENT_NAME_LEN_MAX + 1, what the oldest template pads names to
_TEMPLATES: Final[Mapping[bytes, tuple[str, ...]]] = {
    b"ima-ng": ("d-ng", "n-ng"),
    b"ima-sig": ("d-ng", "n-ng", "sig"),
    b"ima-ngv2": ("d-ngv2", "n-ng"),
    b"ima-sigv2": ("d-ngv2", "n-ng", "sig"),
    b"ima-buf": ("d-ng", "n-ng", "buf"),
    b"ima-modsig": ("d-ng", "n-ng", "sig", "d-modsig", "modsig"),
    b"evm-sig": (
        "d-ng",
        "n-ng",
        "evmsig",
        "xattrnames",
        "xattrlengths",
        "xattrvalues",
        "iuid",
        "igid",
        "imode",
    ),
}
_LEGACY: Final = b"ima"
_DIGEST_BYTES: Final = {
    b"md5": 16,
    b"sha1": 20,
    b"sha224": 28,
    b"sha256": 32,
    b"sha384": 48,
    b"sha512": 64,
    b"sm3": 32,
    b"sm3-256": 32,
    b"rmd160": 20,
    b"wp256": 32,
    b"wp384": 48,
    b"wp512": 64,
    b"streebog256": 32,
    b"streebog512": 64,
    b"sha3-256": 32,
    b"sha3-384": 48,
    b"sha3-512": 64,
}


class ImaEntry(NamedTuple):
    """One measured file or buffer.

    Attributes:
        register: the PCR that it was extended into; 10 unless the policy says else.
        template: the template's name.
        algorithm: of ``digest``: ``sha256``; fs-verity digests read ``verity:sha256``.
        digest: of the file's content; zeros for a violation.
        name: absolute path, or a buffer's label. Any bytes but NUL.
        data: what the template hash is taken over.
        extra: the fields after the name: signature, buffer.
        violation: a file was written while it was open for measured reading, so the list does
            not say what was read. The registers were extended with ones, so nothing else in
            such an entry is proven, not even the name.
    """

    register: int
    template: bytes
    algorithm: str
    digest: bytes
    name: bytes
    data: bytes
    extra: tuple[bytes, ...]
    violation: bool


def parse_ima_list(raw: bytes) -> list[ImaEntry]:
    """Read a binary list, in the byte order that its first entry shows.

    Kernels write their own byte order, or little endian with ``ima_canonical_fmt``.

    Raises:
        EvidenceError: the list is not exactly understood, or an entry's template hash is not
            that of its data.
    """
    if len(raw) > MAX_LIST_BYTES:
        raise _error("the IMA list is too large", f"{len(raw)} bytes", f"<= {MAX_LIST_BYTES} bytes")
    raw = bytes(raw)
    if not raw:
        return []
    order = _byte_order(raw)
    head, number = struct.Struct(order + "I20sI"), struct.Struct(order + "I")
    entries: list[ImaEntry] = []
    offset, end = 0, len(raw)
    while offset < end:
        if len(entries) == MAX_ENTRIES:
            raise _error(
                "the IMA list has too many entries", f"> {MAX_ENTRIES}", f"<= {MAX_ENTRIES}"
            )
        try:
            register, shown, size = head.unpack_from(raw, offset)
            offset += 28 + size
            template = raw[offset - size : offset]
            if template == _LEGACY:
                (size,) = number.unpack_from(raw, offset + 20)
                start, offset = offset, offset + 24 + size
                entry = _legacy(register, shown, raw[start : start + 20], raw[start + 24 : offset])
            else:
                (size,) = number.unpack_from(raw, offset)
                start, offset = offset + 4, offset + 4 + size
                entry = _entry(register, shown, template, raw[start:offset], number)
        except struct.error:
            raise _cut(len(entries), end) from None
        if offset > end:
            raise _cut(len(entries), end)
        entries.append(entry)
    return entries


def parse_ascii_list(text: bytes) -> list[ImaEntry]:
    """Read an ascii list. Each line's template hash must be that of what the line says.

    The kernel escapes nothing, so a file name with a line break makes a list that cannot be
    read; the binary list can.

    Raises:
        EvidenceError: naming the line that is not understood.
    """
    if len(text) > MAX_LIST_BYTES:
        raise _error(
            "the IMA list is too large", f"{len(text)} bytes", f"<= {MAX_LIST_BYTES} bytes"
        )
    lines = text.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) > MAX_ENTRIES:
        raise _error("the IMA list has too many entries", len(lines), f"<= {MAX_ENTRIES}")
    number = struct.Struct("<I")
    entries = []
    for place, line in enumerate(lines):
        try:
            register, shown, template, rest = line.lstrip(b" ").split(b" ", 3)
            entries.append(_line(int(register), _unhex(shown), template, rest, number))
        except ValueError:
            raise _error(
                f"line {place + 1} of the IMA list is not understood",
                _clip(line),
                "register, template hash, template, digest, name",
                "send the binary list: the ascii one cannot hold every file name",
            ) from None
    return entries


def replay(entries: Iterable[ImaEntry], algorithm: str = "sha256") -> bytes:
    """The register after all entries, from zeros; every entry counts, whatever its register."""
    value = bytes(_hasher(algorithm)(b"").digest_size)
    for extended in _extend(entries, algorithm, value):
        value = extended
    return value


def match_prefix(
    entries: Sequence[ImaEntry], register: bytes, algorithm: str, start: bytes | None = None
) -> int:
    """How many entries, from the first, give the quoted register.

    A file may be measured between the quote and the reading of the list, so the list may be
    longer. What follows is not vouched for by anybody.

    Args:
        register: the quoted value of PCR 10.
        start: the register's value before the first entry; zeros unless given.

    Raises:
        EvidenceError: no prefix does, or an entry belongs to another register.
    """
    others = sorted({entry.register for entry in entries if entry.register != IMA_REGISTER})
    if others:
        raise _error(
            "the IMA list has entries of other registers",
            ", ".join(map(str, others[:8])),
            IMA_REGISTER,
            "measure into one register: remove pcr= from the IMA policy",
        )
    value = bytes(len(register)) if start is None else start
    if value == register:
        return 0
    for count, extended in enumerate(_extend(entries, algorithm, value), 1):
        if extended == register:
            return count
    if start is None and _is_padded(entries, register, algorithm):
        raise _error(
            "the kernel extends SHA-1 template hashes",
            f"padded hashes in the {algorithm} bank",
            f"{algorithm} template hashes",
            "boot Linux 5.8 or later",
        )
    raise _error(
        "the IMA list does not replay to the quoted register",
        f"no match in {len(entries)} entries",
        register.hex()[:16],
        "send the whole list of this boot, read after the quote",
    )


def boot_aggregates(registers: Mapping[int, bytes], algorithm: str) -> frozenset[bytes]:
    """What the first entry's digest must be: the hash of PCRs 0 to 9.

    Kernels before 5.8 leave out 8 and 9. Empty if the quote lacks a register.
    """
    if not all(number in registers for number in range(10)):
        return frozenset()
    joined = [b"".join(registers[n] for n in range(count)) for count in (8, 10)]
    return frozenset(_hasher(algorithm)(part).digest() for part in joined)


def pack_entry(entry: ImaEntry) -> bytes:
    """One entry in the (little-endian) binary form that :func:`parse_ima_list` reads."""
    shown = _NO_HASH if entry.violation else _sha1(entry.data)
    head = struct.pack("<I20sI", entry.register, shown, len(entry.template)) + entry.template
    if entry.template == _LEGACY:
        return head + entry.digest + struct.pack("<I", len(entry.name)) + entry.name
    return head + struct.pack("<I", len(entry.data)) + entry.data


def show_name(name: bytes) -> str:
    """A file name for messages: unprintable characters escaped, at most 200 characters."""
    text = name.decode("utf-8", "backslashreplace")
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 200 else shown[:197] + "..."


def _hasher(algorithm: str) -> Callable[[bytes], hashlib._Hash]:
    found = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "sha384": hashlib.sha384}
    return found.get(algorithm) or hashlib.sha512


def _extend(entries: Iterable[ImaEntry], algorithm: str, value: bytes) -> Iterator[bytes]:
    digest = _hasher(algorithm)
    violated = b"\xff" * len(value)
    for entry in entries:
        added = violated if entry.violation else digest(entry.data).digest()
        value = digest(value + added).digest()
        yield value


def _is_padded(entries: Sequence[ImaEntry], register: bytes, algorithm: str) -> bool:
    digest, value, pad = _hasher(algorithm), bytes(len(register)), bytes(len(register) - 20)
    for entry in entries:
        added = b"\xff" * len(register) if entry.violation else _sha1(entry.data) + pad
        value = digest(value + added).digest()
        if value == register:
            return True
    return False


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _byte_order(raw: bytes) -> str:
    if int.from_bytes(raw[:4], "little") < 24:
        return "<"
    if int.from_bytes(raw[:4], "big") < 24:
        return ">"
    raise _error("the IMA list does not begin with a register's number", raw[:4].hex(), "0a000000")


def _legacy(register: int, shown: bytes, digest: bytes, name: bytes) -> ImaEntry:
    if len(name) >= _NAME_BYTES or b"\0" in name:
        raise _error("an IMA entry has an impossible name", f"{len(name)} bytes", "<= 255 bytes")
    data = digest + name.ljust(_NAME_BYTES, b"\0")
    return _checked(ImaEntry(register, _LEGACY, "sha1", digest, name, data, (), False), shown)


def _entry(
    register: int, shown: bytes, template: bytes, data: bytes, number: struct.Struct
) -> ImaEntry:
    fields, offset = [], 0
    while offset < len(data):
        (size,) = number.unpack_from(data, offset)
        offset += 4 + size
        if offset > len(data):
            raise _error(
                "an IMA entry's field is cut off", f"{size} bytes", f"<= {len(data)} bytes"
            )
        fields.append(data[offset - size : offset])
    names = _TEMPLATES.get(template) or _custom(template)
    if len(fields) != len(names) or not fields[1].endswith(b"\0") or b"\0" in fields[1][:-1]:
        raise _error(
            "an IMA entry does not fit its template",
            f"{len(fields)} fields in {_clip(template)}",
            " | ".join(names),
        )
    algorithm, digest = _digest(fields[0], versioned=names[0] == "d-ngv2")
    entry = ImaEntry(
        register, template, algorithm, digest, fields[1][:-1], data, tuple(fields[2:]), False
    )
    return _checked(entry, shown)


def _custom(template: bytes) -> tuple[str, ...]:
    """A template by its fields, as ``ima_template_fmt=`` sets it."""
    names = tuple(template.decode("ascii", "replace").split("|"))
    if len(names) < 2 or names[0] not in ("d-ng", "d-ngv2") or names[1] != "n-ng":
        raise _error(
            "an IMA entry has an unknown template",
            _clip(template),
            ", ".join(name.decode() for name in [_LEGACY, *_TEMPLATES]),
        )
    return names


def _digest(field: bytes, *, versioned: bool) -> tuple[str, bytes]:
    """``sha256:`` NUL digest; with a type before it in version 2."""
    name, mark, digest = field.partition(b":\0")
    prefix = ""
    if versioned:
        kind, _, name = name.partition(b":")
        if kind not in (b"ima", b"verity"):
            raise _error("an IMA entry's digest has an unknown type", _clip(kind), "ima or verity")
        prefix = "verity:" if kind == b"verity" else ""
    if not mark or _DIGEST_BYTES.get(name) != len(digest):
        raise _error("an IMA entry's digest is malformed", f"{_clip(name)}, {len(digest)} bytes")
    return prefix + name.decode(), digest


def _checked(entry: ImaEntry, shown: bytes) -> ImaEntry:
    if shown == _NO_HASH:
        return entry._replace(violation=True)
    if _sha1(entry.data) != shown:
        raise _error(
            f"the IMA entry of {show_name(entry.name)} is not what its template hash covers",
            _sha1(entry.data).hex()[:16],
            shown.hex()[:16],
        )
    if entry.template == b"ima-buf" and entry.algorithm in hashlib.algorithms_available:
        found = hashlib.new(entry.algorithm, entry.extra[0], usedforsecurity=False).digest()
        if found != entry.digest:
            raise _error(
                f"the IMA entry of buffer {show_name(entry.name)} shows another buffer",
                found.hex()[:16],
                entry.digest.hex()[:16],
            )
    return entry


def _line(
    register: int, shown: bytes, template: bytes, rest: bytes, number: struct.Struct
) -> ImaEntry:
    if len(shown) != 20:
        raise ValueError("a template hash has 20 bytes")
    if template == _LEGACY:
        digest, name = rest.split(b" ", 1)
        if len(digest) != 40:
            raise ValueError("a digest of this template has 20 bytes")
        return _legacy(register, shown, _unhex(digest), name)
    names = _TEMPLATES.get(template, ())
    if not 2 <= len(names) <= 5:
        raise ValueError("a template that the ascii list does not separate")
    digest, rest = rest.split(b" ", 1)
    name, *extra = rest.rsplit(b" ", len(names) - 2) if len(names) > 2 else [rest]
    fields = [_ascii_digest(digest), name + b"\0"]
    for kind, value in zip(names[2:], extra, strict=True):
        fields.append(_ascii_digest(value) if kind == "d-modsig" and value else _unhex(value))
    data = b"".join(number.pack(len(field)) + field for field in fields)
    return _entry(register, shown, template, data, number)


def _ascii_digest(text: bytes) -> bytes:
    name, _, digest = text.rpartition(b":")
    return name + b":\0" + _unhex(digest)


def _unhex(text: bytes) -> bytes:
    value = bytes.fromhex(text.decode("ascii"))
    if value.hex().encode() != text:
        raise ValueError("not as the kernel writes it")
    return value


def _clip(text: bytes) -> str:
    return show_name(text[:80])


def _cut(entries: int, size: int) -> EvidenceError:
    return _error("the IMA list ends inside an entry", f"{size} bytes, {entries} whole entries")


def _error(
    what: str, found: object, expected: object = None, remedy: str | None = None
) -> EvidenceError:
    return EvidenceError(what, found=found, expected=expected, remedy=remedy)
