from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    SecretsHandler,
    Signature,
    Signer,
)

from cenacle.crypto import SecretBytes, SigningKey, VerifyKey
from cenacle.errors import InputError, SignatureError

# RFC 8032, section 7.1: secret key, public key, message, signature.
RFC_8032 = [
    pytest.param(
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        id="TEST 1",
    ),
    pytest.param(
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        id="TEST 2",
    ),
    pytest.param(
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        id="TEST 3",
    ),
    pytest.param(
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
        id="SHA(abc)",
    ),
]
ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_published_vectors(secret: str, public: str, message: str, signature: str) -> None:
    key = SigningKey.from_seed(SecretBytes(bytes.fromhex(secret)))
    assert key.verify_key.raw.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    VerifyKey(bytes.fromhex(public)).verify(bytes.fromhex(signature), bytes.fromhex(message))


def test_key_ids_are_stable() -> None:
    raw = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    key = VerifyKey(raw)
    assert key.keyid == "21fe31dfa154a261626bf854046fd2271b7bed4b6abe45aa58877ef47f9721b9"
    assert key == VerifyKey(bytes(raw))
    assert hash(key) == hash(VerifyKey(raw))
    assert key != SigningKey.generate().verify_key
    assert key != raw
    assert repr(key) == "VerifyKey(21fe31dfa154a261)"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


def test_no_flipped_bit_verifies(key: SigningKey) -> None:
    message = b"a message"
    signature = key.sign(message)
    for position in range(8 * len(signature)):
        altered = bytearray(signature)
        altered[position // 8] ^= 1 << (position % 8)
        with pytest.raises(SignatureError):
            key.verify_key.verify(bytes(altered), message)


def test_only_one_spelling_of_a_signature_verifies(key: SigningKey) -> None:
    signature = key.sign(b"message")
    scalar = int.from_bytes(signature[32:], "little")
    for multiple in range(1, 16):  # RFC 8032, section 5.1.7: S is below the group's order
        if (other := scalar + multiple * ORDER) < 2**256:
            with pytest.raises(SignatureError):
                key.verify_key.verify(signature[:32] + other.to_bytes(32, "little"), b"message")


@pytest.mark.parametrize("message", [b"", b"a messag", b"a message ", b"A message"])
def test_another_message_does_not_verify(key: SigningKey, message: bytes) -> None:
    with pytest.raises(SignatureError) as caught:
        key.verify_key.verify(key.sign(b"a message"), message)
    assert key.verify_key.keyid[:16] in str(caught.value.found)


@given(st.binary(max_size=80), st.binary(max_size=20))
@settings(max_examples=60)
def test_arbitrary_bytes_are_no_signature(signature: bytes, message: bytes) -> None:
    key = VerifyKey(
        bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    )
    with pytest.raises(SignatureError):
        key.verify(signature, message)


def test_another_key_does_not_verify(key: SigningKey) -> None:
    with pytest.raises(SignatureError):
        SigningKey.generate().verify_key.verify(key.sign(b"m"), b"m")


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_refuses_keys_of_another_length(length: int) -> None:
    with pytest.raises(InputError, match="wrong length"):
        VerifyKey(bytes(length))
    if length:
        with pytest.raises(InputError, match="malformed"):
            SigningKey.from_seed(SecretBytes(bytes(length)))


# --- keys of small order -------------------------------------------------------------------

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Addition on the twisted Edwards curve -x^2 + y^2 = 1 + d x^2 y^2."""
    (x1, y1), (x2, y2) = one, other
    t = D * x1 * x2 * y1 * y2 % P
    return (
        (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P,
    )


def times_the_order(point: tuple[int, int]) -> tuple[int, int]:
    result = (0, 1)
    for bit in bin(ORDER)[2:]:
        result = add(result, result)
        if bit == "1":
            result = add(result, point)
    return result


def small_subgroup() -> list[bytes]:
    """Every encoding, canonical or not, of the eight points whose order divides 8."""
    generator = (0, 1)
    y = 1
    while generator in {(0, 1)} or add(*[add(*[generator] * 2)] * 2) == (0, 1):
        y += 1  # take points until one has a component of order 8
        square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
        x = pow(square, (P + 3) // 8, P)
        if x * x % P != square:
            x = x * pow(2, (P - 1) // 4, P) % P
        if x * x % P == square:
            generator = times_the_order((x, y))
    points = [(0, 1)]
    while (following := add(points[-1], generator)) != (0, 1):
        points.append(following)
    assert len(points) == 8
    encodings = set()
    for _, y in points:
        for spelled in (y, y + P):
            if spelled < 2**255:
                encodings |= {spelled | sign << 255 for sign in (0, 1)}
    return sorted(encoding.to_bytes(32, "little") for encoding in encodings)


def test_refuses_every_key_of_small_order() -> None:
    """Under the key 0100..00, the signature 0100..00 holds for every message."""
    encodings = small_subgroup()
    assert bytes([1, *bytes(31)]) in encodings
    assert len(encodings) == 14
    for raw in encodings:
        with pytest.raises(InputError, match="small order"):
            VerifyKey(raw)


# --- other signers -------------------------------------------------------------------------


class Elsewhere(Signer):
    """A signer that the test registers, as an HSM's would be."""

    inner = CryptoSigner.generate_ed25519()

    def __init__(self, public_key: Key) -> None:
        self._public_key = public_key

    @property
    def public_key(self) -> Key:
        return self._public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> Elsewhere:
        return cls(public_key)

    def sign(self, payload: bytes) -> Signature:
        return self.inner.sign(payload)


def test_a_key_may_live_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "elsewhere", Elsewhere)
    public = VerifyKey(bytes.fromhex(Elsewhere.inner.public_key.keyval["public"]))
    key = SigningKey.from_uri("elsewhere:2?label=hospital", public)
    assert key.verify_key == public
    key.verify_key.verify(key.sign(b"message"), b"message")
    with pytest.raises(InputError, match="cannot be exported"):
        key.seed()


@pytest.mark.parametrize("make", [CryptoSigner.generate_ecdsa, CryptoSigner.generate_rsa])
def test_refuses_signers_of_other_key_types(make: Any) -> None:
    with pytest.raises(InputError, match="unsupported key type") as caught:
        SigningKey(make())
    assert caught.value.expected == "ed25519"


def test_a_local_key_exports_its_seed_and_nothing_else(key: SigningKey, tmp_path: Path) -> None:
    again = SigningKey.from_seed(SecretBytes(bytes(key.seed().view())))
    assert again.verify_key == key.verify_key
    assert bytes(key.seed().view()).hex() not in repr(key) + str(key) + repr(key.seed())
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(key, protocol)
