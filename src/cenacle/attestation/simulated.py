"""Simulated evidence: real measurements, signed by a software key of this installation.

It protects from nobody with root on the machine, who can read the key and sign anything.
It exists so that every other part (freshness, binding, reference values, refusals) runs
as with hardware. Its verifier exists only in brokers made for development.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Attester, Shown, Verifier
from cenacle.crypto import SecretBytes, SigningKey, VerifyKey
from cenacle.documents.base import (
    Base64,
    Digest,
    Frozen,
    Timestamp,
    b64,
    canonical_json,
    format_time,
    parse_time,
    sha256_digest,
    unb64,
)
from cenacle.errors import CenacleError, EvidenceError, InputError, SignatureError, UnavailableError

__all__ = ["WARNING", "InstallationKey", "SimulatedAttester", "SimulatedVerifier"]

_KIND = "simulated"
_DOMAIN = b"cenacle/simulated-evidence/v2\x00"
WARNING: Final = "simulated: protects from nobody with root on the machine"


class _Report(Frozen):
    """What the installation key signs (all but ``signature``)."""

    warning: Literal["simulated: protects from nobody with root on the machine"] = WARNING
    installation_key: Base64
    report_data: Base64
    issued: Timestamp
    signature: Base64 | None = None

    def message(self) -> bytes:
        fields = self.to_fields()
        fields.pop("signature", None)
        return _DOMAIN + canonical_json(fields)


class InstallationKey:
    """The software key that stands in for a hardware vendor's, one per installation."""

    def __init__(self, key: SigningKey) -> None:
        self.key = key

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read the 32-byte seed, or make it once (mode 0600, never overwritten).

        Raises:
            InputError: the file is damaged.
            UnavailableError: it cannot be written.
        """
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _make_seed(path)
        except OSError as error:
            raise UnavailableError(
                "the installation key cannot be written", found=f"{error.strerror}: {path}"
            ) from None
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the 32-byte seed; :class:`InputError` if it is missing or damaged."""
        try:
            seed = path.read_bytes()
        except OSError as error:
            raise InputError(
                "the installation key cannot be read", found=f"{error.strerror}: {path}"
            ) from None
        if len(seed) != 32:
            raise InputError(
                "the installation key is damaged",
                found=f"{len(seed)} bytes in {path}",
                expected="32 bytes",
                remedy="remove the file to make a new key, and draft new contracts",
            )
        return cls(SigningKey.from_seed(SecretBytes(bytearray(seed))))

    @property
    def measurement(self) -> Digest:
        """How contracts name the installation: the digest of its public key."""
        return sha256_digest(self.key.verify_key.raw)


def _make_seed(path: Path) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(fd, "wb", buffering=0) as file, SecretBytes.random(32) as seed:
            with seed.view() as view:
                file.write(view)
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):  # another process or thread made it first
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class SimulatedAttester(Attester):
    """Signs with the installation key; the measurements are the agent's statement."""

    kind = _KIND

    def __init__(self, installation: InstallationKey) -> None:
        self._installation = installation

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        report = _Report(
            installation_key=b64(self._installation.key.verify_key.raw),
            report_data=b64(bound),
            issued=format_time(now),
        )
        signature = b64(self._installation.key.sign(report.message()))
        return report.model_copy(update={"signature": signature}).to_fields()


class SimulatedVerifier(Verifier):
    """Checks signature, binding and age; the installation itself is a measurement.

    The key that signed becomes the measurement ``installation``, so a contract accepts only
    the installations that its parties listed.
    """

    kind = _KIND

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        del now  # the key has no dates; the age is that of the report
        try:
            fields = {name: value for name, value in evidence.body.items() if name != "statement"}
            report = _Report.from_fields(fields)
            key = VerifyKey(unb64(report.installation_key))
            key.verify(unb64(report.signature or ""), report.message())
        except SignatureError:
            raise EvidenceError(
                "simulated evidence is not signed by the installation that it names",
                found="another signature, or an altered report",
                expected="the installation key's signature over the whole report",
                remedy="start the enclave again",
            ) from None
        except CenacleError as error:
            raise EvidenceError(
                "simulated evidence is malformed", found=error.diagnostics()
            ) from None
        claims = Claims(
            kind=_KIND,
            protection=self.protection,
            measurements={"installation": sha256_digest(key.raw)},
            properties={"warning": WARNING},
            layers=(),
            issued=parse_time(report.issued).astimezone(UTC),
        )
        return Shown(claims, unb64(report.report_data))
