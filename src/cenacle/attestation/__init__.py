"""Evidence and claims (RFC 9334): one evidence kind a file, behind a registry."""

from cenacle.attestation.binding import Statement, report_data
from cenacle.attestation.claims import Claims, Evidence, compare
from cenacle.attestation.measure import measure_enclave
from cenacle.attestation.registry import Attester, Shown, Verifier, VerifierSet
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester, SimulatedVerifier

__all__ = [
    "Attester",
    "Claims",
    "Evidence",
    "InstallationKey",
    "Shown",
    "SimulatedAttester",
    "SimulatedVerifier",
    "Statement",
    "Verifier",
    "VerifierSet",
    "compare",
    "measure_enclave",
    "report_data",
]
