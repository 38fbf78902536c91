"""TLS between a broker and those who pinned its certificate.

The certificate is self-made (P-256, which every OpenSSL accepts; ``CA:FALSE``, so it can vouch
for nothing but itself) or given. Clients trust exactly the pinned one, no certificate authority,
and speak TLS 1.3 alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cenacle.broker.identity import check_private_file, private_folder
from cenacle.errors import InputError, VerificationError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

__all__ = [
    "TlsFiles",
    "client_context",
    "ensure_certificate",
    "given_certificate",
    "renew_certificate",
    "server_context",
]

CERTIFICATE_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
LIFETIME: Final = timedelta(days=365)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_BACKDATE: Final = timedelta(minutes=5)  # clocks of parties differ
_MAX_PEM: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate and its key on disk; ``certificate_pem`` is what parties pin."""

    certificate: Path
    key: Path
    certificate_pem: str


def ensure_certificate(
    folder: Path, hosts: Sequence[str] = (), *, now: datetime | None = None
) -> TlsFiles:
    """The folder's certificate, self-made at the first start for loopback and ``hosts``.

    Args:
        folder: private to the broker (mode 0700).
        hosts: further DNS names or IP addresses that clients use.

    Raises:
        InputError: the certificate has expired or lost its key, or a host name is impossible.
    """
    certificate, key = folder / CERTIFICATE_FILE, folder / KEY_FILE
    with private_folder(folder):
        if not certificate.exists():
            _issue(certificate, key, hosts, now or datetime.now(UTC))
    return given_certificate(certificate, key, now=now)


def renew_certificate(
    folder: Path, hosts: Sequence[str] = (), *, now: datetime | None = None
) -> TlsFiles:
    """Replace the self-made certificate (its key stays); parties must pin the new one."""
    certificate, key = folder / CERTIFICATE_FILE, folder / KEY_FILE
    with private_folder(folder):
        _issue(certificate, key, hosts, now or datetime.now(UTC))
    return given_certificate(certificate, key, now=now)


def given_certificate(certificate: Path, key: Path, *, now: datetime | None = None) -> TlsFiles:
    """Check a certificate and key on disk.

    Raises:
        InputError: one is missing or malformed, they do not belong together, the certificate
            is not valid now, or others can read the key.
    """
    with disk_errors(f"read {certificate}"):
        pem = _read(certificate)
    check_private_file(key)
    parsed = _parse(pem, str(certificate))
    moment = now or datetime.now(UTC)
    if not parsed.not_valid_before_utc <= moment <= parsed.not_valid_after_utc:
        raise InputError(
            "a TLS certificate is not valid now",
            found=f"{certificate}, valid from {parsed.not_valid_before_utc:%Y-%m-%d}"
            f" to {parsed.not_valid_after_utc:%Y-%m-%d}",
            expected=f"one valid on {moment:%Y-%m-%d}",
            remedy="renew it and give parties the new certificate to pin",
        )
    try:
        private = serialization.load_pem_private_key(_read(key), None)
    except (ValueError, TypeError):
        raise InputError(
            "a TLS key cannot be read", found=str(key), expected="an unencrypted PEM private key"
        ) from None
    if _spki(private.public_key()) != _spki(parsed.public_key()):
        raise InputError(
            "a TLS key does not belong to its certificate",
            found=f"{key} and {certificate}",
            expected="the key that the certificate was made for",
        )
    return TlsFiles(certificate, key, pem.decode("ascii"))


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the broker: TLS 1.3 with its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with disk_errors(f"read {files.key}"):
        context.load_cert_chain(files.certificate, files.key)
    return context


class _PinnedContext(ssl.SSLContext):
    pinned: bytes


def _check_pin(context: ssl.SSLContext, presented: bytes | None) -> None:
    pinned = getattr(context, "pinned", b"")
    if not pinned or not hmac.compare_digest(presented or b"", pinned):
        # The chain verified, so a pinned certificate that may issue others issued this one.
        raise ssl.SSLCertVerificationError("the broker's certificate is not the pinned one")


class _PinnedSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_pin(self.context, self.getpeercert(binary_form=True))


class _PinnedObject(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        _check_pin(self.context, self.getpeercert(binary_form=True))


def client_context(certificate_pem: str) -> ssl.SSLContext:
    """For those who talk to a broker: TLS 1.3, and this very certificate or none.

    A handshake with any other raises :class:`ssl.SSLCertVerificationError`, even with one of the
    same name or one that the pinned certificate issued.

    Raises:
        VerificationError: ``certificate_pem`` is not exactly one certificate.
    """
    try:
        pinned = _parse(certificate_pem.encode("ascii"), "the pinned certificate")
    except (InputError, UnicodeEncodeError):
        raise VerificationError(
            "a pinned certificate cannot be read",
            expected="one PEM certificate",
            remedy="fetch the broker's identity again",
        ) from None
    context = _PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A given certificate may come from an authority: pinned itself, it needs no chain.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    context.pinned = pinned.public_bytes(serialization.Encoding.DER)
    context.sslsocket_class = _PinnedSocket
    context.sslobject_class = _PinnedObject
    context.load_verify_locations(cadata=context.pinned)
    return context


def _issue(certificate: Path, key_path: Path, hosts: Sequence[str], now: datetime) -> None:
    names = [_general_name(host) for host in dict.fromkeys((*_LOOPBACK, *hosts))]
    if key_path.exists():
        # An earlier start was cut off after the key, or the certificate is being renewed.
        check_private_file(key_path)
        try:
            key = serialization.load_pem_private_key(_read(key_path), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InputError(
                "a TLS key cannot be used",
                found=str(key_path),
                expected="the P-256 key that the broker made",
                remedy="remove it, and give parties the new certificate to pin",
            )
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        _write(
            key_path,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Cenacle broker")])
    usage = {
        field: field == "digital_signature"
        for field in (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        )
    }
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    _write(certificate, built.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not all(
        0 < len(label) <= 63 and label.replace("-", "a").isalnum() for label in host.split(".")
    ):
        raise InputError(
            "a host name cannot be put into a certificate",
            found=repr(host[:80]),
            expected="a DNS name or an IP address",
        )
    return x509.DNSName(host)


def _parse(pem: bytes, where: str) -> x509.Certificate:
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        found = []
    if not found or pem.count(b"-----BEGIN") != len(found):
        raise InputError(
            "a TLS certificate cannot be read", found=where, expected="PEM certificates alone"
        )
    return found[0]


def _spki(key: Any) -> bytes:
    data: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data


def _read(path: Path) -> bytes:
    with disk_errors(f"read {path}"), path.open("rb") as file:
        return file.read(_MAX_PEM)


def _write(path: Path, data: bytes) -> None:
    with AtomicFile(path, 0o600) as file, disk_errors(f"write {path}"):
        os.fchmod(file.fd, 0o600)
        pwrite_all(file.fd, data, 0)
        file.commit()
