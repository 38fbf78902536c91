"""What attestation costs: verification by kind, quotes through a TPM, lists of files.

``python -m benchmarks.attestation [--json] [--quick] [--evidence FOLDER] [--image FOLDER]``

``verify_ms``: milliseconds of processor time from bytes to claims, by kind, medians. Genuine
evidence is needed, in FOLDER (default: CENACLE_EVIDENCE, or ``../shared/evidence``); kinds whose
sample is not there are left out and named. ``quote_ms``: wall time of a quote through a software
TPM. ``ima_entries_per_s``: entries judged against an allow-list. ``vm_boot_to_key_s``:
seconds from the launch of a measured virtual machine to its keys, once. It needs QEMU and an image
(without PyTorch; default: the one that ``cenacle image build`` makes), is named under ``skipped``
where they are missing, and is left out with --quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._attestation_amd import amd_verify_ms
from benchmarks._attestation_devices import device_verify_ms
from benchmarks._attestation_ima import ima_entries_per_s
from benchmarks._attestation_intel import intel_verify_ms
from benchmarks._attestation_tpm import tpm_ms
from benchmarks._attestation_vm import vm_boot_to_key_s
from benchmarks._report import report
from cenacle.errors import CenacleError


def _evidence_folder(given: str | None) -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "evidence"
    return Path(given or os.environ.get("CENACLE_EVIDENCE") or beside)


def measure(evidence: Path, image: Path | None = None, *, quick: bool) -> dict[str, Any]:
    """Every figure that can be had here; what cannot is named under ``skipped``."""
    rounds = 20 if quick else 200
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {"verify_ms": {}}

    def attempt(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except (FileNotFoundError, CenacleError) as error:
            skipped[name] = str(error)
            return {}

    if evidence.is_dir():
        vendors: dict[str, Callable[[Path, int], dict[str, float]]] = {
            "sgx, tdx": intel_verify_ms,
            "snp, az-snp-vtpm": amd_verify_ms,
            "nitro, nvidia": device_verify_ms,
        }
        for name, work in vendors.items():
            found["verify_ms"] |= attempt(name, partial(work, evidence, rounds))
    else:
        skipped["vendors' kinds"] = f"no genuine evidence in {evidence}"
    through_tpm = attempt("tpm", lambda: tpm_ms(10 if quick else 50))
    if "verify_ms" in through_tpm:
        found["verify_ms"]["tpm"] = through_tpm.pop("verify_ms")
    found |= through_tpm
    found |= attempt("ima", lambda: ima_entries_per_s(10_000 if quick else 100_000))
    if quick:
        skipped["vm"] = "takes a minute: leave out --quick"
    else:
        found |= attempt("vm", lambda: vm_boot_to_key_s(image))
    return {**found, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--evidence", help="folder of genuine evidence")
    parser.add_argument("--image", type=Path, help="folder of an image of virtual machines")
    given = parser.parse_args()
    figures = measure(_evidence_folder(given.evidence), given.image, quick=given.quick)
    report("attestation", figures, as_json=given.json)


if __name__ == "__main__":
    main()
