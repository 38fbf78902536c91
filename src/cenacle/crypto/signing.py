"""Ed25519 keys through ``securesystemslib``, so that HSM, KMS and YubiKey signers fit too."""

from __future__ import annotations

import hashlib
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, Signature, Signer, SSlibKey

from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError, SignatureError

__all__ = ["SigningKey", "VerifyKey"]


class VerifyKey:
    """A public Ed25519 key; ``keyid`` is the SHA-256 of its 32 raw bytes, in hex."""

    __slots__ = ("_key", "keyid", "raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise InputError(
                "an Ed25519 public key has the wrong length",
                found=f"{len(raw)} bytes",
                expected="32 bytes",
            )
        self.raw = bytes(raw)
        self.keyid = hashlib.sha256(raw).hexdigest()
        self._key = SSlibKey(self.keyid, "ed25519", "ed25519", {"public": raw.hex()})

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raises :class:`SignatureError` unless ``signature`` is this key's over ``message``."""
        try:
            self._key.verify_signature(Signature(self.keyid, signature.hex()), message)
        except (UnverifiedSignatureError, VerificationError, ValueError):
            raise SignatureError(
                "a signature does not verify",
                found=f"bytes not signed by key {self.keyid[:16]}",
                expected="the key's signature over exactly these bytes",
                remedy="fetch the document again from its author; it was altered or mis-signed",
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"VerifyKey({self.keyid[:16]})"


class SigningKey:
    """A signer: a local Ed25519 key, or any ``securesystemslib`` signer of an Ed25519 key."""

    __slots__ = ("_seed", "_signer", "verify_key")

    def __init__(self, signer: Signer, seed: SecretBytes | None = None) -> None:
        key = signer.public_key
        if key.keytype != "ed25519":
            raise InputError(
                "a signer has an unsupported key type", found=key.keytype, expected="ed25519"
            )
        self._signer = signer
        self._seed = seed
        self.verify_key = VerifyKey(bytes.fromhex(key.keyval["public"]))

    @classmethod
    def from_seed(cls, seed: SecretBytes) -> Self:
        """A local key from its 32-byte RFC 8032 seed."""
        view = seed.view()
        try:
            private = Ed25519PrivateKey.from_private_bytes(bytes(view))
        except ValueError as error:
            raise InputError(f"a signing key is malformed ({error})") from None
        finally:
            view.release()
        public = SSlibKey.from_crypto(private.public_key())
        return cls(CryptoSigner(private, public), seed)

    @classmethod
    def generate(cls) -> Self:
        return cls.from_seed(SecretBytes.random(32))

    @classmethod
    def from_uri(cls, uri: str, public: VerifyKey) -> Self:
        """A signer elsewhere, e.g. ``hsm:2?label=hospital`` (see securesystemslib's signers)."""
        key = SSlibKey(public.keyid, "ed25519", "ed25519", {"public": public.raw.hex()})
        return cls(Signer.from_priv_key_uri(uri, key))

    def seed(self) -> SecretBytes:
        if self._seed is None:
            raise InputError(
                "this signing key cannot be exported",
                found="a key held by another device",
                expected="a local key",
            )
        return self._seed

    def sign(self, message: bytes) -> bytes:
        return bytes.fromhex(self._signer.sign(message).signature)


