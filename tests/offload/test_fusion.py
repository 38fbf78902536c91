"""ReLUs in the pass of the layer before: only where a model has them, and never wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import offload
from cenacle.offload.schemes.permuted import Permuted


class Net(nn.Module):
    """Between the convolution and its in-place ReLU something else may happen, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.mode = "relu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        extra: Any = 0.0
        if self.mode == "look":
            assert y.shape[1] == 6
            assert y.dim() == 4
            assert y.requires_grad is not None
        if self.mode == "use first":
            extra = y.mean()
        if self.mode == "no relu":
            return self.second(y).tanh()  # type: ignore[no-any-return]
        if self.mode == "leave":
            return y  # type: ignore[no-any-return]
        z = self.relu(y)
        if self.mode == "use after":
            extra = y.mean()  # after an in-place ReLU that is the ReLU's result
        return self.relu(self.second(z)) + extra  # type: ignore[no-any-return]


def step(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    out = net(x)
    if not out.requires_grad:
        return [out.clone()]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [out.detach().clone(), *grads]


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


MODES = ["relu", "look", "use first", "no relu", "leave", "use after"]


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_whatever_follows_results_are_the_plain_model_s(first: str, second: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a"), InlineAccelerator("b")]):
        for mode in (first, first, second, second, first):
            x = torch.randn(5, 3, 9, 9)
            net.mode = plain.mode = mode
            compare(step(net, x), step(plain, x))
            with torch.no_grad():
                compare(step(net, x), step(plain, x))


def test_it_is_fused_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[str] = []
    whole = Permuted.forward_relu

    def counted(self: Permuted, site: Any, *operands: Any) -> Any:
        fused.append(site.name)
        return whole(self, site, *operands)

    monkeypatch.setattr(Permuted, "forward_relu", counted)
    net = Net()
    with offload(net, "permuted", [InlineAccelerator("a")]):
        step(net, torch.randn(2, 3, 9, 9))
        assert fused == []
        step(net, torch.randn(2, 3, 9, 9))
        assert fused == ["first", "second"]
        net.mode = "use first"  # computed again, and never early any more
        step(net, torch.randn(2, 3, 9, 9))
        step(net, torch.randn(2, 3, 9, 9))
        assert fused == ["first", "second", "first", "second", "second"]


def test_changing_a_fused_output_before_its_gradient_is_torch_s_own_error() -> None:
    net = Net()
    with offload(net, "permuted", [InlineAccelerator("a")]):
        step(net, torch.randn(2, 3, 9, 9))
        out = net.relu(net.first(torch.randn(2, 3, 9, 9)))
        out.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            out.sum().backward()
