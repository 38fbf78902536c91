"""How long a broker needs to verify SEV-SNP evidence, from bytes to claims."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from benchmarks._attestation_timing import verify_ms
from cenacle.attestation import snp_certificates, snp_chain
from cenacle.attestation.az_snp_vtpm import AzSnpVtpmVerifier
from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Verifier
from cenacle.attestation.snp import SnpVerifier

__all__ = ["amd_verify_ms"]

_WHEN = datetime(2025, 12, 1, tzinfo=UTC)  # within the sample's validity


def amd_verify_ms(folder: Path, rounds: int = 200) -> dict[str, float]:
    """Milliseconds of CPU time, medians, for the genuine Azure sample and the report in it.

    ``snp`` and ``az-snp-vtpm`` are with empty caches: all certificates are read and three RSA
    and one P-384 signature checked. ``... again`` is for a machine whose certificates were seen
    before, as when it makes fresh evidence during a job.

    Args:
        folder: of the genuine samples.
    """
    raw = (folder / "az-snp-vtpm" / "az-snp-vtpm_evidence-v1.json").read_bytes()
    body = AzSnpVtpmVerifier.body_of(raw)
    report = {name: body[name] for name in ("report", "certificates")}
    kinds: list[tuple[Verifier, Evidence]] = [
        (SnpVerifier(), Evidence(kind="snp", body=report)),
        (AzSnpVtpmVerifier(), Evidence(kind="az-snp-vtpm", body=body)),
    ]
    return verify_ms(kinds, _WHEN, rounds, (snp_certificates, snp_chain))


if __name__ == "__main__":
    print(amd_verify_ms(Path(__file__).parents[2] / "shared" / "evidence"))
