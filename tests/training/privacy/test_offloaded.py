"""Private steps of a model whose products are computed by accelerators that nobody trusts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Operation, Pending
from cenacle.errors import InputError
from cenacle.offload import offload
from cenacle.offload.integrity import Verifier
from cenacle.offload.private import PRIVATE_NOTE
from cenacle.training.privacy import KeepExamplesApartError, Noise, make_private
from cenacle.training.privacy.outside import weighted_sum

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "enclave": ("enclave", {}),
    "permuted": ("permuted", {}),
    "general": ("permuted", {"coefficients": "general"}),
    "lowrank": ("lowrank", {"guard": None}),
    "guarded": ("lowrank", {}),
    "measured": ("measured", {"check": True}),
}
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "per-layer": {"per_layer": True},
    "micro-batches": {"micro_batch": 3},
}


class Convolutions(nn.Module):
    """Strides, groups, normalization, pooling; one layer with few positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular")
        self.norm = nn.GroupNorm(2, 8)
        self.two = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.three = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.last = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.one(x)))
        x = functional.max_pool2d(functional.relu(self.two(x)), 2)
        return self.last(functional.relu(self.three(x)).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Packed projections, attention's own products, a weight used twice, GPT-2's product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.shared = nn.Linear(16, 16)
        self.turned = nn.Parameter(torch.randn(16, 5) / 4)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.inner(x))
        x = self.shared(torch.tanh(self.shared(x)))
        return torch.addmm(self.bias, x.mean(1), self.turned)


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.GELU(), nn.Linear(9, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (_dense, (12,)),
    "convolutions": (Convolutions, (4, 8, 8)),
    "attention": (Attention, (7, 6)),
}


