"""What holds for every kind of worker."""

from __future__ import annotations

import pytest
import torch

from cenacle.accelerators import Accelerator, Operation
from cenacle.errors import AcceleratorError

_PRODUCT = Operation("matmul")


def test_a_tensor_comes_back_as_it_was(accelerator: Accelerator) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int8, torch.bool):
        value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
        accelerator.put(1, value)
        found = accelerator.get(1).wait(60)
        assert found.dtype == dtype
        assert torch.equal(found, value)
        accelerator.drop([1])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1, 1, 1, 1)])
def test_odd_shapes_come_back(accelerator: Accelerator, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    accelerator.put(1, value)
    found = accelerator.get(1).wait(60)
    assert found.shape == value.shape
    assert torch.equal(found, value)
    accelerator.drop([1])


def test_staging_is_sent_as_it_is(accelerator: Accelerator) -> None:
    value = accelerator.staging.empty((5, 7), torch.float64)
    assert value.shape == (5, 7)
    assert value.is_contiguous()
    value.copy_(torch.arange(35).reshape(5, 7))
    accelerator.put(1, value)
    accelerator.put(2, value[2:4])
    accelerator.put(3, value[:, 1:3])
    for handle, expected in ((1, value), (2, value[2:4]), (3, value[:, 1:3])):
        assert torch.equal(accelerator.get(handle).wait(60), expected)
    accelerator.drop([1, 2, 3])


def test_requests_are_carried_out_in_order(accelerator: Accelerator) -> None:
    """A handle may be given to another tensor; earlier requests saw the earlier one."""
    identity = torch.eye(2)
    accelerator.put(1, identity)
    pending = []
    for k in range(50):
        accelerator.put(2, torch.full((2, 2), float(k)))
        accelerator.call(_PRODUCT, 3, [1, 2])
        pending.append(accelerator.get(3))
        accelerator.drop([2])
    for k, one in enumerate(pending):
        assert torch.equal(one.wait(60), torch.full((2, 2), float(k)))
    accelerator.drop([1, 3])


def test_results_may_be_awaited_in_any_order_and_twice(accelerator: Accelerator) -> None:
    accelerator.put(1, torch.ones(2))
    accelerator.put(2, torch.zeros(2))
    first, second = accelerator.get(1), accelerator.get(2)
    assert torch.equal(second.wait(60), torch.zeros(2))
    assert torch.equal(first.wait(60), torch.ones(2))
    assert torch.equal(first.wait(0), torch.ones(2))
    accelerator.drop([1, 2])


def test_a_result_outlives_its_handle(accelerator: Accelerator) -> None:
    accelerator.put(1, torch.eye(3))
    accelerator.call(_PRODUCT, 2, [1, 1])
    pending = accelerator.get(2)
    accelerator.drop([1, 2])
    kept = pending.wait(60)
    for _ in range(20):
        accelerator.put(1, torch.zeros(3, 3))
        accelerator.get(1).wait(60)
        accelerator.drop([1])
    assert torch.equal(kept, torch.eye(3))


def test_unknown_handles_are_dropped_silently(accelerator: Accelerator) -> None:
    accelerator.drop([12345, 12346])
    accelerator.drop([])


def test_a_dropped_tensor_is_gone(accelerator: Accelerator) -> None:
    accelerator.put(1, torch.ones(1))
    accelerator.drop([1])
    with pytest.raises(AcceleratorError):
        accelerator.get(1)
    with pytest.raises(AcceleratorError):
        accelerator.call(_PRODUCT, 2, [1, 1])


@pytest.mark.parametrize(
    "operation",
    [
        Operation("matmul"),
        Operation("system", {}),
        Operation("matmul", {"nonsense": 1}),
        Operation("conv", {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}),
    ],
)
def test_what_cannot_be_computed_is_an_error_and_not_the_end(
    accelerator: Accelerator, operation: Operation
) -> None:
    accelerator.put(1, torch.ones(2, 3))
    with pytest.raises(AcceleratorError, match="worker"):
        accelerator.call(operation, 2, [1, 1])
    accelerator.put(2, torch.ones(1))
    assert torch.equal(accelerator.get(2).wait(60), torch.ones(1))
    accelerator.drop([1, 2])


def test_nan_and_infinity_pass_through(accelerator: Accelerator) -> None:
    """Whether a result is right is for :mod:`cenacle.offload.integrity` to find out."""
    value = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    accelerator.put(1, value)
    found = accelerator.get(1).wait(60)
    assert torch.equal(found.view(torch.int32), value.view(torch.int32))
    accelerator.drop([1])


def test_it_says_how_long_it_took(accelerator: Accelerator) -> None:
    accelerator.put(1, torch.randn(400, 400))
    accelerator.call(_PRODUCT, 2, [1, 1])
    pending = accelerator.get(2)
    pending.wait(60)
    assert 0 < pending.seconds < 60
    accelerator.drop([1, 2])


def test_it_describes_itself(accelerator: Accelerator) -> None:
    assert accelerator.describe().startswith(accelerator.kind)
