"""HPKE (RFC 9180) with the hybrid KEM ML-KEM-768 + X25519 (X-Wing).

Sealed medical data must outlive quantum computers, so the key encapsulation is secure if
either ML-KEM-768 or X25519 is. KDF: HKDF-SHA-256; AEAD: AES-256-GCM; base mode, single shot.
"""

from __future__ import annotations

from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from cenacle.crypto.kdf import encode_fields
from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError, SealError

__all__ = ["PUBLIC_KEY_BYTES", "SUITE_NAME", "HpkePrivateKey", "HpkePublicKey"]

SUITE_NAME: Final = "MLKEM768-X25519/HKDF-SHA256/AES-256-GCM"
_MLKEM_PUBLIC: Final = 1184
_MLKEM_SEED: Final = 64
_X25519: Final = 32
PUBLIC_KEY_BYTES: Final = _MLKEM_PUBLIC + _X25519
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

# Shares with which every X25519 exchange gives zeros, which RFC 7748, section 6.1, refuses: the
# u-coordinates of order 1, 2, 4 and 8 on the curve and its twist, and their non-canonical
# spellings, without the bit that the exchange ignores. Sealing to such a key would fail.
_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


class HpkePublicKey:
    """Whom to seal to. ``raw`` is ML-KEM-768 (1184 bytes) followed by X25519 (32 bytes)."""

    __slots__ = ("_key", "raw")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != PUBLIC_KEY_BYTES:
            raise InputError(
                "an HPKE public key has the wrong length",
                found=f"{len(raw)} bytes",
                expected=f"{PUBLIC_KEY_BYTES} bytes ({SUITE_NAME})",
            )
        try:
            share = raw[_MLKEM_PUBLIC:]
            if bytes([*share[:31], share[31] & 0x7F]) in _SMALL_ORDER:
                raise ValueError("an X25519 share of small order")
            self._key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC]),
                X25519PublicKey.from_public_bytes(share),
            )
        except ValueError as error:
            raise InputError(f"an HPKE public key is malformed ({error})") from None
        self.raw = bytes(raw)

    def seal(self, plaintext: bytes | memoryview, *context: bytes) -> bytes:
        """Encrypt for the holder of the private key; ``context`` is bound as HPKE ``info``."""
        return _SUITE.encrypt(plaintext, self._key, info=encode_fields(*context))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HpkePublicKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


class HpkePrivateKey:
    """The recipient's half, kept as its 96-byte seed (ML-KEM-768 seed, X25519 scalar)."""

    __slots__ = ("_key", "_seed", "public_key")

    def __init__(self, seed: SecretBytes) -> None:
        if len(seed) != _MLKEM_SEED + _X25519:
            raise InputError(
                "an HPKE private key has the wrong length",
                found=f"{len(seed)} bytes",
                expected=f"{_MLKEM_SEED + _X25519} bytes",
            )
        view = seed.view()
        mlkem = MLKEM768PrivateKey.from_seed_bytes(bytes(view[:_MLKEM_SEED]))
        x25519 = X25519PrivateKey.from_private_bytes(bytes(view[_MLKEM_SEED:]))
        view.release()
        self._seed = seed
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public_key = HpkePublicKey(
            mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls) -> Self:
        return cls(SecretBytes.random(_MLKEM_SEED + _X25519))

    def seed(self) -> SecretBytes:
        """The secret itself, for storing; treat it as the key."""
        return self._seed

    def open(self, sealed: bytes, *context: bytes) -> SecretBytes:
        """Decrypt what was sealed to this key under the same ``context``.

        Raises:
            SealError: another key, another context, or altered bytes.
        """
        try:
            return SecretBytes(
                bytearray(_SUITE.decrypt(sealed, self._key, info=encode_fields(*context)))
            )
        except (InvalidTag, ValueError):
            raise SealError(
                "a wrapped key does not open",
                found=f"{len(sealed)} bytes that this key and context do not decrypt",
                expected="bytes sealed to this key for this very asset, contract and purpose",
                remedy="check that the right party's key is used and that the file is unaltered",
            ) from None
