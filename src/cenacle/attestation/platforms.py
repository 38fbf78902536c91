"""Attesters of the hardware of this machine, for a launcher or broker on the host.

Some kinds need what their vendor publishes for the verification (collateral, certificates), which
a host fetches beforehand and keeps in a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, TypeVar

from cenacle.attestation.ima import ImaAttester
from cenacle.attestation.registry import Attester
from cenacle.attestation.tpm_attester import KeyIssuer, TpmAttester
from cenacle.documents.base import Digest
from cenacle.errors import InputError, UnavailableError

__all__ = ["DEFAULT_TCTI", "Platform", "platform_attester", "platform_kinds"]

T = TypeVar("T")

DEFAULT_TCTI: Final = "device:/dev/tpmrm0"


def platform_kinds() -> tuple[str, ...]:
    """Kinds of evidence that a machine's hardware can make."""
    return tuple(_MAKERS)


@dataclass(frozen=True)
class Platform:
    """Where a machine's hardware is, and what its evidence needs beside it.

    Attributes:
        tcti: where the TPM is, as the tpm2-tools take it.
        issuer: who certifies the TPM's attestation key: a broker's client.
        authorities: certificates (DER) between the TPM's endorsement key and its root.
        allow_list: digest of the list of files that the machine claims to keep to.
        collateral: what Intel publishes for the verification of a quote, as a file.
    """

    tcti: str = DEFAULT_TCTI
    issuer: KeyIssuer | None = None
    authorities: tuple[bytes, ...] = ()
    allow_list: Digest | None = None
    collateral: Path | None = None


def platform_attester(kind: str, platform: Platform = Platform()) -> Attester:
    """The attester of one kind on this machine.

    Raises:
        InputError: there is no such kind.
        UnavailableError: something that it needs is not named.
    """
    make = _MAKERS.get(kind)
    if make is None:
        raise InputError(
            "no hardware makes this kind of evidence", found=kind, expected=" or ".join(_MAKERS)
        )
    return make(platform)


def _needed(value: T | None, what: str, remedy: str) -> T:
    if value is None:
        raise UnavailableError(f"evidence of this kind needs {what}", found="none", remedy=remedy)
    return value


def _made(module: str, name: str, *given: object) -> Attester:
    """An attester whose module needs a library that may not be installed."""
    try:
        made: Attester = getattr(import_module(f"cenacle.attestation.{module}"), name)(*given)
    except ImportError as error:
        raise UnavailableError(
            "a library for this kind of evidence is missing",
            found=error.name or "a module",
            remedy="pip install 'cenacle[attest]'",
        ) from None
    return made


def _collateral(platform: Platform) -> Path:
    return _needed(
        platform.collateral, "Intel's collateral of this platform", "name it with --collateral"
    )


def _tpm(platform: Platform) -> Attester:
    return TpmAttester(platform.tcti, issuer=platform.issuer, authorities=platform.authorities)


def _ima(platform: Platform) -> Attester:
    listed = _needed(
        platform.allow_list,
        "the list of files that the machine keeps to",
        "name it in the contract",
    )
    return ImaAttester(
        platform.tcti,
        allow_list=listed,
        issuer=platform.issuer,
        authorities=platform.authorities,
    )


_MAKERS: Final[dict[str, Callable[[Platform], Attester]]] = {
    "tpm": _tpm,
    "ima": _ima,
    "sgx": lambda platform: _made("sgx", "SgxAttester", _collateral(platform)),
    "tdx": lambda platform: _made("tdx", "TdxAttester", _collateral(platform)),
    "snp": lambda _: _made("snp_attester", "SnpAttester"),
    "az-snp-vtpm": lambda platform: _made(
        "az_snp_vtpm_attester", "AzSnpVtpmAttester", platform.tcti
    ),
    "nitro": lambda _: _made("nitro_device", "NitroAttester"),
}
