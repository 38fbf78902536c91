"""Report data: the 64 bytes that bind evidence to a nonce, a contract and the enclave's keys."""

from __future__ import annotations

import hashlib

from cenacle.crypto.kdf import encode_fields

__all__ = ["REPORT_DATA_BYTES", "report_data"]

REPORT_DATA_BYTES = 64


def report_data(nonce: bytes, contract: str, hpke_key: bytes, signing_key: bytes) -> bytes:
    """SHA-512 over the length-prefixed nonce, contract digest and both public keys.

    The same for every evidence kind (64 bytes is what SGX, TDX and SNP reports carry). The
    prefixes keep two different tuples from giving the same input.
    """
    fields = encode_fields(
        b"cenacle/report-data/v1", nonce, contract.encode(), hpke_key, signing_key
    )
    return hashlib.sha512(fields).digest()
