"""The reference: a float64 loop over single examples, by autograd alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenacle.training.privacy import make_private

Losses = Callable[..., Tensor]


@dataclass
class Reference:
    """Norms (B,) and clipped sums by parameter name, both float64."""

    norms: Tensor
    sums: dict[str, Tensor]


def square_loss(out: Any) -> Tensor:
    """A loss per example of whatever a model gives: uneven, so that no gradient vanishes."""
    while not isinstance(out, Tensor):
        out = out[0]
    flat = out.flatten(1)
    slope = torch.linspace(-1, 1.5, max(flat.shape[1], 1), dtype=flat.dtype)[: flat.shape[1]]
    return (flat.square() * 0.5 + flat * slope).sum(1)


def reference(
    model: nn.Module, losses: Callable[[nn.Module], Losses], batch: Sequence[Tensor], clip: float,
    *, per_layer: bool = False,
) -> Reference:  # fmt: skip
    exact = copy.deepcopy(model).double()
    loss = losses(exact)
    named = {n: p for n, p in exact.named_parameters() if p.requires_grad}
    groups = {n: n.rpartition(".")[0] if per_layer else "" for n in named}
    bound = clip / math.sqrt(len(set(groups.values())))
    sums = {n: torch.zeros_like(p) for n, p in named.items()}
    norms = []
    for i in range(len(batch[0])):
        one = [t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in batch]
        found = torch.autograd.grad(loss(*one).sum(), list(named.values()), allow_unused=True)
        each = {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(named.items(), found, strict=True)
        }
        squares: dict[str, float] = dict.fromkeys(groups.values(), 0.0)
        for n, g in each.items():
            squares[groups[n]] += float(g.square().sum())
        norms.append(math.sqrt(sum(squares.values())))
        for n, g in each.items():
            norm = math.sqrt(squares[groups[n]])
            sums[n] += g * (min(1.0, bound / norm) if norm else 1.0)
    return Reference(torch.tensor(norms, dtype=torch.float64), sums)


def private_sums(
    model: nn.Module, losses: Callable[[nn.Module], Losses], batch: Sequence[Tensor], clip: float,
    **options: Any,
) -> Reference:  # fmt: skip
    """What the engine says, without noise."""
    private = make_private(model, clip=clip, noise_multiplier=0.0, expected_batch=1.0, **options)
    private.backward(losses(model), *batch)
    sums = {
        n: p.grad.double()
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return Reference(private.norms, sums)


def close(found: Reference, expected: Reference, *, norms: bool = True, rtol: float = 1e-5) -> None:
    if norms:
        torch.testing.assert_close(found.norms, expected.norms, rtol=rtol, atol=1e-7)
    assert found.sums.keys() == expected.sums.keys()
    scale = math.sqrt(sum(float(s.square().sum()) for s in expected.sums.values()))
    for name, total in expected.sums.items():
        size = max(float(total.norm()), 1e-3 * scale)
        assert float((found.sums[name] - total).norm()) <= rtol * size + 1e-12, name


@dataclass
class Checks:
    """The helpers, for tests in folders that are no packages."""

    reference: Callable[..., Reference] = reference
    private_sums: Callable[..., Reference] = private_sums
    close: Callable[..., None] = close
    square_loss: Callable[[Any], Tensor] = square_loss

    def equal(self, model: nn.Module, *batch: Tensor, clip: float | None = None) -> None:
        """Flat and per-layer clipping, micro-batches and all, equal the float64 loop."""

        def losses(of: nn.Module) -> Losses:
            return lambda *inputs: square_loss(of(*inputs))

        if clip is None:
            clip = 1.0
            if len(batch[0]):
                found = reference(model, losses, batch, 1.0).norms
                clip = max(float(found.median()), 1e-3)
        plain = reference(model, losses, batch, clip)
        close(private_sums(model, losses, batch, clip), plain)
        close(private_sums(model, losses, batch, clip, micro_batch=2), plain)
        layered = reference(model, losses, batch, clip, per_layer=True)
        close(private_sums(model, losses, batch, clip, per_layer=True), layered, norms=False)

    def canary(self, model: nn.Module, *batch: Tensor, clip: float = 0.7) -> None:
        """Extreme examples move the sum by at most the clip, and never spoil it."""

        def losses(of: nn.Module) -> Losses:
            return lambda *inputs: square_loss(of(*inputs))

        rest = [t[1:] for t in batch]
        without = {
            layered: private_sums(model, losses, rest, clip, per_layer=layered)
            for layered in (False, True)
        }
        floats = [i for i, t in enumerate(batch) if t.is_floating_point()]
        for value in (1.0, 1e12, 1e30, math.inf, math.nan):
            extreme = [t.clone() for t in batch]
            for i in floats:
                extreme[i][0] *= value
            for layered in (False, True) if value in (1e12, math.inf) else (False,):
                got = private_sums(model, losses, extreme, clip, per_layer=layered)
                base = without[layered].sums
                moved = sum(float((got.sums[n] - base[n]).square().sum()) for n in base)
                assert moved**0.5 <= clip * (1 + 1e-6), (value, layered)


@pytest.fixture(scope="session")
def checks() -> Checks:
    return Checks()
