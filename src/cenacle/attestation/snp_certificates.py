"""X.509 certificates and revocation lists as AMD issues them for SEV-SNP.

Source: "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification", AMD
publication 57230: everything is signed with RSASSA-PSS, SHA-384 and a salt of 48 bytes.

``asn1crypto`` reads them because a VCEK's serial number is zero, which ``cryptography`` is about
to refuse. What asn1crypto tolerates beyond DER cannot matter: the signed part is believed only
under its signature, and what surrounds it is accepted in one spelling alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Self

from asn1crypto import algos, core, crl, x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cenacle.errors import EvidenceError

__all__ = ["Certificate", "RevocationList"]

_MAX_BYTES: Final = 8192
_CRL_MAX_BYTES: Final = 1 << 20
_COMMON_NAME: Final = "2.5.4.3"
_BASIC_CONSTRAINTS, _KEY_USAGE = "2.5.29.19", "2.5.29.15"
_UNDERSTOOD: Final = frozenset({_BASIC_CONSTRAINTS, _KEY_USAGE})


def _der(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + body


@dataclass(frozen=True, slots=True)
class _Signed:
    """SIGNED{...} of X.509: what is signed, and an RSASSA-PSS signature with SHA-384."""

    body: Any
    tbs: bytes
    signature: bytes

    @classmethod
    def parse(cls, kind: type[core.Sequence], field: str, der: bytes, what: str) -> Self:
        outer = kind.load(der, strict=True)
        body = outer[field]
        tbs, algorithm = body.dump(), body["signature"].dump()
        signature = outer[2].contents[1:]
        # What surrounds the signed bytes is not signed: it may be spelled in one way only.
        if der != _der(0x30, tbs, algorithm, _der(0x03, b"\x00", signature)):
            raise EvidenceError(f"{what} is not in DER, or names two signature algorithms")
        if not _is_pss_sha384(algorithm):
            raise EvidenceError(
                f"{what} is signed in another way than AMD signs",
                found=body["signature"]["algorithm"].native,
                expected="RSASSA-PSS with SHA-384",
            )
        return cls(body, tbs, signature)

    def verify(self, key: rsa.RSAPublicKey, what: str, by: str) -> None:
        pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
        try:
            key.verify(self.signature, self.tbs, pss, hashes.SHA384())
        except InvalidSignature:
            raise EvidenceError(
                f"the signature of {what} does not verify",
                found="another key's signature, or altered bytes",
                expected=f"signed by {by}",
                remedy="use the certificates that AMD's key distribution service gives",
            ) from None


@lru_cache(maxsize=16)  # AMD uses two spellings
def _is_pss_sha384(der: bytes) -> bool:
    algorithm = algos.SignedDigestAlgorithm.load(der, strict=True)
    if algorithm["algorithm"].native != "rsassa_pss":
        return False
    found = algorithm["parameters"]
    mask = found["mask_gen_algorithm"]
    return bool(
        found["hash_algorithm"]["algorithm"].native == "sha384"
        and mask["algorithm"].native == "mgf1"
        and mask["parameters"]["algorithm"].native == "sha384"
        and found["salt_length"].native == 48
        and found["trailer_field"].native in {1, "trailer_field_bc"}
    )


def _malformed(what: str) -> EvidenceError:
    return EvidenceError(
        f"{what} cannot be read",
        expected="one X.509 structure in DER",
        remedy="use the file that AMD's key distribution service gives, as it is",
    )


# What asn1crypto raises for hostile bytes, which it reads only when a field is asked for.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """An X.509 certificate of AMD's: parsed, not yet believed.

    Attributes:
        name, issuer_name: common names.
        issuer, subject: whole names in DER.
        extensions: by object identifier: whether critical, and the value.
    """

    name: str
    issuer_name: str
    issuer: bytes
    subject: bytes
    serial: int
    not_before: datetime
    not_after: datetime
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    extensions: Mapping[str, tuple[bool, bytes]]
    signs_certificates: bool
    signed: _Signed

    @classmethod
    def parse(cls, der: bytes, what: str = "a certificate") -> Self:
        """Read one certificate.

        Raises:
            EvidenceError: it is not strict DER, not signed as AMD signs, or has another key.
        """
        if len(der) > _MAX_BYTES:
            raise EvidenceError(f"{what} is too large", found=len(der), expected=f"<= {_MAX_BYTES}")
        try:
            return cls._read(der, what)
        except _UNREADABLE:
            raise _malformed(what) from None

    @classmethod
    def _read(cls, der: bytes, what: str) -> Self:
        signed = _Signed.parse(x509.Certificate, "tbs_certificate", der, what)
        body = signed.body
        extensions: dict[str, tuple[bool, bytes]] = {}
        signs = False
        for extension in body["extensions"]:
            oid = extension["extn_id"].dotted
            if oid in extensions:
                raise EvidenceError(f"{what} has an extension twice", found=oid)
            critical = bool(extension["critical"].native)
            if critical and oid not in _UNDERSTOOD:
                raise EvidenceError(f"{what} has an unknown critical extension", found=oid)
            if oid == _BASIC_CONSTRAINTS:
                signs = bool(extension["extn_value"].parsed["ca"].native)
            extensions[oid] = (critical, bytes(extension["extn_value"].contents))
        try:
            key = load_der_public_key(body["subject_public_key_info"].dump())
        except UnsupportedAlgorithm:
            raise _malformed(what) from None
        if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            raise EvidenceError(f"{what} has a key of another type", expected="RSA or P-384")
        validity = body["validity"]
        issuer, subject = body["issuer"].dump(), body["subject"].dump()
        issuer_name, name = _common_name(issuer), _common_name(subject)
        if issuer_name is None or name is None:
            raise EvidenceError(f"{what} has no common name, or several")
        return cls(
            name=name,
            issuer_name=issuer_name,
            issuer=issuer,
            subject=subject,
            serial=body["serial_number"].native,
            not_before=validity["not_before"].native,
            not_after=validity["not_after"].native,
            key=key,
            extensions=extensions,
            signs_certificates=signs,
            signed=signed,
        )

    def check_issued_by(self, issuer: Certificate) -> None:
        """Raises :class:`EvidenceError` unless ``issuer`` signed this certificate."""
        if self.issuer != issuer.subject:
            raise EvidenceError(
                f"{self.name} was issued by another authority",
                found=self.issuer_name,
                expected=issuer.name,
            )
        if not issuer.signs_certificates or not isinstance(issuer.key, rsa.RSAPublicKey):
            raise EvidenceError(
                f"{issuer.name} may not sign certificates", expected="a certificate authority"
            )
        self.signed.verify(issuer.key, self.name, issuer.name)

    def check_date(self, now: datetime) -> None:
        """Raises :class:`EvidenceError` unless the certificate is valid at ``now``."""
        if not self.not_before <= now <= self.not_after:
            raise EvidenceError(
                f"{self.name} is {'not yet' if now < self.not_before else 'no longer'} valid",
                found=f"{now:%Y-%m-%d %H:%M:%S}",
                expected=f"{self.not_before:%Y-%m-%d %H:%M:%S} to "
                f"{self.not_after:%Y-%m-%d %H:%M:%S}",
                remedy="fetch the certificate again, or correct the clock",
            )


@lru_cache(maxsize=64)
def _common_name(name: bytes) -> str | None:
    """The one common name in a name in DER; ``None`` if there is none, or several."""
    found = [
        part["value"].native
        for relative in x509.Name.load(name, strict=True).chosen
        for part in relative
        if part["type"].dotted == _COMMON_NAME
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A certificate revocation list, by serial numbers of one issuer's certificates."""

    issuer: bytes
    this_update: datetime
    next_update: datetime
    revoked: frozenset[int]
    signed: _Signed

    @classmethod
    def parse(cls, der: bytes) -> Self:
        """Read one list.

        Raises:
            EvidenceError: it is not strict DER, not signed as AMD signs, never expires, or has
                critical extensions, which may change what it says.
        """
        what = "the revocation list"
        if len(der) > _CRL_MAX_BYTES:
            raise EvidenceError(
                f"{what} is too large", found=len(der), expected=f"<= {_CRL_MAX_BYTES}"
            )
        try:
            signed = _Signed.parse(crl.CertificateList, "tbs_cert_list", der, what)
            body = signed.body
            entries = list(body["revoked_certificates"] or ())
            extensions = list(body["crl_extensions"] or ())
            for entry in entries:
                extensions += list(entry["crl_entry_extensions"] or ())
            if any(extension["critical"].native for extension in extensions):
                raise EvidenceError(f"{what} has a critical extension", expected="none")
            next_update = body["next_update"].native
            if next_update is None:
                raise EvidenceError(f"{what} never expires", expected="a next update")
            return cls(
                issuer=body["issuer"].dump(),
                this_update=body["this_update"].native,
                next_update=next_update,
                revoked=frozenset(entry["user_certificate"].native for entry in entries),
                signed=signed,
            )
        except _UNREADABLE:
            raise _malformed(what) from None

    def check(self, issuer: Certificate, certificate: Certificate, now: datetime) -> None:
        """Raises :class:`EvidenceError` unless ``issuer`` signed it, it is valid at ``now``, and
        ``certificate`` is not on it."""
        if self.issuer != issuer.subject or not isinstance(issuer.key, rsa.RSAPublicKey):
            raise EvidenceError(
                "the revocation list was issued by another authority", expected=issuer.name
            )
        self.signed.verify(issuer.key, "the revocation list", issuer.name)
        if not self.this_update <= now <= self.next_update:
            raise EvidenceError(
                f"the revocation list is {'not yet' if now < self.this_update else 'no longer'} "
                "valid",
                found=f"{now:%Y-%m-%d %H:%M:%S}",
                expected=f"{self.this_update:%Y-%m-%d %H:%M:%S} to "
                f"{self.next_update:%Y-%m-%d %H:%M:%S}",
                remedy="fetch AMD's revocation list again",
            )
        if certificate.serial in self.revoked:
            raise EvidenceError(
                f"{certificate.name} was revoked by AMD",
                found=f"serial number {certificate.serial}",
                expected="a certificate that is not on the revocation list",
                remedy="fetch the certificates again",
            )
