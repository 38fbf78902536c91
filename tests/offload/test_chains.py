"""Batch normalisation, a residual and a ReLU after a convolution: fused, and never wrong."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.errors import InputError
from cenacle.offload import Offload, offload
from cenacle.offload.norms import compiled_norms
from cenacle.offload.schemes.permuted import Permuted

pytestmark = pytest.mark.skipif(compiled_norms() is None, reason="numba is not installed")


class Taking(torch.autograd.Function):
    """Takes its operand past torch's functions, and gives it on as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Block(nn.Module):
    """Two residual blocks as in ResNet; whatever ``mode`` says happens in between."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(4, **norm)
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, **norm)
        self.second = nn.Conv2d(6, 6, 1, bias=False)
        self.last = nn.BatchNorm2d(6, **norm)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.short = nn.BatchNorm2d(6, **norm)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.end = nn.BatchNorm2d(6, **norm)
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.mode = ""
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> Any:
        mode, extra = self.mode, torch.zeros(())
        x = self.inplace(self.stem_norm(self.stem(x)))
        if mode == "pool":
            x = self.pool(x)
        y = self.first(x)
        if mode == "raw before":
            extra = y.mean()
        elif mode == "raw in place":
            y.mul_(-1)
        elif mode == "shape":
            assert y.shape[1] == 6
            assert y.dim() == 4
        z = self.norm(y)
        if mode == "raw after":
            extra = y.square().mean()
        elif mode == "raw changed after" and not torch.is_grad_enabled():
            extra = extra + y.detach().mul_(2).mean()
            y = y * 1.0
        elif mode == "no norm":
            z = self.first(x)
        elif mode == "norm twice":
            z = self.norm(z)
        elif mode == "look":
            extra = z.detach().mean()
        elif mode == "hook" and z.requires_grad:
            z.register_hook(lambda gradient: gradient * 2)
        elif mode == "retain" and z.requires_grad:
            z.retain_grad()
            self.kept = [z]
        elif mode == "function":
            z = Taking.apply(z)  # type: ignore[no-untyped-call]
        elif mode == "no grad":
            with torch.no_grad():
                extra = self.relu(z).mean()
        a = functional.silu(z) if mode == "silu" else self.relu(z)
        if mode == "norm after":
            extra = z.mean()
        elif mode == "relu twice":
            a = self.relu(a)
        left = self.last(self.second(a))
        right = self.short(self.shortcut(x))
        if mode == "both":
            left, right = right, left
        if mode == "plus":
            s = left + right
        elif mode == "other side":
            s = right.clone() + left
        elif mode == "add":
            s = torch.add(left, right)
        elif mode == "scaled":
            s = torch.add(left, right, alpha=2)
        elif mode == "number":
            s = left + 1.5
        elif mode == "broadcast":
            s = left + right[:, :1]
        elif mode == "itself":
            s = left + left
        elif mode == "mul":
            s = left * right
        else:
            s = left
            s += right
        if mode == "residual changed":
            right = right.mul_(3)
        elif mode == "sum seen":
            extra = s.square().mean()
        elif mode == "sum halved":
            s /= 2
        elif mode == "summand after":
            extra = left.mean()
        out = s if mode == "no relu" else (self.inplace if mode == "in place" else self.relu)(s)
        if mode == "sum after":
            extra = s.mean()
        elif mode == "keep":
            self.kept = [y, z, s]
        elif mode == "return all":
            return y, z, s, out + extra
        found = self.end(self.third(out))
        found = found + out
        return functional.relu(found) + extra


MODES = [
    "", "pool", "raw before", "raw in place", "shape", "raw after", "raw changed after", "no norm",
    "norm twice", "look", "hook", "retain", "function", "no grad", "silu", "norm after",
    "relu twice", "both", "plus", "other side", "add", "scaled", "number", "broadcast",
    "itself", "mul", "residual changed", "sum seen", "sum halved", "summand after", "no relu",
    "in place", "sum after", "keep", "return all",
]  # fmt: skip


def run(net: Block, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients of everything that learns, and buffers."""
    net.kept = []
    x = x.clone().requires_grad_(x.requires_grad)
    found = net(x)
    found = [*found, *net.kept] if isinstance(found, tuple) else [found, *net.kept]
    seen = {f"output {i}": o.detach().clone() for i, o in enumerate(found)}
    if torch.is_grad_enabled() and found[-1].requires_grad:
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in found)
        assert isinstance(loss, torch.Tensor)
        named = {**dict(net.named_parameters()), "input": x}
        learns = {name: p for name, p in named.items() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(learns.values()), allow_unused=True)
        seen |= {f"d {n}": g for n, g in zip(learns, grads, strict=True) if g is not None}
    return seen | {name: b.clone() for name, b in net.named_buffers()}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        # A bias before a normalisation learns nothing but the rounding of large sums.
        floor = 10.0 if name in {"d stem.bias", "d third.bias"} else 1.0
        size = max(floor, float(wanted.abs().max()))
        error = float((found[name] - wanted).abs().max())
        assert error <= 2e-5 * size, (name, error, size)


