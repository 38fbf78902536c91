"""Endorsement keys: is this the key of a TPM that a trusted vendor made?

An endorsement key (EK) never signs and never leaves its TPM; its certificate is the vendor's
word for that. The checks are those of the TCG "EK Credential Profile for TPM Family 2.0"
(version 2.5, sections 3.2 to 3.5) and of RFC 5280's path validation, as far as such chains need
it. Revocation lists are not asked for: nothing here uses a network. A contract names the
endorsement keys that it accepts, so one that is known to be broken is refused by leaving it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID

from cenacle.attestation.tpm_keys import TpmKey
from cenacle.attestation.tpm_roots import VENDOR_ROOTS, vendor_roots
from cenacle.documents.base import Digest, sha256_digest
from cenacle.errors import EvidenceError

__all__ = [
    "Endorsement",
    "certificate_digest",
    "key_digest",
    "load_certificate",
    "vendor_of",
    "vendor_roots",
    "verify_endorsement",
]

_MAX_CHAIN: Final = 8
_MANUFACTURER, _MODEL, _VERSION = (f"2.23.133.2.{n}" for n in (1, 2, 3))
_EK_CERTIFICATE: Final = "2.23.133.8.1"  # tcg-kp-EKCertificate
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)


@dataclass(frozen=True, slots=True)
class Endorsement:
    """An endorsement key that a trusted root vouches for.

    Attributes:
        key: the public key in the certificate.
        digest: SHA-256 of its SubjectPublicKeyInfo; names the TPM.
        root: SHA-256 of the root certificate.
        manufacturer: the TCG's vendor id as the certificate gives it, e.g. ``id:49465800``.
        model: the vendor's name of the part.
        version: of the TPM's firmware when the certificate was made, e.g. ``id:00070055``.
    """

    key: TpmKey
    digest: Digest
    root: Digest
    manufacturer: str
    model: str
    version: str


def key_digest(key: TpmKey) -> Digest:
    """SHA-256 of the key's SubjectPublicKeyInfo (DER).

    The same as ``openssl x509 -pubkey -noout | openssl pkey -pubin -outform der | sha256sum``.
    """
    return sha256_digest(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def certificate_digest(certificate: x509.Certificate) -> Digest:
    """SHA-256 of the certificate's DER form."""
    return sha256_digest(certificate.public_bytes(Encoding.DER))


def vendor_of(root: Digest) -> str | None:
    """The vendor whose pinned root this is; ``None`` for any other root."""
    return next((pinned.vendor for pinned in VENDOR_ROOTS if pinned.digest == root), None)


