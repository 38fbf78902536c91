"""The attester of each evidence kind, made from what the launcher mounted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cenacle.attestation.platform import PlatformAttester
from cenacle.attestation.registry import Attester
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester
from cenacle.documents.protection import EVIDENCE_KINDS
from cenacle.errors import InputError, UnavailableError

__all__ = ["attester_for", "attester_kinds"]


def _simulated(paths: Mapping[str, Path]) -> Attester:
    key = paths.get("installation")
    if key is None:
        raise UnavailableError(
            "this enclave has no installation key to sign simulated evidence with",
            remedy="start the job with `cenacle run`",
        )
    return SimulatedAttester(InstallationKey.load(key))


_ATTESTERS: Final[dict[str, Callable[[Mapping[str, Path]], Attester]]] = {
    "simulated": _simulated,
}


def attester_kinds() -> tuple[str, ...]:
    """Kinds of evidence that an enclave makes by itself, without its host's hardware."""
    return tuple(_ATTESTERS)


def attester_for(kind: str, paths: Mapping[str, Path], platform: Path | None = None) -> Attester:
    """The attester of ``kind``, from inside the enclave.

    Args:
        paths: the enclave's mounts by name.
        platform: the socket where the host serves evidence of its hardware.

    Raises:
        InputError: no attester of this kind exists.
        UnavailableError: it cannot work here.
    """
    make = _ATTESTERS.get(kind)
    if make is not None:
        return make(paths)
    if platform is not None and kind in EVIDENCE_KINDS:
        return PlatformAttester(kind, platform)
    raise InputError(
        "no attester makes this kind of evidence",
        found=kind,
        expected=" or ".join(_ATTESTERS),
    )