def pair(**norm: Any) -> tuple[Block, Block]:
    torch.manual_seed(0)
    plain = Block(**norm)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return copy.deepcopy(plain), plain


def both(net: Block, plain: Block, batch: int = 3) -> None:
    x = torch.randn(batch, 3, 10, 10)
    compare(run(net, x), run(plain, x))


def fused(session: Offload) -> dict[str, tuple[bool, ...]]:
    return {site: tuple(plan) for site, plan in session._chains._plans.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_whatever_happens_in_between(mode: str, training: bool) -> None:
    net, plain = pair()
    net.train(training)
    plain.train(training)
    with offload(net, "permuted", [InlineAccelerator("a")], check=False):
        for now in ("", "", mode, mode, "", mode):
            net.mode = plain.mode = now
            both(net, plain)
        for now in ("", mode):
            net.mode = plain.mode = now
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    both(net, plain)


@pytest.mark.parametrize("mode", MODES)
def test_whatever_comes_first_without_gradients(mode: str) -> None:
    net, plain = pair()
    with offload(net, "permuted", [InlineAccelerator("a")], check=False):
        for context in (torch.no_grad, torch.inference_mode):
            for training in (True, False):
                net.train(training)
                plain.train(training)
                for now in (mode, "", mode):
                    net.mode = plain.mode = now
                    with context():
                        both(net, plain)


@pytest.mark.parametrize(
    "norm",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.9, "eps": 0.1},
    ],
    ids=str,
)
def test_every_kind_of_normalisation(norm: dict[str, Any]) -> None:
    net, plain = pair(**norm)
    with offload(net, "permuted", [InlineAccelerator("a")], check=False) as session:
        for training in (True, True, False, True, False):
            net.train(training)
            plain.train(training)
            both(net, plain)
            with torch.no_grad():
                both(net, plain)
        assert fused(session)["second"] == (True, True, True)


FROZEN: dict[str, Callable[[Block], Any]] = {
    "convolutions": lambda net: [p for n, p in net.named_parameters() if p.dim() == 4],
    "normalisation": lambda net: [p for n, p in net.named_parameters() if "norm" in n],
    "weights of normalisation": lambda net: [net.norm.weight, net.last.weight],
    "first layers": lambda net: [*net.stem.parameters(), *net.stem_norm.parameters()],
    "main branch": lambda net: [*net.second.parameters(), *net.last.parameters()],
    "all but one": lambda net: [p for p in net.parameters() if p is not net.short.bias],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers(name: str, training: bool) -> None:
    net, plain = pair()
    for one in (net, plain):
        one.train(training)
        for parameter in FROZEN[name](one):
            parameter.requires_grad_(False)
    with offload(net, "permuted", [InlineAccelerator("a")], check=False):
        for _ in range(3):
            both(net, plain)
            x = torch.randn(2, 3, 10, 10, requires_grad=True)
            compare(run(net, x), run(plain, x))


def test_what_is_fused_and_less_when_refuted() -> None:
    net, plain = pair()
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        both(net, plain)
        before = session.profile.total.products
        both(net, plain)
        assert session.profile.total.products == before + 5 * 3 - 1  # nothing is computed twice
        assert fused(session) == {
            "stem": (True, False, True),
            "first": (True, False, True),
            "second": (True, True, True),
            "shortcut": (True, False, False),
            "third": (True, True, True),
        }
        net.mode = plain.mode = "mul"
        both(net, plain)
        assert fused(session)["second"] == (True, False, False)
        net.mode = plain.mode = "no norm"
        both(net, plain)
        assert fused(session)["first"] == (False, False, False)


def test_shared_layers() -> None:
    class Shared(Block):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.relu(self.stem_norm(self.stem(x)))
            a = self.relu(self.norm(self.first(x)))
            for _ in range(2):
                a = self.relu(self.norm(self.third(a)) + a)
            return self.end(self.third(a))

    torch.manual_seed(0)
    plain = Shared()
    net = copy.deepcopy(plain)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(4):
            both(net, plain)


def test_hooks_on_modules_that_come_later() -> None:
    net, plain = pair()
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with offload(net, "permuted", [InlineAccelerator("a")]):
        net.mode = plain.mode = "plus"
        both(net, plain)
        both(net, plain)
        for number, one in enumerate((net, plain)):

            def keep(_: Any, __: Any, output: torch.Tensor, number: int = number) -> None:
                seen[number].append(output.detach().clone())

            def note(_: Any, __: Any, grads: Any, number: int = number) -> None:
                seen[number].append(grads[0].clone())

            one.norm.register_forward_hook(keep)
            one.second.register_forward_hook(keep)
            one.last.register_full_backward_hook(note)
            one.shortcut.register_full_backward_hook(note)
        both(net, plain)
        both(net, plain)
    assert len(seen[0]) == len(seen[1]) == 8
    for found, wanted in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["weight", "output"])
