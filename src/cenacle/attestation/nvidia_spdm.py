"""NVIDIA GPU attestation reports: an SPDM GET_MEASUREMENTS request and its response.

Source: DMTF DSP0274 1.1, sections 10.11 (GET_MEASUREMENTS, MEASUREMENTS) and 10.11.1 (signature);
the opaque data's fields are NVIDIA's (NVIDIA/nvtrust, local_gpu_verifier, and
NVIDIA/attestation-sdk, gpu_opaque_data_parser). The report is the request that the driver sent
(37 bytes) and the response; the signature is over both but for itself. Hopper and Blackwell.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cenacle.attestation.p384_path import SIGNATURE_BYTES
from cenacle.documents.protection import Measured
from cenacle.errors import EvidenceError

__all__ = ["NONCE_BYTES", "Field", "SpdmReport", "parse_report"]

NONCE_BYTES: Final = 32

_VERSION: Final = 0x11
_GET_MEASUREMENTS: Final = 0xE0
_MEASUREMENTS: Final = 0x60
_WITH_SIGNATURE: Final = 0x01
_ALL: Final = 0xFF
_DMTF: Final = 0x01
_RAW: Final = 0x80
_MAX_BYTES: Final = 0x4000  # twice what the driver library has room for
_REQUEST: Final = struct.Struct("<BBBB32sB")
_HEAD: Final = struct.Struct("<BBBBB")
_BLOCK: Final = struct.Struct("<BBHBH")  # index, specification, size; type and size of the value
_FIELD: Final = struct.Struct("<HH")
_ALGORITHMS: Final = {32: "sha256", 48: "sha384", 64: "sha512"}


class Field:
    """Types of NVIDIA's opaque data that are read here."""

    DRIVER_VERSION: Final = 3
    VBIOS_VERSION: Final = 6
    NVDEC0_STATUS: Final = 11
    CHIP_SKU: Final = 15
    PROJECT: Final = 17
    PROJECT_SKU: Final = 18
    FWID: Final = 20
    PROTECTED_PCIE: Final = 21
    DATA_VERSION: Final = 34
    FEATURE: Final = 36


@dataclass(frozen=True, slots=True)
class SpdmReport:
    """A report whose form is right and whose signature nobody has checked.

    Attributes:
        nonce: the requester's, 32 bytes.
        measurements: SPDM index (1 to 254; the index in NVIDIA's files plus one) to value.
        opaque: type to data.
        signed: all but the signature.
        signature: r and s, 48 bytes each.
    """

    nonce: bytes
    measurements: Mapping[int, Measured]
    opaque: Mapping[int, bytes]
    signed: bytes
    signature: bytes


class _Reader:
    """Takes bytes off the front, or says what is missing."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data, self._at, self._where = data, 0, where

    def take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        if len(piece) != length:
            raise EvidenceError(
                f"{self._where} ends too early",
                found=f"{len(self._data)} bytes",
                expected=f"{self._at + length} or more",
            )
        self._at += length
        return piece

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    @property
    def empty(self) -> bool:
        return self._at == len(self._data)

    def finish(self) -> None:
        if not self.empty:
            raise EvidenceError(
                f"{self._where} has bytes that belong to nothing",
                found=f"{len(self._data) - self._at} more",
                expected="the end",
            )


def parse_report(data: bytes) -> SpdmReport:
    """Read exactly one report.

    Raises:
        EvidenceError: naming what is not as the specification says.
    """
    if len(data) > _MAX_BYTES:
        raise EvidenceError(
            "an NVIDIA report is too long", found=f"{len(data)} bytes", expected=f"<= {_MAX_BYTES}"
        )
    reader = _Reader(data, "an NVIDIA report")
    version, code, attributes, operation, nonce, slot = _REQUEST.unpack(reader.take(_REQUEST.size))
    _demand("request's SPDM version", version, _VERSION)
    _demand("request code", code, _GET_MEASUREMENTS)
    _demand("request for a signature", attributes, _WITH_SIGNATURE)
    _demand("choice of measurements", operation, _ALL)  # or what was asked for could be chosen
    answered, code, _, answering, count = reader.unpack(_HEAD)
    _demand("response's SPDM version", answered, _VERSION)
    _demand("response code", code, _MEASUREMENTS)
    _demand("answering slot", answering & 0x0F, slot & 0x0F)
    record = reader.take(int.from_bytes(reader.take(3), "little"))
    reader.take(NONCE_BYTES)  # the responder's
    opaque = reader.take(int.from_bytes(reader.take(2), "little"))
    signature = reader.take(SIGNATURE_BYTES)
    reader.finish()
    return SpdmReport(
        nonce=nonce,
        measurements=_measurements(record, count),
        opaque=_opaque(opaque),
        signed=data[:-SIGNATURE_BYTES],
        signature=signature,
    )


def _demand(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise EvidenceError(
            f"the {what} in an NVIDIA report is not supported",
            found=f"{found:#04x}",
            expected=f"{expected:#04x}",
        )


def _measurements(record: bytes, count: int) -> dict[int, Measured]:
    reader = _Reader(record, "the measurement record of an NVIDIA report")
    found: dict[int, Measured] = {}
    for _ in range(count):
        index, specification, size, kind, length = reader.unpack(_BLOCK)
        if specification != _DMTF or not 0 < index < 0xFF or index in found:
            raise EvidenceError(
                "a measurement block in an NVIDIA report is not as specified",
                found=f"index {index}, specification {specification}",
                expected="DMTF's format, every index once",
            )
        algorithm = "hex" if kind & _RAW else _ALGORITHMS.get(length)
        if size != length + 3 or algorithm is None or not 0 < length <= 256:
            raise EvidenceError(
                f"measurement {index} of an NVIDIA report is neither a digest nor raw bytes",
                found=f"type {kind:#04x}, {length} bytes in a block of {size}",
                expected="a SHA-2 digest, or 1 to 256 raw bytes",
            )
        found[index] = f"{algorithm}:{reader.take(length).hex()}"
    reader.finish()
    if not found:
        raise EvidenceError("an NVIDIA report holds no measurement")
    return found


def _opaque(data: bytes) -> dict[int, bytes]:
    reader = _Reader(data, "the opaque data of an NVIDIA report")
    fields: dict[int, bytes] = {}
    while not reader.empty:
        kind, size = reader.unpack(_FIELD)
        if kind in fields:
            raise EvidenceError(
                "the opaque data of an NVIDIA report names a field twice", found=kind
            )
        fields[kind] = reader.take(size)
    return fields
