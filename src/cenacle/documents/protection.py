"""How strong an evidence kind's protection is, as an ordered scale.

``simulated`` protects from nobody with root on the machine; ``measured`` (TPM and IMA)
shows which software ran but the host can read its memory; ``tee`` keeps the host out.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import StringConstraints

from cenacle.documents.base import Frozen
from cenacle.errors import DocumentError

__all__ = [
    "DEVICE_KINDS",
    "ENCLAVE_KINDS",
    "EVIDENCE_KINDS",
    "Measured",
    "Protection",
    "ProtectionByUse",
    "Use",
    "at_least",
    "demanded_for",
    "protection_of",
    "strongest",
]

Measured = Annotated[
    str,
    StringConstraints(
        pattern=r"^(?:sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}"
        r"|hex:(?:[0-9a-f]{2}){1,256})$"
    ),
]
"""What a register or a software measurement holds: a digest, or raw bytes as ``hex:``."""

Protection = Literal["simulated", "measured", "tee"]

Use = Literal["training", "inference", "any"]
"""What a job does with an asset; ``any`` where that cannot be known beforehand."""


class ProtectionByUse(Frozen):
    """Another protection for each use: Perun's trade-off between speed and protection.

    What is left out is ``tee``.
    """

    training: Protection = "tee"
    inference: Protection = "tee"


_ORDER: Final[dict[str, int]] = {"simulated": 0, "measured": 1, "tee": 2}

EVIDENCE_KINDS: Final[dict[str, Protection]] = {
    "simulated": "simulated",
    "tpm": "measured",
    "ima": "measured",
    "sgx": "tee",
    "tdx": "tee",
    "snp": "tee",
    "az-snp-vtpm": "tee",
    "nitro": "tee",
    "nvidia": "tee",
    "composite": "tee",
}

DEVICE_KINDS: Final = frozenset({"nvidia"})
"""Kinds that speak for a device only: no enclave runs in one, so they stand in ``composite``."""

ENCLAVE_KINDS: Final = tuple(kind for kind in EVIDENCE_KINDS if kind not in DEVICE_KINDS)
"""Kinds that a contract can accept of an enclave."""


def protection_of(kind: str) -> Protection:
    """The protection that evidence of this kind can prove at best."""
    try:
        return EVIDENCE_KINDS[kind]
    except KeyError:
        raise DocumentError(
            "an evidence kind is unknown", found=repr(kind), expected=", ".join(EVIDENCE_KINDS)
        ) from None


def strongest(*levels: Protection) -> Protection:
    """The strongest of several protections."""
    return max(levels, key=_ORDER.__getitem__)


def demanded_for(demand: Protection | ProtectionByUse, use: Use) -> Protection:
    """What is demanded of this use; of a use that is not known, the strongest of all."""
    if not isinstance(demand, ProtectionByUse):
        return demand
    match use:
        case "training":
            return demand.training
        case "inference":
            return demand.inference
    return strongest(demand.training, demand.inference)


def at_least(found: Protection, demanded: Protection) -> bool:
    """Whether ``found`` is as strong as ``demanded`` or stronger."""
    return _ORDER[found] >= _ORDER[demanded]
