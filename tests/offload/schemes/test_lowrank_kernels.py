"""Compiled passes of ``lowrank`` against torch, ReLUs in the same pass, dense layers inside."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks._offload_traffic import Traffic, peak
from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import Transcript, offload
from cenacle.offload import lowrank_inside as inside
from cenacle.offload import lowrank_split as splitting
from cenacle.offload.fleet import Fleet
from cenacle.offload.lowrank_share import ConvolutionShare
from cenacle.offload.maps import Convolution, Dense
from cenacle.offload.schemes.base import Needs, Site
from cenacle.offload.schemes.lowrank import LowRank

ALL = Needs(True, True, True)


def conv(side: int = 3, stride: int = 1, groups: int = 1) -> Convolution:
    return Convolution((stride,) * 2, (side // 2,) * 2, (1, 1), groups)


def scheme(**options: Any) -> LowRank:
    made = LowRank(**options)
    made.attach(Fleet([InlineAccelerator()]), nn.Identity())
    return made


def site(map_: Convolution | Dense) -> Site:
    return Site("layer", map_, "activations", True, (1, 0))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


CASES = {
    "3x3": (conv(), (3, 16, 20, 18), (12, 16, 3, 3), 4),
    "3x3, rank 2": (conv(), (2, 8, 33, 40), (8, 8, 3, 3), 2),
    "3x3, odd rank": (conv(), (2, 16, 17, 29), (8, 16, 3, 3), 5),
    "3x3, narrow": (conv(), (2, 16, 9, 9), (8, 16, 3, 3), 3),
    "3x3, very narrow": (conv(), (2, 16, 5, 5), (8, 16, 3, 3), 3),
    "3x3, wide": (conv(), (1, 8, 40, 113), (4, 8, 3, 3), 3),
    "1x1": (conv(1), (2, 24, 6, 18), (16, 24, 1, 1), 5),
    "5x5": (conv(5), (2, 8, 16, 30), (8, 8, 5, 5), 3),
    "groups": (conv(groups=2), (2, 16, 10, 18), (8, 8, 3, 3), 3),
    "stride": (conv(stride=2), (2, 12, 15, 14), (8, 12, 3, 3), 3),
    "odd channels": (conv(), (2, 9, 17, 19), (7, 9, 3, 3), 3),
}


class TestRelu:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("guard", [None, 1e-9], ids=["sent", "inside"])
    def test_both_passes(self, name: str, dtype: torch.dtype, guard: float | None) -> None:
        map_, x_shape, w_shape, rank = CASES[name]
        torch.manual_seed(1)
        x, w, bias = torch.randn(x_shape), torch.randn(w_shape), torch.randn(w_shape[0])
        x, w, bias = (t.to(dtype) for t in (x, w, bias))
        made = scheme(ranks=rank, guard=guard)
        w.requires_grad_()
        with torch.no_grad():
            y, saved = made.forward_relu(site(map_), x, w, bias)
            wide = map_.forward().compute(x.double(), w.double()) + bias.double()[:, None, None]
            bound = 1e-5 if dtype == torch.float32 else 1e-12
            assert relative(y, wide.clamp_min(0)) < bound
            assert (y >= 0).all()
            gy = torch.randn(y.shape, dtype=dtype)
            found = made.backward_relu(site(map_), saved, gy, y, None, w, ALL)
            passed = gy.double() * (y > 0)
        assert found.x is not None
        assert found.w is not None
        assert found.bias is not None
        expected = map_.input_gradient(x.shape).compute(passed, w.detach().double())
        assert relative(found.x, expected) < bound
        expected = map_.weight_gradient(w.shape).compute(passed, x.double())
        assert relative(found.w, expected) < bound
        assert relative(found.bias, passed.sum((0, 2, 3))) < bound

    def test_not_a_number_stays(self) -> None:
        made, x = scheme(ranks=2, guard=None), torch.randn(1, 8, 20, 20)
        x[0, 3, 5, 5] = math.nan
        y, _ = made.forward_relu(site(conv()), x, torch.randn(4, 8, 3, 3), None)
        assert y[0, :, 5, 5].isnan().all()

    def test_model(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        x, record = torch.randn(2, 3, 40, 40), Transcript()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with offload(model, "lowrank", [InlineAccelerator()], guard=None, transcript=record):
            for _ in range(2):  # fused from the second pass on
                model.zero_grad()
                model(x).square().sum().backward()
        for one, true in zip(model.parameters(), expected, strict=True):
            assert one.grad is not None
            assert relative(one.grad, true.double()) < 1e-5
        gradients = [
            record.tensors[i]
            for i, line in enumerate(record.lines)
            if line["event"] == "put" and line["role"] == "gradients"
        ]
        # What workers get in a fused pass is what they got before.
        for first, second in zip(gradients[:2], gradients[2:], strict=True):
            assert relative(second, first.double()) < 1e-5


class TestCompiled:
    @pytest.mark.parametrize("name", CASES)
    def test_as_torch(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        map_, x_shape, w_shape, rank = CASES[name]
        torch.manual_seed(2)
        x, w = torch.randn(x_shape).relu(), torch.randn(w_shape)
        found: list[tuple[torch.Tensor, ...]] = []
        for module in (splitting.compiled_kernels(), None):
            assert module is not None or found
            monkeypatch.setattr(splitting, "compiled_kernels", lambda module=module: module)
            torch.manual_seed(3)
            made = scheme(ranks=rank, guard=None)
            y, saved = made.forward(site(map_), x, w, None)
            gy = torch.randn(y.shape)
            dw = made.backward(site(map_), saved, gy, None, w, Needs(False, True, False)).w
            assert dw is not None
            found.append((saved.share.residual, y, dw))
        for fast, slow in zip(*found, strict=True):
            assert relative(fast, slow.double()) < 2e-6

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_split_of_any_shape(self, data: st.DataObject) -> None:
        """X_U + Q V is X, and X_U has nothing along Q: whatever is read past an end."""
        channels = 4 * data.draw(st.integers(1, 9))
        height, width = (data.draw(st.integers(1, 40)) for _ in range(2))
        rank = data.draw(st.integers(1, min(7, channels, height * width)))
        torch.manual_seed(data.draw(st.integers(0, 9)))
        x = torch.randn(2, channels, height, width)
        residual = torch.full_like(x, math.nan)
        share = ConvolutionShare(
            conv(), x, (4, channels, 3, 3), residual, rank, 2, splitting.Scratch()
        )
        planes = share._factors[:, :, 1:-1, 1:-1].flatten(2)
        whole = residual.flatten(2) + share._basis @ planes
        assert torch.allclose(whole, x.flatten(2), atol=1e-5)
        assert (share._basis.mT @ residual.flatten(2)).abs().max() < 1e-4
        assert (share._factors[:, :, 0] == 0).all()
        assert (share._factors[:, :, :, -1] == 0).all()


class TestFewRows:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inside, "_LARGE", 1)

    @pytest.mark.parametrize("rows", [2, 3, 4, 5, 8])
    @pytest.mark.parametrize(("out", "inner"), [(32, 16), (96, 48), (320, 8224), (64, 25088)])
    def test_products(self, rows: int, out: int, inner: int) -> None:
        torch.manual_seed(rows)
        x, w, gy = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(rows, out)
        few = inside.FewRows(Buffers())
        assert few.fits(x, w)
        wide = [t.double() for t in (x, w, gy)]
        assert relative(few.forward(x, w), wide[0] @ wide[1].T) < 1e-6
        assert relative(few.input_gradient(gy, w), wide[2] @ wide[1]) < 1e-6
        assert relative(few.weight_gradient(gy, x), wide[2].T @ wide[0]) < 1e-6

    @pytest.mark.parametrize(
        ("x", "w"),
        [
            (torch.ones(1, 32), torch.ones(32, 32)),
            (torch.ones(9, 32), torch.ones(32, 32)),
            (torch.ones(4, 24), torch.ones(32, 24)),
            (torch.ones(4, 32), torch.ones(10, 32)),
            (torch.ones(4, 32), torch.ones(32, 32).t()[:, :32].t()[::1].t()),
            (torch.ones(4, 32).double(), torch.ones(32, 32).double()),
            (torch.ones(4, 16 * 4099), torch.ones(32, 16 * 4099)),
        ],
    )
    def test_others_are_left_to_torch(self, x: torch.Tensor, w: torch.Tensor) -> None:
        made = scheme()
        if w.is_contiguous() and x.shape[1] != 16 * 4099:
            assert not inside.FewRows(Buffers()).fits(x, w)
        y, saved = made.forward(site(Dense()), x, w, None)
        assert relative(y, x.double() @ w.double().T) < 1e-5
        found = made.backward(site(Dense()), saved, torch.ones_like(y), None, w, ALL)
        assert found.w is not None
        assert torch.allclose(found.w, x.sum(0).expand_as(w))

    def test_classifier_trains_as_plain(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
        x = torch.randn(4, 64)
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with offload(model, "lowrank", [InlineAccelerator()]) as session:
            model(x).square().sum().backward()
            assert session.profile.total.products == 0
        for one, true in zip(model.parameters(), expected, strict=True):
            assert one.grad is not None
            assert relative(one.grad, true.double()) < 1e-6


class TestAlgebra:
    def test_counts(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
        with offload(model, (traffic := Traffic()), [InlineAccelerator()]):
            model(torch.randn(2, 3, 10, 10)).sum().backward()
        first = 4 * 2 * (2 * 3 * 100) + 2 * 2 * (2 * 216 + 9 * 2 * 8 * 100) * 2
        second = 4 * 3 * (2 * 8 * 100) + 2 * 3 * (2 * 288 + 9 * 2 * 4 * 100) * 2
        assert traffic.algebra(lambda _: True, {"0": 2, "1": 3}) == first + second
        assert traffic.algebra(lambda name: name == "0", {"0": 2, "1": 3}) == first
        assert traffic.algebra(lambda _: True, {"0": 0}) == 0

    def test_peak(self) -> None:
        assert 1e8 < peak(64, 1) < 1e13
