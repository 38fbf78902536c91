"""The verifiers of real hardware that this installation can make, by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

from cryptography import x509

from cenacle.attestation.registry import Verifier
from cenacle.crypto import VerifyKey
from cenacle.documents.protection import EVIDENCE_KINDS
from cenacle.errors import InputError, UnavailableError

__all__ = ["Trust", "hardware_kinds", "hardware_verifier", "hardware_verifiers", "missing_for"]


@dataclass(frozen=True)
class Trust:
    """What verifiers take as given, beside the vendors' roots that come with this package.

    Attributes:
        issuers: brokers whose certificates of TPM attestation keys count.
        tpm_roots: further roots of TPM vendors' endorsement certificates.
        software_tpm_roots: roots of TPMs in software; evidence under them is simulated, and no
            production broker holds a verifier with any.
        allow_lists: lists of files for ``ima`` evidence, in their file format.
    """

    issuers: Sequence[VerifyKey] = ()
    tpm_roots: Sequence[x509.Certificate] = ()
    software_tpm_roots: Sequence[x509.Certificate] = ()
    allow_lists: Sequence[bytes] = field(default=())


class _Home(NamedTuple):
    module: str
    name: str
    needs: str | None = None


_HOMES: Final[Mapping[str, _Home]] = {
    "tpm": _Home("tpm", "TpmVerifier"),
    "ima": _Home("ima", "ImaVerifier"),
    "sgx": _Home("sgx", "SgxVerifier", "dcap_qvl"),
    "tdx": _Home("tdx", "TdxVerifier", "dcap_qvl"),
    "snp": _Home("snp", "SnpVerifier", "asn1crypto"),
    "az-snp-vtpm": _Home("az_snp_vtpm", "AzSnpVtpmVerifier", "asn1crypto"),
    "nitro": _Home("nitro", "NitroVerifier", "cbor2"),
    "nvidia": _Home("nvidia", "NvidiaVerifier"),
    "composite": _Home("composite", "CompositeVerifier"),
}


def hardware_kinds() -> tuple[str, ...]:
    """Every kind of real evidence, whether it can be verified here or not."""
    return tuple(_HOMES)


def missing_for(kind: str) -> str | None:
    """What has to be installed to verify this kind; ``None`` if nothing."""
    home = _HOMES.get(kind)
    if home is None or home.needs is None or find_spec(home.needs) is not None:
        return None
    return f"{home.needs}: pip install 'cenacle[attest]'"


def hardware_verifier(kind: str, trust: Trust = Trust()) -> Verifier:
    """The verifier of one kind.

    Raises:
        InputError: the kind is not one of real hardware.
        UnavailableError: its library is not installed.
    """
    home = _HOMES.get(kind)
    if home is None:
        raise InputError(
            "this kind of evidence has no verifier here",
            found=kind,
            expected=" or ".join(k for k in EVIDENCE_KINDS if k in _HOMES),
        )
    if (missing := missing_for(kind)) is not None:
        raise UnavailableError(
            f"{kind} evidence cannot be verified here", found="a library is missing", remedy=missing
        )
    make: Callable[..., Verifier] = getattr(
        import_module(f"cenacle.attestation.{home.module}"), home.name
    )
    positional, named = _arguments(kind, trust)
    return make(*positional, **named)


def _arguments(kind: str, trust: Trust) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tpm = {"roots": None, "software_roots": tuple(trust.software_tpm_roots)}
    if trust.tpm_roots:
        from_vendors = import_module("cenacle.attestation.tpm_roots").vendor_roots()
        tpm["roots"] = (*from_vendors, *trust.tpm_roots)
    match kind:
        case "tpm":
            return (tuple(trust.issuers),), tpm
        case "ima":
            read = import_module("cenacle.attestation.ima_allow").AllowList.parse
            lists = tuple(read(raw) for raw in trust.allow_lists)
            return (tuple(trust.issuers),), {**tpm, "allow_lists": lists}
        case "composite":
            members = tuple(
                hardware_verifier(one, trust)
                for one in _HOMES
                if one != "composite" and missing_for(one) is None
            )
            return (members,), {}
    return (), {}


def hardware_verifiers(trust: Trust = Trust()) -> tuple[Verifier, ...]:
    """Every verifier whose library is installed."""
    return tuple(hardware_verifier(kind, trust) for kind in _HOMES if missing_for(kind) is None)
