"""Rounded products never let an example pass its clipping norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cenacle.training.privacy import PrivacyError, make_private
from cenacle.training.privacy.gradients import Outer
from cenacle.training.privacy.precision import exact_products, has_bfloat16, upper_ghost

needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16("cpu"), reason="this processor has no bfloat16 products"
)


def exact(x: Tensor, d: Tensor) -> Tensor:
    return (d.double().mT @ x.double()).square().sum((1, 2))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda t: t,
    "positive": lambda t: t.abs(),
    "equal_rows": lambda t: t[:, :1].expand_as(t).contiguous(),
    "cancelling": lambda t: t - t.mean(1, keepdim=True) + 1e3,
    "one_row": lambda t: t * (torch.arange(t.shape[1]) == 1)[None, :, None],
    "between_two_values": lambda t: torch.full_like(t, 1 + 2.0**-8 - 2.0**-20) * t.sign(),
    "uneven": lambda t: t * torch.logspace(-12, 5, t.shape[1])[None, :, None],
    "zero": torch.zeros_like,
}


@needs_bfloat16
@pytest.mark.parametrize("left", SHAPES)
@pytest.mark.parametrize("right", SHAPES)
def test_bounds_are_never_below_the_norm(left: str, right: str) -> None:
    torch.manual_seed(1)
    for t, k, o in ((2, 3, 5), (33, 40, 24), (65, 300, 7)):
        x, d = SHAPES[left](torch.randn(3, t, k)), SHAPES[right](torch.randn(3, t, o))
        found = upper_ghost(x, d)
        assert found is not None
        assert bool((found[0] >= exact(x, d)).all())


@needs_bfloat16
@settings(max_examples=25)
@given(t=st.integers(2, 40), k=st.integers(1, 90), o=st.integers(1, 90), power=st.integers(-6, 6))
def test_bounds_hold_and_are_tight(t: int, k: int, o: int, power: int) -> None:
    torch.manual_seed(t * 8100 + k * 90 + o)
    x, d = torch.randn(4, t, k) * 10.0**power, torch.randn(4, t, o)
    found = upper_ghost(x, d)
    assert found is not None
    share = (found[0] / exact(x, d)).sqrt()
    assert bool((share >= 1).all())
    rows = (x.norm(dim=2) * d.norm(dim=2)).sum(1).double() / exact(x, d).sqrt()
    assert bool((share <= 1.01 + 0.01 * rows + 0.0045 * rows.square()).all())


def test_rows_too_long_for_the_bound_are_taken_in_float32() -> None:
    x, d = torch.randn(1, 2, 9000), torch.randn(1, 2, 3)
    assert upper_ghost(x, d) is None
    use = Outer(x, d)
    use.low = True
    torch.testing.assert_close(use.square_norms(), exact(x, d), rtol=1e-5, atol=0)


@needs_bfloat16
def test_extreme_rows_are_taken_exactly() -> None:
    x, d = torch.randn(2, 9, 30), torch.randn(2, 9, 40)
    x[0] *= 1e-25
    d[0] *= 1e12
    use = Outer(x, d)
    use.low = True
    torch.testing.assert_close(use.square_norms()[:1], exact(x, d)[:1], rtol=1e-5, atol=0)


class Encoder(nn.Module):
    """Dense layers over more positions than they are wide: ghost norms throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(24, 40), nn.LayerNorm(40)
        self.out = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.inner(x))))  # type: ignore[no-any-return]


class Picture(nn.Module):
    """Convolutions of each way to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 6),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder": (Encoder, (12, 24)),
    "picture": (Picture, (3, 8, 8)),
}


@needs_bfloat16
@pytest.mark.parametrize("layered", [False, True])
def test_bfloat16_norms_clip_a_little_more(layered: bool, checks: Any) -> None:
    torch.manual_seed(3)
    model, x = Encoder(), torch.randn(5, 12, 24)

    def losses(of: nn.Module) -> Callable[..., Tensor]:
        return lambda x: checks.square_loss(of(x))

    options = {"norm_dtype": torch.bfloat16, "per_layer": layered}
    expected = checks.reference(model, losses, [x], 0.5, per_layer=layered)
    found = checks.private_sums(model, losses, [x], 0.5, **options)
    checks.close(found, expected, norms=False, rtol=0.15)
    if not layered:
        assert bool((found.norms >= expected.norms).all())
        assert bool((found.norms <= 1.15 * expected.norms).all())
    one = checks.private_sums(model, losses, [x[:1]], 0.5, **options)
    size = math.sqrt(sum(float(s.square().sum()) for s in one.sums.values()))
    assert 0.4 < size <= 0.5


def autocast_losses(checks: Any) -> Callable[[nn.Module], Callable[..., Tensor]]:
    def losses(of: nn.Module) -> Callable[..., Tensor]:
        def loss(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                out = of(x)
            return checks.square_loss(out.to(x.dtype))  # type: ignore[no-any-return]

        return loss

    return losses


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16], ids=["exact", "bounded"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_the_bound(
    name: str, norm_dtype: torch.dtype, layered: bool, checks: Any
) -> None:
    """Trained in bfloat16, called within autocast and without: one example moves at most C."""
    torch.manual_seed(5)
    make, shape = MODELS[name]
    model, x, clip = make(), torch.randn(5, *shape), 0.7
    options = {"per_layer": layered, "norm_dtype": norm_dtype}
    losses = autocast_losses(checks)
    near = checks.reference(model, losses, [x], clip, per_layer=layered)
    # An example of NaN adds nothing, and keeps the batch's shape: for another shape, kernels
    # may add in another order, and bfloat16 shows it in everybody's gradients.
    absent = torch.cat([torch.full_like(x[:1], math.nan), x[1:]])
    without = checks.private_sums(model, losses, [absent], clip, **options)
    whole = checks.private_sums(model, losses, [x], clip, **options)
    checks.close(whole, near, norms=False, rtol=0.2)
    assert all(s.dtype == torch.float64 for s in whole.sums.values())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    for value in (1.0, 1e12, math.inf):
        extreme = x.clone()
        extreme[0] *= value
        for around in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                got = checks.private_sums(model, losses, [extreme], clip, **options).sums
            moved = sum(float((got[n] - without.sums[n]).square().sum()) for n in got)
            assert moved**0.5 <= clip * (1 + 1e-6), (value, around)


def test_modes_are_suspended_and_put_back() -> None:
    mkldnn: Any = torch.backends.mkldnn
    matmul, conv = mkldnn.matmul, mkldnn.conv
    before = (matmul.fp32_precision, conv.fp32_precision)
    try:
        matmul.fp32_precision = conv.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            with exact_products("cpu"):
                assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
                assert not torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")
        assert (matmul.fp32_precision, conv.fp32_precision) == ("bf16", "bf16")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def test_other_types_of_norms_are_refused() -> None:
    with pytest.raises(PrivacyError, match="norm_dtype"):
        make_private(
            nn.Linear(2, 2), clip=1, noise_multiplier=1, expected_batch=1, norm_dtype=torch.float16
        )
