"""A software TPM for the machine: its identity is made once, its state is each machine's own.

Whoever runs this program owns that TPM. Its endorsement certificate is signed by an authority
in the same folder, which a relying party trusts, or does not; see docs/vm.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cenacle.attestation.tpm_endorsement import load_certificate
from cenacle.documents.base import Digest, sha256_digest
from cenacle.enclave.vm.qemu import program
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["AUTHORITY_FILE", "TpmIdentity"]

AUTHORITY_FILE: Final = "issuercert.pem"
_STATE: Final = "tpm2-00.permall"
_SETUP_S: Final = 120


class TpmIdentity:
    """The endorsement key of this host's software TPMs, with its certificate.

    Args:
        folder: where it is kept; made by :meth:`prepare`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def authority(self) -> Path:
        """The certificate (PEM) of the authority that signed the endorsement certificate."""
        return self._folder / "authority" / AUTHORITY_FILE

    def endorsement_keys(self) -> tuple[Digest, ...]:
        """SHA-256 of each endorsement key: accepted values of the measurement ``ek``.

        Raises:
            UnavailableError: the identity is incomplete.
        """
        try:
            certificates = [
                load_certificate(path.read_bytes())
                for path in sorted(self.authority.parent.glob("ek-*.crt"))
            ]
        except (OSError, EvidenceError):
            certificates = []
        if not certificates:
            raise UnavailableError(
                "the certificates of this host's software TPMs cannot be read",
                found=str(self.authority.parent),
                remedy="delete that folder; the next start makes another identity",
            )
        return tuple(
            sha256_digest(
                one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            )
            for one in certificates
        )

    def prepare(self) -> None:
        """Make the identity unless it is there; raises UnavailableError."""
        if (self._folder / _STATE).is_file():
            return
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".tpm-", dir=self._folder.parent))
        try:
            self._set_up(part)
            part.rename(self._folder)
        except OSError:
            if not (self._folder / _STATE).is_file():  # somebody else was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _set_up(self, part: Path) -> None:
        authority = part / "authority"
        authority.mkdir(mode=0o700)
        # The programs keep paths in their files, and the folder is renamed afterwards: the
        # authority signs once, here, and only its certificate is used later.
        configs = {
            "localca.conf": f"statedir = {authority}\n"
            f"signingkey = {authority}/signkey.pem\n"
            f"issuercert = {authority}/{AUTHORITY_FILE}\n"
            f"certserial = {authority}/certserial\n",
            "localca.options": "--platform-manufacturer cenacle\n--platform-version 1\n"
            "--platform-model enclave\n",
        }
        for name, text in configs.items():
            (authority / name).write_text(text, "utf-8")
        setup = authority / "setup.conf"
        setup.write_text(
            f"create_certs_tool = {program('swtpm_localca')}\n"
            f"create_certs_tool_config = {authority}/localca.conf\n"
            f"create_certs_tool_options = {authority}/localca.options\n",
            "utf-8",
        )
        command = [
            *(program("swtpm_setup"), "--tpm2", "--tpmstate", str(part)),
            *("--create-ek-cert", "--ecc", "--pcr-banks", "sha256"),
            *("--config", str(setup), "--logfile", str(authority / "log"), "--overwrite"),
            *("--write-ek-cert-files", str(authority)),
        ]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SETUP_S,
                check=False,
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            code = f"no end after {_SETUP_S} s"
        if not (part / _STATE).is_file() or not (authority / AUTHORITY_FILE).is_file():
            raise UnavailableError(
                "a software TPM cannot be set up",
                found=f"swtpm_setup: {code}",
                remedy="install the Debian package swtpm-tools",
            )

    def copy_to(self, folder: Path) -> None:
        """A state of its own for one machine, which is forgotten with it."""
        shutil.copyfile(self._folder / _STATE, folder / _STATE)

    @staticmethod
    def command(folder: Path, control: int) -> list[str]:
        """Command line of the TPM's process, on a connected control socket."""
        return [
            *(program("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={folder}"),
            *("--ctrl", f"type=unixio,clientfd={control}", "--terminate"),
        ]
