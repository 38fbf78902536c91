"""ReLUs in the pass of the layer before: only where a model has them, and never wrong."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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
    whole = Permuted.forward_fused

    def counted(self: Permuted, site: Any, *operands: Any) -> Any:
        fused.append(site.name)
        return whole(self, site, *operands)

    monkeypatch.setattr(Permuted, "forward_fused", counted)
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


class Doubling(torch.autograd.Function):
    """Takes its operand past torch's functions, and reads it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        found: torch.Tensor = x * 2 + x.square()
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        found: torch.Tensor = gradient * (2 + 2 * x)
        return found


class Taking(torch.autograd.Function):
    """Takes its operand past torch's functions, and gives it on as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Pooled(nn.Module):
    """Between a convolution, its ReLU and pooling anything may happen; or nothing."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(2)
        self.mode = ""
        self.kept: list[torch.Tensor] = []
        self.sizes: list[Any] = []

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 1.5
        y = self.first(x)
        raw, middle, end = self.mode, self.mode, self.mode
        extra: Any = 0.0
        if raw == "look":
            self.sizes += [y.shape, y.dtype, y.dim(), y.requires_grad]
        elif raw == "raw":
            extra = y.mean()
        elif raw == "raw in place":
            y.mul_(-1)
        elif raw == "stride":
            assert y.stride() == (6 * 64, 64, 8, 1)
            assert y.is_contiguous()
        elif raw == "operand in place" and not torch.is_grad_enabled():
            x.add_(1)
            extra = y.mean()
        elif raw == "function":
            y = Doubling.apply(y)  # type: ignore[no-untyped-call]
        elif raw == "taken":
            y = Taking.apply(y)  # type: ignore[no-untyped-call]
        elif raw == "array" and not torch.is_grad_enabled():
            extra = float(np.asarray(y).mean())
        elif raw == "data":
            extra = y.data.mean()
        elif raw == "hook" and y.requires_grad:
            y.register_hook(lambda gradient: gradient * 2)
        elif raw == "retain" and y.requires_grad:
            y.retain_grad()
            self.kept = [y]
        elif raw == "relu elsewhere":
            with torch.no_grad():
                extra = self.relu(y.clone()).mean()
        z = self.relu(y)
        if middle == "raw after":
            extra = y.square().mean()
        elif middle == "relu":
            extra = z.square().mean()
        elif middle == "relu twice":
            z = self.relu(z)
        elif middle == "relu in place":
            z = z.clone().mul_(2) if self.relu.inplace else z * 2
        elif middle == "other pool":
            z = functional.max_pool2d(z, 3, stride=2, padding=1)
        elif middle == "average":
            z = functional.avg_pool2d(z, 2)
        elif middle == "no grad pool":
            with torch.no_grad():
                extra = self.pool(z).mean()
        elif middle == "indices":
            z, indices = functional.max_pool2d(z, 2, return_indices=True)
            extra = indices.double().mean()
        elif middle == "view":
            extra = z.view(-1)[3:90].mean()
        small = middle in {"other pool", "average", "indices", "no pool"}
        p = z if small else self.pool(z)
        if end == "relu after":
            extra = z.square().mean()
        elif end == "pool again":
            extra = self.pool(z).square().mean()
        elif end == "pooled in place":
            p.mul_(0.5)
        elif end == "return all":
            return self.relu(self.second(p)) + y.mean(), z, p
        elif end == "keep relu":
            self.kept = [z]
        elif end == "keep raw":
            self.kept = [y]
        elif end == "skip":
            p = torch.cat([p, functional.avg_pool2d(z, 2)]).view(2, *p.shape).sum(0)
        q = self.pool(self.relu(self.second(p)))
        return q + extra


ANY = [
    "", "look", "raw", "raw in place", "stride", "operand in place", "function", "taken", "array",
    "data", "hook", "retain", "relu elsewhere", "raw after", "relu", "relu twice", "relu in place",
    "other pool", "average", "no grad pool", "indices", "view", "no pool", "relu after",
    "pool again", "pooled in place", "return all", "keep relu", "keep raw", "skip",
]  # fmt: skip


def run_pooled(net: Pooled, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net.kept = []
    found = net(x)
    found = list(found) if isinstance(found, tuple) else [found]
    kept = net.kept
    found += kept  # looked at when the model has run
    grads: list[torch.Tensor] = []
    if found[0].requires_grad:
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in found)
        assert isinstance(loss, torch.Tensor)
        wanted = list(net.parameters())
        grads = [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]
    return [*(o.detach().clone() for o in found), *grads]


@pytest.mark.parametrize(
    ("mode", "inplace"),
    [(mode, inplace) for mode in ANY for inplace in (False, True)
     if not inplace or mode not in {"taken", "relu twice"}],  # torch itself cannot do these
)  # fmt: skip
def test_pooling_whatever_happens_in_between(mode: str, inplace: bool) -> None:
    torch.manual_seed(0)
    plain = Pooled(inplace=inplace)
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a"), InlineAccelerator("b")]):
        for now in ("", "", mode, mode, "", mode, ""):
            x = torch.randn(3, 3, 8, 8)
            net.mode = plain.mode = now
            compare(run_pooled(net, x), run_pooled(plain, x))
            with torch.no_grad():
                compare(run_pooled(net, x), run_pooled(plain, x))
            if now != "array":
                with torch.inference_mode():
                    compare(run_pooled(net, x), run_pooled(plain, x))


