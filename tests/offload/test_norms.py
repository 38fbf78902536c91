"""Batch normalisation's numbers: as torch has them, in every shape, mode and combination."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import InputError
from cenacle.offload.norms import BatchNorm, Norm, compiled_norms, gradient, normalise
from cenacle.offload.passes import marks_for

pytestmark = pytest.mark.skipif(compiled_norms() is None, reason="numba is not installed")


def close(found: torch.Tensor | None, wanted: torch.Tensor | None, floor: float = 1e-6) -> None:
    """Relative to the norm, as for every layer."""
    assert found is not None
    assert wanted is not None
    error = float((found.double() - wanted.double()).norm())
    assert error <= 1e-5 * float(wanted.double().norm()) + floor


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 5),
    channels=st.integers(1, 5),
    plane=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    training=st.booleans(),
    affine=st.booleans(),
    tracked=st.booleans(),
    residual=st.booleans(),
    relu=st.booleans(),
    momentum=st.floats(0, 1),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_outputs_gradients_and_statistics_are_torch_s(
    samples: int, channels: int, plane: list[int], training: bool, affine: bool, tracked: bool,
    residual: bool, relu: bool, momentum: float, offset: float, seed: int,
) -> None:  # fmt: skip
    shape = (samples, channels, *plane)
    count = samples * math.prod(plane)
    # Two or three numbers have gradients that cancel but for their rounding.
    if training and count < 4:
        return
    torch.manual_seed(seed)
    y, other, g = torch.randn(shape) * 3 + offset, torch.randn(shape), torch.randn(shape)
    weight, bias = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    running = [torch.randn(channels), torch.rand(channels) + 0.5]
    if training and not tracked:
        means: list[torch.Tensor | None] = [None, None]
    else:
        means = [t.clone() for t in running]
    bn = BatchNorm(means[0], means[1], weight, bias, training, momentum, 1e-5)
    assert bn.fits(y.shape)
    norm = bn.measured(y)

    leaves = [t.double().requires_grad_() for t in (y, other)]
    numbers = [None if t is None else t.double().requires_grad_() for t in (weight, bias)]
    wanted_means = [None if t is None else r.double() for t, r in zip(means, running, strict=True)]
    wanted = functional.batch_norm(
        leaves[0], wanted_means[0], wanted_means[1], numbers[0], numbers[1], training, momentum
    )
    wanted = wanted + leaves[1] if residual else wanted
    # At a ReLU's edge rounding decides; the gradient is compared where it does not.
    g = torch.where(wanted.abs() > 1e-4, g, torch.zeros(()))
    wanted = wanted.relu() if relu else wanted
    torch.autograd.backward(wanted, g.double())

    buffers = Buffers()
    marks = None
    if relu and residual:
        marks = marks_for(samples, channels, math.prod(plane), None, buffers)
    out = normalise(
        y, norm, torch.empty(shape), residual=other if residual else None, relu=relu, marks=marks
    )
    close(out, wanted.detach(), 1e-5)
    found = gradient(g, y, norm, buffers, relu=relu, marks=marks, needs=(True, residual, affine))
    # Beside what cancels: a gradient's own size.
    close(found[0], leaves[0].grad, 2e-6 * float((g * norm.scale.max()).norm()))
    if residual:
        close(found[1], leaves[1].grad)
    if affine:
        assert numbers[0] is not None
        assert numbers[1] is not None
        close(found[2], numbers[0].grad, 1e-5 * float(g.norm()))
        close(found[3], numbers[1].grad, 1e-5 * float(g.norm()))
    for mine, theirs in zip(means, wanted_means, strict=True):
        if mine is not None:
            close(mine, theirs)


def test_a_result_may_take_an_operand_s_place() -> None:
    torch.manual_seed(0)
    y, other = torch.randn(3, 4, 5, 7), torch.randn(3, 4, 5, 7)
    norm = BatchNorm(None, None, None, None, True, 0.1, 1e-5).measured(y)
    wanted = normalise(y, norm, torch.empty_like(y), residual=other, relu=True)
    for place in (0, 1):
        operands = [y.clone(), other.clone()]
        normalise(operands[0], norm, operands[place], residual=operands[1], relu=True)
        assert torch.equal(operands[place], wanted)


def test_large_results_go_past_the_cache() -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 16, 256, 272)
    buffers = Buffers()
    norm = BatchNorm(None, None, None, None, True, 0.1, 1e-5).measured(y)
    out = normalise(y, norm, buffers.empty(y.shape), relu=True)
    torch.testing.assert_close(out, functional.batch_norm(y, None, None, training=True).relu())
    found = gradient(y, y, norm, buffers, relu=False, marks=None, needs=(True, False, False))[0]
    assert found is not None
    assert float(found.abs().max()) < 1e-4  # it points along the result


def test_nan_and_infinity_stay_visible() -> None:
    y = torch.ones(2, 3, 4)
    y[0, 1, 2], y[1, 2, 3] = math.nan, math.inf
    for training in (True, False):
        bn = BatchNorm(torch.zeros(3), torch.ones(3), None, None, training, 0.1, 1e-5)
        out = normalise(y, bn.measured(y), torch.empty_like(y), relu=True)
        wanted = functional.batch_norm(y, torch.zeros(3), torch.ones(3), training=training).relu()
        assert torch.equal(out.isnan(), wanted.isnan())
        assert out[0, 1, 2].isnan()


def test_running_statistics_keep_their_version() -> None:
    """As torch: a graph that remembers them can still be differentiated."""
    mean, variance = torch.zeros(3), torch.ones(3)
    BatchNorm(mean, variance, None, None, True, 0.1, 1e-5).measured(torch.randn(2, 3, 4))
    assert mean._version == variance._version == 0
    assert mean.abs().sum() > 0


@pytest.mark.parametrize(
    "bn",
    [
        BatchNorm(None, None, None, None, False, 0.1, 1e-5),
        BatchNorm(torch.zeros(2), torch.ones(3), None, None, True, 0.1, 1e-5),
        BatchNorm(None, None, torch.ones(3).double(), None, True, 0.1, 1e-5),
        BatchNorm(None, None, torch.ones(3, 1), None, True, 0.1, 1e-5),
        BatchNorm(None, None, None, None, True, 0.1, 0.0),
    ],
    ids=["no statistics", "channels", "type", "dimensions", "no epsilon"],
)
def test_what_torch_would_refuse_or_convert_is_left_to_it(bn: BatchNorm) -> None:
    assert not bn.fits(torch.Size((2, 3, 4)))


@pytest.mark.parametrize("wrong", ["shape", "type", "layout", "marks"])
def test_kernels_are_given_nothing_that_does_not_fit(wrong: str) -> None:
    y = torch.randn(2, 3, 8)
    norm: Norm = BatchNorm(None, None, None, None, True, 0.1, 1e-5).measured(y)
    out, marks = torch.empty(2, 3, 8), None
    if wrong == "shape":
        out = torch.empty(2, 3, 9)
    elif wrong == "type":
        out = out.double()
    elif wrong == "layout":
        out = torch.empty(2, 8, 3).transpose(1, 2)
    else:
        marks = torch.zeros(2, 3, 2, dtype=torch.int16)
    with pytest.raises(InputError):
        normalise(y, norm, out, relu=True, marks=marks)
