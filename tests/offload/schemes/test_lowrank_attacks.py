"""What residuals give away by themselves, and what the equations of dW really determine.

Everything here works on a worker's transcript alone. Attacks that the documentation says
succeed have to go on succeeding, so that it stays true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import Transcript, offload
from cenacle.offload.lowrank_guard import determined_share
from cenacle.offload.maps import Convolution, Dense
from cenacle.offload.schemes.lowrank import LowRank

RATE = 0.5
F64 = torch.float64


def put(record: Transcript, role: str) -> list[torch.Tensor]:
    return [
        record.tensors[i]
        for i, line in enumerate(record.lines)
        if line["event"] == "put" and line["role"] == role
    ]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def missing_directions(residual: torch.Tensor, rank: int) -> torch.Tensor:
    """Q's span, from a residual (channels, positions) that has nothing along it."""
    basis: torch.Tensor = torch.linalg.svd(residual, full_matrices=True)[0][:, -rank:]
    return basis


class TestDirectionsShow:
    """A residual tells Q, so only V is unknown: B r H W numbers, not B C H W."""

    CHANNELS, OUT, RANK = 32, 16, 2

    def victim(self, guard: float | None, samples: int, size: int) -> tuple[Any, Transcript]:
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Hardtanh(-9, 9), nn.Conv2d(self.CHANNELS, self.OUT, 3, padding=1)
        ).double()
        x = torch.randn(samples, self.CHANNELS, size, size, dtype=F64) + 1
        optimizer, record = torch.optim.SGD(model.parameters(), lr=RATE), Transcript()
        with offload(
            model,
            "lowrank",
            [InlineAccelerator()],
            ranks=self.RANK,
            guard=guard,
            transcript=record,
        ):
            for _ in range(2):
                optimizer.zero_grad()
                y = model(x)
                (y * torch.randn(y.shape, dtype=F64)).sum().backward()
                optimizer.step()
        return x, record

    def attack(self, record: Transcript) -> torch.Tensor:
        weights = put(record, "weights")
        seen, gy = put(record, "activations")[0], put(record, "gradients")[0]
        samples, channels, size, _ = seen.shape
        total = (weights[0] - weights[1]) / RATE
        part = conv().weight_gradient(total.shape).compute(gy, seen)
        bases = [missing_directions(one.flatten(1), self.RANK) for one in seen]
        # Samples come apart: their columns of Q are independent.
        apart = torch.einsum("ocuv,ic->oiuv", total - part, torch.linalg.pinv(torch.cat(bases, 1)))
        found = seen.clone()
        for b in range(samples):
            padded = nn.functional.pad(gy[b : b + 1], (2, 2, 2, 2))
            rows = [
                padded[:, :, 3 - u : 3 - u + size, 3 - v : 3 - v + size]
                for u in range(3)
                for v in range(3)
            ]
            equations = torch.stack(rows, 2).permute(1, 2, 0, 3, 4).reshape(self.OUT * 9, -1)
            own = apart[:, b * self.RANK : (b + 1) * self.RANK]
            known = own.permute(0, 2, 3, 1).reshape(self.OUT * 9, -1)
            factors = torch.linalg.lstsq(equations, known, driver="gelsd").solution
            found[b] += (bases[b] @ factors.T).view(channels, size, size)
        return found

    @pytest.mark.parametrize("samples", [1, 4, 16])
    def test_a_larger_batch_hides_nothing(self, samples: int) -> None:
        # 144 equations for each channel and up to 16 * 100 positions.
        x, record = self.victim(None, samples, 10)
        assert relative(put(record, "activations")[0], x) > 0.6
        assert relative(self.attack(record), x) < 1e-9

    @pytest.mark.parametrize("samples", [1, 4, 16])
    def test_guard_keeps_it_inside(self, samples: int) -> None:
        _, record = self.victim(0.5, samples, 10)
        assert record.lines == []

    def test_guard_s_limit_leaves_the_rest(self) -> None:
        x, record = self.victim(0.5, 4, 18)  # 144 of 324 numbers for each column of Q
        blind = put(record, "activations")[0]
        left = relative(self.attack(record) - blind, x - blind)
        hidden = float((self.attack(record) - x).norm() / (x - blind).norm())
        assert 0.5 < hidden < 1
        assert left > 0.5

    def test_inference_alone_is_not_guarded(self) -> None:
        model = nn.Sequential(nn.Hardtanh(), nn.Conv2d(16, 16, 3)).eval()
        record = Transcript()
        with (
            torch.inference_mode(),
            offload(model, "lowrank", [InlineAccelerator()], transcript=record) as session,
        ):
            for _ in range(2):
                model(torch.randn(1, 16, 8, 8))
            assert isinstance(session.scheme, LowRank)
            assert session.scheme.chosen == {"1": 2}
        assert len(put(record, "weights")) == 1
        assert put(record, "gradients") == []


def conv(groups: int = 1, padding: int = 1, stride: int = 1) -> Convolution:
    return Convolution((stride,) * 2, (padding,) * 2, (1, 1), groups)


