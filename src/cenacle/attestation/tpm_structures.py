"""The TPM 2.0 structures that evidence is made of, read and written without a TPM.

Parsers take bytes from anywhere: every length is checked, nothing may follow the structure, and
whatever is wrong raises :class:`EvidenceError`. ``pack`` gives back exactly what was parsed.
Keys and signatures are in :mod:`cenacle.attestation.tpm_keys`.

Names and numbers are those of the TCG's "Trusted Platform Module Library, Part 2: Structures"
(revision 1.59), whose section is given at each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from cryptography.hazmat.primitives import hashes

from cenacle.errors import EvidenceError

__all__ = [
    "HASHES",
    "Attest",
    "CertifyInfo",
    "ClockInfo",
    "PcrSelection",
    "QuoteInfo",
    "Reader",
    "digest_of",
    "hash_name",
    "hasher",
    "pack_selections",
    "parse_selections",
    "pcr_composite",
    "tpm2b",
    "unpack_tpm2b",
]

_SHA1: Final = 0x0004  # TPM_ALG_ID (Part 2, 6.3)
_GENERATED: Final = 0xFF544347  # TPM_GENERATED_VALUE (6.2)
_ST_CERTIFY, _ST_QUOTE = 0x8017, 0x8018  # TPM_ST (6.9)
_MAX_BANKS: Final = 16
_PCR_BYTES: Final = frozenset({3, 4})  # PCR_SELECT_MIN to PCR_SELECT_MAX: 24 or 32 registers

HASHES: Final[Mapping[int, type[hashes.HashAlgorithm]]] = {
    0x000B: hashes.SHA256,
    0x000C: hashes.SHA384,
    0x000D: hashes.SHA512,
}
"""The hashes that evidence may rest on, by TPM_ALG_ID. SHA-1 is not among them."""


def hasher(algorithm: int) -> hashes.HashAlgorithm:
    """The hash with this TPM_ALG_ID, or :class:`EvidenceError` for SHA-1 and unknown ones."""
    if algorithm == _SHA1:
        raise EvidenceError(
            "a TPM structure rests on SHA-1, for which collisions are made at will",
            found="TPM_ALG_SHA1",
            expected="SHA-256, SHA-384 or SHA-512",
            remedy="use the TPM's SHA-256 bank and keys that sign with SHA-256",
        )
    kind = HASHES.get(algorithm)
    if kind is None:
        raise EvidenceError(
            "a TPM structure names an unknown hash",
            found=f"TPM_ALG_ID {algorithm:#06x}",
            expected="SHA-256, SHA-384 or SHA-512",
        )
    return kind()


def hash_name(algorithm: int) -> str:
    """``sha256``, ``sha384`` or ``sha512``."""
    return hasher(algorithm).name


def digest_of(algorithm: int, *parts: bytes) -> bytes:
    """The hash of all parts, one after another."""
    context = hashes.Hash(hasher(algorithm))
    for part in parts:
        context.update(part)
    return context.finalize()


class Reader:
    """Big-endian fields one after another; ``what`` names the structure in errors."""

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = bytes(data)
        self._what = what
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise EvidenceError(
                f"{self._what} is cut off",
                found=f"{len(self._data)} bytes",
                expected=f"at least {end}",
            )
        part = self._data[self._at : end]
        self._at = end
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def u16(self) -> int:
        return self.number(2)

    def u32(self) -> int:
        return self.number(4)

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then as many bytes."""
        return self.take(self.u16())

    def end(self) -> None:
        """Raises unless everything was read."""
        left = len(self._data) - self._at
        if left:
            raise EvidenceError(
                f"{self._what} is followed by other bytes", found=left, expected="none"
            )

    def refuse(self, problem: str, found: object, expected: object) -> EvidenceError:
        return EvidenceError(f"{self._what} {problem}", found=found, expected=expected)


def tpm2b(data: bytes) -> bytes:
    """A TPM2B: ``data`` behind its length."""
    if len(data) > 0xFFFF:
        raise EvidenceError("a TPM2B is too large", found=len(data), expected="<= 65535 bytes")
    return len(data).to_bytes(2, "big") + data


def unpack_tpm2b(data: bytes, what: str = "a TPM2B") -> bytes:
    """What one TPM2B holds; nothing may follow it."""
    reader = Reader(data, what)
    held = reader.sized()
    reader.end()
    return held


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """TPMS_PCR_SELECTION (10.6.2): registers of one bank, ascending."""

    algorithm: int
    registers: tuple[int, ...]
    octets: int = 3

    def pack(self) -> bytes:
        bits = sum(1 << register for register in self.registers)
        return _u16(self.algorithm) + bytes([self.octets]) + bits.to_bytes(self.octets, "little")


