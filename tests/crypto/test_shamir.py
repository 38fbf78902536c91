from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.crypto.shamir import (
    MAX_SHARES,
    RecoveryShare,
    combine,
    recover,
    recovery_shares,
    split,
)
from cenacle.errors import InputError, SealError

KEY = bytes(range(32))


class Vector(NamedTuple):
    """A vector of SLIP-0039, its mnemonics written as what they encode.

    From ``vectors.json`` of trezor/python-shamir-mnemonic (commit 17fcce14), passphrase TREZOR.
    """

    name: str
    groups: dict[int, dict[int, str]]
    secret: str
    identifier: int
    exponent: int = 0
    extendable: bool = False


VECTORS = (
    Vector(
        "4 basic sharing 2-of-3 128 bits",
        {0: {2: "08fb14b66e692e25dfe2edf53289ed62", 0: "06ab48fef4bedc8ce58baeef0a73f76e"}},
        "b43ceb7e57a0ea8766221624d01b0864",
        25653,
        2,
    ),
    Vector(
        "17 groups and members 128 bits case 1",
        {
            3: {0: "44e95c567b0b73d470f78e2cc4f206ee", 4: "a0c12ed2cc2adeb32ccebec07a3c1b3a"},
            2: {
                4: "90f25bc998346d039203971999669e96",
                2: "fc119ebfe32da3d688dc1f26c22c7ffc",
                0: "9e6afad0e741c8c1c65b2785a942808a",
            },
        },
        "7c3397a292a5941682d7a4ae2d898d11",
        9497,
    ),
    Vector(
        "18 groups and members 128 bits case 2",
        {
            3: {4: "a0c12ed2cc2adeb32ccebec07a3c1b3a", 1: "7de3cd7710c8938b67328217664ccadb"},
            1: {0: "0b99753280a6da02952584800234d7be"},
        },
        "7c3397a292a5941682d7a4ae2d898d11",
        9497,
    ),
    Vector(
        "23 basic sharing 2-of-3 256 bits",
        {
            0: {
                2: "81e5473f4b7f66094f888d2f98fe0ded6a692dc72c65dc498d6e28bee6ebdfcc",
                1: "19e366e9b2e34851e52132c31c2b2c957321bf5ce6c9c1410ea1ddf5fef92c27",
            }
        },
        "c938b319067687e990e05e0da0ecce1278f75ff58d9853f19dcaeed5de104aae",
        14279,
        2,
    ),
    Vector(
        "36 groups and members 256 bits case 1",
        {
            2: {
                0: "82a363ed145a49a4e37311253c105846c0afb13b74e5ddda9cc25d7aae49bc89",
                1: "d127f1f9bc12e3856fb3983104783b71480d249d80101568def4a41100177dfb",
                4: "4bde8a604105f3a6c32f2f547131aafea756725a28e80a14d59d8f05c4adcca5",
            },
            3: {
                1: "094ed0a7c9b50a3dcecc037bb4e34eb5b158a8ee3f8ea661e76521e07629e663",
                2: "98091ab3396a2e9ab9d6889b6507fce1e3c12dd0a2676ee52bb1b389ec320a90",
            },
        },
        "5385577c8cfc6c1a8aa0f7f10ecde0a3318493262591e78b8c14c6686167123b",
        32134,
    ),
    Vector(
        "41 errors in modular arithmetic",
        {
            0: {
                7: "3ed2fa64acf769131509ca05437606b1",
                9: "58ccc8f63e2232eb372d91241e61506b",
                0: "0d5f0655e0645fad705c1e128887678f",
            }
        },
        "ad6f2ad8b59bbbaa01369b9006208d9a",
        13899,
    ),
    Vector(
        "43 extendable 2-of-3 128 bits",
        {0: {0: "a5a69aa82af0f8068a01d8e8c095ddf3", 2: "00d13191fb007cabfc4883edfa14552e"}},
        "48b1a4b80b8c209ad42c33672bdaa428",
        9066,
        extendable=True,
    ),
    Vector(
        "45 extendable 2-of-3 256 bits",
        {
            0: {
                2: "daef18f6bfd2792749905e41a402dae0365bc2434e455226096a99f941d203bf",
                0: "b4290e56271e919a44596794aef75071b07536ee113e1529299a08b19190ed81",
            }
        },
        "8dc652d6d6cd370d8c963141f6d79ba440300f25c467302c1d966bff8f62300d",
        32065,
        extendable=True,
    ),
)

# Vectors 13 and 32: mnemonics giving an invalid digest.
INVALID = (
    {0: "c8b9d27853c7dee68be5457014f07057", 1: "61695b5315b3dfc1dce0ab914325af00"},
    {0: "3c59ea2a38b713c8f0eda4907c558602", 1: "7409621999e03973ca7ba0fdbfba28b1"},
)


def _decrypt(encrypted: bytes, vector: Vector) -> bytes:
    """SLIP-0039's encryption of the master secret: four Feistel rounds of PBKDF2."""
    salt = b"" if vector.extendable else b"shamir" + vector.identifier.to_bytes(2, "big")
    half = len(encrypted) // 2
    left, right = encrypted[:half], encrypted[half:]
    for step in (3, 2, 1, 0):
        mask = hashlib.pbkdf2_hmac(
            "sha256", bytes([step]) + b"TREZOR", salt + right, 2500 << vector.exponent, half
        )
        left, right = right, bytes(a ^ b for a, b in zip(left, mask, strict=True))
    return right + left


