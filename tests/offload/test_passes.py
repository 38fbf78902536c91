"""Compiled passes against the same in plain torch, for every shape, gate and layout."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import InputError
from cenacle.offload import passes
from cenacle.offload.passes import Tally, blind, marks_for, sketch_for, unblind

SHAPES = [(3, 5, 4, 6), (1, 1, 2, 2), (9, 4, 6, 34), (4, 3, 64, 64), (2, 3, 2, 70), (17, 2, 8, 16)]
ODD = [(3, 5, 7, 7), (2, 3, 1, 1), (4, 2, 3, 11)]


class Keyed:
    """Random permutations, scales and data."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        draw = np.random.default_rng(sum(shape))
        rows, cols, height, width = shape
        self.rows = draw.permutation(rows).astype(np.int32)
        self.cols = draw.permutation(cols).astype(np.int32)
        self.row_scale = draw.choice([-1, 1], rows).astype(np.float32)
        self.col_scale = draw.choice([-1, 1], cols).astype(np.float32)
        self.value = torch.from_numpy(draw.standard_normal((rows, cols, height * width))).to(dtype)
        self.value[draw.random(self.value.shape) < 0.2] = 0.5  # ties
        self.bias = torch.from_numpy(draw.standard_normal(cols)).to(dtype)
        self.r = draw.standard_normal(cols).astype(np.float32)
        self.s = draw.standard_normal(rows)
        self.q = torch.from_numpy(draw.standard_normal((2, cols)))
        self.keys = (self.rows, self.cols, self.row_scale, self.col_scale)

    def true(self, src: torch.Tensor) -> torch.Tensor:
        """What unblinding has to give, before its ReLU."""
        found = torch.empty_like(src)
        scale = torch.from_numpy(self.row_scale[:, None] * self.col_scale).to(src.dtype)
        found[self.rows] = src[:, self.cols] * scale[:, :, None]
        return found + self.bias[:, None]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(passes, "compiled", lambda: None)
    elif passes.compiled() is None:
        pytest.skip("numba is not installed")
    return str(request.param)


