"""``masked-training``: gradients are right, and each worker alone sees uniform numbers."""

from __future__ import annotations

import contextlib
import copy
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.operations import PRIME
from cenacle.accelerators.protocol import Operation
from cenacle.errors import AcceleratorError, DataError, InputError
from cenacle.offload import Transcript, offload
from cenacle.offload.schemes.masked_training import MaskedTraining


def pair() -> list[InlineAccelerator]:
    return [InlineAccelerator("first"), InlineAccelerator("second")]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.inner(x)
        return functional.scaled_dot_product_attention(q, x, q)


# Smooth activations: fixed point may move a pre-activation near 0 to the other side of a ReLU.
MODELS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4)), (6, 20)),
    (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, 2)), (2, 3, 9, 9)),
    (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False)), (2, 4, 9, 9)),
    (nn.Sequential(nn.Conv1d(4, 6, 5, padding=2), nn.Tanh(), nn.Conv1d(6, 2, 1)), (3, 4, 20)),
    (Attention(), (2, 5, 8)),
]


@pytest.mark.parametrize(("model", "shape"), MODELS)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_gradients_are_those_of_the_plain_model(
    model: nn.Module, shape: tuple[int, ...], size: float
) -> None:
    torch.manual_seed(3)
    plain, masked = copy.deepcopy(model).double(), copy.deepcopy(model)
    x = torch.randn(shape)
    gy = None
    found: list[list[torch.Tensor]] = []
    for one, given in ((plain, x.double()), (masked, x.clone())):
        given.requires_grad_()
        if one is masked:
            with offload(one, "masked-training", pair()):
                y = one(given)
                assert gy is not None
                y.backward(gy.float())
        else:
            y = one(given)
            gy = torch.randn(y.shape, dtype=torch.float64) * size
            y.backward(gy)
        assert given.grad is not None
        gradients = [p.grad for p in one.parameters()]
        found.append([y.detach(), given.grad, *(g for g in gradients if g is not None)])
    for exact, got in zip(*found, strict=True):
        assert float((got.double() - exact).norm() / exact.norm()) < 3e-3


def test_training_reaches_the_same_accuracy() -> None:
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target)
    accuracies = []
    for hidden in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        session = offload(model, "masked-training", pair()) if hidden else None
        if session:
            session.__enter__()
        for _ in range(3):
            for part in torch.split(torch.randperm(1200), 60):
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(x[part]), y[part]))
                optimizer.step()
        if session:
            session.close()
        with torch.no_grad():
            accuracies.append(float((model(x[1200:]).argmax(1) == y[1200:]).float().mean()))
    assert accuracies[0] > 0.85
    assert abs(accuracies[0] - accuracies[1]) <= 0.003


def read_idx(path: Path) -> torch.Tensor:
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).copy()).view(
        shape
    )


@pytest.mark.slow
def test_training_on_mnist_reaches_the_same_accuracy(mnist: Path) -> None:
    """One pass over 20,000 pictures, with the rate going down to nothing; all test pictures."""
    x = read_idx(mnist / "train-images-idx3-ubyte.gz")[:20000].unsqueeze(1).float() / 255
    y = read_idx(mnist / "train-labels-idx1-ubyte.gz")[:20000].long()
    test = read_idx(mnist / "t10k-images-idx3-ubyte.gz").unsqueeze(1).float() / 255
    labels = read_idx(mnist / "t10k-labels-idx1-ubyte.gz").long()
    right = []
    for hidden in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 49, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        parts = torch.split(torch.randperm(len(x)), 100)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
        with contextlib.ExitStack() as stack:
            if hidden:
                session = stack.enter_context(offload(model, "masked-training", pair()))
            for part in parts:
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(x[part]), y[part]))
                optimizer.step()
                rate.step()
            if hidden:
                assert not session.losses
                assert not session.kept_inside
        with torch.no_grad():
            right.append(int((model(test).argmax(1) == labels).sum()))
    assert right[0] > 9500
    assert abs(right[0] - right[1]) <= 30, right  # 0.3 points


