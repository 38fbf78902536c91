"""DSSE envelopes (Dead Simple Signing Envelope v1) around canonical documents.

The signature covers the pre-authentication encoding ``DSSEv1 len type len payload``, so a
signature for one kind of document can never pass for another. Encoding and parsing are
``securesystemslib``'s; which keys must have signed is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeVar

from securesystemslib.dsse import Envelope as _SslibEnvelope
from securesystemslib.signer import Signature

from cenacle.crypto.signing import SigningKey, VerifyKey
from cenacle.documents.base import Document, canonical_json, parse_json, sha256_digest
from cenacle.errors import DocumentError, SignatureError

__all__ = ["Envelope", "pae"]

D = TypeVar("D", bound=Document)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed (DSSE pre-authentication encoding)."""
    return _SslibEnvelope(payload, payload_type, {}).pae()


@dataclass(frozen=True)
class Envelope:
    """A payload, its type, and signatures by key id (raw bytes). Verifies nothing by itself."""

    payload: bytes
    payload_type: str
    signatures: dict[str, bytes]

    @classmethod
    def sign(cls, document: Document, *keys: SigningKey) -> Self:
        return cls(document.canonical_bytes(), document.media_type, {}).signed_by(*keys)

    def signed_by(self, *keys: SigningKey) -> Self:
        """A copy with one more signature a key."""
        message = pae(self.payload_type, self.payload)
        added = {key.verify_key.keyid: key.sign(message) for key in keys}
        return type(self)(self.payload, self.payload_type, {**self.signatures, **added})

    def with_signature(self, keyid: str, signature: bytes) -> Self:
        return type(self)(self.payload, self.payload_type, {**self.signatures, keyid: signature})

    @property
    def digest(self) -> str:
        """The digest of the payload, which is the digest of the document."""
        return sha256_digest(self.payload)

    def verify_signature(self, key: VerifyKey) -> None:
        """Raises :class:`SignatureError` unless ``key`` signed this payload."""
        signature = self.signatures.get(key.keyid)
        if signature is None:
            raise SignatureError(
                "a signature is missing",
                found=f"signatures by {[k[:16] for k in self.signatures] or 'nobody'}",
                expected=f"one by key {key.keyid[:16]}",
                remedy="have the document signed by that key's holder",
            )
        key.verify(signature, pae(self.payload_type, self.payload))

    def open(self, kind: type[D], *keys: VerifyKey) -> D:
        """Verify that every one of ``keys`` (at least one) signed, and return the document."""
        if not keys:
            raise SignatureError("a document was opened without a key to check", expected="a key")
        for key in keys:
            self.verify_signature(key)
        return self.peek(kind)

    def peek(self, kind: type[D]) -> D:
        """The document, its signatures NOT checked: for finding out whose key to check."""
        if self.payload_type != kind.media_type:
            raise DocumentError(
                "an envelope holds another kind of document",
                found=repr(self.payload_type),
                expected=repr(kind.media_type),
            )
        return kind.from_canonical(self.payload)

    def to_fields(self) -> dict[str, Any]:
        """The standard DSSE JSON fields."""
        signatures = {k: Signature(k, s.hex()) for k, s in self.signatures.items()}
        fields: dict[str, Any] = _SslibEnvelope(
            self.payload, self.payload_type, signatures
        ).to_dict()
        return fields

    def to_json(self) -> str:
        return canonical_json(self.to_fields()).decode()

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        return cls.from_fields(parse_json(data))

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Parse DSSE JSON fields; refuses unknown fields and two signatures by one key."""
        wrong = DocumentError(
            "a signed envelope is not valid",
            expected="DSSE fields payload, payloadType, signatures [{keyid, sig}], each key once",
            remedy="fetch the file again; do not edit signed files",
        )
        try:
            if set(fields) != {"payload", "payloadType", "signatures"} or [
                type(fields[name]) for name in ("payload", "payloadType", "signatures")
            ] != [str, str, list]:
                raise wrong
            if any(
                set(s) != {"keyid", "sig"} or not all(isinstance(v, str) for v in s.values())
                for s in fields["signatures"]
            ):
                raise wrong
            copy = {**fields, "signatures": [dict(s) for s in fields["signatures"]]}
            envelope = _SslibEnvelope.from_dict(copy)
            signatures = {k: bytes.fromhex(s.signature) for k, s in envelope.signatures.items()}
            return cls(bytes(envelope.payload), str(envelope.payload_type), signatures)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise wrong from None
