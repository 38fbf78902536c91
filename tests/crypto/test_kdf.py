from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes, derive_key
from cenacle.crypto.kdf import encode_fields

# RFC 5869, appendix A: IKM, salt, info, L, OKM.
RFC_5869 = [
    pytest.param(
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        42,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        id="A.1",
    ),
    pytest.param(
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        82,
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
        "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
        "cc30c58179ec3e87c14c01d5c1f3434f1d87",
        id="A.2",
    ),
    pytest.param(
        "0b" * 22,
        "",
        "",
        42,
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        id="A.3",
    ),
]


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, sections 2.2 and 2.3, from HMAC alone."""
    key = hmac.digest(salt or bytes(32), secret, hashlib.sha256)
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), hashlib.sha256)
        out += block
    return out[:length]


def field(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


@pytest.mark.parametrize(("secret", "salt", "info", "length", "expected"), RFC_5869)
def test_published_vectors(secret: str, salt: str, info: str, length: int, expected: str) -> None:
    raw, salted, named = (bytes.fromhex(part) for part in (secret, salt, info))
    assert hkdf(raw, salted, named, length).hex() == expected
    assert HKDF(SHA256(), length, salted or None, named).derive(raw).hex() == expected


@pytest.mark.parametrize(
    ("context", "salt", "length"),
    [
        ((), b"", 32),
        ((b"one",), b"", 32),
        ((b"one", b""), bytes(32), 16),
        ((b"one", b"two" * 1000), b"salt", 1),
        ((), b"s" * 200, 255 * 32),
    ],
)
def test_derives_what_a_second_implementation_does(
    context: tuple[bytes, ...], salt: bytes, length: int
) -> None:
    secret = bytes(range(32))
    info = b"".join(field(part) for part in (b"cenacle/v1", "tests/ключ".encode(), *context))
    derived = derive_key(SecretBytes(secret), "tests/ключ", *context, salt=salt, length=length)
    assert bytes(derived.view()) == hkdf(secret, salt, info, length)


def test_every_argument_moves_the_key() -> None:
    secret = SecretBytes(bytes(32))
    keys = [
        derive_key(secret, "a"),
        derive_key(secret, "b"),
        derive_key(secret, "a", b""),
        derive_key(secret, "a", b"", b""),
        derive_key(secret, "a", b"b"),
        derive_key(secret, "ab"),
        derive_key(secret, "a", salt=b"b"),
        derive_key(SecretBytes(bytes(31) + b"\1"), "a"),
    ]
    assert len({bytes(key.view()) for key in keys}) == len(keys)


@pytest.mark.parametrize("length", [0, 255 * 32 + 1])
def test_refuses_lengths_that_hkdf_cannot_give(length: int) -> None:
    with pytest.raises(ValueError, match=r".+"):
        derive_key(SecretBytes(b"secret"), "tests", length=length)


def test_leaves_the_secret_usable_and_wipeable() -> None:
    secret = SecretBytes(b"secret")
    derive_key(secret, "tests")
    assert bytes(secret.view()) == b"secret"
    secret.wipe()
    with pytest.raises(ValueError, match="wiped"):
        derive_key(secret, "tests")


fields = st.lists(st.binary(max_size=12), max_size=4).map(tuple)


@given(fields, fields)
@settings(max_examples=300)
def test_no_two_tuples_encode_alike(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> None:
    assert (encode_fields(*one) == encode_fields(*other)) == (one == other)


@given(fields)
@settings(max_examples=100)
def test_the_encoding_can_be_read_back(one: tuple[bytes, ...]) -> None:
    rest, read = encode_fields(*one), []
    while rest:
        size = int.from_bytes(rest[:8], "big")
        read.append(rest[8 : 8 + size])
        rest = rest[8 + size :]
    assert tuple(read) == one