def chi_square(values: torch.Tensor, bins: int = 32) -> float:
    counts = torch.histc(values.double(), bins, 0, PRIME)
    mean = len(values) / bins
    return float((((counts - mean) ** 2 / mean).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5)


def test_each_worker_alone_sees_uniform_and_independent_numbers() -> None:
    """Each message, each pair of messages of one size, and the same again in a second step."""
    torch.manual_seed(1)
    model, record = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), Transcript()
    x = torch.ones(64, 64)
    with offload(model, "masked-training", pair(), transcript=record) as session:
        for _ in range(2):
            model(x).sum().backward()
        leakage = session.leakage
    assert {
        leakage.inputs, leakage.weights, leakage.activations, leakage.gradients, leakage.labels
    } == {"hidden"}  # fmt: skip
    for worker in ("first", "second"):
        seen = [
            record.tensors[n].flatten().long()
            for n, line in enumerate(record.lines)
            if line["event"] == "put" and line["worker"] == worker
        ]
        # Per step: two layers' products forward, two dw, and one dx; four messages each.
        assert len(seen) == 2 * 5 * 4
        for values in seen:
            assert abs(chi_square(values)) < 7
        for i, a in enumerate(seen):
            for b in seen[:i]:
                assert abs(chi_square((a - b) % PRIME)) < 7
                assert abs(chi_square((a + b) % PRIME)) < 7
    # ... and both together do see the data: the assumption is needed.
    puts = [
        (line["worker"], record.tensors[n].long())
        for n, line in enumerate(record.lines)
        if line["event"] == "put"
    ][:8]
    (_, e), _, (_, u1), _, (_, e2), _, (_, u2), _ = puts
    assert torch.equal(e, e2)
    assert len(torch.unique((e + u1 + u2) % PRIME)) == 1  # all ones, in fixed point


def test_prepared_triples_give_the_same_numbers_and_are_used_once() -> None:
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(3, 5)
    scheme = MaskedTraining()
    with offload(model, scheme, pair()):
        first = model(x)
        drawn = scheme._drawn
        scheme.prepare(3)
        assert scheme._drawn == 4 * drawn
        again = [model(x) for _ in range(3)]
        assert scheme._drawn == 4 * drawn
        more = model(x)
        assert scheme._drawn == 5 * drawn
    assert all(torch.equal(one, first) for one in (*again, more))


@pytest.mark.parametrize("count", [1, 3])
def test_it_takes_two_workers(count: int) -> None:
    pool = [InlineAccelerator(f"w{n}") for n in range(count)]
    with pytest.raises(InputError, match="needs two workers that do not collude"):
        offload(nn.Sequential(nn.Linear(2, 2)), "masked-training", pool).__enter__()


class Broken(InlineAccelerator):
    """Dies, or lies, from a certain request on."""

    lies = False
    left = 3

    def call(self, operation: Operation, result: int, operands: list[int]) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left < 0 and not self.lies:
            raise AcceleratorError("it died")
        super().call(operation, result, operands)
        if self.left < 0:
            self._kept[result] = (self._kept[result] + 1) % PRIME


@pytest.mark.parametrize("lies", [False, True])
def test_a_lost_worker_is_never_replaced_by_the_other(lies: bool) -> None:
    torch.manual_seed(2)
    model, record = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), Transcript()
    x, broken = torch.randn(4, 6), Broken("first")
    broken.lies = lies
    with offload(
        model, "masked-training", [broken, InlineAccelerator("second")], transcript=record
    ) as session:
        y = model(x)
        y.sum().backward()
        assert [loss.name for loss in session.losses] == ["first"]
    assert torch.allclose(y, model(x), atol=1e-3)
    puts = [
        tuple(record.tensors[n].flatten().tolist())
        for n, line in enumerate(record.lines)
        if line["event"] == "put" and line["worker"] == "second"
    ]
    assert len(puts) == 5 * 4  # what is its own, and no more
    assert len(set(puts)) == len(puts)


def test_operands_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with offload(model, "masked-training", pair()), pytest.raises(DataError, match="not finite"):
        model(torch.tensor([[1.0, float("nan")]]))


def test_zeros_stay_zeros() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with offload(model, "masked-training", pair()):
        assert not model(torch.zeros(2, 3)).any()
        assert model(torch.zeros(0, 3)).shape == (0, 2)