class TestDeterminedShare:
    """The count of the guard against the rank of the equations themselves."""

    @pytest.mark.parametrize(
        ("map_", "samples", "channels", "out", "rank", "size", "fixed"),
        [
            (conv(), 1, 6, 2, 2, 6, False),
            (conv(), 3, 8, 2, 2, 6, False),  # 6 columns of 8 channels: samples come apart
            (conv(), 4, 6, 2, 2, 7, False),  # 8 columns of 6 channels: they do not
            (conv(), 3, 6, 2, 2, 6, True),
            (conv(), 2, 6, 8, 2, 4, False),  # more equations than unknowns
            (conv(groups=2), 2, 8, 2, 2, 6, False),
            (conv(groups=2), 3, 6, 2, 2, 6, False),
            (conv(padding=0), 2, 6, 2, 2, 6, False),
            (conv(stride=2), 2, 6, 1, 2, 8, False),
            (conv(stride=3, padding=0), 2, 6, 1, 2, 9, False),
        ],
    )
    def test_is_the_rank(
        self,
        map_: Convolution,
        samples: int,
        channels: int,
        out: int,
        rank: int,
        size: int,
        fixed: bool,
    ) -> None:
        torch.manual_seed(0)
        bases = 1 if fixed else samples
        q = torch.linalg.qr(torch.randn(bases, channels, rank, dtype=F64))[0]
        q = q.expand(samples, -1, -1)
        w_shape = (out, channels // map_.groups, 3, 3)
        x_shape = (samples, channels, size, size)
        space = map_.space(x_shape, w_shape)
        gy = torch.randn(samples, out, *space, dtype=F64)
        product = map_.weight_gradient(w_shape)

        def equations(v: torch.Tensor) -> torch.Tensor:
            x = torch.bmm(q, v.view(samples, rank, -1)).view(x_shape)
            return product.compute(gy, x).flatten()

        unknowns = samples * rank * size * size
        columns = torch.stack([equations(e) for e in torch.eye(unknowns, dtype=F64)], 1)
        found = int(torch.linalg.matrix_rank(columns, rtol=1e-9))
        share = determined_share(map_, x_shape, w_shape, rank, bases)
        met = min(size * size, space[0] * space[1] * 9)
        assert found <= round(share * samples * rank * met)
        assert share >= found / unknowns
        if share < 1:  # and the count is not far too careful
            assert found >= 0.8 * share * samples * rank * met

    def test_dense_rows_are_split_together(self) -> None:
        torch.manual_seed(0)
        rows, inner, out, rank = 12, 10, 5, 2
        q = torch.linalg.qr(torch.randn(inner, rank, dtype=F64))[0]
        gy = torch.randn(rows, out, dtype=F64)
        product = Dense().weight_gradient((out, inner))
        columns = [
            product.compute(gy, v.view(rows, rank) @ q.T).flatten()
            for v in torch.eye(rows * rank, dtype=F64)
        ]
        found = int(torch.linalg.matrix_rank(torch.stack(columns, 1)))
        share = determined_share(Dense(), (rows, inner), (out, inner), rank, 1)
        assert found == round(share * rows * rank)


class TestZerosShow:
    """A ReLU's zeros: where x is zero the residual is -Q v, for far more channels than v has
    numbers. Linear programming finds v, and many zeros where chance gives none prove it."""

    def decode(self, residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The activation (channels, positions), and at which positions it is certain."""
        basis = missing_directions(residual, rank).numpy()
        found = residual.clone()
        for p in range(residual.shape[1]):
            done = linprog(
                basis.sum(0), A_ub=-basis, b_ub=residual[:, p].numpy(), bounds=(None, None)
            )
            if done.x is not None:
                found[:, p] += torch.from_numpy(basis @ done.x)
        return found, (found.abs() < 1e-9).sum(0) > rank + 1

    def picture(self, size: int) -> torch.Tensor:
        smooth = nn.functional.avg_pool2d(torch.randn(1, 3, size + 6, size + 6), 7, 1).double()
        return smooth / smooth.std()

    @pytest.mark.parametrize(("rank", "least", "most"), [(2, 0.9, 1.0), (4, 0.7, 1.0), (8, 0, 0.8)])
    def test_activation_and_then_the_picture(self, rank: int, least: float, most: float) -> None:
        """Of one inference. What is hidden at low ranks is nothing."""
        torch.manual_seed(0)
        channels, size = 64, 9
        model = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 8, 3, padding=1),
        )
        model.double().eval()
        x, record = self.picture(size), Transcript()
        ranks = {"0": 2, "2": rank}
        with (
            torch.no_grad(),
            offload(model, "lowrank", [InlineAccelerator()], ranks=ranks, transcript=record),
        ):
            model(x)
        with torch.no_grad():
            true = model[:2](x)[0].flatten(1)
        (residual,) = put(record, "activations")
        found, certain = self.decode(residual[0].flatten(1), rank)
        right = (found - true).norm(dim=0) < 1e-6 * true.norm(dim=0)
        assert least <= float(right.double().mean()) <= most
        assert not (certain & ~right).any()
        if rank > 4:
            return
        # The first layer's weight is known; its bias is not.
        w = next(w for w in put(record, "weights") if w.shape[1] == 3)
        unit = torch.eye(x.numel(), dtype=F64).view(-1, *x.shape[1:])
        linear = nn.functional.conv2d(unit, w, padding=1).flatten(1).T
        bias = torch.eye(channels, dtype=F64).repeat_interleave(size * size, 0)
        rows = ((found > 1e-9) & certain).flatten()
        solution = torch.linalg.lstsq(
            torch.cat([linear, bias], 1)[rows], found.flatten()[rows, None]
        ).solution[: x.numel(), 0]
        assert relative(put(record, "inputs")[0].flatten(), x.flatten()) > 0.5
        assert relative(solution, x.flatten()) < 1e-9

    def test_the_record_says_so(self) -> None:
        record = LowRank().leakage
        assert (record.inputs, record.activations) == ("obfuscated", "obfuscated")
        assert "ReLU" in record.note

    def test_no_zeros_no_decoding(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(32, 100, dtype=F64)
        q = torch.linalg.svd(x)[0][:, :2]
        found, certain = self.decode(x - q @ (q.T @ x), 2)
        assert not certain.any()
        assert relative(found, x) > 0.1
        assert np.isfinite(found.numpy()).all()
