"""Certificates and revocation lists of Intel's DCAP, each checked for its role.

Intel's root signs three kinds of certificate: CAs of platform certificates (PCK), the PCK
certificates below them, and the certificate that signs TCB information. Whoever accepts *any*
certificate below the root as a signer of TCB information lets one machine whose PCK key leaked
declare every machine up to date. Here each chain has an exact length and exact names.

Source: *Intel SGX PCK Certificate and Certificate Revocation List Profile Specification* 1.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from cenacle.documents.base import unb64
from cenacle.errors import DocumentError, EvidenceError

__all__ = [
    "Chain",
    "PckExtension",
    "check_ca_chain",
    "check_crl",
    "check_pck_chain",
    "check_signature",
    "check_signer_chain",
    "parse_chain",
    "parse_pck_extension",
]

_ROOT: Final = ("Intel SGX Root CA",)
_CA: Final = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
_PCK: Final = ("Intel SGX PCK Certificate",)
_SIGNER: Final = ("Intel SGX TCB Signing",)
_EXTENSION: Final = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
_ARC: Final = bytes.fromhex("2a864886f84d010d01")  # the same, as DER writes it

# What cryptography raises for certificates and lists that it does not understand, many of them
# only when a field is looked at; a warning counts where warnings are errors.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    Warning,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

_PEM: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----[\r\n]+([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----[\r\n]*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Certificates from the leaf up to the root, checked link by link."""

    certificates: tuple[x509.Certificate, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return self.certificates[0]

    @property
    def root(self) -> x509.Certificate:
        return self.certificates[-1]

    @property
    def key(self) -> ec.EllipticCurvePublicKey:
        """The leaf's P-256 key."""
        return _p256(self.leaf)


@dataclass(frozen=True, slots=True)
class PckExtension:
    """What Intel certified about one platform (profile specification, section 1.3.5).

    Attributes:
        ppid: the platform's (or processor's) identifier, 16 bytes.
        components: security versions of the SGX TCB's 16 components.
        fmspc: family, model, stepping, platform and custom SKU, 6 bytes.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
        instance: identifier of a platform registered by Intel's platform registration; or empty.
        flags: dynamic platform, cached keys, SMT; those that are known.
    """

    ppid: bytes
    components: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    instance: bytes
    flags: dict[str, bool]


def _refuse(
    what: str, found: object = None, expected: object = None, remedy: str | None = None
) -> NoReturn:
    raise EvidenceError(what, found=found, expected=expected, remedy=remedy)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        _refuse(f"{what} cannot be read", type(error).__name__, "a certificate profile of Intel's")


def parse_chain(text: str, what: str) -> tuple[x509.Certificate, ...]:
    """The certificates of PEM text, in order; anything between them is refused."""
    certificates: list[x509.Certificate] = []
    offset = 0
    while (match := _PEM.match(text, offset)) is not None:
        offset = match.end()
        with _reading(f"certificate {len(certificates) + 1} of {what}"):
            try:
                der = unb64(re.sub(r"[\r\n]", "", match[1]))
            except DocumentError:
                _refuse(f"{what} is not in base64")
            certificates.append(x509.load_der_x509_certificate(der))
    if text[offset:].strip("\0") or not 1 <= len(certificates) <= 4:
        _refuse(
            f"{what} is not a chain of certificates",
            f"{len(certificates)} certificates, {len(text) - offset} other characters",
            "PEM certificates, leaf first",
        )
    return tuple(certificates)


def check_pck_chain(
    certificates: tuple[x509.Certificate, ...], roots: Iterable[x509.Certificate], now: datetime
) -> Chain:
    """The platform's chain: PCK certificate, PCK CA, root.

    Raises:
        EvidenceError: a certificate has another role, another issuer, or other dates.
    """
    what = "the platform's chain"
    with _reading(what):
        return _check(certificates, (_PCK, _CA, _ROOT), what, roots, now)


def check_signer_chain(
    certificates: tuple[x509.Certificate, ...],
    what: str,
    roots: Iterable[x509.Certificate],
    now: datetime,
) -> Chain:
    """The chain of what Intel signs about all platforms: TCB signing certificate, root."""
    with _reading(what):
        return _check(certificates, (_SIGNER, _ROOT), what, roots, now)


def check_ca_chain(
    certificates: tuple[x509.Certificate, ...],
    platform: Chain,
    roots: Iterable[x509.Certificate],
    now: datetime,
) -> None:
    """The chain of a revocation list: the CA that issued the platform's certificate, and the root.

    A CA may have been certified anew, with the same name and key.
    """
    what = "the revocation list's chain"
    with _reading(what):
        chain = _check(certificates, (_CA, _ROOT), what, roots, now)
        ca = platform.certificates[1]
        if chain.leaf.subject != ca.subject or chain.key != _p256(ca):
            _refuse(
                f"{what} is not that of the platform's CA",
                _common_name(chain.leaf),
                f"{_common_name(ca)}, with the same key",
                "fetch the revocation list of the CA that issued the platform's certificate",
            )


def _check(
    certificates: tuple[x509.Certificate, ...],
    roles: tuple[tuple[str, ...], ...],
    what: str,
    roots: Iterable[x509.Certificate],
    now: datetime,
) -> Chain:
    if len(certificates) != len(roles):
        _refuse(f"{what} has another length", len(certificates), f"{len(roles)} certificates")
    for certificate, names in zip(certificates, roles, strict=True):
        name = _common_name(certificate)
        if name not in names:
            _refuse(
                f"{what} has a certificate of another role",
                name[:80],
                " or ".join(names),
                "a certificate below Intel's root may only be used for what it was issued for",
            )
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start <= now <= end:
            _refuse(
                f"{what}: {name} is {'expired' if now > end else 'of the future'}",
                f"{start:%Y-%m-%d} to {end:%Y-%m-%d}",
                f"{now:%Y-%m-%d}",
                "fetch the collateral again, and check the clock",
            )
    if certificates[-1] not in tuple(roots):
        _refuse(
            f"{what} does not end in a root that is trusted here",
            _common_name(certificates[-1])[:80],
            "Intel's SGX root CA, byte for byte",
        )
    for place, certificate in enumerate(certificates):
        _check_ca(certificate, roles[place] in (_CA, _ROOT), what)
    for certificate, issuer in pairwise(certificates):  # the root is trusted as it is
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, *_UNREADABLE):
            _refuse(
                f"{what}: {_common_name(certificate)} is not signed by the next certificate",
                "a signature by another key",
                _common_name(issuer),
            )
    chain = Chain(certificates)
    _p256(chain.leaf)
    return chain