def load_certificate(der: bytes) -> x509.Certificate:
    """A certificate from its DER form.

    Raises:
        EvidenceError: it is none, or in a form that cannot be read for certain.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        _ = certificate.extensions, certificate.subject, certificate.issuer
        _ = certificate.public_key(), certificate.not_valid_before_utc
        _ = certificate.not_valid_after_utc
        if not der.endswith(b"\x00" + certificate.signature):
            raise ValueError("a bit string with loose bits")
    except Exception:  # many kinds, warnings that a caller made errors among them
        raise EvidenceError(
            "an endorsement certificate does not parse",
            found=f"{len(der)} bytes",
            expected="an X.509 certificate in DER",
        ) from None
    return certificate


def verify_endorsement(
    chain: Sequence[bytes], roots: Iterable[x509.Certificate], now: datetime
) -> Endorsement:
    """Check an EK certificate against trusted roots.

    Args:
        chain: certificates in DER: the endorsement key's first, then any that lead to a root.
        roots: the only certificates that are trusted.
        now: when it must be valid.

    Raises:
        EvidenceError: saying which certificate fails, and why.
    """
    if not 1 <= len(chain) <= _MAX_CHAIN:
        raise EvidenceError(
            "an endorsement chain has a wrong length",
            found=f"{len(chain)} certificates",
            expected=f"1 to {_MAX_CHAIN}",
        )
    leaf, *others = (load_certificate(der) for der in chain)
    key = _check_leaf(leaf)
    root = _path(leaf, others, list(roots), now)
    manufacturer, model, version = _identity(leaf)
    return Endorsement(key, key_digest(key), certificate_digest(root), manufacturer, model, version)


def _path(
    leaf: x509.Certificate,
    others: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> x509.Certificate:
    """Walk from the leaf to a root, checking every step; returns the root."""
    at = leaf
    _check_dates(at, now)
    for below in range(_MAX_CHAIN):
        found = _issuer(at, roots)
        issuer = found or _issuer(at, [other for other in others if other != at])
        if issuer is None:
            raise EvidenceError(
                "an endorsement certificate does not lead to a trusted root",
                found=f"issued by {at.issuer.rfc4514_string()}",
                expected=" or ".join(root.subject.rfc4514_string() for root in roots) or "a root",
                remedy="give the intermediate certificates too, or trust the TPM's root by name",
            )
        _check_dates(issuer, now)
        _check_authority(issuer, below)
        if found is not None:
            return found
        at = issuer
    raise EvidenceError(
        "an endorsement chain does not end", expected=f"a root within {_MAX_CHAIN} steps"
    )


def _issuer(
    certificate: x509.Certificate, candidates: Iterable[x509.Certificate]
) -> x509.Certificate | None:
    for candidate in candidates:
        if candidate.subject != certificate.issuer:
            continue
        try:
            certificate.verify_directly_issued_by(candidate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        return candidate
    return None


def _refuse(
    certificate: x509.Certificate, problem: str, found: str, expected: str
) -> EvidenceError:
    name = certificate.subject.rfc4514_string() or "without a name"
    return EvidenceError(
        f"an endorsement certificate {problem}", found=f"{found} ({name})", expected=expected
    )


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        raise _refuse(
            certificate,
            "is not valid now",
            f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}",
            f"{now:%Y-%m-%d %H:%M}",
        )


def _extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> object | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _check_understood(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise _refuse(
                certificate,
                "has a critical extension that is not understood",
                extension.oid.dotted_string,
                "known ones",
            )


def _check_authority(certificate: x509.Certificate, below: int) -> None:
    """``below`` is how many authorities stand between this one and the endorsement key."""
    _check_understood(certificate)
    constraints = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    if not isinstance(constraints, x509.BasicConstraints) or not constraints.ca:
        raise _refuse(certificate, "was issued by no authority", "CA:FALSE", "CA:TRUE")
    if constraints.path_length is not None and below > constraints.path_length:
        raise _refuse(
            certificate,
            "stands too far above the endorsement key",
            f"{below} authorities between",
            f"{constraints.path_length}",
        )
    if not isinstance(usage, x509.KeyUsage) or not usage.key_cert_sign:
        raise _refuse(certificate, "may not sign certificates", "no keyCertSign", "keyCertSign")


def _check_leaf(leaf: x509.Certificate) -> TpmKey:
    _check_understood(leaf)
    key = leaf.public_key()
    usage = _extension(leaf, x509.KeyUsage)
    if not isinstance(usage, x509.KeyUsage):
        raise _refuse(leaf, "does not say what its key is for", "no key usage", "key usage")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        wanted, allowed = "keyEncipherment", usage.key_encipherment
    elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        wanted, allowed = "keyAgreement", usage.key_agreement
    else:
        raise _refuse(leaf, "is of an unknown key", type(key).__name__, "RSA 2048 or a NIST curve")
    if not allowed or usage.key_cert_sign:
        raise _refuse(leaf, "is not for an endorsement key", "another key usage", wanted)
    constraints = _extension(leaf, x509.BasicConstraints)
    if isinstance(constraints, x509.BasicConstraints) and constraints.ca:
        raise _refuse(leaf, "is an authority's", "CA:TRUE", "CA:FALSE")
    purposes = _extension(leaf, x509.ExtendedKeyUsage)
    if isinstance(purposes, x509.ExtendedKeyUsage):
        named = [purpose.dotted_string for purpose in purposes]
        if _EK_CERTIFICATE not in named:
            raise _refuse(leaf, "is for something else", ", ".join(named), _EK_CERTIFICATE)
    return key


def _identity(leaf: x509.Certificate) -> tuple[str, str, str]:
    """Manufacturer, model and version from the subject alternative name (section 3.2.9)."""
    names = _extension(leaf, x509.SubjectAlternativeName)
    found: dict[str, list[str]] = {}
    if isinstance(names, x509.SubjectAlternativeName):
        for directory in names.get_values_for_type(x509.DirectoryName):
            for attribute in directory:
                text = attribute.value if isinstance(attribute.value, str) else ""
                found.setdefault(attribute.oid.dotted_string, []).append(text[:64])
    values = [found.get(oid, []) for oid in (_MANUFACTURER, _MODEL, _VERSION)]
    if any(len(value) != 1 or not value[0].isprintable() for value in values):
        raise _refuse(
            leaf,
            "does not name one TPM",
            f"{', '.join(str(len(value)) for value in values)} values",
            "one manufacturer, model and version",
        )
    manufacturer, model, version = (value[0] for value in values)
    return manufacturer, model, version
