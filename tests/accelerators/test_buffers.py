"""Memory that is used again: never while anybody still looks at it."""

from __future__ import annotations

import gc

import torch

from cenacle.accelerators.buffers import Buffers

_SHAPE = (300, 1000)


def test_memory_comes_back_when_nobody_refers_to_it() -> None:
    buffers = Buffers()
    first = buffers.empty(_SHAPE)
    address = first.data_ptr()
    view = first[10:].flatten()
    del first
    gc.collect()
    assert buffers.empty(_SHAPE).data_ptr() != address  # a view is left
    view.fill_(3.0)
    del view
    gc.collect()
    found = {buffers.empty(_SHAPE).data_ptr() for _ in range(3)}
    assert address in found


def test_a_gradient_keeps_its_memory() -> None:
    buffers = Buffers()
    weight = torch.zeros(_SHAPE, requires_grad=True)
    weight.grad = buffers.empty(_SHAPE).fill_(1.0)
    for _ in range(5):
        buffers.empty(_SHAPE).fill_(2.0)
    assert torch.equal(weight.grad, torch.ones(_SHAPE))


def test_results_can_be_changed_in_place_under_autograd() -> None:
    buffers = Buffers()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return torch.mul(x, 2, out=buffers.empty(x.shape))

        @staticmethod
        def backward(ctx: object, gy: torch.Tensor) -> torch.Tensor:
            return 2 * gy

    x = torch.ones(_SHAPE, requires_grad=True)
    y = Double.apply(x)  # type: ignore[no-untyped-call]
    y.relu_()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full(_SHAPE, 2.0))


def test_no_more_than_the_limit_is_kept() -> None:
    buffers = Buffers(limit=3 << 20)
    tensors = [buffers.empty(_SHAPE) for _ in range(5)]
    tensors.clear()
    gc.collect()
    buffers.empty(_SHAPE)
    assert buffers.spare <= 3 << 20


def test_closing_leaves_what_is_in_use() -> None:
    buffers = Buffers()
    kept = buffers.empty(_SHAPE).fill_(4.0)
    buffers.close()
    assert (kept == 4).all()
    del kept
    gc.collect()
    buffers.empty(_SHAPE)
    assert buffers.spare == 0


def test_small_tensors_and_other_types() -> None:
    buffers = Buffers()
    assert buffers.empty((2, 3)).shape == (2, 3)
    assert buffers.empty((0, 3)).shape == (0, 3)
    assert buffers.empty(_SHAPE, torch.bfloat16).dtype == torch.bfloat16
    assert buffers.empty(_SHAPE, torch.float64).dtype == torch.float64
