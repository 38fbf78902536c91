"""Certificate paths of signers with P-384 keys: AWS Nitro, NVIDIA's devices, NVIDIA's files.

These vendors use ECDSA on P-384 with SHA-384 throughout, so nothing else is accepted. The checks
are those of RFC 5280, section 6.1, for such a path: signatures, names, dates, basic constraints,
path length, key usage, and no critical extension that is not understood. Revocation
lists are not read: a verifier makes no network call.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from cenacle.errors import EvidenceError

__all__ = ["SIGNATURE_BYTES", "P384Path", "check_signature"]

SIGNATURE_BYTES: Final = 96
"""A raw P-384 signature: r and s, 48 bytes each, big endian (RFC 9053, section 2.1)."""

_MAX_CERTIFICATE_BYTES: Final = 8192
_LEAST, _MOST = 2, 8
_UNDERSTOOD: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})


def _load(der: bytes, where: str) -> x509.Certificate:
    if not 0 < len(der) <= _MAX_CERTIFICATE_BYTES:
        raise EvidenceError(
            f"{where} has no credible length",
            found=f"{len(der)} bytes",
            expected=f"1 to {_MAX_CERTIFICATE_BYTES}",
        )
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.extensions  # noqa: B018 - parsed when asked for: a bad one must fail here
        key = certificate.public_key()
    except Exception as error:  # many kinds, warnings that a caller made errors among them
        raise EvidenceError(
            f"{where} does not parse", found=type(error).__name__, expected="X.509 v3, DER"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EvidenceError(f"{where} holds another kind of key", expected="ECDSA on P-384")
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise EvidenceError(
            f"{where} is signed in another way",
            found=certificate.signature_algorithm_oid.dotted_string,
            expected="ecdsa-with-SHA384",
        )
    return certificate


def _constraints(certificate: x509.Certificate) -> x509.BasicConstraints:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:  # an end entity may leave it out
        return x509.BasicConstraints(ca=False, path_length=None)


def _usage(certificate: x509.Certificate, where: str) -> x509.KeyUsage:
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise EvidenceError(f"{where} has no key usage", expected="one (RFC 5280)") from None


@lru_cache(maxsize=256)
def _verify_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    # Whether one signed the other never changes, and a vendor's devices share the upper part
    # of their paths. What raises is not kept.
    certificate.verify_directly_issued_by(issuer)


class P384Path:
    """A path from a signer's certificate to a vendor's root; made before it is believed.

    Args:
        certificates: DER, the signer's own first and the root last.
        what: what was signed, for messages, e.g. ``nitro evidence``.

    Raises:
        EvidenceError: there are too few or too many, or one does not parse or is not of P-384.
    """

    def __init__(self, certificates: Sequence[bytes], what: str) -> None:
        if not _LEAST <= len(certificates) <= _MOST:
            raise EvidenceError(
                f"{what} has no credible number of certificates",
                found=len(certificates),
                expected=f"{_LEAST} to {_MOST}",
            )
        self._what = what
        self._der = tuple(certificates)
        self._path = tuple(_load(der, self._name(i)) for i, der in enumerate(certificates))

    def _name(self, index: int) -> str:
        return f"certificate {index + 1} of {len(self._der)} of {self._what}"

    @property
    def leaf(self) -> x509.Certificate:
        """The signer's own certificate."""
        return self._path[0]

    def check(self, roots: Sequence[bytes]) -> None:
        """Everything but the dates.

        Args:
            roots: DER of each root that is trusted.

        Raises:
            EvidenceError: naming the first certificate that fails, and how.
        """
        if self._der[-1] not in roots:
            found = self._path[-1].fingerprint(hashes.SHA256()).hex()
            raise EvidenceError(
                f"{self._what} chains to a root that is not trusted",
                found=f"SHA-256 {found[:16]}",
                expected="the vendor's root certificate",
            )
        for index, certificate in enumerate(self._path):
            self._check_extensions(index, certificate)
        for index, certificate in enumerate(self._path[:-1]):
            self._check_issued(index, certificate, self._path[index + 1])

    def _check_extensions(self, index: int, certificate: x509.Certificate) -> None:
        where = self._name(index)
        for extension in certificate.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                raise EvidenceError(
                    f"{where} has a critical extension that is not understood",
                    found=extension.oid.dotted_string,
                )
        constraints, usage = _constraints(certificate), _usage(certificate, where)
        if index == 0:
            if constraints.ca or not usage.digital_signature or usage.key_cert_sign:
                raise EvidenceError(
                    f"{where} may not sign data",
                    found="CA" if constraints.ca else "another key usage",
                    expected="an end entity that signs data",
                )
            return
        if not constraints.ca or not usage.key_cert_sign:
            raise EvidenceError(
                f"{where} may not issue certificates",
                found="no CA" if not constraints.ca else "another key usage",
                expected="a CA with keyCertSign",
            )
        below = index - 1  # intermediate CAs between this one and the signer
        if constraints.path_length is not None and constraints.path_length < below:
            raise EvidenceError(
                f"{where} may not have so many CAs below it",
                found=below,
                expected=f"<= {constraints.path_length}",
            )

    def _check_issued(
        self, index: int, certificate: x509.Certificate, issuer: x509.Certificate
    ) -> None:
        try:
            _verify_issued(certificate, issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise EvidenceError(
                f"{self._name(index)} is not issued by the one above it",
                found="another issuer or a wrong signature",
                expected=f"the signature of certificate {index + 2}",
            ) from None

    def check_dates(self, at: datetime, room: timedelta = timedelta(0)) -> None:
        """Raises :class:`EvidenceError` unless all certificates were valid.

        Args:
            at: when, aware.
            room: how far their dates may be from it, either way, for clocks that differ.
        """
        for index, certificate in enumerate(self._path):
            since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            early = since - at > room
            if early or at - until > room:
                raise EvidenceError(
                    f"{self._name(index)} is {'not valid yet' if early else 'expired'}",
                    found=f"{at:%Y-%m-%d %H:%M:%S} UTC",
                    expected=f"{since:%Y-%m-%d %H:%M:%S} to {until:%Y-%m-%d %H:%M:%S}",
                    remedy="check the clock, or judge old evidence at its own time",
                )


def check_signature(
    certificate: x509.Certificate, signature: bytes, message: bytes, what: str
) -> None:
    """Raises :class:`EvidenceError` unless it is a raw P-384 signature over ``message``."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or len(signature) != SIGNATURE_BYTES:
        raise EvidenceError(
            f"the signature of {what} has the wrong length",
            found=f"{len(signature)} bytes",
            expected=f"{SIGNATURE_BYTES} bytes",
        )
    half = SIGNATURE_BYTES // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise EvidenceError(
            f"{what} is not signed by the key of its certificate",
            found="altered bytes, or another key's signature",
            expected="ECDSA P-384 with SHA-384",
        ) from None
