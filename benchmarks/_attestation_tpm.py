"""How fast TPM evidence is made, through a software TPM, and verified."""

from __future__ import annotations

import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from cenacle.attestation.tpm import TpmVerifier
from cenacle.attestation.tpm_attester import TpmAttester, certify_attestation_key
from cenacle.attestation.tpm_device import TpmDevice
from tests.support.swtpm import LocalIssuer, Manufacturer, run_swtpm

__all__ = ["tpm_ms"]

_REPORT = bytes(64)


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


def tpm_ms(rounds: int = 50) -> dict[str, float]:
    """Medians in milliseconds; a real TPM takes hundreds of milliseconds to sign.

    ``quote_ms``: TPM2_Quote on an open connection with a loaded key. ``evidence_ms``: whole
    evidence, from opening the TPM to closing it. ``certify_ms``: certifying the attestation key
    (TPM and issuer, without a network). ``verify_ms``: authenticating evidence; processor time.
    """
    with tempfile.TemporaryDirectory() as folder:
        manufacturer = Manufacturer(Path(folder))
        state = manufacturer.make("tpm")
        now = datetime.now(UTC).replace(microsecond=0)
        issuer = LocalIssuer(manufacturer.root, now=now)
        with run_swtpm(manufacturer, state) as tpm:
            attester = TpmAttester(tpm.tcti, issuer=issuer, authorities=tpm.authorities)
            certify, quote, whole, verify = [], [], [], []
            evidence = attester.attest(_REPORT, {}, (), now)
            for _ in range(rounds):
                start = time.perf_counter()
                evidence = attester.attest(_REPORT, {}, (), now)
                whole.append(time.perf_counter() - start)
            with TpmDevice(tpm.tcti) as device, device.attestation_key() as ak:
                for _ in range(rounds):
                    start = time.perf_counter()
                    device.quote(ak, attester.selection, bytes(32))
                    quote.append(time.perf_counter() - start)
                for _ in range(max(rounds // 5, 1)):
                    start = time.perf_counter()
                    certify_attestation_key(device, ak, issuer, tpm.authorities)
                    certify.append(time.perf_counter() - start)
        verifier = TpmVerifier([issuer.key.verify_key], issuer.roots)
        for _ in range(rounds):
            start = time.process_time()
            verifier.authenticate(evidence, _REPORT, now)
            verify.append(time.process_time() - start)
    return {
        "quote_ms": _median_ms(quote),
        "evidence_ms": _median_ms(whole),
        "certify_ms": _median_ms(certify),
        "verify_ms": _median_ms(verify),
    }


if __name__ == "__main__":
    print(tpm_ms())
