"""Software TPMs as real processes, with endorsement certificates of a local authority."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyChallenge,
    AttestationKeyRequest,
    certify_key,
    check_attestation_key,
    check_endorsement_key,
    make_credential,
)
from cenacle.attestation.tpm_endorsement import Endorsement, verify_endorsement
from cenacle.attestation.tpm_keys import Public
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import EvidenceError

__all__ = ["LocalIssuer", "Manufacturer", "Tpm", "require_swtpm", "run_swtpm"]


def require_swtpm() -> None:
    """Skips where a software TPM cannot run, naming the package."""
    for program, package in (("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools")):
        if shutil.which(program) is None:
            pytest.skip(f"TPM tests need {program}: install Debian's package {package}")
    pytest.importorskip("tpm2_pytss", reason="TPM tests need tpm2-pytss: pip install cenacle[tpm]")


@dataclass(frozen=True)
class Manufacturer:
    """A local authority that certifies endorsement keys (swtpm_localca)."""

    folder: Path

    @property
    def root(self) -> x509.Certificate:
        pem = (self.folder / "ca" / "swtpm-localca-rootca-cert.pem").read_bytes()
        return x509.load_pem_x509_certificate(pem)

    @property
    def issuer(self) -> bytes:
        """The certificate (DER) between the root's and the endorsement keys'."""
        pem = (self.folder / "ca" / "issuercert.pem").read_bytes()
        return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)

    def make_plain(self, name: str) -> Path:
        """The state of a new TPM that nobody certified: in a tenth of the time."""
        state = self.folder / name
        state.mkdir()
        command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--pcr-banks", "sha256"]
        command += ["--config", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return state

    def make(self, name: str) -> Path:
        """The state of a new TPM, with endorsement keys and their certificates."""
        ca, state = self.folder / "ca", self.folder / name
        ca.mkdir(exist_ok=True)
        state.mkdir()
        local, options, setup = (self.folder / n for n in ("ca.conf", "ca.options", "setup.conf"))
        local.write_text(
            f"statedir = {ca}\nsigningkey = {ca}/signkey.pem\n"
            f"issuercert = {ca}/issuercert.pem\ncertserial = {ca}/certserial\n"
        )
        options.write_text(
            "--platform-manufacturer test\n--platform-version 1\n--platform-model test\n"
        )
        setup.write_text(
            f"create_certs_tool = {shutil.which('swtpm_localca')}\n"
            f"create_certs_tool_config = {local}\ncreate_certs_tool_options = {options}\n"
        )
        command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--create-ek-cert"]
        command += ["--config", str(setup), "--pcr-banks", "sha1,sha256,sha384"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return state


@dataclass(frozen=True)
class Tpm:
    """A running software TPM."""

    tcti: str
    manufacturer: Manufacturer

    @property
    def authorities(self) -> tuple[bytes, ...]:
        return (self.manufacturer.issuer,)


@contextmanager
def run_swtpm(manufacturer: Manufacturer, state: Path) -> Iterator[Tpm]:
    """A TPM just switched on, from a copy of its state; what it does leaves no trace."""
    folder = Path(tempfile.mkdtemp(prefix="swtpm-"))  # socket names must be short
    shutil.copytree(state, folder / "state")
    # Sockets that listen already: whoever connects early waits in their queue.
    with _listening(folder / "tpm") as server, _listening(folder / "tpm.ctrl") as control:
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}/state"]
        command += ["--server", f"type=unixio,fd={server.fileno()}"]
        command += ["--ctrl", f"type=unixio,fd={control.fileno()}"]
        command += ["--flags", "not-need-init,startup-clear"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(server.fileno(), control.fileno()),
        )
    try:
        yield Tpm(f"swtpm:path={folder}/tpm", manufacturer)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def _listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(8)
    return made


class LocalIssuer:
    """An issuer in this process, as a broker is one; tests put something between.

    Attributes:
        now: its clock.
    """

    def __init__(self, *roots: x509.Certificate, now: datetime | None = None) -> None:
        self.key = SigningKey.generate()
        self.roots = roots
        self.now = now or datetime.now(UTC).replace(microsecond=0)
        self._secrets: dict[str, bytes] = {}

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        ek, ak = Public.parse(unb64(request.endorsement_key)), self._key(request)
        check_endorsement_key(ek, self._endorsement(request))
        value, challenge = secrets.token_bytes(32), secrets.token_hex(8)
        self._secrets[b64(challenge.encode())] = value
        credential = make_credential(ek, ak.name, value)
        return AttestationKeyChallenge(
            challenge=b64(challenge.encode()),
            credential=b64(credential.blob),
            secret=b64(credential.secret),
        )

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        if self._secrets.pop(answer.challenge) != unb64(answer.secret):
            raise EvidenceError("the challenge was not solved")
        return certify_key(
            self._key(answer.request), self._endorsement(answer.request), self.key, self.now
        )

    def _key(self, request: AttestationKeyRequest) -> Public:
        key = Public.parse(unb64(request.attestation_key))
        check_attestation_key(key)
        return key

    def _endorsement(self, request: AttestationKeyRequest) -> Endorsement:
        chain = [unb64(der) for der in request.certificates]
        return verify_endorsement(chain, self.roots, self.now)
