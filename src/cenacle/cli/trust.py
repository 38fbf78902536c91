"""What a user or broker trusts beside the vendors' roots: certificates and lists in a folder.

``FOLDER/trust/tpm`` holds roots of TPM vendors, ``software-tpm`` those of TPMs in software (whose
evidence is simulated), ``ima`` lists of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.crypto import VerifyKey
from cenacle.documents.base import parse_yaml
from cenacle.documents.contract import EnclaveRequirements
from cenacle.errors import InputError
from cenacle.sealing.disk import disk_errors

if TYPE_CHECKING:
    from cryptography import x509

    from cenacle.attestation.verifiers import Trust

__all__ = [
    "TrustKind",
    "add_trust",
    "read_certificates",
    "read_requirements",
    "read_small",
    "read_trust",
    "user_verifiers",
]

TrustKind = Literal["tpm", "software-tpm", "ima"]

_MAX_FILE: Final = 64 * 1024 * 1024


def read_small(path: Path) -> bytes:
    """A file that somebody named; refused where it is no file of a sensible size."""
    with disk_errors(f"read {path}"):
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise InputError(
                "a file is too large", found=f"{path}: {size} bytes", expected=f"{_MAX_FILE}"
            )
        return path.read_bytes()


def read_certificates(paths: Sequence[Path]) -> tuple[x509.Certificate, ...]:
    """Certificates of PEM files.

    Raises:
        InputError: a file is missing, or holds no certificate.
    """
    from cryptography import x509

    found: list[x509.Certificate] = []
    for path in paths:
        try:
            found += x509.load_pem_x509_certificates(read_small(path))
        except ValueError:
            raise InputError(
                "a root certificate cannot be read", found=path, expected="PEM"
            ) from None
    return tuple(found)


def _files(folder: Path, kind: TrustKind) -> list[Path]:
    return sorted(path for path in (folder / "trust" / kind).glob("*") if path.is_file())


def read_trust(folder: Path, issuers: Sequence[VerifyKey] = ()) -> Trust:
    """What was added to the folder.

    Args:
        issuers: brokers whose certificates of TPM keys count.
    """
    from cenacle.attestation.verifiers import Trust

    return Trust(
        issuers=tuple(issuers),
        tpm_roots=read_certificates(_files(folder, "tpm")),
        software_tpm_roots=read_certificates(_files(folder, "software-tpm")),
        allow_lists=tuple(read_small(path) for path in _files(folder, "ima")),
    )


def add_trust(folder: Path, kind: TrustKind, source: Path) -> Path:
    """Copy a root or list into the folder, under the digest of its content.

    Raises:
        InputError: it is not what its kind says.
    """
    from cenacle.cli.home import write_file

    data = read_small(source)
    if kind == "ima":
        from cenacle.attestation.ima_allow import AllowList

        AllowList.parse(data)
    elif not read_certificates([source]):
        raise InputError("a file holds no certificate", found=source, expected="PEM")
    place = folder / "trust" / kind
    with disk_errors(f"make the folder {place}"):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = place / (hashlib.sha256(data).hexdigest() + source.suffix)
    write_file(target, data)
    return target


def read_requirements(path: Path) -> EnclaveRequirements:
    """Reference values and policy: the ``enclave`` field of a contract, or a whole contract."""
    fields = parse_yaml(read_small(path))
    if isinstance(fields, dict) and isinstance(fields.get("enclave"), dict):
        fields = fields["enclave"]
    return EnclaveRequirements.from_fields(fields)


def user_verifiers(folder: Path, issuer: VerifyKey) -> VerifierSet:
    """Every verifier that a party has: what it accepts, its terms and pins decide.

    Args:
        issuer: the broker whose receipts or evidence are looked at.
    """
    from cenacle.attestation.verifiers import hardware_verifiers

    return VerifierSet.of_development(
        SimulatedVerifier(), *hardware_verifiers(read_trust(folder, (issuer,)))
    )
