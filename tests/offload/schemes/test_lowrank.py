"""Low-rank splitting: exact results, what is left in residuals, and what follows from them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.errors import InputError
from cenacle.offload import Transcript, offload
from cenacle.offload import lowrank_split as splitting
from cenacle.offload.fleet import Fleet
from cenacle.offload.lowrank_noise import (
    ResidualNoise,
    gaussian,
    gaussian_delta,
    gaussian_epsilon,
)
from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct
from cenacle.offload.schemes.base import Needs, Site
from cenacle.offload.schemes.lowrank import LowRank

ALL = Needs(True, True, True)


def conv(
    stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1, dims: int = 2
) -> Convolution:
    return Convolution((stride,) * dims, (padding,) * dims, (dilation,) * dims, groups)


def site(map_: LinearMap, role: Any = "activations", key: int = 0) -> Site:
    return Site("layer", map_, role, not isinstance(map_, MatrixProduct), (1, key))


def scheme(workers: int = 1, transcript: Transcript | None = None, **options: Any) -> LowRank:
    made = LowRank(**options)
    fleet = Fleet([InlineAccelerator(f"worker-{i}") for i in range(workers)], transcript=transcript)
    made.attach(fleet, nn.Identity())
    return made


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def case(
    map_: LinearMap, x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    x = (
        torch.randn(x_shape) + torch.randn(x_shape[1]).view(1, -1, *[1] * (len(x_shape) - 2))
    ).relu()
    w, bias = torch.randn(w_shape), torch.randn(w_shape[0])
    y = map_.forward().compute(x, w)
    gy = torch.randn(y.shape) + 0.3
    return tuple(t.to(dtype) for t in (x, w, bias, gy))


def check(
    made: LowRank, at: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, gy: torch.Tensor
) -> None:
    """Forward and all gradients against float64."""
    bound = 1e-5 if x.dtype == torch.float32 else 1e-12
    y, saved = made.forward(at, x, w, bias)
    found = made.backward(at, saved, gy, None, w, ALL)
    map_, xd, wd, gd = at.map, x.double(), w.double(), gy.double()
    shape = (1, -1, *[1] * (x.dim() - 2))
    expected = map_.forward().compute(xd, wd) + bias.double().view(shape)
    assert relative(y, expected) < bound
    assert found.x is not None
    assert found.w is not None
    assert found.bias is not None
    assert relative(found.x, map_.input_gradient(x.shape).compute(gd, wd)) < bound
    assert relative(found.w, map_.weight_gradient(w.shape).compute(gd, xd)) < bound
    assert relative(found.bias, gd.sum([d for d in range(gd.dim()) if d != 1])) < bound


GEOMETRIES = {
    "3x3": (conv(), (3, 16, 20, 18), (12, 16, 3, 3), 4),
    "3x3, narrow": (conv(), (2, 16, 9, 7), (8, 16, 3, 3), 4),
    "3x3, odd outputs": (conv(), (2, 9, 17, 19), (7, 9, 3, 3), 3),
    "1x1": (conv(padding=0), (2, 24, 6, 18), (16, 24, 1, 1), 5),
    "5x5": (conv(padding=2), (2, 8, 16, 30), (8, 8, 5, 5), 2),
    "stride": (conv(stride=2), (2, 12, 15, 14), (8, 12, 3, 3), 3),
    "stride beyond kernel": (conv(stride=3, padding=0), (2, 8, 13, 13), (8, 8, 1, 1), 2),
    "dilation": (conv(dilation=2, padding=2), (2, 8, 14, 20), (8, 8, 3, 3), 2),
    "no padding": (conv(padding=0), (2, 8, 20, 20), (8, 8, 3, 3), 2),
    "wide padding": (conv(padding=3), (2, 8, 5, 20), (8, 8, 3, 3), 2),
    "uneven kernel": (
        Convolution((1, 2), (0, 2), (1, 1), 1), (2, 8, 9, 11), (4, 8, 1, 5), 2,
    ),
    "groups": (conv(groups=2), (2, 16, 10, 18), (8, 8, 3, 3), 3),
    "many groups": (conv(groups=4), (2, 16, 10, 18), (8, 4, 3, 3), 2),
    "depthwise": (conv(groups=8), (2, 8, 10, 10), (8, 1, 3, 3), 2),
    "picture": (conv(stride=2, padding=3), (2, 3, 32, 32), (8, 3, 7, 7), 2),
    "one channel": (conv(), (2, 1, 12, 12), (4, 1, 3, 3), 2),
    "one sample": (conv(), (1, 8, 33, 47), (8, 8, 3, 3), 3),
    "large": (conv(), (1, 8, 80, 80), (4, 8, 3, 3), 3),
    "1-d": (conv(dims=1), (3, 12, 40), (8, 12, 3), 3),
    "1-d, stride": (conv(stride=2, dims=1), (3, 12, 41), (6, 12, 3), 3),
    "1-d, groups": (conv(dims=1, groups=3), (3, 12, 40), (6, 4, 3), 2),
    "dense": (Dense(), (64, 40), (24, 40), 3),
    "dense, few rows": (Dense(), (3, 40), (24, 40), 2),
    "dense, one row": (Dense(), (1, 40), (24, 40), 1),
}  # fmt: skip


class TestExactness:
    @pytest.mark.parametrize("name", GEOMETRIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("role", ["inputs", "activations"])
    def test_geometry(self, name: str, dtype: torch.dtype, role: str) -> None:
        map_, x_shape, w_shape, rank = GEOMETRIES[name]
        made = scheme(ranks=rank, guard=None)
        check(made, site(map_, role), *case(map_, x_shape, w_shape, dtype))

    @pytest.mark.parametrize("workers", [2, 3, 5])
    @pytest.mark.parametrize("name", ["3x3", "groups", "dense", "1-d"])
    def test_workers(self, name: str, workers: int) -> None:
        map_, x_shape, w_shape, rank = GEOMETRIES[name]
        made = scheme(workers, ranks=rank, guard=None)
        check(made, site(map_), *case(map_, x_shape, w_shape, torch.float32))

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_shape(self, data: st.DataObject) -> None:
        draw = data.draw
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        kernel = draw(st.tuples(*[st.integers(1, 4)] * 2))
        stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(2))
        padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
        least = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
        size = [max(1, low) + draw(st.integers(0, 20)) for low in least]
        channels = groups * draw(st.integers(1, 6))
        out = groups * draw(st.integers(1, 5))
        batch = draw(st.integers(1, 3))
        map_ = Convolution(stride, padding, dilation, groups)
        made = scheme(ranks=draw(st.integers(1, 6)), rounds=draw(st.integers(1, 2)), guard=None)
        tensors = case(
            map_, (batch, channels, *size), (out, channels // groups, *kernel), torch.float64
        )
        check(made, site(map_), *tensors)

    def test_compiled_and_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        map_, x_shape, w_shape, rank = GEOMETRIES["3x3"]
        x, w, bias, _ = case(map_, x_shape, w_shape, torch.float32)
        assert splitting.compiled_kernels() is not None
        fast, _ = scheme(ranks=rank).forward(site(map_), x, w, bias)
        monkeypatch.setattr(splitting, "compiled_kernels", lambda: None)
        slow, _ = scheme(ranks=rank).forward(site(map_), x, w, bias)
        assert relative(fast, slow.double()) < 1e-6

    @pytest.mark.parametrize(
        "needs",
        [Needs(*(bool(n) for n in ns)) for ns in [(0, 1, 1), (1, 0, 1), (0, 0, 1), (1, 1, 0)]],
    )
    def test_only_what_is_needed(self, needs: Needs) -> None:
        map_, x_shape, w_shape, rank = GEOMETRIES["3x3"]
        x, w, bias, gy = case(map_, x_shape, w_shape, torch.float64)
        made = scheme(ranks=rank, guard=None)
        _, saved = made.forward(site(map_), x, w, bias)
        found = made.backward(site(map_), saved, gy, None, w, needs)
        assert [g is not None for g in found] == [bool(n) for n in needs]
        if found.bias is not None:
            assert relative(found.bias, gy.sum((0, 2, 3))) < 1e-12

    def test_products_stay_inside(self) -> None:
        made = scheme(transcript=(seen := Transcript()))
        x, w = torch.randn(2, 5, 4), torch.randn(2, 4, 6)
        y, saved = made.forward(site(MatrixProduct()), x, w, None)
        found = made.backward(
            site(MatrixProduct()), saved, torch.ones_like(y), None, w, Needs(True, True, False)
        )
        assert torch.equal(y, x @ w)
        assert found.w is not None
        assert torch.equal(found.w, x.mT @ torch.ones_like(y))
        assert seen.lines == []

    def test_zeros_and_huge_and_tiny(self) -> None:
        map_, x_shape, w_shape, rank = GEOMETRIES["3x3"]
        x, w, bias, _ = case(map_, x_shape, w_shape, torch.float32)
        for scale in (0.0, 1e-18, 1e15):
            y, _ = scheme(ranks=rank).forward(site(map_), x * scale, w, bias * scale)
            expected = torch.conv2d(
                (x * scale).double(), w.double(), (bias * scale).double(), padding=1
            )
            assert relative(y, expected) < 1e-5 or scale == 0.0
            assert y.isfinite().all()

    def test_changed_input_is_noticed(self) -> None:
        made = scheme()
        x, w = torch.randn(2, 40), torch.randn(3, 40)
        y, saved = made.forward(site(Dense()), x, w, None)  # few rows: inside
        x += 1
        with pytest.raises(InputError, match="in place"):
            made.backward(site(Dense()), saved, y, None, w, ALL)


class TestRanks:
    def test_doubling(self) -> None:
        made = scheme(guard=None)
        widths = [3, 64, 128, 256, 512, 512, 512]
        for i, (c, o) in enumerate(itertools.pairwise(widths)):
            at = Site(f"layer-{i}", conv(), "activations", True, (i, 0))
            made.forward(at, torch.randn(1, c, 24, 24), torch.randn(o, c, 3, 3), None)
        assert list(made.chosen.values()) == [2, 4, 8, 16, 32, 32]

    @pytest.mark.parametrize(
        ("channels", "size", "expected"),
        [(3, 32, 2), (2, 32, 0), (1, 32, 0), (16, 32, 2), (512, 7, 6), (512, 1, 0), (512, 2, 2)],
    )
    def test_limits(self, channels: int, size: int, expected: int) -> None:
        made = scheme(max_rank=32, guard=None)
        made._order = {f"before-{i}": i for i in range(9)}
        made.forward(
            site(conv()), torch.randn(1, channels, size, size), torch.randn(4, channels, 3, 3), None
        )
        assert made.chosen["layer"] == (2 if channels == 3 else expected)

    def test_by_name(self) -> None:
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        with offload(model, "lowrank", [InlineAccelerator()], ranks={"1": 3}) as session:
            model(torch.randn(2, 8, 9, 9))
            assert isinstance(session.scheme, LowRank)
            assert session.scheme.chosen == {"0": 0, "1": 3}
        with (
            pytest.raises(InputError, match="does not have"),
            offload(model, "lowrank", [InlineAccelerator()], ranks={"2": 3}),
        ):
            pass

    @pytest.mark.parametrize(
        "options",
        [
            {"ranks": 0}, {"ranks": True}, {"ranks": "two"}, {"ranks": {"a": 0}}, {"rounds": 0},
            {"max_rank": 0}, {"guard": 0.0}, {"guard": 1.5}, {"noise": (1.0, 1e-5)},
            {"noise": (0.0, 1e-5, 1.0)}, {"noise": (1.0, 0.0, 1.0)}, {"noise": (1.0, 1.0, 1.0)},
            {"noise": (1.0, 1e-5, math.inf)},
        ],
    )  # fmt: skip
    def test_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            LowRank(**options)


def features(samples: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """Like activations: correlated channels, smooth over space, after a ReLU."""
    torch.manual_seed(seed)
    few = torch.randn(samples, 4 + channels // 4, size, size)
    smooth = nn.functional.avg_pool2d(few, 5, 1, 2)
    mixed = torch.einsum("oc,bchw->bohw", torch.randn(channels, few.shape[1]), smooth)
    return (mixed + 0.3 * torch.randn(1, channels, 1, 1)).relu()


class TestResiduals:
    @pytest.mark.parametrize(("channels", "size"), [(64, 56), (64, 112), (128, 28), (256, 14)])
    @pytest.mark.parametrize("rank", [2, 8, 16])
    def test_energy_is_near_the_best(self, channels: int, size: int, rank: int) -> None:
        x = features(2, channels, size).flatten(2)
        best = torch.linalg.svdvals(x)[:, rank:].square().sum(1)
        for rounds, bound in ((1, 1.50), (2, 1.15), (3, 1.12)):
            basis = splitting.subspace(x, rank, rounds)
            residual = x - basis @ (basis.mT @ x)
            assert (residual.square().sum((1, 2)) / best).max() < bound, rounds

    def test_basis_is_orthonormal_even_of_dead_channels(self) -> None:
        x = features(2, 32, 12).flatten(2)
        x[:, 5:] = 0
        for seen in (x, torch.zeros_like(x)):
            basis = splitting.subspace(seen, 8, 2)
            assert torch.allclose(basis.mT @ basis, torch.eye(8).expand(2, -1, -1), atol=1e-5)

    def test_cosine_basis_is_orthonormal(self) -> None:
        basis = splitting.cosine_basis(16, 5, torch.float64)
        assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=1e-12)

    def test_a_sample_is_split_alike_in_any_company(self) -> None:
        x = features(4, 32, 20)
        w, seen = torch.randn(8, 32, 3, 3), []
        for batch in (x, x[[2, 0]]):
            made = scheme(ranks=4, transcript=(record := Transcript()))
            made.forward(site(conv()), batch, w, None)
            seen.append(put(record, "activations")[0])
        assert torch.allclose(seen[0][[2, 0]], seen[1], atol=1e-6)


def put(record: Transcript, role: str, layer: str | None = None) -> list[torch.Tensor]:
    return [
        record.tensors[i]
        for i, line in enumerate(record.lines)
        if line["event"] == "put" and line["role"] == role and layer in (None, line["layer"])
    ]


def small_cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for i in range(count):
        torch.manual_seed(100 + i)
        yield torch.rand(4, 3, 32, 32), torch.randint(0, 10, (4,))


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x, target in batches(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class TestModels:
    def test_training_is_the_plain_model_s(self) -> None:
        plain = small_cnn()
        split = copy.deepcopy(plain)
        expected = train(plain, 3)
        with offload(split, "lowrank", [InlineAccelerator("a"), InlineAccelerator("b")]) as session:
            assert train(split, 3) == pytest.approx(expected, rel=1e-5)
        assert session.profile.total.products > 0
        for name, value in split.state_dict().items():
            assert relative(value, plain.state_dict()[name].double()) < 1e-5, name

    def test_workers_see_residuals_only(self) -> None:
        """In training, at the first layer too: never X, X_T, nor any part of what is hidden."""
        model, record = small_cnn(), Transcript()
        hidden: dict[str, list[torch.Tensor]] = {"0": [], "2": []}
        for name, given_to in hidden.items():
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=given_to: kept.append(args[0].detach().clone())
            )
        with offload(
            model, "lowrank", [InlineAccelerator()], guard=None, transcript=record
        ) as session:
            train(model, 2)
            assert session.scheme.chosen == {"0": 2, "2": 2, "6": 0}  # type: ignore[attr-defined]
        fixed = splitting.cosine_basis(3, 2, torch.float32)
        for x, seen in zip(hidden["0"], put(record, "inputs", "0"), strict=True):
            flat = seen.flatten(2)
            assert (fixed.T @ flat).abs().max() < 1e-5  # nothing of the hidden directions
            assert torch.allclose(flat, x.flatten(2) - fixed @ (fixed.T @ x.flatten(2)), atol=1e-5)
        for x, seen in zip(hidden["2"], put(record, "activations", "2"), strict=True):
            basis = splitting.subspace(x.flatten(2), 2, 2)
            assert (basis.mT @ seen.flatten(2)).abs().max() < 1e-4
        x, parts = hidden["0"][0], [x for xs in hidden.values() for x in xs]
        for i, line in enumerate(record.lines):
            if line["event"] == "put":
                assert line["layer"] != "6"
                for secret in [*parts, *(p - r for p, r in [(x, put(record, "inputs", "0")[0])])]:
                    sent = record.tensors[i]
                    if sent.shape == secret.shape:
                        cosine = nn.functional.cosine_similarity(
                            sent.flatten(), secret.flatten(), 0
                        )
                        assert abs(cosine) < 0.9

    def test_record(self) -> None:
        guarded, open_ = LowRank().leakage, LowRank(guard=None).leakage
        assert (guarded.inputs, guarded.activations, guarded.weights) == (
            "obfuscated",
            "obfuscated",
            "plaintext",
        )
        assert (guarded.gradients, guarded.labels) == ("plaintext", "plaintext")
        assert (open_.inputs, open_.activations) == ("plaintext", "plaintext")


def solve(
    total: torch.Tensor, residual_part: torch.Tensor, gy: torch.Tensor, size: int
) -> torch.Tensor:
    """X_T (batch, in, size, size) from dW - dW_U = grad(X_T, dY) for 3x3 windows, padding 1."""
    batch, out = gy.shape[:2]
    rows = []
    for u in range(3):
        for v in range(3):
            # Coefficient of x[b, i, j]: gy[b, o, i - u + 1, j - v + 1].
            padded = nn.functional.pad(gy, (2, 2, 2, 2))
            rows.append(padded[:, :, 3 - u : 3 - u + size, 3 - v : 3 - v + size])
    equations = torch.stack(rows, 2).permute(1, 2, 0, 3, 4).reshape(out * 9, -1)
    known = (total - residual_part).permute(0, 2, 3, 1).reshape(out * 9, -1)
    found: torch.Tensor = torch.linalg.lstsq(equations, known, driver="gelsd").solution
    return found.T.reshape(-1, batch, size, size).transpose(0, 1)


class TestAttacks:
    """What the record says can be done, done; and what it says cannot."""

    RATE = 0.5

    def victim(self, guard: float | None, size: int, eval_first: bool = False) -> Any:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1)).double()
        x = torch.randn(2, 16, size, size, dtype=torch.float64) + 1
        record = Transcript()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.RATE)
        # The model is fed activations: an operation before it makes x one.
        chain = nn.Sequential(nn.Hardtanh(-9, 9), model)
        chain.train(not eval_first)
        with offload(
            chain, "lowrank", [InlineAccelerator()], ranks=4, guard=guard, transcript=record
        ):
            for _ in range(2):
                optimizer.zero_grad()
                (chain(x) * torch.randn(2, 64, size, size, dtype=torch.float64)).sum().backward()
                optimizer.step()
        return x, record

    def solved(self, record: Transcript, size: int) -> torch.Tensor:
        weights = put(record, "weights")
        total = (weights[0] - weights[1]) / self.RATE
        seen, gy = put(record, "activations")[0], put(record, "gradients")[0]
        part = conv().weight_gradient((64, 16, 3, 3)).compute(gy, seen)
        return solve(total, part, gy, size) + seen

    def test_unguarded_equations_give_everything(self) -> None:
        # 2 * 10 * 10 positions, 64 * 9 equations for each channel
        x, record = self.victim(None, 10)
        assert relative(self.solved(record, 10), x) < 1e-9

    def test_guarded_layer_is_never_seen_in_training(self) -> None:
        _, record = self.victim(0.5, 10)
        assert record.lines == []

    def test_guarded_layer_in_eval_mode_shows_one_weight_and_no_gradient(self) -> None:
        _, record = self.victim(0.5, 10, eval_first=True)
        assert len(put(record, "weights")) == 1
        assert put(record, "gradients") == []

    @pytest.mark.parametrize(("role", "found"), [("activations", True), ("inputs", False)])
    def test_two_views_of_a_picture(self, role: Any, found: bool) -> None:
        """Two crops under different directions give their common part away; fixed ones do not."""
        torch.manual_seed(4)
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
        spectrum = torch.tensor([9.0, 6.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
        scene = torch.einsum("oc,chw->ohw", basis * spectrum, torch.randn(6, 24, 40).double())
        scene[:, :, :8] *= torch.rand(6, 1, 1) * 3  # so that the crops differ in their directions
        seen, normals = [], []
        for left in (0, 16):
            made = scheme(ranks=4, transcript=(record := Transcript()))
            made.forward(
                site(conv(), role),
                scene[None, :, :, left : left + 24],
                torch.ones(8, 6, 3, 3).double(),
                None,
            )
            (residual,) = put(record, role)
            # The residual's own directions tell the projection that was applied.
            normals.append(torch.linalg.svd(residual[0].flatten(1))[0][:, :2])
            seen.append(residual[0])
        common = (seen[0][:, :, 16:].flatten(1), seen[1][:, :, :8].flatten(1))
        equations = torch.cat([n.T for n in normals])
        known = torch.cat([n.T @ r for n, r in zip(normals, common, strict=True)])
        solution = torch.linalg.lstsq(equations, known, driver="gelsd").solution
        truth = scene[:, :, 16:24].flatten(1)
        rank = torch.linalg.matrix_rank(equations, rtol=1e-6)
        # 2 of 6 directions shown by one view, 4 by two; with fixed ones, always the same 2.
        assert rank == (4 if found else 2)
        if found:
            shown = torch.linalg.qr(equations.T)[0]
            assert relative(shown.T @ solution, shown.T @ truth) < 1e-6


class TestNoise:
    def test_generator(self) -> None:
        drawn = gaussian(1_000_001)
        assert drawn.shape == (1_000_001,)
        assert abs(drawn.mean()) < 0.005
        assert abs(drawn.std() - 1) < 0.004
        assert abs((drawn.abs() < 1).double().mean() - 0.6827) < 0.003
        assert not torch.equal(gaussian(8), gaussian(8))

    @pytest.mark.parametrize(
        ("epsilon", "delta"), [(0.1, 1e-6), (0.5, 1e-5), (1.0, 1e-5), (4.0, 1e-5), (30.0, 1e-3)]
    )
    def test_sigma_is_the_least(self, epsilon: float, delta: float) -> None:
        sigma = ResidualNoise(epsilon, delta, 3.0).sigma
        assert gaussian_delta(epsilon, 6.0 / sigma) <= delta
        assert gaussian_delta(epsilon, 6.0 / (sigma * 0.999)) > delta
        if epsilon < 1:  # never more than the classical bound for the same distance
            assert sigma <= 6.0 * math.sqrt(2 * math.log(1.25 / delta)) / epsilon

    def test_published_value(self) -> None:
        # Balle and Wang: sigma of the analytic mechanism for epsilon 1, delta 1e-5, distance 1.
        assert ResidualNoise(1.0, 1e-5, 0.5).sigma == pytest.approx(3.7304, abs=2e-3)

    def test_clipped_and_calibrated(self) -> None:
        noise = ResidualNoise(8.0, 1e-3, 2.0)
        x = torch.randn(3, 8, 60, 60)
        x[1] *= 1e-4
        x[2, 0, 0, 0] = math.nan
        before = x.clone()
        noise.apply(x)
        scaled = before[0] * (2.0 / before[0].norm())
        assert float((x[0] - scaled).std()) == pytest.approx(noise.sigma, rel=0.02)
        assert float((x[1] - before[1]).std()) == pytest.approx(noise.sigma, rel=0.02)
        assert float(x[2].std()) == pytest.approx(noise.sigma, rel=0.02)

    def test_accounting(self) -> None:
        noise = ResidualNoise(0.5, 1e-5, 1.0)
        for _ in range(9):
            noise.apply(torch.zeros(1, 4))
        distance = 2.0 / noise.sigma
        assert noise.spent() == pytest.approx(gaussian_epsilon(1e-5, 3 * distance))
        assert 0.5 < noise.spent() < 9 * 0.5
        assert noise.spent() >= 0.5
        assert "at most 9 releases" in noise.describe()

    def test_session(self) -> None:
        model, record = small_cnn(), Transcript()
        with (
            torch.no_grad(),
            offload(
                model, "lowrank", [InlineAccelerator()], noise=(2.0, 1e-4, 1.0), transcript=record
            ) as session,
        ):
            for x, _ in batches(3):
                model(x)
            assert isinstance(session.scheme, LowRank)
            noise = session.scheme.noise
            assert noise is not None
            assert noise.releases == 6  # two layers, three passes
            assert f"epsilon {noise.spent():.4g}" in session.leakage.note
        (first, *_) = put(record, "inputs")
        # Of 3 * 32 * 32 numbers almost all is noise.
        assert float(first[0].std()) == pytest.approx(noise.sigma, rel=0.05)
