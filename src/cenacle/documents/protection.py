"""How strong an evidence kind's protection is, as an ordered scale.

``simulated`` protects from nobody with root on the machine; ``measured`` (TPM and IMA)
shows which software ran but the host can read its memory; ``tee`` keeps the host out.
"""

from __future__ import annotations

from typing import Final, Literal

from cenacle.errors import DocumentError

__all__ = ["EVIDENCE_KINDS", "Protection", "at_least", "protection_of"]

Protection = Literal["simulated", "measured", "tee"]

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
}


def protection_of(kind: str) -> Protection:
    """The protection that evidence of this kind can prove at best."""
    try:
        return EVIDENCE_KINDS[kind]
    except KeyError:
        raise DocumentError(
            "an evidence kind is unknown", found=repr(kind), expected=", ".join(EVIDENCE_KINDS)
        ) from None


def at_least(found: Protection, demanded: Protection) -> bool:
    """Whether ``found`` is as strong as ``demanded`` or stronger."""
    return _ORDER[found] >= _ORDER[demanded]
