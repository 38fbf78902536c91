"""Noise: its distribution, its independence, its grid, and that no word ever comes twice."""

from __future__ import annotations

import math
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from cenacle.training.privacy import Noise, PrivacyError
from cenacle.training.privacy.gaussian import add_noise, grid, normals
from cenacle.training.privacy.keystream import Keystream

KEY = bytes(range(32))
COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["ziggurat", "box_muller"])


def _kolmogorov_smirnov(values: np.ndarray) -> float:
    """sqrt(n) D against the standard normal; above 1.95 with probability 0.001."""
    ordered = np.sort(values)
    theory = torch.special.ndtr(torch.from_numpy(ordered)).numpy()
    n = len(ordered)
    steps = np.arange(1, n + 1) / n
    distance = max(np.abs(steps - theory).max(), np.abs(steps - 1 / n - theory).max())
    return float(math.sqrt(n) * distance)


@COMPILED
@pytest.mark.parametrize("terms", [1, 2, 4])
def test_samples_are_normal(compiled: bool, terms: int) -> None:
    z = normals(Keystream(KEY), 300_000, terms=terms, compiled=compiled)
    n = len(z)
    assert _kolmogorov_smirnov(z) < 1.95
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for beyond in (2.0, 3.0, 3.7):  # the last is in the ziggurat's tail
        expected = math.erfc(beyond / math.sqrt(2))
        assert abs((np.abs(z) > beyond).mean() - expected) < 4 * math.sqrt(expected / n)


@COMPILED
def test_samples_are_independent(compiled: bool) -> None:
    z = normals(Keystream(KEY), 200_000, compiled=compiled)
    for lag in (1, 2, 3, 7, 64, 16384):
        for a, b in ((z[lag:], z[:-lag]), (z[lag:] ** 2 - 1, z[:-lag] ** 2 - 1)):
            deviation = a.std() * b.std() / math.sqrt(len(a))
            assert abs((a * b).mean()) < 4.5 * deviation
    other = normals(Keystream(KEY[::-1]), 200_000, compiled=compiled)
    assert abs((z * other).mean()) < 4 / math.sqrt(len(z))


def test_words_are_aes_in_counter_mode() -> None:
    words = Keystream(KEY).words(1000)
    cipher = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    assert words.tobytes() == cipher.update(bytes(8000))


def test_words_never_come_twice() -> None:
    stream = Keystream(KEY)
    drawn = [word for count in (1, 2, 3, 7, 100) for word in stream.words(count).tolist()]
    assert len(set(drawn)) == len(drawn)
    fresh = [Keystream().words(4).tobytes() for _ in range(8)]
    assert len(set(fresh)) == 8


@pytest.mark.parametrize("key", [None, KEY], ids=["fresh", "given"])
def test_a_fork_does_not_repeat_its_parent(key: bytes | None) -> None:
    stream = Keystream(key)
    stream.words(1)
    children = []
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            os.write(writing, stream.words(32).tobytes())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            children.append(pipe.read())
        os.waitpid(child, 0)
    parent = stream.words(32).tobytes()
    assert len({parent, *children}) == 3
    assert all(len(words) == 256 for words in children)


def test_a_keystream_cannot_be_stored() -> None:
    with pytest.raises(TypeError, match="twice"):
        pickle.dumps(Keystream())
    with pytest.raises(PrivacyError, match="length"):
        Keystream(b"short")


@COMPILED
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_sum_and_noise_share_a_grid(compiled: bool, kind: type) -> None:
    """Before the division every output is a multiple of one step, whatever the sum was."""
    scale, step = 0.7, grid(0.7)
    assert math.log2(step) == round(math.log2(step))
    assert scale * 2**-31 <= step <= scale * 2**-29
    sums: np.ndarray = np.full(1000, math.pi / 3e4, dtype=kind)
    out = np.empty_like(sums)
    add_noise(Keystream(KEY), [(sums, out)], scale=scale, divisor=1.0, compiled=compiled)
    if kind is np.float64:
        assert np.array_equal(np.rint(out / step), out / step)
    rounded = np.rint(float(sums[0]) / step) * step
    noise = normals(Keystream(KEY), 1000, compiled=compiled) * scale
    assert np.allclose(out, rounded + noise, atol=step, rtol=1e-6)


def _released(shapes: list[tuple[int, ...]], noise: Noise, kind: torch.dtype) -> list[Tensor]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in shapes]
    noise.release([(p, None) for p in parameters], scale=2.0, divisor=4.0)
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_release_covers_every_parameter(kind: torch.dtype) -> None:
    shapes = [(3,), (200, 300), (), (17, 5), (0,), (50_000,)]
    grads = _released(shapes, Noise(), kind)
    assert [tuple(g.shape) for g in grads] == shapes
    assert all(g.dtype == kind for g in grads)
    flat = torch.cat([g.flatten() for g in grads]).double()
    assert float(flat.std()) == pytest.approx(0.5, rel=0.02)
    assert _kolmogorov_smirnov((flat / 0.5).numpy()) < (4 if kind == torch.bfloat16 else 1.95)


def test_a_key_determines_the_noise() -> None:
    once, again = (_released([(40_000,), (9,)], Noise(key=KEY), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not Noise(key=KEY).secure
    assert Noise().secure


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_a_sum_that_cannot_be_noised_is_not_released(value: float) -> None:
    fine, bad = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(PrivacyError, match="noised"):
        Noise().release([(fine, None), (bad, torch.full((3,), value))], scale=1e-3, divisor=1.0)
    assert fine.grad is None
    assert bad.grad is None


def test_terms() -> None:
    with pytest.raises(PrivacyError):
        Noise(terms=0)
