"""The algebra of workers against autograd, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from cenacle.accelerators import Accelerator, Operation, execute

_CONV2D = [
    # batch, in, out, size, kernel, stride, padding, dilation, groups
    pytest.param(2, 3, 4, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1, id="plain"),
    pytest.param(2, 3, 4, (8, 9), (3, 2), (2, 3), (0, 1), (1, 1), 1, id="stride"),
    pytest.param(1, 2, 3, (9, 9), (3, 3), (1, 2), (2, 2), (2, 1), 1, id="dilation"),
    pytest.param(2, 4, 6, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2, id="groups"),
    pytest.param(3, 4, 4, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 4, id="depthwise"),
    pytest.param(2, 3, 6, (5, 4), (3, 1), (1, 1), (1, 0), (1, 1), 3, id="depthwise-twofold"),
    pytest.param(2, 5, 3, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1, id="pointwise"),
    pytest.param(2, 3, 2, (7, 8), (3, 3), (3, 3), (0, 0), (1, 1), 1, id="stride-leaves-rest"),
    pytest.param(1, 3, 2, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1, id="one-output"),
]
_CONV1D = [
    pytest.param(2, 3, 4, (9,), (3,), (1,), (1,), (1,), 1, id="plain-1d"),
    pytest.param(3, 4, 6, (11,), (4,), (3,), (2,), (2,), 2, id="all-1d"),
    pytest.param(2, 4, 4, (8,), (3,), (2,), (0,), (1,), 4, id="depthwise-1d"),
]


def _run(accelerator: Accelerator, operation: Operation, *operands: torch.Tensor) -> torch.Tensor:
    handles = list(range(1, len(operands) + 1))
    for handle, value in zip(handles, operands, strict=True):
        accelerator.put(handle, value)
    accelerator.call(operation, 99, handles)
    pending = accelerator.get(99)
    accelerator.drop([99, *handles])
    return pending.wait(60).clone()


@pytest.mark.parametrize(
    ("batch", "channels", "out", "size", "kernel", "stride", "padding", "dilation", "groups"),
    _CONV2D + _CONV1D,
)
def test_convolution_and_its_gradients(
    accelerator: Accelerator,
    batch: int,
    channels: int,
    out: int,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    torch.manual_seed(1)
    x = torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(out, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    conv = functional.conv2d if len(size) == 2 else functional.conv1d
    y = conv(x, w, None, stride, padding, dilation, groups)
    gy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), gy)
    geometry = {
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
    }
    found = _run(accelerator, Operation("conv", geometry), x.detach(), w.detach())
    torch.testing.assert_close(found, y.detach())
    operation = Operation("conv_input", {**geometry, "shape": list(x.shape[1:])})
    torch.testing.assert_close(_run(accelerator, operation, gy, w.detach()), dx)
    operation = Operation("conv_weight", {**geometry, "shape": list(w.shape)})
    torch.testing.assert_close(_run(accelerator, operation, gy, x.detach()), dw)


@pytest.mark.parametrize(
    ("transpose_a", "transpose_b", "batch"),
    [
        (*flags, batch)
        for flags in itertools.product([False, True], repeat=2)
        for batch in ((), (3,), (2, 3))
    ],
)
def test_matrix_products(
    accelerator: Accelerator, transpose_a: bool, transpose_b: bool, batch: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    a = torch.randn(*batch, 4, 5, dtype=torch.float64)
    b = torch.randn(*batch, 5, 6, dtype=torch.float64)
    sent = (a.mT.contiguous() if transpose_a else a, b.mT.contiguous() if transpose_b else b)
    operation = Operation("matmul", {"transpose_a": transpose_a, "transpose_b": transpose_b})
    torch.testing.assert_close(_run(accelerator, operation, *sent), a @ b)


def test_gradient_of_a_right_operand(accelerator: Accelerator) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    w = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    y = x @ w
    gy = torch.randn_like(y)
    (dw,) = torch.autograd.grad(y, w, gy)
    torch.testing.assert_close(_run(accelerator, Operation("matmul_weight"), gy, x), dw)


def test_an_empty_batch_has_an_empty_result(accelerator: Accelerator) -> None:
    found = _run(accelerator, Operation("matmul"), torch.zeros(0, 3), torch.ones(3, 2))
    assert found.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_a_worker_computes_to_the_bit_what_the_enclave_does(
    accelerator: Accelerator, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    a, b = ((torch.randn(37, 53) * 50).to(dtype) for _ in range(2))
    operation = Operation("matmul", {"transpose_b": True})
    # Parts of a batch begin anywhere within a cache line.
    for first in range(4):
        rows = a[first:]
        assert torch.equal(_run(accelerator, operation, rows, b), execute(operation, [rows, b]))


def test_execute_knows_no_other_names() -> None:
    with pytest.raises(KeyError):
        execute(Operation("system"), [])
