"""Training on MNIST: the same accuracy under every scheme, from the same seed.

Rounding differs from scheme to scheme, so weights do after some steps; accuracy must not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.cli.demo_data import read_idx
from cenacle.crypto import SecretBytes
from cenacle.offload import offload

pytestmark = pytest.mark.slow
_log = logging.getLogger(__name__)

PICTURES, EPOCHS, BATCH = 20_000, 3, 128
POINTS = 0.3

ALL = frozenset({"0", "3", "7", "9"})


@dataclass(frozen=True)
class Case:
    """A scheme with its options, the layers that it sends, and what is trained how."""

    scheme: str
    options: tuple[tuple[str, Any], ...] = ()
    sent: frozenset[str] = ALL
    hidden: int = 64
    optimizer: str = "adam"
    resident: bool = False


CASES = {
    "enclave": Case("enclave", sent=frozenset()),
    "measured": Case("measured"),
    # Not "0", the first layer: a picture of one channel has no part of low rank.
    "lowrank": Case("lowrank", sent=ALL - {"0"}),
    "permuted, signs": Case("permuted", (("coefficients", "signs"),)),
    "permuted, general": Case("permuted", (("coefficients", "general"),)),
    # 256: a weight with more numbers than go through its layer, which stays with a worker.
    "permuted, resident, SGD": Case("permuted", hidden=256, optimizer="sgd", resident=True),
    "permuted, resident, Adam": Case(
        "permuted", (("check", False),), hidden=256, optimizer="adam", resident=True
    ),
}


@dataclass(frozen=True)
class Mnist:
    pictures: torch.Tensor
    labels: torch.Tensor
    test_pictures: torch.Tensor
    test_labels: torch.Tensor


@cache
def load(folder: Path) -> Mnist:
    def pictures(name: str, count: int) -> torch.Tensor:
        found = torch.tensor(read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3, count))
        return (found.unsqueeze(1).float() / 255 - 0.13) / 0.31

    def labels(name: str, count: int) -> torch.Tensor:
        return torch.tensor(read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1, count)).long()

    return Mnist(
        pictures("train", PICTURES), labels("train", PICTURES),
        pictures("t10k", 10_000), labels("t10k", 10_000),
    )  # fmt: skip


def network(hidden: int) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 49, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.003)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(data: Mnist, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same batches in the same order whoever computes; the learning rate falls to zero."""
    order = torch.Generator().manual_seed(3)
    steps = EPOCHS * (PICTURES // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        shuffled = torch.randperm(PICTURES, generator=order)
        for batch in torch.split(shuffled[: PICTURES // BATCH * BATCH], BATCH):
            optimizer.zero_grad()
            output = model(data.pictures[batch])
            torch.autograd.backward(functional.cross_entropy(output, data.labels[batch]))
            optimizer.step()
            schedule.step()


def accuracy(data: Mnist, model: nn.Module) -> float:
    """In per cent of all test pictures."""
    model.eval()
    with torch.no_grad():
        parts = torch.split(data.test_pictures, 1000)
        found = torch.cat([model(part).argmax(1) for part in parts])
    return float((found == data.test_labels).double().mean() * 100)


@cache
def plain_accuracy(folder: Path, hidden: int, optimizer: str) -> float:
    data, model = load(folder), network(hidden)
    train(data, model, make_optimizer(optimizer, model))
    return accuracy(data, model)


@pytest.mark.parametrize("name", CASES)
def test_every_scheme_trains_to_the_same_accuracy(name: str, mnist: Path) -> None:
    case = CASES[name]
    plain = plain_accuracy(mnist, case.hidden, case.optimizer)
    assert plain > 97.5
    data, model = load(mnist), network(case.hidden)
    optimizer = make_optimizer(case.optimizer, model)
    options = dict(case.options)
    if case.scheme == "permuted":
        options["seed"] = SecretBytes(bytes(range(32)))
    if case.resident:
        options["resident"] = optimizer
    workers = [InlineAccelerator("a"), InlineAccelerator("b")]
    with offload(model, case.scheme, workers, **options) as session:
        train(data, model, optimizer)
    found = accuracy(data, model)
    _log.warning("%s: %.2f %%, plain %.2f %%", name, found, plain)  # pytest -rP shows it
    assert session.losses == ()
    assert session.kept_inside == []
    sent = {layer for layer, cost in session.profile.layers.items() if cost.products}
    assert sent == case.sent
    assert abs(found - plain) <= POINTS
