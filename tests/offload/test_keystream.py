"""Random choices: the cipher is the published one, and what is made of it is uniform."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError
from cenacle.offload.keystream import Keystream


def seeded(number: int = 0) -> Keystream:
    return Keystream(SecretBytes(number.to_bytes(32, "big")))


def test_the_published_vector() -> None:
    """NIST SP 800-38A, F.5.5: CTR-AES256, the four output blocks."""
    key = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
    stream = Keystream(
        SecretBytes(bytes.fromhex(key)), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    )
    expected = (
        "0bdf7df1591716335e9a8b15c860c502"
        "5a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca62"
        "2956e1c8693536b1bee99c73a31576b6"
    )
    # Requests of odd sizes continue where the last one ended.
    found = b"".join(stream.octets(size).tobytes() for size in (1, 15, 17, 31))
    assert found.hex() == expected


def test_a_seed_repeats_everything() -> None:
    a, b = seeded(1), seeded(1)
    assert (a.permutation(100) == b.permutation(100)).all()
    assert (a.signs(33) == b.signs(33)).all()
    assert (a.below(1000, 50) == b.below(1000, 50)).all()
    assert (a.uniform(50) == b.uniform(50)).all()
    assert (a.words(4) != seeded(2).words(4)).all()


def test_without_a_seed_streams_differ() -> None:
    assert (Keystream().words(4) != Keystream().words(4)).all()


def test_a_given_seed_is_not_wiped() -> None:
    seed = SecretBytes(bytes(32))
    assert (Keystream(seed).words(2) == Keystream(seed).words(2)).all()


@given(st.integers(0, 300), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_permutations_are_permutations(count: int, rows: int) -> None:
    found = seeded(3).permutations(rows, count)
    assert found.dtype == np.int32
    assert found.shape == (rows, count)
    assert (np.sort(found, axis=1) == np.arange(count)).all()


def test_permutations_are_uniform() -> None:
    found = seeded(4).permutations(24_000, 4)
    codes = found @ np.array([64, 16, 4, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-4


def test_rows_of_permutations_are_independent() -> None:
    found = seeded(5).permutations(2 * 9_000, 3) @ np.array([9, 3, 1])
    pairs = found[::2] * 27 + found[1::2]
    counts = np.unique(pairs, return_counts=True)[1]
    assert len(counts) == 36
    assert chisquare(counts).pvalue > 1e-4


def test_bytes_signs_and_numbers_are_uniform() -> None:
    stream = seeded(6)
    assert chisquare(np.bincount(stream.octets(200_000), minlength=256)).pvalue > 1e-4
    assert chisquare(np.unique(stream.signs(100_000), return_counts=True)[1]).pvalue > 1e-4
    assert chisquare(np.histogram(stream.uniform(100_000), 64, (0, 1))[0]).pvalue > 1e-4
    powers = stream.powers(70_000, 3)
    values, counts = np.unique(powers, return_counts=True)
    assert values.tolist() == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("bound", [1, 2, 3, 251, 10_485_767, 3 << 61, 1 << 63])
def test_numbers_below_a_bound(bound: int) -> None:
    found = seeded(7).below(bound, 20_000)
    assert int(found.max()) < bound
    thirds = (found.astype(np.float64) / bound * 3).astype(int)
    if bound > 1000:  # 3 << 61: a quarter of all words are rejected
        assert chisquare(np.bincount(thirds, minlength=3)).pvalue > 1e-4


@pytest.mark.parametrize("bound", [0, -1, (1 << 63) + 1])
def test_impossible_bounds(bound: int) -> None:
    with pytest.raises(InputError, match="bound"):
        seeded().below(bound, 1)


@pytest.mark.parametrize(("seed", "block"), [(31, 16), (33, 16), (32, 15), (32, 0)])
def test_wrong_lengths(seed: int, block: int) -> None:
    with pytest.raises(InputError, match="length"):
        Keystream(SecretBytes(bytes(seed)), bytes(block))


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_is_not_copied(take: object) -> None:
    with pytest.raises(TypeError, match="keystream"):
        take(seeded())  # type: ignore[operator]
