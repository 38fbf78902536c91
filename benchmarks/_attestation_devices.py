"""How long a broker needs to verify Nitro and NVIDIA evidence, from bytes to claims."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from benchmarks._attestation_timing import verify_ms
from cenacle.attestation import p384_path
from cenacle.attestation.claims import Evidence
from cenacle.attestation.nitro import NitroVerifier
from cenacle.attestation.nvidia import NvidiaVerifier
from cenacle.attestation.registry import Verifier

__all__ = ["device_verify_ms"]

_WHEN = datetime(2025, 12, 25, 13, 16, tzinfo=UTC)  # within the Nitro sample's three hours


def device_verify_ms(folder: Path, rounds: int = 200) -> dict[str, float]:
    """Milliseconds of CPU time, medians, for the genuine samples.

    ``nitro`` and ``nvidia`` are with an empty cache: five P-384 signatures each. ``... again`` is
    for a machine whose certificates were seen before: one signature.

    Args:
        folder: of the genuine samples.
    """
    nitro = NitroVerifier.body_of((folder / "nitro" / "nitro_attestation.bin").read_bytes())
    nvidia = NvidiaVerifier.body_of(
        (folder / "nvidia" / "hopperAttestationReport.txt").read_bytes(),
        (folder / "nvidia" / "hopperCertChain.txt").read_bytes(),
    )
    kinds: list[tuple[Verifier, Evidence]] = [
        (NitroVerifier(), Evidence(kind="nitro", body=nitro)),
        (NvidiaVerifier(), Evidence(kind="nvidia", body=nvidia)),
    ]
    return verify_ms(kinds, _WHEN, rounds, (p384_path,))


if __name__ == "__main__":
    print(device_verify_ms(Path(__file__).parents[2] / "shared" / "evidence"))
