"""Key derivation: HKDF-SHA-256 (RFC 5869) with labelled, unambiguous context."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cenacle.crypto.memory import SecretBytes

__all__ = ["derive_key", "encode_fields"]


def encode_fields(*fields: bytes) -> bytes:
    """Join byte strings so that no two different tuples give the same bytes.

    Each field is preceded by its length as eight bytes, big endian.
    """
    return b"".join(len(field).to_bytes(8, "big") + field for field in fields)


def derive_key(
    secret: SecretBytes, label: str, *context: bytes, salt: bytes = b"", length: int = 32
) -> SecretBytes:
    """Derive ``length`` bytes for one purpose.

    Args:
        secret: the input key material.
        label: what the key is for, unique in the program, e.g. ``"sealing/file"``.
        context: whatever the key is bound to.
        salt: the HKDF salt; empty is allowed by RFC 5869.
    """
    info = encode_fields(b"cenacle/v1", label.encode(), *context)
    out = bytearray(length)
    view = secret.view()
    HKDF(SHA256(), length, salt or None, info).derive_into(view, out)
    view.release()
    return SecretBytes(out)
