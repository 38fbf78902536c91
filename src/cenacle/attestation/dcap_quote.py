"""Quotes of Intel SGX and TDX: their bytes read into fields, and nothing believed yet.

Formats: *Intel SGX ECDSA QuoteLibReference DCAP API*, appendix A.4 (quote version 3), *Intel TDX
DCAP Quoting Library API*, appendix A.3 (versions 4 and 5), Intel SDM volume 3D, table 37-21
(the report of an SGX enclave), *Intel TDX Module Base Architecture Specification* (TD attributes).

Integers are little-endian. Every length must fit exactly; what follows a quote may only be
zeros, since drivers hand out fixed buffers. Reserved bytes must be zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from cenacle.errors import EvidenceError

__all__ = [
    "MAX_QUOTE_BYTES",
    "EnclaveReport",
    "Quote",
    "QuoteHeader",
    "TdReport",
    "Tee",
    "parse_quote",
]

Tee = Literal["sgx", "tdx"]

MAX_QUOTE_BYTES: Final = 64 * 1024
"""Genuine quotes have 4 to 8 KiB."""

_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_ECDSA_P256: Final = 2
_TEES: Final[dict[int, Tee]] = {0x00: "sgx", 0x81: "tdx"}
_QE_CERTIFICATION: Final = 6
_SGX_BYTES: Final = 384

# Name and size of each field, in order.
_TD_10: Final = (
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mr_signer_seam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("report_data", 64),
)
_TD_15: Final = (*_TD_10, ("tee_tcb_svn2", 16), ("mr_service_td", 48))

# Body types of version 5. Type 4 (TD report 1.5 extended) describes migrated TDs.
_BODIES: Final[dict[int, tuple[Tee, int]]] = {
    1: ("sgx", _SGX_BYTES),
    2: ("tdx", sum(size for _, size in _TD_10)),
    3: ("tdx", sum(size for _, size in _TD_15)),
}


@dataclass(frozen=True, slots=True)
class QuoteHeader:
    """The first 48 bytes.

    Attributes:
        version: 3, 4 or 5.
        tee: what made the report.
        qe_svn: security version of the quoting enclave (versions 4 and 5 leave it zero).
        pce_svn: security version of the certification enclave (likewise).
        user_data: 20 bytes of the quoting enclave's own.
    """

    version: int
    tee: Tee
    qe_svn: int
    pce_svn: int
    user_data: bytes


@dataclass(frozen=True, slots=True)
class EnclaveReport:
    """The 384 bytes that an SGX CPU reports of an enclave."""

    cpu_svn: bytes
    misc_select: int
    cet_attributes: int
    isv_ext_prod_id: bytes
    attributes: int
    xfrm: int
    mr_enclave: bytes
    mr_signer: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes
    report_data: bytes


@dataclass(frozen=True, slots=True)
class TdReport:
    """What a TDX module reports of a trust domain: 584 bytes (TD 1.0) or 648 (TD 1.5).

    ``tee_tcb_svn2`` (the module as it is now, where ``tee_tcb_svn`` is the module that launched
    the domain) and ``mr_service_td`` are empty in TD 1.0.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes
    tee_tcb_svn2: bytes = b""
    mr_service_td: bytes = b""

    @property
    def version(self) -> str:
        """``1.0`` or ``1.5``."""
        return "1.5" if self.tee_tcb_svn2 else "1.0"


@dataclass(frozen=True, slots=True)
class Quote:
    """A parsed quote; nothing in it is authenticated.

    Attributes:
        report: of the enclave or trust domain, by ``header.tee``.
        signed: the bytes under ``signature``, which the attestation key made.
        attestation_key: P-256 public key, x || y, 64 bytes.
        qe_report_bytes: report of the quoting enclave, which the PCK certificate's key signed.
        certification_type: what ``certification_data`` is; 5 is a chain of PEM certificates.
        raw: the quote without padding.
    """

    header: QuoteHeader
    report: EnclaveReport | TdReport
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: EnclaveReport
    qe_report_bytes: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes
    raw: bytes


class _Reader:
    """Bounds-checked reading."""

    __slots__ = ("offset", "raw", "what")

    def __init__(self, raw: bytes, what: str) -> None:
        self.raw = raw
        self.what = what
        self.offset = 0

    def take(self, size: int, name: str) -> bytes:
        left = len(self.raw) - self.offset
        if size > left:
            _refuse(f"{self.what} ends inside its {name}", f"{left} bytes", f"{size} bytes")
        self.offset += size
        return self.raw[self.offset - size : self.offset]

    def number(self, size: int, name: str) -> int:
        return int.from_bytes(self.take(size, name), "little")

    def sized(self, width: int, name: str) -> bytes:
        return self.take(self.number(width, f"{name}'s length"), name)

    def end(self) -> None:
        if left := len(self.raw) - self.offset:
            _refuse(f"{self.what} has bytes left over", f"{left} bytes", "none")


def _refuse(what: str, found: object, expected: object = None) -> NoReturn:
    raise EvidenceError(what, found=found, expected=expected)


