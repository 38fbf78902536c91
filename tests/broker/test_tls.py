"""Real TLS on loopback: the pinned certificate, and no other."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtensionOID, NameOID

from cenacle.broker.tls import (
    CERTIFICATE_FILE,
    KEY_FILE,
    LIFETIME,
    TlsFiles,
    client_context,
    ensure_certificate,
    given_certificate,
    renew_certificate,
    server_context,
)
from cenacle.errors import InputError, VerificationError

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "broker"


@contextlib.contextmanager
def serving(context: ssl.SSLContext, host: str = "127.0.0.1") -> Iterator[int]:
    """A server that answers each connection with an HTTP response, until the end."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)

    def answer() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError):
                plain.settimeout(10)
                with context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ask(context: ssl.SSLContext, port: int, name: str = "localhost", at: str = "127.0.0.1") -> str:
    """The protocol version that a handshake and an exchange used."""
    with (
        socket.create_connection((at, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        secure.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert secure.recv(4096).startswith(b"HTTP/1.1 200")
        return str(secure.version())


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "broker.example", "192.0.2.7"])
def test_the_pinned_certificate_is_accepted(folder: Path, name: str) -> None:
    files = ensure_certificate(folder, ["broker.example", "192.0.2.7"])
    with serving(server_context(files)) as port:
        assert ask(client_context(files.certificate_pem), port, name) == "TLSv1.3"


def test_a_name_that_it_does_not_have_is_refused(folder: Path) -> None:
    files = ensure_certificate(folder)
    with serving(server_context(files)) as port, pytest.raises(ssl.SSLCertVerificationError):
        ask(client_context(files.certificate_pem), port, "broker.example")


def test_a_certificate_of_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    pinned = ensure_certificate(folder)
    impostor = ensure_certificate(tmp_path / "impostor")
    with serving(server_context(impostor)) as port, pytest.raises(ssl.SSLCertVerificationError):
        ask(client_context(pinned.certificate_pem), port)


def test_httpx_accepts_the_pin_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    pinned = ensure_certificate(folder)
    impostor = ensure_certificate(tmp_path / "impostor")
    with (
        serving(server_context(pinned)) as port,
        httpx.Client(verify=client_context(pinned.certificate_pem), trust_env=False) as client,
    ):
        assert client.get(f"https://localhost:{port}/").text == "ok"
    with (
        serving(server_context(impostor)) as port,
        httpx.Client(verify=client_context(pinned.certificate_pem), trust_env=False) as client,
        pytest.raises(httpx.ConnectError, match="certificate"),
    ):
        client.get(f"https://localhost:{port}/")


def test_older_protocols_are_refused(folder: Path) -> None:
    files = ensure_certificate(folder)
    old_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old_client.load_verify_locations(files.certificate)
    old_client.maximum_version = ssl.TLSVersion.TLSv1_2
    with serving(server_context(files)) as port, pytest.raises(ssl.SSLError):
        ask(old_client, port)
    old_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old_server.load_cert_chain(files.certificate, files.key)
    old_server.maximum_version = ssl.TLSVersion.TLSv1_2
    with serving(old_server) as port, pytest.raises(ssl.SSLError):
        ask(client_context(files.certificate_pem), port)


def test_openssl_accepts_it_as_its_only_authority(folder: Path) -> None:
    """Strictly, and without our own comparison: a plain client with the file alone."""
    files = ensure_certificate(folder)
    plain = ssl.create_default_context(cafile=str(files.certificate))
    plain.verify_flags |= ssl.VERIFY_X509_STRICT
    with serving(server_context(files)) as port:
        assert ask(plain, port) == "TLSv1.3"


def test_the_certificate_can_vouch_for_nothing_else(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate(
        ensure_certificate(folder, now=NOW).certificate_pem.encode()
    )
    constraints = certificate.extensions.get_extension_for_oid(ExtensionOID.BASIC_CONSTRAINTS)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert certificate.not_valid_after_utc == NOW.replace(microsecond=0) + LIFETIME
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}


# ---------------------------------------------------------------- given certificates


def _make(
    folder: Path,
    *,
    authority: bool,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
    days: int = 30,
) -> tuple[TlsFiles, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for localhost, self-signed or issued by another."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"given {folder.name}")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signer, parent = (key, None) if issuer is None else (issuer[1], issuer[0])
    above = signer.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if parent is None else parent.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(days=60))
        .not_valid_after(NOW + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, authority, authority, False, False),
            critical=True,
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above), critical=False)
        .sign(signer, hashes.SHA256())
    )
    folder.mkdir(mode=0o700)
    files = TlsFiles(folder / "cert.pem", folder / "key.pem", "")
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(files.key, key)
    return files, certificate, key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize("authority", [False, True])