def _check_ca(certificate: x509.Certificate, expected: bool, what: str) -> None:
    ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    if ca != expected:
        _refuse(
            f"{what}: {_common_name(certificate)} {'may' if ca else 'may not'} sign certificates",
            f"CA: {ca}",
            f"CA: {expected}",
        )


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else f"{len(names)} names"


def _p256(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        _refuse("a certificate has another kind of key", type(key).__name__, "ECDSA P-256")
    return key


def check_signature(
    key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes, what: str
) -> None:
    """ECDSA P-256 with SHA-256, the signature as r || s.

    Raises:
        EvidenceError: the signature is not the key's.
    """
    if len(signature) != 64:
        _refuse(f"the signature of {what} has another size", f"{len(signature)} bytes", "64 bytes")
    numbers = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(*numbers), data, ec.ECDSA(SHA256()))
    except InvalidSignature:
        _refuse(
            f"{what} is not genuine",
            "a signature that does not match",
            "the signature of the key that is certified for it",
        )


def check_crl(
    der: bytes,
    issuer: x509.Certificate,
    subjects: Iterable[x509.Certificate],
    now: datetime,
) -> None:
    """A revocation list of ``issuer``, which is valid now and names none of ``subjects``.

    Raises:
        EvidenceError: the list is not genuine, is outdated, or revokes one of them.
    """
    name = _common_name(issuer)
    what = f"the revocation list of {name}"
    with _reading(what):
        crl = x509.load_der_x509_crl(der)
        signed = crl.issuer == issuer.subject and crl.is_signature_valid(_p256(issuer))
        start, end = crl.last_update_utc, crl.next_update_utc
        partial = [
            extension.oid.dotted_string for extension in crl.extensions if extension.critical
        ]
        revoked = [
            certificate
            for certificate in subjects
            if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
        ]
    if not signed:
        _refuse(f"{what} is not genuine", "another signature or issuer", name)
    if end is None or not start <= now < end:
        _refuse(
            f"{what} is {'of the future' if now < start else 'expired'}",
            f"{start:%Y-%m-%d} to {'no end' if end is None else format(end, '%Y-%m-%d')}",
            f"{now:%Y-%m-%d}",
            "fetch the collateral again, and check the clock",
        )
    if partial:  # a delta, or a list for some purposes only
        _refuse(f"{what} is not complete", " ".join(partial), "no critical extension")
    for certificate in revoked:
        _refuse(
            f"{_common_name(certificate)} is revoked",
            f"serial number {certificate.serial_number:x}",
            f"not on {what}",
            "the platform or signer is no longer trusted by Intel",
        )


