"""How long a broker needs to verify Nitro and NVIDIA evidence, from bytes to claims."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cenacle.attestation import p384_path
from cenacle.attestation.claims import Evidence
from cenacle.attestation.nitro import NitroVerifier
from cenacle.attestation.nvidia import NvidiaVerifier
from cenacle.attestation.registry import Verifier

__all__ = ["device_verify_ms"]

_WHEN = datetime(2025, 12, 25, 13, 16, tzinfo=UTC)  # within the Nitro sample's three hours


def _forget() -> None:
    """Empty the cache of certificates, as in a process that has just started."""
    for value in vars(p384_path).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _median_ms(run: Callable[[], object], before: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        before()
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return round(statistics.median(times) * 1e3, 3)


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
    found = {}
    for verifier, evidence in kinds:

        def run(verifier: Verifier = verifier, evidence: Evidence = evidence) -> object:
            return verifier.inspect(evidence, _WHEN)

        found[verifier.kind] = _median_ms(run, _forget, rounds)
        found[f"{verifier.kind} again"] = _median_ms(run, lambda: None, rounds)
    return found


if __name__ == "__main__":
    print(device_verify_ms(Path(__file__).parents[2] / "shared" / "evidence"))