def _members(shares: dict[int, str]) -> bytes:
    values = {x: bytes.fromhex(value) for x, value in shares.items()}
    return next(iter(values.values())) if len(values) == 1 else combine(values)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name.replace(" ", "-"))
def test_published_vectors(vector: Vector) -> None:
    groups = {x: _members(shares) for x, shares in vector.groups.items()}
    encrypted = next(iter(groups.values())) if len(groups) == 1 else combine(groups)
    assert _decrypt(encrypted, vector).hex() == vector.secret


@pytest.mark.parametrize("shares", INVALID, ids=("13", "32"))
def test_published_invalid_digests(shares: dict[int, str]) -> None:
    with pytest.raises(SealError, match="give no secret"):
        _members(shares)


@settings(max_examples=40)
@given(st.binary(min_size=16, max_size=40), st.data())
def test_any_threshold_of_the_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    shares = data.draw(st.integers(2, MAX_SHARES))
    threshold = data.draw(st.integers(2, shares))
    values = split(secret, threshold, shares)
    chosen = data.draw(st.permutations(range(shares)))[:threshold]
    assert combine({x: values[x] for x in chosen}) == secret


def test_fewer_shares_give_nothing() -> None:
    values = split(KEY, 3, 5)
    for x, y in itertools.combinations(range(5), 2):
        with pytest.raises(SealError, match="give no secret"):
            combine({x: values[x], y: values[y]})


@pytest.mark.parametrize(("threshold", "shares"), [(1, 3), (0, 3), (4, 3), (2, 17), (-1, 2)])
def test_impossible_numbers_are_refused(threshold: int, shares: int) -> None:
    with pytest.raises(InputError, match="cannot be shared in this way"):
        split(KEY, threshold, shares)
    with pytest.raises(InputError, match="cannot be shared in this way"):
        recovery_shares(SecretBytes(KEY), threshold, shares)


def test_short_secrets_are_refused() -> None:
    with pytest.raises(InputError, match="too short"):
        split(bytes(15), 2, 3)
    with pytest.raises(InputError, match="only keys of 32 bytes"):
        recovery_shares(SecretBytes(bytes(16)), 2, 3)


@pytest.mark.parametrize(
    "shares",
    [{}, {0: KEY}, {0: KEY, 1: KEY[:-1]}, {0: KEY, 254: KEY}, {0: KEY, 255: KEY}, {0: b"", 1: b""}],
)
def test_shares_that_cannot_be_ones_are_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(SealError, match="do not fit together"):
        combine(shares)


def _recovered(shares: tuple[RecoveryShare, ...]) -> bytes:
    with recover(shares) as key, key.view() as view:
        return bytes(view)


def test_recovery_shares_give_the_key_back() -> None:
    shares = recovery_shares(SecretBytes(KEY), 3, 5)
    for chosen in itertools.combinations(shares, 3):
        assert _recovered(chosen) == KEY
    assert _recovered(shares) == KEY
    assert _recovered(tuple(reversed(shares))) == KEY


def test_two_sharings_differ_and_do_not_mix() -> None:
    one, two = (recovery_shares(SecretBytes(KEY), 2, 3) for _ in "12")
    assert not {share.value for share in one} & {share.value for share in two}
    with pytest.raises(InputError, match="not of one sharing"):
        recover((one[0], two[1]))


def test_too_few_shares_or_one_twice() -> None:
    shares = recovery_shares(SecretBytes(KEY), 3, 5)
    for some in (shares[:2], shares[:1], (shares[0], shares[0], shares[1])):
        with pytest.raises(InputError, match="too few recovery shares"):
            recover(some)
    with pytest.raises(InputError, match="not of one sharing"):
        recover(())


def test_an_altered_share_is_noticed_wherever_it_stands() -> None:
    shares = recovery_shares(SecretBytes(KEY), 2, 4)
    for number, share in enumerate(shares):
        for at in range(32):
            raw = bytearray(share.value)
            raw[at] ^= 1
            wrong = replace(share, value=bytes(raw))
            with pytest.raises(SealError, match="give no secret"):
                recover((*shares[:number], wrong, *shares[number + 1 :]))
    wrong = replace(shares[0], index=7)
    with pytest.raises(SealError):
        recover((wrong, shares[1]))
    forged = tuple(replace(share, check=bytes(16)) for share in shares)
    with pytest.raises(SealError):
        recover(forged)


def test_shares_travel_as_text() -> None:
    for share in recovery_shares(SecretBytes(KEY), 2, 3):
        text = share.to_text()
        assert RecoveryShare.from_text(f"  {text}\n") == share
        assert text.startswith("cenacle-share-1-")
        assert set(text.removeprefix("cenacle-share-1-")) <= set("abcdefghijklmnopqrstuvwxyz234567")


def test_every_character_of_a_text_counts() -> None:
    text = recovery_shares(SecretBytes(KEY), 2, 3)[0].to_text()
    for at in range(len(text)):
        for mask in (1, 0x20):
            wrong = text[:at] + chr(ord(text[at]) ^ mask) + text[at + 1 :]
            with pytest.raises(InputError, match="cannot be read") as refused:
                RecoveryShare.from_text(wrong)
            assert text[20:40] not in str(refused.value)
    for wrong in ("", text[:-1], text + "a", "cenacle-share-1-", text.upper(), "é" * 100):
        with pytest.raises(InputError, match="cannot be read"):
            RecoveryShare.from_text(wrong)


def test_a_share_is_not_shown() -> None:
    share = recovery_shares(SecretBytes(KEY), 2, 3)[0]
    assert repr(share) == "<RecoveryShare 1, 2 needed>"
    assert share.value.hex() not in f"{share} {share!r}"