def parse_pck_extension(certificate: x509.Certificate) -> PckExtension:
    """The SGX extension of a PCK certificate (profile specification, section 1.3.5).

    Raises:
        EvidenceError: it is missing or not exactly understood.
    """
    try:
        found = certificate.extensions.get_extension_for_oid(_EXTENSION).value
        assert isinstance(found, x509.UnrecognizedExtension)
        return _pck_extension(found.value)
    except (*_UNREADABLE, KeyError, IndexError):
        _refuse(
            "the platform's certificate says nothing that can be read about the platform",
            "no SGX extension, or a malformed one",
            "a PCK certificate",
        )


def _pck_extension(der: bytes) -> PckExtension:
    items = _items(_only(der, 0x30), b"")
    tcb = _items(_typed(items[b"\x02"], 0x30), b"\x02")
    components = bytes(_integer(tcb[bytes([2, i])]) for i in range(1, 17))
    flags = {}
    if b"\x07" in items:
        stated = _items(_typed(items[b"\x07"], 0x30), b"\x07")
        names = {b"\x07\x01": "dynamic", b"\x07\x02": "cached_keys", b"\x07\x03": "smt"}
        flags = {name: _typed(stated[i], 0x01) != b"\0" for i, name in names.items() if i in stated}
    return PckExtension(
        ppid=_sized(items[b"\x01"], 16),
        components=components,
        pce_svn=_integer(tcb[b"\x02\x11"]),
        pce_id=_sized(items[b"\x03"], 2),
        fmspc=_sized(items[b"\x04"], 6),
        sgx_type=int.from_bytes(_typed(items[b"\x05"], 0x0A), "big"),
        instance=_sized(items[b"\x06"], 16) if b"\x06" in items else b"",
        flags=flags,
    )


Tlv = tuple[int, bytes]


def _elements(data: bytes) -> list[Tlv]:
    """DER elements one after another (X.690, lengths below 65536)."""
    out = []
    while data:
        tag, size, start = data[0], data[1], 2
        if size >= 0x80:
            width = size & 0x7F
            size, start = int.from_bytes(data[2 : 2 + width], "big"), 2 + width
            if width not in (1, 2) or size < 0x80:
                raise ValueError("a length in another form")
        if len(data) < start + size:
            raise ValueError("cut off")
        out.append((tag, data[start : start + size]))
        data = data[start + size :]
    return out


def _only(data: bytes, tag: int) -> bytes:
    (element,) = _elements(data)
    return _typed(element, tag)


def _typed(element: Tlv, tag: int) -> bytes:
    if element[0] != tag:
        raise ValueError("another type")
    return element[1]


def _sized(element: Tlv, size: int) -> bytes:
    value = _typed(element, 0x04)
    if len(value) != size:
        raise ValueError("another size")
    return value


def _integer(element: Tlv) -> int:
    value = int.from_bytes(_typed(element, 0x02), "big", signed=True)
    if not 0 <= value <= 0xFFFF:
        raise ValueError("a number out of range")
    return value


def _items(data: bytes, prefix: bytes) -> dict[bytes, Tlv]:
    """Pairs of an identifier below Intel's arc and a value, by the identifier's last parts."""
    found: dict[bytes, Tlv] = {}
    for element in _elements(data):
        name, value = _elements(_typed(element, 0x30))
        identifier = _typed(name, 0x06)
        part = identifier.removeprefix(_ARC)
        if part == identifier or not part.startswith(prefix) or part in found:
            raise ValueError("an unknown or repeated item")
        found[part] = value
    return found