def _read_selections(reader: Reader) -> tuple[PcrSelection, ...]:
    count = reader.u32()
    if count > _MAX_BANKS:
        raise reader.refuse("selects too many banks", count, f"at most {_MAX_BANKS}")
    found = []
    for _ in range(count):
        algorithm, octets = reader.u16(), reader.number(1)
        if octets not in _PCR_BYTES:
            raise reader.refuse("selects registers in a wrong form", f"{octets} bytes", "3 or 4")
        bits = int.from_bytes(reader.take(octets), "little")
        registers = tuple(n for n in range(octets * 8) if bits >> n & 1)
        found.append(PcrSelection(algorithm, registers, octets))
    return tuple(found)


def parse_selections(data: bytes) -> tuple[PcrSelection, ...]:
    """TPML_PCR_SELECTION (10.9.7)."""
    reader = Reader(data, "a PCR selection")
    selections = _read_selections(reader)
    reader.end()
    return selections


def pack_selections(selections: tuple[PcrSelection, ...]) -> bytes:
    """The inverse of :func:`parse_selections`."""
    return len(selections).to_bytes(4, "big") + b"".join(s.pack() for s in selections)


def pcr_composite(algorithm: int, values: Mapping[int, bytes]) -> bytes:
    """The digest that a quote signs for one bank (Part 1, 17.5; Part 3, 18.4).

    Args:
        algorithm: the TPM_ALG_ID of the signing scheme's hash, which is not the bank's.
        values: the quoted registers by number.
    """
    return digest_of(algorithm, *(values[register] for register in sorted(values)))


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """TPMS_CLOCK_INFO (10.11.1): milliseconds of powered time, resets, and resumes."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool

    @classmethod
    def read(cls, reader: Reader) -> Self:
        clock, resets, restarts, safe = reader.number(8), reader.u32(), reader.u32(), reader.take(1)
        if safe not in {b"\x00", b"\x01"}:
            raise reader.refuse("has a flag that is neither yes nor no", safe.hex(), "00 or 01")
        return cls(clock, resets, restarts, safe == b"\x01")

    def pack(self) -> bytes:
        counts = self.reset_count.to_bytes(4, "big") + self.restart_count.to_bytes(4, "big")
        return self.clock.to_bytes(8, "big") + counts + bytes([self.safe])


@dataclass(frozen=True, slots=True)
class QuoteInfo:
    """TPMS_QUOTE_INFO (10.12.1)."""

    selections: tuple[PcrSelection, ...]
    digest: bytes

    def pack(self) -> bytes:
        return pack_selections(self.selections) + tpm2b(self.digest)


@dataclass(frozen=True, slots=True)
class CertifyInfo:
    """TPMS_CERTIFY_INFO (10.12.3): the Name and qualified Name of the certified object."""

    name: bytes
    qualified_name: bytes

    def pack(self) -> bytes:
        return tpm2b(self.name) + tpm2b(self.qualified_name)


@dataclass(frozen=True, slots=True)
class Attest:
    """TPMS_ATTEST (10.12.12) of a quote or of a certified object.

    Only the TPM itself makes a structure that begins with TPM_GENERATED and is signed by a
    restricted key: such a key refuses to sign anything else that begins so (Part 1, 31.4).
    """

    qualified_signer: bytes
    extra_data: bytes
    clock_info: ClockInfo
    firmware_version: int
    attested: QuoteInfo | CertifyInfo

    @classmethod
    def parse(cls, data: bytes) -> Self:
        reader = Reader(data, "a TPM attestation")
        magic, kind = reader.u32(), reader.u16()
        if magic != _GENERATED:
            raise reader.refuse("was not made by a TPM", f"{magic:08x}", f"{_GENERATED:08x}")
        signer, extra, clock = reader.sized(), reader.sized(), ClockInfo.read(reader)
        firmware = reader.number(8)
        attested: QuoteInfo | CertifyInfo
        if kind == _ST_QUOTE:
            attested = QuoteInfo(_read_selections(reader), reader.sized())
        elif kind == _ST_CERTIFY:
            attested = CertifyInfo(reader.sized(), reader.sized())
        else:
            raise reader.refuse("is of another type", f"{kind:#06x}", "a quote or a certification")
        reader.end()
        return cls(signer, extra, clock, firmware, attested)

    def pack(self) -> bytes:
        kind = _ST_QUOTE if isinstance(self.attested, QuoteInfo) else _ST_CERTIFY
        head = _GENERATED.to_bytes(4, "big") + _u16(kind)
        named = tpm2b(self.qualified_signer) + tpm2b(self.extra_data)
        firmware = self.firmware_version.to_bytes(8, "big")
        return head + named + self.clock_info.pack() + firmware + self.attested.pack()