def test_a_given_certificate_is_pinned_exactly(tmp_path: Path, authority: bool) -> None:
    """Even one that may issue others vouches for itself alone."""
    files, certificate, key = _make(tmp_path / "given", authority=authority)
    given = given_certificate(files.certificate, files.key)
    with serving(server_context(given)) as port:
        assert ask(client_context(given.certificate_pem), port) == "TLSv1.3"
    child, _, _ = _make(tmp_path / "child", authority=False, issuer=(certificate, key))
    with (
        serving(server_context(given_certificate(child.certificate, child.key))) as port,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ask(client_context(given.certificate_pem), port)


def test_a_certificate_of_an_authority_needs_no_chain(tmp_path: Path) -> None:
    _, certificate, key = _make(tmp_path / "authority", authority=True)
    leaf, _, _ = _make(tmp_path / "leaf", authority=False, issuer=(certificate, key))
    given = given_certificate(leaf.certificate, leaf.key)
    with serving(server_context(given)) as port:
        assert ask(client_context(given.certificate_pem), port) == "TLSv1.3"


def test_memory_sockets_check_the_pin_too(tmp_path: Path) -> None:
    """asyncio and proxies use ``SSLObject``, not ``SSLSocket``."""
    files, certificate, key = _make(tmp_path / "given", authority=True)
    child, _, _ = _make(tmp_path / "child", authority=False, issuer=(certificate, key))

    def shake(server_files: TlsFiles) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(files.certificate.read_text()).wrap_bio(
            to_client, to_server, server_hostname="localhost"
        )
        server = server_context(server_files).wrap_bio(to_server, to_client, server_side=True)
        for _ in range(4):
            for end in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()

    shake(files)
    with pytest.raises(ssl.SSLCertVerificationError, match="not the pinned one"):
        shake(child)


@pytest.mark.parametrize("pem", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAA\n", "\u00e9"])
def test_a_pin_that_is_no_certificate_is_refused(pem: str) -> None:
    with pytest.raises(VerificationError, match="cannot be read"):
        client_context(pem)


def test_a_given_key_must_fit(folder: Path, tmp_path: Path) -> None:
    files = ensure_certificate(folder)
    other = ensure_certificate(tmp_path / "other")
    with pytest.raises(InputError, match="does not belong"):
        given_certificate(files.certificate, other.key)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_key_is_refused(folder: Path, content: bytes) -> None:
    files = ensure_certificate(folder)
    files.key.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        given_certificate(files.certificate, files.key)


def test_an_encrypted_key_is_refused(folder: Path) -> None:
    files = ensure_certificate(folder)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(InputError, match="unencrypted"):
        given_certificate(files.certificate, files.key)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_damaged_certificate_is_refused(folder: Path, content: bytes) -> None:
    files = ensure_certificate(folder)
    files.certificate.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        ensure_certificate(folder)


def test_missing_files_are_named(folder: Path) -> None:
    files = ensure_certificate(folder)
    files.key.unlink()
    with pytest.raises(InputError, match=KEY_FILE):
        ensure_certificate(folder)
    assert not files.key.exists()
    with pytest.raises(InputError, match=r"none\.pem"):
        given_certificate(folder / "none.pem", files.key)


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_key_open_to_others_is_refused(folder: Path, mode: int) -> None:
    files = ensure_certificate(folder)
    files.key.chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        ensure_certificate(folder)


@pytest.mark.parametrize("host", ["a b", "", "caf\u00e9.example", "a..b", "x" * 64, "*"])
def test_impossible_host_names_are_refused(folder: Path, host: str) -> None:
    with pytest.raises(InputError, match="host name"):
        ensure_certificate(folder, [host])
    assert not (folder / CERTIFICATE_FILE).exists()


# ---------------------------------------------------------------- over time


def test_a_restart_keeps_the_certificate(folder: Path) -> None:
    old = os.umask(0)
    try:
        first = ensure_certificate(folder)
    finally:
        os.umask(old)
    assert ensure_certificate(folder) == first
    assert stat.S_IMODE(first.key.stat().st_mode) == 0o600


def test_a_start_cut_off_after_the_key_is_completed(folder: Path) -> None:
    files = ensure_certificate(folder)
    key = files.key.read_bytes()
    files.certificate.unlink()
    again = ensure_certificate(folder)
    assert again.key.read_bytes() == key
    with serving(server_context(again)) as port:
        ask(client_context(again.certificate_pem), port)


def test_an_expired_certificate_is_refused_until_it_is_renewed(folder: Path) -> None:
    ago = NOW - dt.timedelta(days=400)
    old = ensure_certificate(folder, now=ago)
    with pytest.raises(InputError, match="not valid now"):
        ensure_certificate(folder)
    with pytest.raises(InputError, match="not valid now"):
        given_certificate(old.certificate, old.key, now=ago - dt.timedelta(days=1))
    with serving(server_context(old)) as port, pytest.raises(ssl.SSLCertVerificationError):
        ask(client_context(old.certificate_pem), port)
    new = renew_certificate(folder, ["broker.example"])
    assert new.certificate_pem != old.certificate_pem
    with serving(server_context(new)) as port:
        ask(client_context(new.certificate_pem), port, "broker.example")
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(client_context(old.certificate_pem), port)


def test_a_renewal_needs_the_brokers_own_key(folder: Path) -> None:
    files = ensure_certificate(folder)
    before = files.certificate.read_bytes()
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    files.key.write_bytes(
        rsa_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(InputError, match="P-256 key that the broker made"):
        renew_certificate(folder)
    assert files.certificate.read_bytes() == before