def bits_for(value: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    rows, cols, plane = value.shape
    return marks_for(rows, cols, plane, None, buffers)


def tally_for(k: Keyed, bundle: int) -> Tally:
    rows, _, plane = k.value.shape
    totals = torch.zeros(-(-rows // bundle), plane, dtype=torch.float64)
    return Tally(k.r, k.s, bundle, totals)


def contracted(k: Keyed, bundle: int) -> torch.Tensor:
    each = torch.einsum("c,bcp->bp", torch.from_numpy(k.r).double(), k.value.double())
    weighted = each * torch.from_numpy(k.s)[:, None]
    return torch.stack([part.sum(0) for part in weighted.split(bundle)])  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES + ODD)
def test_unblinding(shape: tuple[int, ...], relu: bool, checked: bool, way: str) -> None:
    for dtype in (torch.float32, torch.float64):
        k = Keyed(shape, dtype)
        dst = torch.empty_like(k.value)
        marks = bits_for(k.value, Buffers()) if relu else None
        tally = tally_for(k, 4) if checked else None
        unblind(k.value, dst, *k.keys, bias=k.bias, relu=relu, marks=marks, tally=tally)
        wanted = k.true(k.value)
        assert torch.equal(dst, wanted.clamp_min(0) if relu else wanted)
        if tally is not None:
            torch.testing.assert_close(tally.totals, contracted(k, 4), rtol=1e-4, atol=1e-4)
        if marks is None:
            continue
        gradient = torch.randn_like(dst)
        back, sums = torch.empty_like(dst), torch.zeros(shape[1], dtype=torch.float64)
        blind(gradient, back, *k.keys, marks=marks, sums=sums)
        gated = torch.where(dst > 0, gradient, 0)
        compare_blinded(k, back, gated)
        torch.testing.assert_close(sums, gated.double().sum((0, 2)), rtol=1e-4, atol=1e-4)


def compare_blinded(k: Keyed, found: torch.Tensor, true: torch.Tensor) -> None:
    scale = torch.from_numpy(k.row_scale[:, None] * k.col_scale).to(true.dtype)
    assert torch.equal(found, true[k.rows][:, k.cols] * scale[:, :, None])


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_is_torch_s(shape: tuple[int, ...], checked: bool, way: str) -> None:
    rows, cols, height, width = shape
    for dtype in (torch.float32, torch.float64):
        k = Keyed(shape, dtype)
        dst = torch.empty(rows, cols, height * width // 4, dtype=dtype)
        marks = marks_for(rows, cols, height * width, width, Buffers())
        tally = tally_for(k, 4) if checked else None
        unblind(
            k.value, dst, *k.keys, bias=k.bias, relu=True, marks=marks, width=width, tally=tally
        )
        plain = k.true(k.value).view(shape).requires_grad_()
        pooled = functional.max_pool2d(functional.relu(plain), 2)
        assert torch.equal(dst.view_as(pooled), pooled)
        if tally is not None:
            torch.testing.assert_close(tally.totals, contracted(k, 4), rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(dst)
        torch.autograd.backward(pooled, gradient.view_as(pooled))
        assert plain.grad is not None
        back, sums = torch.empty_like(k.value), torch.zeros(cols, dtype=torch.float64)
        sketch = (
            sketch_for(rows, cols, height * width, torch.from_numpy(k.s), k.q, 4, Buffers())
            if checked
            else None
        )
        blind(gradient, back, *k.keys, marks=marks, width=width, sums=sums, sketch=sketch)
        true = plain.grad.flatten(2)
        compare_blinded(k, back, true)
        torch.testing.assert_close(sums, true.double().sum((0, 2)), rtol=1e-4, atol=1e-4)
        if sketch is not None:
            compare_sketch(k, sketch, back)


def compare_sketch(k: Keyed, sketch: passes.Sketch, blinded: torch.Tensor) -> None:
    x = blinded.double()
    weighted = x * torch.from_numpy(k.s)[:, None, None]
    image = torch.stack([part.sum(0) for part in weighted.split(sketch.bundle)])  # type: ignore[no-untyped-call]
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(sketch.image.double(), image)
    close(sketch.energy.double(), image.square().sum(1))
    folds = torch.einsum("rc,bcp->rbp", k.q, x)
    if sketch.folds is not None:
        close(sketch.folds.double(), folds)


@pytest.mark.parametrize("bundle", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES + ODD)
def test_operands_are_contracted_on_their_way(
    shape: tuple[int, ...], bundle: int, way: str
) -> None:
    k = Keyed(shape, torch.float32)
    rows, cols, plane = k.value.shape
    s = torch.from_numpy(k.s)
    sketch = sketch_for(rows, cols, plane, s, k.q, bundle, Buffers(), folded=bundle != 2)
    back = torch.empty_like(k.value)
    blind(k.value, back, *k.keys, sketch=sketch)
    compare_blinded(k, back, k.value)
    compare_sketch(k, sketch, back)


@pytest.mark.parametrize("where", list(itertools.product(range(4), range(4))))
def test_nan_and_infinity_are_pooled_as_torch_does(where: tuple[int, int], way: str) -> None:
    k = Keyed((1, 2, 2, 4), torch.float32)
    k.value[0, 0, where[0] % 2 + where[0] // 2 * 4] = torch.nan
    k.value[0, 0, where[1] % 2 + where[1] // 2 * 4] = torch.nan
    k.value[0, 1] = -torch.inf * torch.from_numpy(k.col_scale)[k.cols.argsort()][1]
    k.value[0, 1, 5] *= -1
    dst, marks = torch.empty(1, 2, 2), marks_for(1, 2, 8, 4, Buffers())
    unblind(k.value, dst, *k.keys, bias=k.bias, relu=True, marks=marks, width=4)
    plain = k.true(k.value).view(1, 2, 2, 4).requires_grad_()
    pooled = functional.max_pool2d(functional.relu(plain), 2)
    torch.testing.assert_close(dst.view_as(pooled), pooled, rtol=0, atol=0, equal_nan=True)
    gradient = torch.randn(1, 2, 2)
    torch.autograd.backward(pooled, gradient.view_as(pooled))
    back = torch.empty(1, 2, 8)
    blind(gradient, back, *k.keys, marks=marks, width=4)
    assert plain.grad is not None
    compare_blinded(k, back, plain.grad.flatten(2))


def test_large_planes_bypass_the_cache_and_stay_right(way: str) -> None:
    k = Keyed((4, 3, 448, 448), torch.float32)
    buffers = Buffers()
    dst, marks = buffers.empty(k.value.shape), bits_for(k.value, buffers)
    unblind(k.value, dst, *k.keys, bias=k.bias, relu=True, marks=marks)
    assert torch.equal(dst, k.true(k.value).clamp_min(0))
    back = buffers.empty(k.value.shape)
    blind(k.value, back, *k.keys, marks=marks)
    compare_blinded(k, back, torch.where(dst > 0, k.value, 0))
    marks = marks_for(4, 3, 448 * 448, 448, buffers)
    small = buffers.empty((4, 3, 224 * 224))
    unblind(k.value, small, *k.keys, relu=True, marks=marks, width=448)
    blind(small, back, *k.keys, marks=marks, width=448)
    plain = functional.max_pool2d(back.view(4, 3, 448, 448).abs(), 2)
    assert torch.equal(plain.flatten(2), small[k.rows][:, k.cols])


@pytest.mark.parametrize(
    "wrong",
    ["rows", "cols", "outside", "negative", "type", "plane", "odd", "no marks", "marks", "tally"],
)
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    k = Keyed((3, 5, 4, 6), torch.float32)
    into, cols, row_scale, col_scale = (a.copy() for a in k.keys)
    dst, marks = torch.empty(3, 5, 6), marks_for(3, 5, 24, 6, Buffers())
    options: dict[str, object] = {"marks": marks, "width": 6, "relu": True}
    if wrong == "rows":
        into = into[:2]
    elif wrong == "cols":
        cols = cols[:4]
    elif wrong == "outside":
        cols[1] = 5
    elif wrong == "negative":
        into[0] = -1
    elif wrong == "type":
        row_scale = row_scale.astype(np.float64)  # type: ignore[assignment]
    elif wrong == "plane":
        dst = torch.empty(3, 5, 5)
    elif wrong == "odd":
        options["width"] = 3
    elif wrong == "no marks":
        options["marks"] = None
    elif wrong == "marks":
        options["marks"] = marks_for(3, 4, 24, 6, Buffers())
    else:
        options["tally"] = Tally(k.r[:2], k.s, 4, torch.zeros(1, 24, dtype=torch.float64))
    with pytest.raises(InputError, match="cannot be moved"):
        unblind(k.value, dst, into, cols, row_scale, col_scale, **options)  # type: ignore[arg-type]
    if wrong not in {"tally"}:
        options.pop("relu")
        with pytest.raises(InputError, match="cannot be moved"):
            blind(dst, k.value, into, cols, row_scale, col_scale, **options)  # type: ignore[arg-type]
