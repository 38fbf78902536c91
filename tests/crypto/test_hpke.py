"""HPKE against published vectors, and against a second implementation of RFC 9180 and X-Wing."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import HpkePrivateKey, HpkePublicKey, SecretBytes
from cenacle.crypto.hpke import PUBLIC_KEY_BYTES, SUITE_NAME
from cenacle.errors import CenacleError, InputError, SealError

KEM, SHA256, AES_256_GCM = 0x647A, 1, 2
ENC_BYTES = 1088 + 32


# --- a second implementation ---------------------------------------------------------------


def _expand(key: bytes, info: bytes, length: int) -> bytes:
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), hashlib.sha256)
        out += block
    return out[:length]


def schedule(shared: bytes, info: bytes, aead: int) -> tuple[bytes, bytes]:
    """Key and base nonce in base mode (RFC 9180, section 5.1)."""
    suite = b"HPKE" + b"".join(n.to_bytes(2, "big") for n in (KEM, SHA256, aead))

    def extract(salt: bytes, label: bytes, secret: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + secret, hashlib.sha256)

    def expand(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
        named = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return _expand(key, named, length)

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)


def combine(mlkem: bytes, x25519: bytes, share: bytes, public: bytes) -> bytes:
    """The combiner of draft-connolly-cfrg-xwing-kem, section 5.3."""
    return hashlib.sha3_256(mlkem + x25519 + share + public + rb"\.//^" + b"\\").digest()


def decapsulate(seed: bytes, enc: bytes) -> bytes:
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:64])
    x25519 = X25519PrivateKey.from_private_bytes(seed[64:])
    share = enc[1088:]
    return combine(
        mlkem.decapsulate(enc[:1088]),
        x25519.exchange(X25519PublicKey.from_public_bytes(share)),
        share,
        x25519.public_key().public_bytes_raw(),
    )


def encapsulate(public: bytes) -> tuple[bytes, bytes]:
    first, ciphertext = MLKEM768PublicKey.from_public_bytes(public[:1184]).encapsulate()
    ephemeral = X25519PrivateKey.generate()
    second = ephemeral.exchange(X25519PublicKey.from_public_bytes(public[1184:]))
    share = ephemeral.public_key().public_bytes_raw()
    return combine(first, second, share, public[1184:]), ciphertext + share


def info_of(*context: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in context)


# --- vectors -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vector() -> Any:
    path = Path(__file__).parents[1] / "vectors" / "crypto" / "hpke-mlkem768-x25519.json"
    fields = json.loads(path.read_text())
    return {k: bytes.fromhex(v) if isinstance(v, str) else v for k, v in fields.items()}


@pytest.fixture(scope="module")
def key() -> HpkePrivateKey:
    return HpkePrivateKey.generate()


def test_the_second_implementation_meets_the_published_vector(vector: Any) -> None:
    assert (vector["mode"], vector["kem_id"], vector["kdf_id"]) == (0, KEM, SHA256)
    seed = hashlib.shake_256(vector["skRm"]).digest(96)
    shared = decapsulate(seed, vector["enc"])
    assert shared == vector["shared_secret"]
    made, nonce = schedule(shared, vector["info"], vector["aead_id"])
    assert (made, nonce) == (vector["key"], vector["base_nonce"])
    for sequence, message in enumerate(vector["encryptions"]):
        used = (int.from_bytes(nonce, "big") ^ sequence).to_bytes(12, "big")
        texts = [bytes.fromhex(message[name]) for name in ("ct", "aad", "pt")]
        assert ChaCha20Poly1305(made).decrypt(used, texts[0], texts[1]) == texts[2]


def test_the_public_key_follows_from_the_published_seed(vector: Any) -> None:
    seed = hashlib.shake_256(vector["skRm"]).digest(96)
    assert HpkePrivateKey(SecretBytes(seed)).public_key.raw == vector["pkRm"]


def test_opens_what_is_sealed_to_the_published_key_and_share(vector: Any) -> None:
    seed = hashlib.shake_256(vector["skRm"]).digest(96)
    made, nonce = schedule(vector["shared_secret"], info_of(b"one", b"two"), AES_256_GCM)
    sealed = vector["enc"] + AESGCM(made).encrypt(nonce, b"the asset key", None)
    opened = HpkePrivateKey(SecretBytes(seed)).open(sealed, b"one", b"two")
    assert bytes(opened.view()) == b"the asset key"


@pytest.mark.parametrize("context", [(), (b"",), (b"one", b"two"), (b"x" * 5000,)])
def test_agrees_with_the_second_implementation(
    key: HpkePrivateKey, context: tuple[bytes, ...]
) -> None:
    sealed = key.public_key.seal(b"outwards", *context)
    shared = decapsulate(bytes(key.seed().view()), sealed[:ENC_BYTES])
    made, nonce = schedule(shared, info_of(*context), AES_256_GCM)
    assert AESGCM(made).decrypt(nonce, sealed[ENC_BYTES:], None) == b"outwards"

    shared, enc = encapsulate(key.public_key.raw)
    made, nonce = schedule(shared, info_of(*context), AES_256_GCM)
    inwards = enc + AESGCM(made).encrypt(nonce, b"inwards", None)
    assert bytes(key.open(inwards, *context).view()) == b"inwards"


# --- use and misuse ------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=300), st.lists(st.binary(max_size=40), max_size=3))
@settings(max_examples=40)
def test_round_trip(plaintext: bytes, context: list[bytes]) -> None:
    key = HpkePrivateKey.generate()
    sealed = key.public_key.seal(plaintext, *context)
    assert len(sealed) == ENC_BYTES + len(plaintext) + 16
    assert plaintext not in sealed or len(plaintext) < 4
    assert bytes(key.open(sealed, *context).view()) == plaintext


def test_sealing_twice_gives_other_bytes(key: HpkePrivateKey) -> None:
    assert key.public_key.seal(b"same") != key.public_key.seal(b"same")


def test_a_key_survives_its_seed(key: HpkePrivateKey) -> None:
    again = HpkePrivateKey(SecretBytes(bytes(key.seed().view())))
    assert again.public_key == key.public_key
    assert hash(again.public_key) == hash(key.public_key)
    assert bytes(again.open(key.public_key.seal(b"x")).view()) == b"x"
    assert key.public_key != HpkePrivateKey.generate().public_key
    assert key.public_key != key.public_key.raw


SEALED_UNDER = (b"asset", b"sha256:1")


@pytest.mark.parametrize(
    "context",
    [
        (),
        (b"asset",),
        (b"sha256:1", b"asset"),
        (b"asset", b"sha256:2"),
        (b"asset", b"sha256:1", b""),
        (b"assetsha256:1",),
        (b"asse", b"tsha256:1"),
        (b"", b"asset", b"sha256:1"),
    ],
)
def test_another_context_does_not_open(key: HpkePrivateKey, context: tuple[bytes, ...]) -> None:
    sealed = key.public_key.seal(b"key", *SEALED_UNDER)
    with pytest.raises(SealError, match="does not open"):
        key.open(sealed, *context)


def test_another_key_does_not_open(key: HpkePrivateKey) -> None:
    with pytest.raises(SealError):
        HpkePrivateKey.generate().open(key.public_key.seal(b"key"))


@pytest.mark.parametrize("half", ["mlkem", "x25519"])
def test_either_half_of_another_key_does_not_open(key: HpkePrivateKey, half: str) -> None:
    mine, other = bytes(key.seed().view()), bytes(HpkePrivateKey.generate().seed().view())
    mixed = mine[:64] + other[64:] if half == "x25519" else other[:64] + mine[64:]
    with pytest.raises(SealError):
        HpkePrivateKey(SecretBytes(mixed)).open(key.public_key.seal(b"key"))


def test_no_flipped_bit_opens(key: HpkePrivateKey) -> None:
    """One bit in every byte: ML-KEM ciphertext, X25519 share, AEAD ciphertext and tag."""
    sealed = key.public_key.seal(bytes(32), b"context")
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1 << (position % 8)
        with pytest.raises(SealError):
            key.open(bytes(altered), b"context")


def test_the_bit_that_x25519_ignores_is_not_ignored(key: HpkePrivateKey) -> None:
    altered = bytearray(key.public_key.seal(b"key"))
    altered[ENC_BYTES - 1] ^= 0x80  # RFC 7748, section 5, masks it; the combiner does not
    with pytest.raises(SealError):
        key.open(bytes(altered))


@pytest.mark.parametrize("length", [0, 1, 31, 1087, 1088, 1119, 1120, 1135, 1136, 1150, 1167])
def test_no_truncation_opens(key: HpkePrivateKey, length: int) -> None:
    sealed = key.public_key.seal(bytes(32))
    assert len(sealed) == 1168
    with pytest.raises(SealError):
        key.open(sealed[:length])


def test_nothing_appended_or_swapped_opens(key: HpkePrivateKey) -> None:
    one, other = key.public_key.seal(bytes(32)), key.public_key.seal(bytes(32))
    for wrong in (one + b"\0", one + one, one[:1120] + other[1120:], other[:1088] + one[1088:]):
        with pytest.raises(SealError):
            key.open(wrong)


def test_a_share_of_small_order_does_not_open(key: HpkePrivateKey) -> None:
    sealed = key.public_key.seal(b"key")
    with pytest.raises(SealError):
        key.open(sealed[:1088] + bytes(32) + sealed[1120:])


def test_a_secret_is_never_empty(key: HpkePrivateKey) -> None:
    with pytest.raises(SealError):
        key.open(key.public_key.seal(b""))


@given(st.binary(max_size=1400))
@settings(max_examples=60)
def test_arbitrary_bytes_never_open(data: bytes) -> None:
    with pytest.raises(SealError):
        HpkePrivateKey(SecretBytes(bytes(range(96)))).open(data)


@pytest.mark.parametrize("length", [0, 1, 32, 1184, PUBLIC_KEY_BYTES - 1, PUBLIC_KEY_BYTES + 1])
def test_refuses_public_keys_of_another_length(length: int) -> None:
    with pytest.raises(InputError, match="wrong length") as caught:
        HpkePublicKey(bytes(length))
    assert caught.value.found == f"{length} bytes"
    assert SUITE_NAME in str(caught.value.expected)


P = 2**255 - 19
ORDER_8 = (
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
)


@pytest.mark.parametrize(
    "point",
    [*(n.to_bytes(32, "little").hex() for n in (0, 1, P - 1, P, P + 1)), *ORDER_8],
)
def test_refuses_public_keys_of_small_order(key: HpkePrivateKey, point: str) -> None:
    for share in (
        bytes.fromhex(point),
        bytes.fromhex(point[:-2] + f"{int(point[-2:], 16) | 128:x}"),
    ):
        with pytest.raises(InputError, match="malformed"):
            HpkePublicKey(key.public_key.raw[:1184] + share)


def test_refuses_exactly_the_shares_that_no_exchange_accepts(key: HpkePrivateKey) -> None:
    """All spellings beyond the field's prime, its neighbours, and each with one bit changed."""
    probe = X25519PrivateKey.generate()
    numbers = [n % 2**255 for n in (*range(-40, 40), *range(P - 20, P + 20))]
    shares = [n.to_bytes(32, "little") for n in numbers]
    for point in ORDER_8:
        raw = int.from_bytes(bytes.fromhex(point), "little")
        shares += [(raw ^ 1 << bit).to_bytes(32, "little") for bit in (0, 1, 7, 100, 254, 255)]
        shares.append(bytes.fromhex(point))
    refused = 0
    for share in shares:
        try:
            probe.exchange(X25519PublicKey.from_public_bytes(share))
        except ValueError:
            refused += 1
            with pytest.raises(InputError, match="small order"):
                HpkePublicKey(key.public_key.raw[:1184] + share)
        else:
            HpkePublicKey(key.public_key.raw[:1184] + share)
    assert refused > 7


def test_refuses_a_public_key_whose_coefficients_are_not_reduced(key: HpkePrivateKey) -> None:
    with pytest.raises(InputError, match="malformed"):  # FIPS 203, section 7.2, modulus check
        HpkePublicKey(b"\xff" * 3 + key.public_key.raw[3:])


@given(st.binary(min_size=PUBLIC_KEY_BYTES, max_size=PUBLIC_KEY_BYTES))
@settings(max_examples=30)
def test_arbitrary_public_keys_are_refused_or_work(raw: bytes) -> None:
    try:
        public = HpkePublicKey(raw)
    except CenacleError:
        return
    assert len(public.seal(b"x")) == ENC_BYTES + 17


@pytest.mark.parametrize("length", [1, 32, 64, 95, 97])
def test_refuses_private_keys_of_another_length(length: int) -> None:
    with pytest.raises(InputError, match="wrong length"):
        HpkePrivateKey(SecretBytes(bytes(length)))