def _made(name: str, examples: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(4)
    return make(), torch.randn(examples, *shape), torch.randint(0, 5, (examples,))


def _step(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> dict[str, Tensor]:
    wanted = {"clip": 0.5, "noise_multiplier": 0.0, "expected_batch": 1.0} | options
    private = make_private(model, **wanted)
    private.backward(lambda x, y: functional.cross_entropy(model(x), y, reduction="none"), x, y)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _workers(kind: type[InlineAccelerator] = InlineAccelerator) -> list[InlineAccelerator]:
    return [kind("one"), InlineAccelerator("two")]


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        size = max(float(value.norm()), 1e-3)
        assert float((found[name] - value).norm()) <= rtol * size, name


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        *(("permuted", way) for way in WAYS),
        *(("lowrank", way) for way in WAYS),
        *((scheme, "flat") for scheme in ("enclave", "general", "guarded", "measured")),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_offload(name: str, scheme: str, way: str) -> None:
    """With the same noise too."""
    model, x, y = _made(name)
    options = {**WAYS[way], "noise_multiplier": 0.1}
    wanted = _step(copy.deepcopy(model), x, y, noise=Noise(key=bytes(32)), **options)
    called, settings = SCHEMES[scheme]
    with offload(model, called, _workers(), **settings) as session:
        found = _step(model, x, y, noise=Noise(key=bytes(32)), **options)
        assert not session.losses
        record = session.leakage
    _same(found, wanted)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert record.note.endswith(PRIVATE_NOTE) == (scheme != "enclave")


class Watching(InlineAccelerator):
    """Remembers what it was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()

    def put(self, handle: int, value: Tensor) -> None:
        self.shapes.add(tuple(value.shape))
        super().put(handle, value)

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        turned = "".join(sorted(k for k in operation.attributes if k.startswith("transpose")))
        self.asked.append(f"{operation.name} {turned}".strip())
        super().call(operation, result, operands)


@pytest.mark.parametrize("scheme", ["permuted", "measured"])
def test_sums_are_products_outside_and_gradients_of_examples_are_not(scheme: str) -> None:
    called, settings = SCHEMES[scheme]
    model, x, y = _made("dense")
    worker = Watching("one")
    with offload(model, called, [worker], **settings):
        _step(model, x, y)
    # Two forward passes (the first is probed, inside), two input gradients, three sums.
    assert worker.asked.count("matmul transpose_b") == 6
    assert worker.asked.count("matmul") == 2
    assert worker.asked.count("matmul transpose_a") == 3
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    assert worker.shapes == weights | {(8, n) for n in (12, 20, 9, 5)}

    model, x, y = _made("convolutions")
    worker = Watching("one")
    with offload(model, called, [worker], **settings):
        _step(model, x, y)
    assert worker.asked.count("conv_input") == 2
    assert worker.asked.count("conv_weight") == 1  # the layer with few positions


def test_a_layer_that_was_fused_before_is_not_now() -> None:
    """Fused, a convolution's gradient would be that of what follows it."""
    model, x, y = _made("convolutions")
    wanted = _step(copy.deepcopy(model), x, y)
    with offload(model, "permuted", _workers()) as session:
        for _ in range(3):
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        plain = session.leakage.note
        _same(_step(model, x, y), wanted)
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert PRIVATE_NOTE not in plain
    copied = copy.deepcopy(model)
    copied.zero_grad()
    functional.cross_entropy(copied(x), y).backward()  # type: ignore[no-untyped-call]
    _same(again, {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}, 1e-4)
    _same(_step(model, x, y), wanted)  # and outside of the session


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("scheme", ["permuted", "lowrank", "measured"])
@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_an_extreme_example_moves_the_sum_by_the_clip(name: str, scheme: str, value: float) -> None:
    called, settings = SCHEMES[scheme]
    model, x, y = _made(name)

    def sums(x: Tensor, y: Tensor, *, per_layer: bool) -> dict[str, Tensor]:
        one = copy.deepcopy(model)
        with offload(one, called, _workers(), **settings) as session:
            found = _step(one, x, y, per_layer=per_layer)
            assert not session.losses
        return found

    x[0] *= value
    for per_layer in (False, True):
        with_it, without = sums(x, y, per_layer=per_layer), sums(x[1:], y[1:], per_layer=per_layer)
        moved = sum(float((with_it[n] - without[n]).double().square().sum()) for n in without)
        assert moved**0.5 <= 0.5 * (1 + 1e-5)


class Lying(InlineAccelerator):
    """Answers what it is told to: any result, or those that are sums of gradients."""

    lie: Callable[[Tensor], Tensor]
    only_sums = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._sums: set[int] = set()
        self.lies = 0

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        if operation.name == "conv_weight" or operation.attributes.get("transpose_a"):
            self._sums.add(result)
        super().call(operation, result, operands)

    def get(self, handle: int) -> Pending:
        if handle in self._sums or not self.only_sums:
            self.lies += 1
            self._kept[handle] = type(self).lie(self._kept[handle])
        return super().get(handle)


def _one_element(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[y.numel() // 2] += 0.05 * y.abs().max()
    return y


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda y: y * 1.01,
    "huge": lambda y: y * 1e6,
    "zeros": torch.zeros_like,
    "one element": _one_element,
    "not a number": lambda y: torch.full_like(y, math.nan),
    "infinite": lambda y: torch.full_like(y, math.inf),
}


@pytest.mark.parametrize(
    ("scheme", "lie", "sums"),
    [
        *(("permuted", lie, True) for lie in LIES),
        *((scheme, lie, False) for scheme in ("lowrank", "measured") for lie in LIES),
    ],
)
def test_a_lying_worker_is_caught_and_changes_nothing(scheme: str, lie: str, sums: bool) -> None:
    called, settings = SCHEMES[scheme]
    model, x, y = _made("convolutions")
    wanted = _step(copy.deepcopy(model), x, y)

    class Liar(Lying):
        only_sums = sums

    Liar.lie = LIES[lie]
    with offload(model, called, _workers(Liar), **settings) as session:
        found = _step(model, x, y)
        assert [loss.name for loss in session.losses] == ["one"]
    _same(found, wanted)


class Trusting(Verifier):
    """One that nothing escapes but everything: as if a lie had been lucky."""

    def expect(self, *given: Any, **named: Any) -> Any:
        check = super().expect(*given, **named)
        check.verify = lambda y: y  # type: ignore[method-assign]
        check.compare = lambda *_: None  # type: ignore[method-assign]
        return check


@pytest.mark.parametrize("lie", ["huge", "not a number", "infinite"])
@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per-layer"])
def test_a_lie_that_passed_cannot_make_a_sum_larger_than_its_examples(
    lie: str, per_layer: bool
) -> None:
    model, x, y = _made("dense")
    wanted = _step(copy.deepcopy(model), x, y, per_layer=per_layer)

    class Liar(Lying):
        pass

    Liar.lie = LIES[lie]
    worker = Liar("one")
    with offload(model, "measured", [worker], check=Trusting()) as session:
        found = _step(model, x, y, per_layer=per_layer)
        assert not session.losses
    assert worker.lies
    _same(found, wanted)


def test_a_sum_is_used_only_up_to_what_its_examples_allow() -> None:
    class Says:
        size = 1.0

        def weight_gradient(self, gy: Tensor) -> Tensor:
            return torch.tensor([self.size]) * gy.sum() / gy.sum()

    factors, squares = torch.tensor([0.5, 1.0]), torch.tensor([16.0, 1.0]).double()
    says = Says()
    for size, used in ((3.0, True), (3.001, False), (-3.1, False), (math.nan, False)):
        says.size = size
        found = weighted_sum(says, torch.ones(4, 2), factors, squares)
        assert (found is not None) == used
    assert weighted_sum(says, torch.ones(4, 2), factors, None) is None


@pytest.mark.parametrize(("size", "passes"), [(1e-6, True), (1e-4, False)])
def test_lies_below_the_tolerance_pass_and_move_a_sum_by_little(size: float, passes: bool) -> None:
    """Every row of every result is moved in one direction: what a liar can do to all examples."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 5))
    x, y = torch.randn(64, 40), torch.randint(0, 5, (64,))
    wanted = _step(copy.deepcopy(model), x, y)

    def lie(result: Tensor) -> Tensor:
        along = torch.linspace(-1, 1, result.shape[1]).mul(3).sin()
        return result + size * result.norm(dim=1, keepdim=True) * along / along.norm()  # type: ignore[no-any-return]

    class Liar(Lying):
        only_sums = False

    Liar.lie = lie
    for _ in range(5):
        worker = Liar("one")
        with offload(model, "permuted", [worker]) as session:
            found = _step(model, x, y)
            assert bool(session.losses) == (not passes)
        moved = sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted)
        assert moved**0.5 < 1e-3 * 0.5


def _session(**settings: Any) -> Callable[[nn.Module], Any]:
    called = settings.pop("scheme", "permuted")
    return lambda model: offload(model, called, _workers(), **settings)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "unchecked": (_session(check=False), "checked results"),
    "measured as it is": (_session(scheme="measured"), "checked results"),
    "noise on residuals": (_session(scheme="lowrank", noise=(1.0, 1e-5, 1.0)), "leave noise out"),
    "masks for inference": (_session(scheme="masked"), "for inference"),
    "fixed point": (_session(scheme="masked-training"), "largest numbers of a batch"),
    "coarse workers": (_session(check=Verifier(roundoff=2**-11)), "full precision"),
    "resident": (
        lambda model: offload(
            model, "permuted", _workers(), resident=torch.optim.SGD(model.parameters(), lr=0.1)
        ),
        "every gradient back",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_leaves(case: str) -> None:
    made, message = REFUSED[case]
    model, x, y = _made("dense")
    with made(model) as session:
        with pytest.raises(InputError) as caught:
            _step(model, x, y)
        assert session.profile.total.bytes_sent == 0
    assert message in caught.value.diagnostics()
    assert all(p.grad is None for p in model.parameters())


def test_two_sessions_for_parts_of_one_model_are_refused() -> None:
    model, x, y = _made("dense")
    assert isinstance(model, nn.Sequential)
    with (
        offload(model[0], "permuted", _workers()),
        offload(model[2], "permuted", _workers()),
        pytest.raises(InputError, match="several offload sessions"),
    ):
        _step(model, x, y)


@pytest.mark.parametrize("teachers", ["permuted", "measured"])
def test_another_offloaded_model_within_the_loss_runs_inside(teachers: str) -> None:
    """Its mode, entered later, would keep its outputs from being seen as data."""
    model, x, y = _made("dense")
    torch.manual_seed(9)
    teacher = nn.Linear(12, 12)
    for p in teacher.parameters():
        p.requires_grad_(False)

    def step(of: nn.Module) -> dict[str, Tensor]:
        private = make_private(of, clip=0.5, noise_multiplier=0.0, expected_batch=1.0)
        private.backward(
            lambda x, y: functional.cross_entropy(of(teacher(x)), y, reduction="none"), x, y
        )
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    wanted = step(copy.deepcopy(model))
    called, settings = SCHEMES[teachers]
    with offload(teacher, called, [InlineAccelerator("t")], **settings) as other:
        _same(step(copy.deepcopy(model)), wanted)
        assert other.profile.total.bytes_sent == 0
        with offload(model, "permuted", _workers()):
            _same(step(model), wanted)


def test_a_part_of_the_model_may_be_offloaded() -> None:
    model, x, y = _made("dense")
    assert isinstance(model, nn.Sequential)
    wanted = _step(copy.deepcopy(model), x, y)
    worker = Watching("one")
    with offload(model[2], "permuted", [worker]):
        _same(_step(model, x, y), wanted)
    assert worker.asked.count("matmul transpose_a") == 1


class Copies(nn.Module):
    """A parameter that becomes one for each example, in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 6)
        self.table = nn.Parameter(torch.randn(6, 4) / 2)
        self.left = nn.Parameter(torch.randn(3, 4) / 2)
        self.last = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unsqueeze(1)
        x = x @ self.table.unsqueeze(0).expand(len(x), 6, 4)
        return self.last((self.left @ x.mT).squeeze(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["permuted", "measured"])
def test_copies_of_a_parameter_are_not_taken_for_the_parameter(scheme: str) -> None:
    torch.manual_seed(0)
    called, settings = SCHEMES[scheme]
    model, x, y = Copies(), torch.randn(6, 12), torch.randint(0, 5, (6,))
    wanted = _step(copy.deepcopy(model), x, y, clip=0.1)
    with offload(model, called, _workers(), **settings):
        _same(_step(model, x, y, clip=0.1), wanted)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["permuted", "lowrank"])
def test_examples_that_mix_are_found_and_the_session_goes_on(scheme: str) -> None:
    called, settings = SCHEMES[scheme]
    model, (_, x, y) = Mixing(), _made("dense")
    with offload(model, called, _workers(), **settings):
        with pytest.raises(KeepExamplesApartError):
            _step(model, x, y)
        assert model(x).shape == (8, 5)


def test_an_error_in_the_model_leaves_the_session_whole() -> None:
    model, x, y = _made("dense")
    wanted = _step(copy.deepcopy(model), x, y)
    with offload(model, "permuted", _workers()):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            _step(model, x[:, :3], y)
        _same(_step(model, x, y), wanted)
