"""Ed25519 keys through ``securesystemslib``, so that HSM, KMS and YubiKey signers fit too."""

from __future__ import annotations

import hashlib
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, Signature, Signer, SSlibKey

from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError, SignatureError

__all__ = ["SigningKey", "VerifyKey"]

# Points of order 1, 2, 4 and 8 and their non-canonical spellings, without the sign bit. Under
# such a key a signature can hold for every message, so its owner could disown what he signed.
_WEAK_KEYS: Final = frozenset(
    bytes.fromhex(key)
    for key in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


class VerifyKey:
    """A public Ed25519 key; ``keyid`` is the SHA-256 of its 32 raw bytes, in hex."""

    __slots__ = ("keyid", "raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise InputError(
                "an Ed25519 public key has the wrong length",
                found=f"{len(raw)} bytes",
                expected="32 bytes",
            )
        if bytes([*raw[:31], raw[31] & 0x7F]) in _WEAK_KEYS:
            raise InputError(
                "an Ed25519 public key is of small order, so anyone can sign for it",
                found=raw.hex(),
                expected="a key made by a generator of keys",
            )
        self.raw = bytes(raw)
        self.keyid = hashlib.sha256(raw).hexdigest()

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raises :class:`SignatureError` unless ``signature`` is this key's over ``message``."""
        try:
            key = SSlibKey(self.keyid, "ed25519", "ed25519", {"public": self.raw.hex()})
            key.verify_signature(Signature(self.keyid, signature.hex()), message)
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
