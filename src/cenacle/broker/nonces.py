"""Nonces that the broker can recognise without having stored them.

A nonce is 16 random bytes, an expiry (8 bytes, seconds since the epoch, big endian) and a
16-byte HMAC-SHA-256 tag over both and the contract's digest, under a key that only the broker
has. So a restart forgets none, several brokers on one database share them, and strangers
cannot fill a table. That each is used once is enforced at release, in the database, by the
transaction that lets keys go.
"""

from __future__ import annotations

import hmac
import secrets
from datetime import UTC, datetime, timedelta
from typing import Final

from cenacle.crypto import SecretBytes
from cenacle.crypto.kdf import encode_fields
from cenacle.errors import EvidenceError

__all__ = ["LIFETIME", "NonceKey"]

LIFETIME: Final = timedelta(minutes=5)
_RANDOM: Final = 16
_EXPIRY: Final = 8
_TAG: Final = 16


class NonceKey:
    """Issues and recognises nonces for one contract each."""

    def __init__(self, key: SecretBytes) -> None:
        self._key = key

    def issue(self, contract: str, now: datetime) -> bytes:
        """A fresh 40-byte nonce for ``contract``, valid for :data:`LIFETIME`."""
        expiry = int((now + LIFETIME).timestamp()).to_bytes(_EXPIRY, "big")
        head = secrets.token_bytes(_RANDOM) + expiry
        return head + self._tag(head, contract)

    def check(self, nonce: bytes, contract: str, now: datetime) -> None:
        """Raises :class:`EvidenceError` unless this broker issued it for ``contract``, recently."""
        head, tag = nonce[: _RANDOM + _EXPIRY], nonce[_RANDOM + _EXPIRY :]
        if not hmac.compare_digest(tag, self._tag(head, contract)):
            raise EvidenceError(
                "the nonce is not one that this broker issued for this contract",
                found=f"{len(nonce)} bytes from elsewhere",
                expected="a nonce from this broker for this very contract",
                remedy="ask the broker for a nonce and attest again",
            )
        expiry = datetime.fromtimestamp(int.from_bytes(head[_RANDOM:], "big"), UTC)
        if now > expiry:
            raise EvidenceError(
                "the nonce has expired",
                found=f"valid until {expiry:%Y-%m-%d %H:%M:%S}",
                expected=f"used within {LIFETIME.seconds} s",
                remedy="ask the broker for a nonce and attest again",
            )

    def _tag(self, head: bytes, contract: str) -> bytes:
        view = self._key.view()
        message = encode_fields(b"cenacle/nonce/v1", head, contract.encode())
        tag = hmac.digest(view, message, "sha256")[:_TAG]
        view.release()
        return tag
