"""Thin, typed wrappers on ``cryptography``: HPKE, key derivation, secret memory, signing keys."""

from cenacle.crypto.hpke import HpkePrivateKey, HpkePublicKey
from cenacle.crypto.kdf import derive_key
from cenacle.crypto.memory import SecretBytes
from cenacle.crypto.signing import SigningKey, VerifyKey

__all__ = [
    "HpkePrivateKey",
    "HpkePublicKey",
    "SecretBytes",
    "SigningKey",
    "VerifyKey",
    "derive_key",
]