def parse_quote(raw: bytes) -> Quote:
    """Read a quote of version 3, 4 or 5.

    Raises:
        EvidenceError: it is not exactly understood.
    """
    if not 1 <= len(raw) <= MAX_QUOTE_BYTES:
        _refuse("a quote has an impossible size", f"{len(raw)} bytes", f"<= {MAX_QUOTE_BYTES}")
    reader = _Reader(bytes(raw), "the quote")
    header = _parse_header(reader)
    tee, size = header.tee, _SGX_BYTES if header.tee == "sgx" else _BODIES[2][1]
    if header.version == 5:
        body_type = reader.number(2, "body type")
        if body_type not in _BODIES:
            _refuse("a quote holds a report of an unknown type", body_type, "1, 2 or 3")
        tee, size = _BODIES[body_type]
        if (stated := reader.number(4, "body size")) != size:
            _refuse("a quote's report has another size than its type", stated, size)
    if tee != header.tee:
        _refuse("a quote's header and report are of different kinds", tee, header.tee)
    body = reader.take(size, "report")
    report = _parse_enclave(body) if tee == "sgx" else _parse_td(body)
    signed = reader.raw[: reader.offset]
    auth = _Reader(reader.sized(4, "signature data"), "the quote's signature data")
    if padding := reader.raw[reader.offset :].strip(b"\0"):
        _refuse("something follows the quote", f"{len(padding)} bytes", "nothing but zeros")
    signature = auth.take(64, "signature")
    key = auth.take(64, "attestation key")
    qe = auth
    if header.version > 3:
        if (outer := auth.number(2, "certification type")) != _QE_CERTIFICATION:
            _refuse("a quote is certified in an unknown way", f"type {outer}", "type 6")
        qe = _Reader(auth.sized(4, "certification data"), "the quote's certification data")
        auth.end()
    qe_bytes = qe.take(_SGX_BYTES, "quoting enclave's report")
    qe_signature = qe.take(64, "quoting enclave's signature")
    auth_data = qe.sized(2, "quoting enclave's authentication data")
    kind = qe.number(2, "certification type")
    certification = qe.sized(4, "certification data")
    qe.end()
    return Quote(
        header=header,
        report=report,
        signed=signed,
        signature=signature,
        attestation_key=key,
        qe_report=_parse_enclave(qe_bytes),
        qe_report_bytes=qe_bytes,
        qe_report_signature=qe_signature,
        qe_auth_data=auth_data,
        certification_type=kind,
        certification_data=certification,
        raw=reader.raw[: reader.offset],
    )


def _parse_header(reader: _Reader) -> QuoteHeader:
    version = reader.number(2, "header")
    key_type = reader.number(2, "header")
    tee_type = reader.number(4, "header")
    qe_svn = reader.number(2, "header")
    pce_svn = reader.number(2, "header")
    vendor = reader.take(16, "header")
    user_data = reader.take(20, "header")
    if version not in (3, 4, 5):
        _refuse("a quote has an unknown version", version, "3, 4 or 5")
    if key_type != _ECDSA_P256:
        _refuse("a quote is signed by an unknown kind of key", key_type, "2 (ECDSA P-256)")
    if tee_type not in _TEES or (version == 3 and tee_type):
        _refuse(
            "a quote is of an unknown kind of enclave",
            f"0x{tee_type:x} in version {version}",
            "0x0 (SGX)" if version == 3 else "0x0 (SGX) or 0x81 (TDX)",
        )
    if vendor != _VENDOR:
        _refuse("a quote is of another vendor's quoting enclave", vendor.hex(), _VENDOR.hex())
    return QuoteHeader(version, _TEES[tee_type], qe_svn, pce_svn, user_data)


_ENCLAVE: Final = struct.Struct("<16sIB11s16sQQ32s32s32s32s64sHHH42s16s64s")


def _parse_enclave(body: bytes) -> EnclaveReport:
    (
        cpu_svn,
        misc_select,
        cet_attributes,
        reserved1,
        isv_ext_prod_id,
        attributes,
        xfrm,
        mr_enclave,
        reserved2,
        mr_signer,
        reserved3,
        config_id,
        isv_prod_id,
        isv_svn,
        config_svn,
        reserved4,
        isv_family_id,
        report_data,
    ) = _ENCLAVE.unpack(body)
    if any(reserved1 + reserved2 + reserved3 + reserved4):
        _refuse("reserved bytes of an enclave report are not zero", "other bytes", "zeros")
    return EnclaveReport(
        cpu_svn=cpu_svn,
        misc_select=misc_select,
        cet_attributes=cet_attributes,
        isv_ext_prod_id=isv_ext_prod_id,
        attributes=attributes,
        xfrm=xfrm,
        mr_enclave=mr_enclave,
        mr_signer=mr_signer,
        config_id=config_id,
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        config_svn=config_svn,
        isv_family_id=isv_family_id,
        report_data=report_data,
    )


def _parse_td(body: bytes) -> TdReport:
    reader = _Reader(body, "the TD report")
    fields = _TD_15 if len(body) > _BODIES[2][1] else _TD_10
    return TdReport(**{name: reader.take(size, name) for name, size in fields})
