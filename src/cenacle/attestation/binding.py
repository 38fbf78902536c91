"""What evidence is bound to: nonce, contract, the enclave's keys, and what its agent states."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from pydantic import StringConstraints

from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import Digest, Frozen, Name, Timestamp, canonical_json

__all__ = ["REPORT_DATA_BYTES", "Statement", "report_data"]

REPORT_DATA_BYTES: Final = 64

_StatedName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,62}$")]


def report_data(nonce: bytes, contract: str, hpke_key: bytes, signing_key: bytes) -> bytes:
    """SHA-512 over the length-prefixed nonce, contract digest and both public keys.

    The same for every evidence kind (64 bytes is what SGX, TDX and SNP reports carry). The
    prefixes keep two different tuples from giving the same input.
    """
    fields = encode_fields(
        b"cenacle/report-data/v1", nonce, contract.encode(), hpke_key, signing_key
    )
    return hashlib.sha512(fields).digest()


class Statement(Frozen):
    """What the agent says of itself beside what the hardware measured, bound by the evidence.

    Hardware vouches for the agent (by its own measurements), and the agent for this: which
    job it is about to run, under which sandbox. It is worth as much as the measurements that
    the same evidence shows, no more.

    Attributes:
        measurements: taken by the agent, by name.
        layers: sandbox layers that are active.
        issued: the agent's clock.
    """

    measurements: dict[_StatedName, Digest]
    layers: tuple[Name, ...]
    issued: Timestamp

    def bind(self, data: bytes) -> bytes:
        """64 bytes that stand for ``data`` (the 64 bytes of report data) and this statement."""
        fields = encode_fields(b"cenacle/statement/v1", data, canonical_json(self.to_fields()))
        return hashlib.sha512(fields).digest()
