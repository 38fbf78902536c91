"""Maximum pooling: torch's own numbers, to the bit, and its gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import offload
from cenacle.offload.norms import compiled_norms
from cenacle.offload.pooling import max_pool

pytestmark = pytest.mark.skipif(compiled_norms() is None, reason="numba is not installed")


def pooled(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    return max_pool(torch.max_pool2d, (x, *args), kwargs, Buffers())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 40)] * 2),
    size=st.tuples(*[st.integers(1, 5)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2),
    kind=st.sampled_from(["any", "ties", "nan", "minus infinity"]),
    seed=st.integers(0, 1000),
)
def test_results_and_gradients_are_torch_s_own(
    shape: tuple[int, ...], size: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], kind: str, seed: int,
) -> None:  # fmt: skip
    padding = (min(padding[0], size[0] // 2), min(padding[1], size[1] // 2))
    if any(n + 2 * p < k for n, p, k in zip(shape[2:], padding, size, strict=True)):
        return
    torch.manual_seed(seed)
    x = torch.randn(shape)
    if kind == "ties":
        x = x.round().relu()
    elif kind == "nan":
        x[torch.rand(shape) < 0.2] = math.nan
    elif kind == "minus infinity":
        x[torch.rand(shape) < 0.7] = -math.inf
    x.requires_grad_()
    wanted = functional.max_pool2d(x, size, stride, padding)
    found = pooled(x, size, stride=list(stride), padding=padding)
    assert found is not None
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    g = torch.randn(wanted.shape).round()  # sums of whole numbers have no rounding
    (ours,) = torch.autograd.grad(found, x, g)
    (theirs,) = torch.autograd.grad(wanted, x, g)
    assert torch.equal(ours, theirs)


def test_forms_of_arguments() -> None:
    x = torch.randn(2, 3, 9, 9)
    wanted = functional.max_pool2d(x, 3, 2, 1)
    for args, kwargs in (
        ((3, 2, 1), {}),
        (((3, 3), (2,), [1, 1]), {}),
        ((3,), {"stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False}),
    ):
        found = pooled(x, *args, **kwargs)
        assert found is not None
        assert torch.equal(found, wanted)
    found = max_pool(functional.max_pool2d, (), {"input": x, "kernel_size": 3}, Buffers())
    assert found is not None
    assert torch.equal(found, functional.max_pool2d(x, 3))
    found = pooled(x.permute(0, 1, 3, 2), 3)
    assert found is not None
    assert torch.equal(found, functional.max_pool2d(x.permute(0, 1, 3, 2), 3))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.zeros(2, 3, 9, 9), {"dilation": 2}),
        (torch.zeros(2, 3, 9, 9), {"ceil_mode": True}),
        (torch.zeros(2, 3, 9, 9), {"return_indices": True}),
        (torch.zeros(2, 3, 9, 9), {"padding": 2}),
        (torch.zeros(2, 3, 2, 2), {}),
        (torch.zeros(3, 9, 9), {}),
        (torch.zeros(2, 3, 9, 9, dtype=torch.float64), {}),
    ],
    ids=["dilation", "rounded up", "indices", "padding", "small", "no batch", "type"],
)
def test_what_stays_torch_s(x: torch.Tensor, options: dict[str, Any]) -> None:
    assert pooled(x, 3, **options) is None
    assert max_pool(torch.relu, (x,), {}, Buffers()) is None


def test_within_a_model() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 3)
    )
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(3):
            x = torch.randn(2, 3, 16, 16)
            outs = [one(x) for one in (net, plain)]
            torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
            grads = [
                torch.autograd.grad(out.square().sum(), list(one.parameters()))
                for out, one in zip(outs, (net, plain), strict=True)
            ]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
