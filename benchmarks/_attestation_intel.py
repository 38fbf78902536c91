"""How long a broker needs to verify SGX and TDX evidence, from bytes to claims."""

from __future__ import annotations

import json
import statistics
import time
from datetime import timedelta
from pathlib import Path

from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Verifier
from cenacle.attestation.sgx import SgxVerifier
from cenacle.attestation.tdx import TdxVerifier
from cenacle.documents.base import parse_time

__all__ = ["intel_verify_ms"]


def intel_verify_ms(folder: Path, rounds: int = 200) -> dict[str, float]:
    """Milliseconds of CPU time, medians, for the genuine samples; nothing is cached between rounds.

    Each round reads the body, checks nine ECDSA P-256 signatures, has ``dcap-qvl`` judge
    the same quote, and compares. The collateral is that of an hour after it was issued.

    Args:
        folder: of the genuine samples.
    """
    found = {}
    kinds: tuple[tuple[Verifier, str], ...] = (
        (SgxVerifier(), "sgx_quote"),
        (TdxVerifier(), "tdx_quote"),
    )
    for verifier, name in kinds:
        quote = (folder / "dcap" / name).read_bytes()
        collateral = (folder / "dcap" / f"{name}_collateral.json").read_bytes()
        evidence = Evidence(kind=verifier.kind, body=verifier.body_of(quote, collateral))
        issued = json.loads(json.loads(collateral)["tcb_info"])["issueDate"]
        now = parse_time(issued) + timedelta(hours=1)
        times = []
        for _ in range(rounds):
            start = time.thread_time()
            verifier.inspect(evidence, now)
            times.append(time.thread_time() - start)
        found[verifier.kind] = round(statistics.median(times) * 1e3, 3)
    return found


if __name__ == "__main__":
    print(intel_verify_ms(Path(__file__).parents[2] / "shared" / "evidence"))
