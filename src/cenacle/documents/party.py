"""Party: an identity with a signing key and an HPKE key."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from cenacle.crypto.hpke import SUITE_NAME, HpkePublicKey
from cenacle.crypto.signing import VerifyKey
from cenacle.documents.base import Base64, Document, Name, Timestamp, unb64
from cenacle.errors import CenacleError

__all__ = ["Party"]


class Party(Document):
    """A party's public half, signed by its own signing key (proof of possession).

    Attributes:
        name: unique at a broker.
        signing_key: base64 of an Ed25519 public key (32 bytes).
        hpke_key: base64 of an HPKE public key (ML-KEM-768 and X25519, 1216 bytes).
    """

    media_type = "application/vnd.cenacle.party+json"

    kind: Literal["party"] = "party"
    version: Literal[1] = 1
    name: Name
    signing_key: Base64
    hpke_key: Base64
    hpke_suite: Literal["MLKEM768-X25519/HKDF-SHA256/AES-256-GCM"] = SUITE_NAME
    created: Timestamp

    @field_validator("signing_key")
    @classmethod
    def _signing_key_parses(cls, text: str) -> str:
        try:
            VerifyKey(unb64(text))
        except CenacleError as error:
            raise ValueError(error.diagnostics()) from None
        return text

    @field_validator("hpke_key")
    @classmethod
    def _hpke_key_parses(cls, text: str) -> str:
        try:
            HpkePublicKey(unb64(text))
        except CenacleError as error:
            raise ValueError(error.diagnostics()) from None
        return text

    @property
    def verify_key(self) -> VerifyKey:
        return VerifyKey(unb64(self.signing_key))

    @property
    def hpke_public_key(self) -> HpkePublicKey:
        return HpkePublicKey(unb64(self.hpke_key))