def test_changing_what_a_gradient_needs_is_torch_s_own_error(change: str) -> None:
    net, _ = pair()
    x = torch.randn(2, 3, 10, 10)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(2):
            run(net, x)
        y = net.first(torch.randn(2, 4, 10, 10))
        z = net.norm(y)
        if change == "weight":
            with torch.no_grad():
                net.norm.weight.mul_(2)
        else:
            y.detach().mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.backward(z.sum())


def test_gradients_twice_and_no_second_derivatives() -> None:
    net, plain = pair()
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(2):
            both(net, plain)
        out = net(torch.randn(2, 3, 10, 10)).sum()
        wanted = list(net.parameters())
        first = torch.autograd.grad(out, wanted, retain_graph=True)
        again = torch.autograd.grad(out, wanted, create_graph=True)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other.detach())
        with pytest.raises(InputError, match="differentiated again"):
            torch.autograd.backward(again[0].sum())


def test_an_array_of_a_pending_sum_is_nan_and_said_so() -> None:
    net, _ = pair()
    x = torch.randn(2, 3, 10, 10)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(2):
            run(net, x)
        held: list[torch.Tensor] = []

        def steal(_: Any, __: Any, output: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():
                held.append((output * 2).detach())

        net.last.register_forward_hook(steal)
        run(net, x)
        assert held[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_types_are_torch_s(dtype: torch.dtype) -> None:
    net, plain = pair()
    net.to(dtype)
    plain.to(dtype)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for _ in range(3):
            x = torch.randn(2, 3, 10, 10, dtype=dtype)
            torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
        assert any(any(plan) for plan in fused(session).values()) == (dtype == torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_no_epsilon(training: bool) -> None:
    """torch refuses it in training, and only there."""
    net, plain = pair(eps=0.0)
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for one in (net, plain):
            one.eval()
        for _ in range(2):
            both(net, plain)
        net.train(training)
        if training:
            with pytest.raises(ValueError, match="eps must be positive"):
                net(torch.randn(2, 3, 10, 10))


def test_one_number_a_channel_is_torch_s_own_error() -> None:
    net, _ = pair()
    with offload(net, "permuted", [InlineAccelerator("a")]):
        for _ in range(2):
            run(net, torch.randn(2, 3, 10, 10))
        with pytest.raises(ValueError, match="more than 1 value"):
            net(torch.randn(1, 3, 1, 1))


def test_every_product_is_checked() -> None:
    """A worker that changes one number of a product, fused or not, loses its place."""

    class Lying(InlineAccelerator):
        lies = False

        def call(self, operation: Any, result: int, operands: Any) -> None:
            super().call(operation, result, operands)
            if self.lies and operation.name == "conv":
                self._kept[result].view(-1)[0] += 1.0

    net, plain = pair()
    for training in (True, False):
        for one in (net, plain):
            one.train(training)
        worker = Lying("liar")
        with offload(net, "permuted", [worker, InlineAccelerator("honest")]) as session:
            for _ in range(2):
                both(net, plain)
            worker.lies = True
            with torch.set_grad_enabled(training):
                both(net, plain)  # what it said was not used
            assert [loss.name for loss in session.losses] == ["liar"]


def test_graphs_let_go_of_what_they_kept() -> None:
    net, _ = pair()
    x = torch.randn(2, 3, 10, 10)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for _ in range(3):
            run(net, x)
        members = session.fleet.members[0]
        before = len(members._kept)  # type: ignore[attr-defined]
        for _ in range(3):
            run(net, x)
        assert len(members._kept) <= before + 2  # type: ignore[attr-defined]
        assert not session._chains._entries
        assert not session._chains._watched
        out = net(x)
        ref = weakref.ref(out)
        del out
        assert ref() is None


def test_only_schemes_that_fuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Permuted, "fuses_norm", False)
    net, plain = pair()
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for _ in range(2):
            both(net, plain)
        assert not fused(session)
