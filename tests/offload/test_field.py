"""Fixed point and the field: exact against Python's integers, and uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cenacle.accelerators.operations import OPERATIONS, PRIME
from cenacle.crypto import SecretBytes
from cenacle.errors import DataError
from cenacle.offload.field import (
    HALF,
    FieldStream,
    fix_weight,
    lift,
    piece,
    row_scales,
    to_field,
)
from cenacle.offload.field_kernels import Kernels, compiled_kernels, plain_kernels

Array = NDArray[Any]


def both() -> list[Any]:
    found = [pytest.param(plain_kernels, id="plain")]
    mark = pytest.mark.skipif(not _numba(), reason="numba is not installed")
    return [*found, pytest.param(compiled_kernels, id="compiled", marks=mark)]


def _numba() -> bool:
    return bool(pytest.importorskip("importlib.util").find_spec("numba"))


def elements(*shape: int, seed: int = 0, high: int = PRIME) -> Array:
    return np.random.default_rng(seed).integers(0, high, shape)


# ---------------------------------------------------------------------- operations


def exact(a: Array, b: Array) -> Array:
    """With Python's integers."""
    product: Array = (a.astype(object) @ b.astype(object)) % PRIME
    return product.astype(np.int64)


@pytest.mark.parametrize("split", [[True, True], [True, False]])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 5), (2, 1000, 2)])
def test_matmul_is_exact(shape: tuple[int, int, int], split: list[bool]) -> None:
    m, k, n = shape
    a = elements(m, k)
    b = elements(k, n, seed=1) if split[1] else elements(k, n, seed=1, high=2**20) - 2**19
    found = OPERATIONS["matmul_mod"](
        torch.from_numpy(a).int(), torch.from_numpy(b).int(), split=split
    )
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), exact(a, b))


def test_the_greatest_operands_do_not_overflow() -> None:
    k = 1 << 16
    a = torch.full((1, k), PRIME - 1, dtype=torch.int32)
    found = OPERATIONS["matmul_mod"](a, a.T.contiguous(), split=[True, True])
    assert int(found) == k * (PRIME - 1) ** 2 % PRIME
    bound = 1 << 21  # sums of |w| below 2^22 need no limbs
    w = torch.full((k, 1), bound // k, dtype=torch.int32)
    assert int(OPERATIONS["matmul_mod"](a, w)) == bound * (PRIME - 1) % PRIME


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "geometry"),
    [
        ((2, 3, 7, 6), (4, 3, 3, 3), {"stride": [1, 1], "padding": [1, 1], "groups": 1}),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"stride": [2, 2], "padding": [1, 1], "groups": 4}),
        ((2, 4, 9), (6, 2, 3), {"stride": [2], "padding": [0], "groups": 2}),
    ],
)
def test_convolutions_are_exact(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: dict[str, Any]
) -> None:
    """All three products, against int64 after a reduction of both operands to few bits."""
    geometry = {**geometry, "dilation": [1] * (len(x_shape) - 2)}
    x, w = torch.from_numpy(elements(*x_shape)), torch.from_numpy(elements(*w_shape, seed=2))

    def limbed(name: str, a: torch.Tensor, b: torch.Tensor, **more: Any) -> torch.Tensor:
        """By 8-bit limbs in int64 (held in float64 where torch has no integer convolution)."""
        total = torch.zeros((), dtype=torch.int64)
        for i in range(4):
            for j in range(4):
                part = OPERATIONS[name](
                    (a >> 8 * i & 255).double(), (b >> 8 * j & 255).double(), **geometry, **more
                )
                total = (total + part.long() % PRIME * pow(2, 8 * (i + j), PRIME) % PRIME) % PRIME
        return total.long()

    def check(name: str, a: torch.Tensor, b: torch.Tensor, **more: Any) -> torch.Tensor:
        found = OPERATIONS[f"{name}_mod"](a.int(), b.int(), split=[True, True], **geometry, **more)
        assert torch.equal(found.long(), limbed(name, a, b, **more))
        return found

    y = check("conv", x, w).long()
    check("conv_input", y, w, shape=list(x_shape[1:]))
    check("conv_weight", y, x, shape=list(w_shape))


@given(st.lists(st.integers(-HALF, HALF), min_size=1, max_size=30))
@settings(max_examples=50)
def test_lift_is_the_inverse_of_to_field(values: list[int]) -> None:
    found = to_field(torch.tensor(values))
    assert bool(((found >= 0) & (found < PRIME)).all())
    assert lift(found).tolist() == values


# ---------------------------------------------------------------------- passes


