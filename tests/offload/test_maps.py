"""Maps: three products each, their division into rows, and their size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.offload.contractions import depth, result_shape
from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct, Product

CASES: dict[str, tuple[LinearMap, tuple[int, ...], tuple[int, ...]]] = {
    "dense": (Dense(), (5, 7), (6, 7)),
    "products": (MatrixProduct(), (3, 4, 5), (3, 5, 6)),
    "3x3": (Convolution((1, 1), (1, 1), (1, 1), 1), (4, 3, 8, 8), (5, 3, 3, 3)),
    "uneven": (Convolution((2, 3), (1, 0), (1, 2), 1), (3, 4, 11, 9), (6, 4, 3, 2)),
    "groups": (Convolution((2, 2), (2, 1), (1, 2), 2), (3, 4, 11, 9), (6, 2, 3, 3)),
    "depthwise": (Convolution((1, 1), (1, 1), (1, 1), 6), (2, 6, 7, 7), (6, 1, 3, 3)),
    "1-d": (Convolution((2,), (2,), (1,), 1), (4, 3, 17), (5, 3, 5)),
}


def forward(map_: LinearMap, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Written out with torch's own functions, for autograd."""
    if isinstance(map_, Dense):
        return x @ w.T
    if isinstance(map_, MatrixProduct):
        return torch.bmm(x, w)
    assert isinstance(map_, Convolution)
    function = torch.conv1d if x.dim() == 3 else torch.conv2d
    return function(x, w, None, map_.stride, map_.padding, map_.dilation, map_.groups)  # type: ignore[no-any-return, unused-ignore]


def products(
    map_: LinearMap, x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor
) -> list[tuple[Product, tuple[torch.Tensor, torch.Tensor]]]:
    return [
        (map_.forward(), (x, w)),
        (map_.input_gradient(x.shape), (gy, w)),
        (map_.weight_gradient(w.shape), (gy, x)),
    ]


def operands(name: str) -> tuple[LinearMap, torch.Tensor, torch.Tensor, torch.Tensor]:
    map_, xs, ws = CASES[name]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(xs, generator=g, dtype=torch.float64)
    w = torch.randn(ws, generator=g, dtype=torch.float64)
    gy = torch.randn(forward(map_, x, w).shape, generator=g, dtype=torch.float64)
    return map_, x, w, gy


@pytest.mark.parametrize("name", CASES)
def test_products_are_what_autograd_finds(name: str) -> None:
    map_, x, w, gy = operands(name)
    x.requires_grad_()
    w.requires_grad_()
    y = forward(map_, x, w)
    y.backward(gy)  # type: ignore[no-untyped-call]
    want = (y.detach(), x.grad, w.grad)
    for (product, pair), expected in zip(products(map_, x, w, gy), want, strict=True):
        found = product.compute(*(t.detach() for t in pair))
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_products_divide_along_their_rows(name: str, parts: int) -> None:
    map_, x, w, gy = operands(name)
    for product, pair in products(map_, x, w, gy):
        rows = next(len(t) for t, split in zip(pair, product.rows, strict=True) if split)
        bounds = [(i * rows // parts, (i + 1) * rows // parts) for i in range(parts)]
        found = [
            product.compute(*(
                t[begin:end] if split else t for t, split in zip(pair, product.rows, strict=True)
            ))
            for begin, end in bounds
            if end > begin
        ]  # fmt: skip
        together = torch.cat(found) if product.reduce == "concat" else torch.stack(found).sum(0)
        torch.testing.assert_close(together, product.compute(*pair), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_shape_of_a_result_is_known_before_it_comes(name: str) -> None:
    map_, x, w, gy = operands(name)
    for product, pair in products(map_, x, w, gy):
        assert result_shape(product.operation, pair) == product.compute(*pair).shape


@pytest.mark.parametrize("name", CASES)
def test_a_product_of_ones_counts_what_is_summed(name: str) -> None:
    """``depth`` is the longest sum there is, and twice their total is ``flops``."""
    map_, x, w, gy = operands(name)
    ones = [torch.ones_like(t) for t in (x, w, gy)]
    for product, pair in products(map_, ones[0], ones[1], ones[2]):
        counted = product.compute(*pair)
        longest = depth(product.operation, pair)
        assert float(counted.max()) <= longest
    padded = isinstance(map_, Convolution) and any(map_.padding)
    total = 2 * float(map_.forward().compute(ones[0], ones[1]).sum())
    if padded:
        assert total <= map_.flops(x.shape, w.shape)
    else:
        assert total == map_.flops(x.shape, w.shape)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_the_space_of_a_convolution(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    map_ = Convolution(stride, padding, dilation, 1)
    x, w = torch.ones(1, 1, *size), torch.ones(1, 1, *kernel)
    space = map_.space(x.shape, w.shape)
    if min(space) < 1:
        return
    assert map_.forward().compute(x, w).shape[2:] == torch.Size(space)
    assert map_.rank == 4


def test_maps_are_values() -> None:
    one, same = (Convolution((1,), (0,), (1,), 1) for _ in range(2))
    assert one == same
    assert len({one, same, Dense(), Dense(), MatrixProduct()}) == 3
