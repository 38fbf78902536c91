from __future__ import annotations

from cryptography.hazmat.primitives import hashes

from cenacle.attestation.intel_roots import intel_roots


def test_the_root_is_intels() -> None:
    (root,) = intel_roots()
    digest = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
    assert root.fingerprint(hashes.SHA256()).hex() == digest
    assert root.subject.rfc4514_string() == (
        "C=US,ST=CA,L=Santa Clara,O=Intel Corporation,CN=Intel SGX Root CA"
    )
    root.verify_directly_issued_by(root)
