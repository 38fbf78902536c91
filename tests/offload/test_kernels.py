"""Moving planes: by definition, compiled and without numba, equal to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.errors import InputError
from cenacle.offload import kernels
from cenacle.offload.kernels import move_planes

_RNG = np.random.default_rng(0)


def permutation(size: int) -> np.ndarray:
    return _RNG.permutation(size).astype(np.int32)


def scales(size: int) -> np.ndarray:
    return _RNG.choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], size).astype(np.float32)


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)


def by_definition(
    src: torch.Tensor,
    arguments: tuple[np.ndarray, ...],
    into: np.ndarray,
    bias: torch.Tensor | None,
    relu: bool,
    gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dst and column sums, in float64, one plane after the other."""
    rows, cols, row_scale, col_scale = arguments
    x = src.double() if gate is None else src.double() * (gate > 0)
    dst = torch.zeros(src.shape, dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(len(cols)):
            y = float(row_scale[i]) * float(col_scale[j]) * x[rows[i], cols[j]]
            y = y + (0 if bias is None else bias[j].double())
            dst[into[i], j] = y.clamp_min(0) if relu else y
    return dst, x.sum((0, 2))


SHAPES = [
    (1, 1, 1), (1, 5, 1), (3, 7, 1), (4, 8, 1), (9, 17, 1), (13, 64, 1), (5, 4099, 1),
    (5, 6, 9), (2, 3, 49), (3, 4, 16), (2, 3, 200), (4, 8, 1024), (1, 6, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_compiled_equals_torch_to_the_bit(
    shape: tuple[int, int, int], gated: bool, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    src, bias = torch.randn(shape), torch.randn(shape[1])
    gate = torch.randn(shape) if gated else None
    arguments = (*map(permutation, shape[:2]), *map(scales, shape[:2]))
    into = permutation(shape[0])
    found = []
    for plain in (False, True):
        if plain:
            without_numba(monkeypatch)
        for summed in (True, False):
            dst, sums = torch.full(shape, 7.0), torch.zeros(shape[1], dtype=torch.float64)
            move_planes(
                src, dst, *arguments, into=into, bias=bias, relu=relu, gate=gate,
                sums=sums if summed else None,
            )  # fmt: skip
            found.append((dst, sums))
    (a, sums_a), (a_too, _), (b, sums_b), (b_too, _) = found
    assert torch.equal(a, b)
    assert torch.equal(a, a_too)
    assert torch.equal(b, b_too)
    assert torch.equal(sums_a, sums_b)
    expected, total = by_definition(src, arguments, into, bias, relu, gate)
    assert torch.allclose(a.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(sums_a, total, rtol=1e-5, atol=1e-4)


@given(
    rows=st.integers(1, 10), cols=st.integers(1, 20), plane=st.sampled_from([1, 2, 15, 16, 17, 65]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_there_and_back(rows: int, cols: int, plane: int, dtype: torch.dtype) -> None:
    src = torch.randn(rows, cols, plane, dtype=dtype)
    row, col, row_scale, col_scale = (
        permutation(rows), permutation(cols), scales(rows), scales(cols),
    )  # fmt: skip
    away, back = torch.empty_like(src), torch.empty_like(src)
    move_planes(src, away, row, col, row_scale, col_scale)
    inverse = np.argsort(col).astype(np.int32)
    move_planes(
        away, back, np.arange(rows, dtype=np.int32), inverse,
        np.reciprocal(row_scale), np.reciprocal(col_scale)[inverse], into=row,
    )  # fmt: skip
    assert torch.equal(src, back)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("plane", [1, 20])
def test_nan_and_infinity_stay(plain: bool, plane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        without_numba(monkeypatch)
    src = torch.zeros(6, 4, plane)
    src[0, 0], src[1, 1], src[2, 2] = torch.nan, torch.inf, -torch.inf
    dst, one = torch.empty_like(src), np.ones(6, np.float32)
    order = np.arange(6, dtype=np.int32)
    move_planes(src, dst, order, order[:4], one, one[:4])
    assert torch.equal(dst.nan_to_num(5, 6, 7), src.nan_to_num(5, 6, 7))
    move_planes(src, dst, order, order[:4], one, one[:4], relu=True)
    assert dst[0, 0].isnan().all()
    assert (dst[2, 2] == 0).all()


@pytest.mark.parametrize("plain", [False, True])
def test_large_results_bypass_the_cache(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        without_numba(monkeypatch)
    monkeypatch.setattr(kernels, "_STREAM", 0)
    src = torch.randn(2, 3, 4096)
    for offset in (0, 1):  # aligned to 64 bytes, or not
        dst = torch.zeros(src.numel() + 16)[offset : offset + src.numel()].view(src.shape)
        arguments = (permutation(2), permutation(3), scales(2), scales(3))
        move_planes(src, dst, *arguments)
        expected = by_definition(src, arguments, np.arange(2, dtype=np.int32), None, False, None)[0]
        assert torch.equal(dst.double(), expected)


def test_rows_that_are_not_named_stay() -> None:
    src, dst = torch.ones(2, 3, 4), torch.full((5, 3, 4), 9.0)
    one = np.ones(3, np.float32)
    into = np.array([4, 1], np.int32)
    move_planes(
        src, dst, np.arange(2, dtype=np.int32), np.arange(3, dtype=np.int32), one[:2], one,
        into=into,
    )  # fmt: skip
    assert dst[:, 0, 0].tolist() == [9, 1, 9, 9, 1]


def _wrong(change: Callable[[dict[str, object]], None]) -> dict[str, object]:
    arguments: dict[str, object] = {
        "src": torch.zeros(2, 3, 4),
        "dst": torch.zeros(2, 3, 4),
        "rows": np.arange(2, dtype=np.int32),
        "cols": np.arange(3, dtype=np.int32),
        "row_scale": np.ones(2, np.float32),
        "col_scale": np.ones(3, np.float32),
    }
    change(arguments)
    return arguments


@pytest.mark.parametrize(
    "change",
    [
        {"rows": np.array([0, 2], np.int32)},
        {"rows": np.array([-1, 0], np.int32)},
        {"cols": np.array([0, 1, 3], np.int32)},
        {"into": np.array([0, 2], np.int32)},
        {"into": np.array([0], np.int32)},
        {"rows": np.array([0, 1])},
        {"row_scale": np.ones(1, np.float32)},
        {"col_scale": np.ones(3)},
        {"dst": torch.zeros(2, 3, 5)},
        {"dst": torch.zeros(2, 3, 4, dtype=torch.float64)},
        {"src": torch.zeros(2, 4, 3).mT},
        {"bias": torch.zeros(2)},
        {"gate": torch.zeros(2, 3, 1)},
        {"sums": torch.zeros(3)},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object]) -> None:
    """Compiled code would read or write wild memory."""
    with pytest.raises(InputError, match="planes cannot be moved"):
        move_planes(**_wrong(lambda arguments: arguments.update(change)))  # type: ignore[arg-type]


def test_nothing_to_move() -> None:
    none = np.zeros(0, np.int32)
    empty = np.zeros(0, np.float32)
    move_planes(
        torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), none, np.arange(3, dtype=np.int32), empty,
        np.ones(3, np.float32),
    )  # fmt: skip