@pytest.mark.parametrize("mode", ANY)
def test_pooling_whatever_comes_first(mode: str) -> None:
    torch.manual_seed(0)
    plain = Pooled(inplace=False)
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for now in (mode, mode, "", mode):
            x = torch.randn(3, 3, 8, 8)
            net.mode = plain.mode = now
            compare(run_pooled(net, x), run_pooled(plain, x))


def fused_widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """What is fused from now on: layer, and width of what is pooled."""
    fused: list[tuple[str, int | None]] = []
    whole = Permuted.forward_fused

    def counted(self: Permuted, site: Any, *operands: Any) -> Any:
        fused.append((site.name, operands[-1]))
        return whole(self, site, *operands)

    monkeypatch.setattr(Permuted, "forward_fused", counted)
    return fused


def test_pooling_is_fused_from_the_second_pass_on_and_less_when_refuted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = fused_widths(monkeypatch)
    net = Pooled(inplace=False)
    x = torch.randn(2, 3, 8, 8)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        run_pooled(net, x)
        assert fused == []
        before = session.profile.total.products
        run_pooled(net, x)
        assert fused == [("first", 8), ("second", 4)]
        assert session.profile.total.products == before + 5  # no input gradient of the first
        fused.clear()
        net.mode = "relu"
        run_pooled(net, x)
        run_pooled(net, x)
        assert fused == [("first", 8), ("second", 4), ("first", None), ("second", 4)]
        fused.clear()
        net.mode = "raw"
        run_pooled(net, x)
        run_pooled(net, x)
        assert fused == [("first", None), ("second", 4), ("second", 4)]


def test_a_hook_on_gradients_that_comes_later_is_called_with_the_right_ones() -> None:
    torch.manual_seed(0)
    plain = Pooled(inplace=False)
    net = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with offload(net, "permuted", [InlineAccelerator("a")]):
        run_pooled(net, x)
        run_pooled(net, x)
        for number, one in enumerate((net, plain)):

            def note(_: Any, __: Any, grads: Any, number: int = number) -> None:
                seen[number].append(grads[0].clone())

            one.first.register_full_backward_hook(note)
            one.pool.register_full_backward_hook(note)
        for _ in range(2):
            compare(run_pooled(net, x), run_pooled(plain, x))
    assert len(seen[0]) == len(seen[1]) > 0
    compare(seen[0], seen[1])


def test_a_hook_on_outputs_that_comes_later_sees_the_right_ones() -> None:
    torch.manual_seed(0)
    plain = Pooled(inplace=False)
    net = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with offload(net, "permuted", [InlineAccelerator("a")]):
        run_pooled(net, x)
        run_pooled(net, x)
        for number, one in enumerate((net, plain)):
            for part in (one.first, one.relu):

                def keep(_: Any, __: Any, output: torch.Tensor, number: int = number) -> None:
                    seen[number].append(output)

                part.register_forward_hook(keep)
        compare(run_pooled(net, x), run_pooled(plain, x))
    compare([t.detach() for t in seen[0]], [t.detach() for t in seen[1]])


def unseen(x: torch.Tensor) -> torch.Tensor:
    """As compiled code would: this read is seen by nobody."""
    with torch._C.DisableTorchFunction():
        return (x * 2).detach()


def test_who_reads_past_torch_s_functions_finds_nan_and_no_wrong_number() -> None:
    net = Pooled(inplace=False)
    x = torch.randn(2, 3, 8, 8)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        run_pooled(net, x)
        found: list[torch.Tensor] = []
        net.first.register_forward_hook(lambda *hook: found.append(unseen(hook[2])))
        run_pooled(net, x)
        assert found[0].isnan().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_count_the_same_in_both_passes(reentrant: bool) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Pooled(inplace=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return found

    plain = Block()
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(4):
            results = []
            for one in (net, plain):
                x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
                x.requires_grad_()
                one.zero_grad()
                one(x).square().sum().backward()
                assert x.grad is not None
                results.append([x.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
            compare(*results)


def test_the_same_graph_twice_gives_the_same_gradients_twice() -> None:
    torch.manual_seed(0)
    net = Pooled(inplace=False)
    x = torch.randn(2, 3, 8, 8)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        run_pooled(net, x)
        found = net(x).square().sum()
        first = torch.autograd.grad(found, list(net.parameters()), retain_graph=True)
        compare(list(torch.autograd.grad(found, list(net.parameters()))), list(first))


def test_a_fused_pass_leaves_no_memory_behind() -> None:
    net = Pooled(inplace=False)
    x = torch.randn(2, 3, 8, 8)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for _ in range(3):
            run_pooled(net, x)
        gc.disable()
        try:
            inner = weakref.ref(session.fleet)
            assert inner() is not None
            run_pooled(net, x)
            before = len(session.fleet.members[0]._kept)  # type: ignore[attr-defined]
            for _ in range(3):
                run_pooled(net, x)
            assert len(session.fleet.members[0]._kept) <= before + 2  # type: ignore[attr-defined]
        finally:
            gc.enable()