@pytest.mark.parametrize("make", both())
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lowest", [-np.inf, 0.0])
@pytest.mark.parametrize(
    ("rows", "channels", "space", "first", "size"),
    [
        (1, 1, 1, 0, 1),
        (3, 5, 7, 10, 80),
        (4, 9, 1, 5, 30),
        (2, 4, 16, 0, 128),
        (2, 3, 4, 11, 2),
        (2, 3, 320, 0, 1920),
        (2, 3, 200, 7, 1000),
        (1, 1, 64, 0, 64),
    ],
)
def test_passes_against_python(
    make: Callable[[], Kernels],
    rows: int,
    channels: int,
    space: int,
    first: int,
    size: int,
    lowest: float,
    stream: bool,
) -> None:
    passes, rng, row = make(), np.random.default_rng(7), channels * space
    x = rng.normal(size=size).astype(np.float32)
    inverse = rng.uniform(1, 300, rows).astype(np.float32)
    mask, z = elements(size).astype(np.uint32), elements(row, seed=3).astype(np.uint32)
    mask[0], mask[-1] = PRIME - 1, 0
    sums, out = np.zeros(rows, np.uint64), aligned(size, np.int32)
    passes.blind(x, inverse, mask, z, row, first, sums, out, stream)

    wanted = [0] * rows
    for i in range(size):
        number, at = divmod(first + i, row)
        value = (int(np.rint(x[i] * inverse[number])) + int(mask[i])) % PRIME
        assert int(out[i]) == value
        wanted[number] = (wanted[number] + value * int(z[at])) % PRIME
    assert sums.tolist() == wanted

    correction = elements(size, seed=4).astype(np.int32)
    r, s = elements(space, seed=5).astype(np.uint32), elements(channels, seed=6).astype(np.uint32)
    scale, bias = rng.random(channels, np.float32), rng.random(channels, np.float32)
    factors = rng.random(rows, np.float32)
    sums[:], wanted, result = 0, [0] * rows, aligned(size, np.float32)
    least = np.float32(lowest)
    assert not passes.unblind(
        out, correction, r, s, factors, scale, bias - 0.5, least, space, first, sums, result, stream
    )
    for i in range(size):
        number, at = divmod(first + i, row)
        channel = at // space
        value = (int(out[i]) - int(correction[i])) % PRIME
        value -= PRIME if value > HALF else 0
        real = np.float32(value) * np.float32(factors[number] * scale[channel])
        assert result[i] == max(np.float32(real + (bias[channel] - np.float32(0.5))), least)
        weight = int(r[at % space]) * int(s[channel])
        wanted[number] = (wanted[number] + int(out[i]) * weight) % PRIME
    assert sums.tolist() == wanted


@pytest.mark.parametrize("make", both())
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 6), (2, 14, 14), (5, 6, 34)])
def test_pooling_takes_the_greatest(
    make: Callable[[], Kernels], shape: tuple[int, int, int]
) -> None:
    y = torch.randn(shape)
    wanted = torch.nn.functional.max_pool2d(y, 2)
    out = np.empty(wanted.numel(), np.float32)
    make().pool(y.view(-1).numpy(), shape[2], out)
    assert np.array_equal(out, wanted.view(-1).numpy())


def aligned(size: int, dtype: Any) -> Array:
    """As large tensors are: beginning with a line of the cache."""
    memory = np.empty(size + 16, dtype)
    return memory[-memory.ctypes.data % 64 // 4 :][:size]


@pytest.mark.parametrize("make", both())
@pytest.mark.parametrize("stream", [False, True])
def test_the_greatest_elements_do_not_overflow_the_check(
    make: Callable[[], Kernels], stream: bool
) -> None:
    size = 64 * 50 + 3
    top, sums = np.full(size, PRIME - 1, np.uint32), np.zeros(1, np.uint64)
    one, zeros = np.ones(1, np.float32), np.zeros(size, np.float32)
    out = aligned(size, np.int32)
    make().blind(zeros, one, top, top, size, 0, sums, out, stream)
    wanted = size * (PRIME - 1) ** 2 % PRIME
    assert sums.tolist() == [wanted]
    sums[0], result = 0, aligned(size, np.float32)
    make().unblind(
        out, top.view(np.int32), top, np.ones(1, np.uint32), one, one, one - 1,
        np.float32(-np.inf), size, 0, sums, result, stream,
    )  # fmt: skip
    assert sums.tolist() == [wanted]
    assert not result.any()


@pytest.mark.parametrize("make", both())
@pytest.mark.parametrize("value", [PRIME, -1, -(2**31)])
@pytest.mark.parametrize("size", [2, 64, 70, 300])
def test_what_is_no_field_element_is_noticed(
    make: Callable[[], Kernels], value: int, size: int
) -> None:
    one = np.ones(1, np.float32)
    words, sums = np.ones(1, np.uint32), np.zeros(1, np.uint64)
    for where in {0, 1, size // 2, size - 1}:
        y = np.zeros(size, np.int32)
        y[where] = value
        found = make().unblind(
            y, np.zeros(size, np.int32), np.ones(size, np.uint32), words,
            one, one, one, one[0], size, 0, sums, np.empty(size, np.float32), False,
        )  # fmt: skip
        assert found


# ---------------------------------------------------------------------- fixed point


@given(st.integers(1, 40), st.integers(1, 4), st.floats(1e-20, 1e20), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_no_sum_can_overflow(fan_in: int, outputs: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.standard_cauchy((outputs, fan_in)) * size)
    fixed = fix_weight(w, "geometry")
    worst = fixed.values.long().abs().sum(1).max() * fixed.steps
    assert int(worst) <= HALF
    assert int(fixed.values.long().abs().sum(1).max()) * PRIME < 2**53  # exact without limbs
    error = (fixed.values.double() * fixed.scale.double().unsqueeze(1) - w).abs()
    assert bool((error <= fixed.scale.double().unsqueeze(1) * 0.51 + w.abs() * 1e-6).all())


def test_weights_of_nothing_and_large_weights() -> None:
    fixed = fix_weight(torch.tensor([[0.0, 0.0], [1e-30, 2e30]]), "")
    assert fixed.values[0].tolist() == [0, 0]
    assert fixed.scale[0] == 0
    assert fix_weight(torch.ones(1, 70_000), "").steps == 512
    with pytest.raises(DataError, match="not finite"):
        fix_weight(torch.tensor([[float("nan")]]), "")


def test_a_digest_is_of_everything_that_decides() -> None:
    w = torch.tensor([[1.0, -1.0]])
    digests = {
        fix_weight(value, geometry).digest
        for value, geometry in ((w, "a"), (w, "b"), (-w, "a"), (w.view(1, 2, 1), "a"))
    }
    assert len(digests) == 4


@given(st.floats(2**-100, 2**100, width=32), st.integers(512, 32767), st.integers(0, 1000))
@settings(max_examples=100)
def test_activations_stay_within_their_steps(peak: float, steps: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (2, 9)))
    rows = (values * peak).float()
    rows[0, 0] = peak
    inverse, back = row_scales(rows, steps)
    integers = np.rint(rows.numpy() * inverse[:, None])
    assert np.abs(integers).max() <= steps
    assert np.allclose(integers * back[:, None], rows.numpy(), atol=0.51 * back.max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    rows = torch.zeros(2, 40)
    rows[1, 17] = value
    with pytest.raises(DataError, match="not finite"):
        row_scales(rows, 1000)


def test_rows_of_zeros_and_denormals_become_zero() -> None:
    inverse, back = row_scales(torch.tensor([[0.0, -0.0], [1e-42, 0.0]]), 1000)
    assert inverse.tolist() == back.tolist() == [0, 0]


# ---------------------------------------------------------------------- randomness


def test_elements_do_not_depend_on_how_they_are_asked_for() -> None:
    stream = FieldStream(SecretBytes(bytes(range(64))))
    whole = stream.tensor(0, (3 * piece() + 5,))
    for first, size in ((0, 1), (1, 3), (3, 70), (4, 64), (piece() - 1, piece() + 2), (7, 4096)):
        assert torch.equal(stream.tensor(first, (size,)), whole[first : first + size])


def test_the_keystream_is_aes_in_counter_mode() -> None:
    """SP 800-38A, F.5.5: the first counter block's keystream, by way of this class's layout."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228")
    words = np.frombuffer(bytes(a ^ b for a, b in zip(plain, cipher, strict=True)), np.uint32)
    found = FieldStream(SecretBytes(key + bytes(32))).tensor(4 * counter, (4,))
    assert found.tolist() == (words & PRIME).tolist()


def test_a_word_that_is_no_element_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FieldStream(SecretBytes(bytes(range(64))))
    honest = stream._words
    calls: list[tuple[int, int]] = []

    def words(half: int, first: int) -> Callable[[Array, int], Array]:
        calls.append((half, first))
        number, read = len(calls), honest(half, first)

        def ones(memory: Array, count: int) -> Array:
            found = read(memory, count)
            if half == 0 or number == 2:
                found[:] = 0xFFFFFFFF  # all ones, as one word in 2^31 is
            return found

        return ones

    monkeypatch.setattr(stream, "_words", words)
    found = stream.tensor(100, (1,))
    assert calls == [(0, 100), (1, 400), (1, 4 * (100 + (1 << 64)))]
    again = honest(1, 4 * (100 + (1 << 64)))(np.empty(8, np.uint32), 4)
    assert int(found) == int(again[0] & PRIME)


def test_elements_are_uniform() -> None:
    found = FieldStream(SecretBytes(bytes(range(64)))).tensor(0, (1 << 20,)).numpy()
    assert found.min() >= 0
    assert found.max() < PRIME
    for bits in (found >> 23, found & 255):
        counts = np.bincount(bits, minlength=256)
        mean = len(found) / 256
        assert 140 < ((counts - mean) ** 2 / mean).sum() < 400  # chi-square, 255 degrees
    steps = np.sort(found) / PRIME - (np.arange(len(found)) + 0.5) / len(found)
    assert np.abs(steps).max() < 2.2 / np.sqrt(len(found))  # Kolmogorov and Smirnov, 1e-4
