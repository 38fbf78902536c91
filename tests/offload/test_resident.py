"""Weights that workers keep and train: the same numbers, whoever lies, dies or looks."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.process import ProcessAccelerator
from cenacle.accelerators.protocol import Operation
from cenacle.crypto.memory import SecretBytes
from cenacle.errors import AcceleratorError, InputError
from cenacle.offload import Offload, offload
from cenacle.offload.resident import RemoteGradient
from cenacle.offload.schemes.permuted import Permuted

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=True
    ),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def dense() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def convolutional() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (4, 4, 4)),
        nn.Conv2d(4, 96, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(96, 64, 2, bias=False),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def batches(count: int, size: int = 4) -> Batches:
    found = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 64, generator=found),
            torch.randint(0, 10, (size,), generator=found),
        )
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches) -> None:
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def session(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    workers: int | Sequence[InlineAccelerator] = 1,
    **options: Any,
) -> Offload:
    scheme = Permuted(
        rekey=options.pop("rekey", 1000), seed=SecretBytes(bytes(range(32))), public_base=False
    )
    if isinstance(workers, int):
        workers = [InlineAccelerator(f"w{number}") for number in range(workers)]
    return offload(model, scheme, workers, resident=optimizer, **options)


def kept(within: Offload) -> list[Any]:
    assert isinstance(within.scheme, Permuted)
    return [one for one in within.scheme._resident._kept.values() if one is not None]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def reference(
    make: Callable[[], nn.Module], name: str, data: Batches
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Under the same keys, with the optimizer in the enclave."""
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    with session(model, None, check=False):
        train(model, optimizer, data)
    return model, optimizer


@pytest.mark.parametrize("make", [dense, convolutional])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_optimizer_inside_to_the_bit(name: str, make: Callable[[], nn.Module]) -> None:
    data = batches(6)
    want, its = reference(make, name, data)
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    with session(model, optimizer, check="adam" not in name) as within:
        train(model, optimizer, data)
        assert len(kept(within)) >= 2
        assert all(one.updates == len(data) for one in kept(within))
        if within.fleet.verifier is not None:
            assert within.fleet.verifier.doubts == 0
    assert equal(want, model)
    wanted, found = its.state_dict(), optimizer.state_dict()
    assert wanted["param_groups"] == found["param_groups"]
    for number, slots in wanted["state"].items():
        for slot, value in slots.items():
            same = found["state"][number][slot]
            assert value is same is None or torch.equal(value, same), (number, slot)


@pytest.mark.parametrize(("workers", "rekey"), [(1, 3), (2, 1000), (3, 2)])
def test_new_keys_and_several_workers(workers: int, rekey: int) -> None:
    data = batches(8)
    want, _ = reference(dense, "nesterov", data)
    model = dense()
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    with session(model, optimizer, workers, rekey=rekey) as within:
        train(model, optimizer, data[:5])
        slots = {one.w.slot for one in kept(within)}
        keys = [one.inner for one in kept(within)]
        train(model, optimizer, data[5:])
        assert len(slots) == workers
        changed = [one.inner is not key for one, key in zip(kept(within), keys, strict=True)]
        assert all(changed) == (rekey < 5)
    for p, q in zip(want.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "look",
    [
        lambda m: m.state_dict(),
        lambda m: [p.norm() for p in m.parameters()],
        lambda m: copy.deepcopy(m),
        lambda m: [p.data for p in m.parameters()],
        lambda m: [p.detach() for p in m.parameters()],
        lambda m: [p.view(-1)[0].item() for p in m.parameters()],
        lambda m: torch.stack([p.sum() for p in m.parameters()]),
        lambda m: repr(list(m.parameters())),
        lambda m: [p.tolist() for p in m.parameters()],
    ],
)
def test_who_looks_sees_what_is(look: Callable[[nn.Module], object]) -> None:
    data = batches(4)
    want, _ = reference(dense, "momentum", data)
    model = dense()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with session(model, optimizer):
        train(model, optimizer, data)
        look(model)
        assert equal(want, model)


def test_the_enclaves_copy_is_old_until_somebody_looks() -> None:
    model = dense()
    weight = next(iter(model.parameters()))
    array = weight.detach().numpy()  # past torch, before the session
    before = array.copy()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session(model, optimizer) as within:
        train(model, optimizer, batches(2))
        assert (array == before).all()
        with pytest.raises(InputError, match="written past torch"):
            within.weights_changed()
        within.bring_home()
        assert (array != before).any()


def test_weights_may_be_changed_between_steps() -> None:
    data = batches(6)

    def run(optimizer_of: Callable[[nn.Module], Any], resident: bool) -> nn.Module:
        model = dense()
        optimizer = optimizer_of(model)
        with session(model, optimizer if resident else None):
            train(model, optimizer, data[:3])
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.05, 0.05)
            train(model, optimizer, data[3:])
        return model

    momentum = lambda m: OPTIMIZERS["momentum"](m.parameters())  # noqa: E731
    a, b = run(momentum, False), run(momentum, True)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_saving_and_loading_in_the_middle() -> None:
    data = batches(6)
    want, _ = reference(dense, "nesterov", data)
    model = dense()
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    with session(model, optimizer):
        train(model, optimizer, data[:3])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, data[4:])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, data[3:])
    for p, q in zip(want.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_inference_between_steps_uses_the_new_weights() -> None:
    model, data = dense(), batches(3)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with session(model, optimizer):
        train(model, optimizer, data)
        with torch.inference_mode():
            inside = model(data[0][0])
    assert torch.allclose(inside, model(data[0][0]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- gradients


def test_micro_batches_add_up() -> None:
    data = batches(6)

    def run(resident: bool) -> nn.Module:
        model = dense()
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        with session(model, optimizer if resident else None):
            for first, second in zip(data[::2], data[1::2], strict=True):
                optimizer.zero_grad()
                for x, y in (first, second):
                    functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return model

    assert equal(run(False), run(True))


@pytest.mark.parametrize("to_none", [True, False, None])
def test_however_gradients_are_forgotten(to_none: bool | None) -> None:
    """With ``None`` they are not, and go on adding up, as in torch."""
    data = batches(4)

    def run(resident: bool) -> nn.Module:
        model = dense()
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        with session(model, optimizer if resident else None):
            for x, y in data:
                functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if to_none is not None:
                    optimizer.zero_grad(set_to_none=to_none)
            if to_none is False:
                optimizer.step()  # of zero: momentum goes on
        return model

    assert equal(run(False), run(True))


@pytest.mark.parametrize("check", [False, True])
def test_a_gradient_kept_over_new_keys_is_refused(check: bool) -> None:
    model, (x, y) = dense(), batches(1)[0]
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with session(model, optimizer, rekey=1, check=check):
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # new keys, and the gradient stays
        with pytest.raises(InputError, match="change of its weight's keys"):
            optimizer.step()
        with pytest.raises(InputError, match="change of its weight's keys"):
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]


def test_looking_at_results_before_the_step_changes_no_keys() -> None:
    data = batches(4)
    want, _ = reference(dense, "momentum", data)
    model = dense()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with session(model, optimizer, rekey=2):
        for x, y in data:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for _ in range(3):
                    model(x)
            optimizer.step()
    for p, q in zip(want.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: clip_grad_norm_(m.parameters(), 1.0),
        lambda m: [p.grad.norm() for p in m.parameters()],
        lambda m: [p.grad.mul_(2) for p in m.parameters()],
        lambda m: [p.grad.numpy() for p in m.parameters()],
        lambda m: [p.grad + torch.ones(()) for p in m.parameters()],
    ],
)
def test_a_gradient_cannot_be_used_in_the_enclave(use: Callable[[nn.Module], object]) -> None:
    model = dense()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session(model, optimizer):
        x, y = batches(1)[0]
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        grad = model[0].weight.grad  # type: ignore[index]
        assert isinstance(grad, RemoteGradient)
        assert "RemoteGradient(0, shape=(256, 64))" in repr(grad)
        with pytest.raises((InputError, RuntimeError), match=r"kept by a worker|numpy"):
            use(model)


class Tied(nn.Module):
    """An embedding and the layer that reads it out share a weight; so do two layers."""

    def __init__(self, embeds: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(128, 64)
        self.a = nn.Linear(64, 128, bias=False)
        self.b = nn.Linear(128, 64, bias=False)
        self.c = nn.Linear(64, 128, bias=False)
        self.c.weight = self.a.weight
        if embeds:
            self.a.weight = self.c.weight = self.embed.weight
        self.embeds = embeds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embeds:
            x = x + self.embed(x[:, 0].abs().mul(20).long() % 128)
        out: torch.Tensor = self.c(torch.tanh(self.b(torch.relu(self.a(x)))))
        return out


@pytest.mark.parametrize("embeds", [False, True])
def test_shared_weights(embeds: bool) -> None:
    data = batches(4)

    def run(resident: bool) -> nn.Module:
        model = Tied(embeds)
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        with session(model, optimizer if resident else None) as within:
            train(model, optimizer, data)
            if resident:
                # What the enclave uses too cannot have its gradient elsewhere.
                away = {one.site for one in kept(within) if one.lent}
                assert away == ({"b"} if embeds else {"a", "b"})
        return model

    for p, q in zip(run(False).parameters(), run(True).parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- workers that fail


class Lying(InlineAccelerator):
    """Falsifies the result of the ``at``-th operation of a kind."""

    def __init__(self, name: str, operation: str, at: int, lie: Callable[[Any], Any]) -> None:
        super().__init__(name)
        self._operation, self._at, self._lie = operation, at, lie
        self.lied = False

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        super().call(operation, result, operands)
        if operation.name == self._operation:
            self._at -= 1
            if self._at == 0:
                self._kept[result] = self._lie(self._kept[result].clone())
                self.lied = True


def _flip(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[value.numel() // 2] += 0.05
    return value


LIES: dict[str, tuple[str, int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "another weight at first": ("clone", 1, _flip),
    "an element of a gradient": ("matmul", 3, _flip),
    "a scaled gradient": ("matmul", 9, lambda v: v * 1.01),
    "a step too large": ("combine", 2, lambda v: v * 1.001),
    "no momentum": ("combine", 8, torch.zeros_like),
    "an element of a new weight": ("combine", 5, _flip),
    "not a number": ("combine", 4, lambda v: v * float("nan")),
    "what is fetched": ("identity", 1, _flip),
    "what is fetched, scaled": ("identity", 2, lambda v: v * 1.01),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_worker_its_place_and_changes_nothing(lie: str) -> None:
    data = batches(8)
    want, _ = reference(dense, "momentum", data)
    model = dense()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    liar = Lying("liar", *LIES[lie])
    with session(model, optimizer, [liar, InlineAccelerator("honest")]) as within:
        train(model, optimizer, data)
        within.bring_home()
        assert liar.lied
        assert [loss.name for loss in within.losses] == ["liar"]
    assert equal(want, model)


def test_every_small_lie_in_an_update_is_caught() -> None:
    """One element at a time, in weights, momenta and gradients of all layers."""
    data = batches(3)
    want, _ = reference(dense, "momentum", data)
    random = torch.Generator().manual_seed(5)
    for trial in range(60):
        model = dense()
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        at = int(torch.randint(1, 13, (), generator=random))

        def lie(value: torch.Tensor, trial: int = trial) -> torch.Tensor:
            flat = value.view(-1)
            where = int(torch.randint(0, len(flat), (), generator=random))
            flat[where] += (1 if trial % 2 else -1) * 0.3 * float(value.square().mean().sqrt())
            return value

        liar = Lying("liar", "combine", at, lie)
        with session(model, optimizer, [liar]) as within:
            train(model, optimizer, data)
            within.bring_home()
            assert liar.lied
            assert [loss.name for loss in within.losses] == ["liar"], (trial, at)
        # Products computed before the lie was found are right up to what their own check allows.
        for p, q in zip(want.parameters(), model.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-4)


class Dying(InlineAccelerator):
    """Fails at its ``at``-th call, for good."""

    def __init__(self, name: str, at: int) -> None:
        super().__init__(name)
        self._at = at

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._at -= 1
        if self._at <= 0:
            raise AcceleratorError(f"accelerator {self.name} died")
        super().call(operation, result, operands)


@pytest.mark.parametrize("at", [1, 2, 4, 5, 9, 17, 30, 47, 61])
@pytest.mark.parametrize("others", [0, 1])
def test_a_lost_worker_takes_nothing_with_it(at: int, others: int) -> None:
    data = batches(6)
    want, _ = reference(dense, "nesterov", data)
    model = dense()
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    workers = [Dying("dying", at), *[InlineAccelerator(f"w{n}") for n in range(others)]]
    with session(model, optimizer, workers) as within:
        train(model, optimizer, data)
        assert [loss.name for loss in within.losses] == ["dying"]
    assert equal(want, model)


def test_a_killed_process_takes_nothing_with_it() -> None:
    data = batches(6)
    want, _ = reference(dense, "momentum", data)
    model = dense()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    workers: Any = [ProcessAccelerator("first"), ProcessAccelerator("second")]
    with session(model, optimizer, workers) as within:
        train(model, optimizer, data[:4])
        os.kill(workers[0].pid, signal.SIGKILL)
        train(model, optimizer, data[4:])
        within.bring_home()
        assert [loss.name for loss in within.losses] == ["first"]
    assert equal(want, model)


@pytest.mark.parametrize("steps", [80, pytest.param(300, marks=pytest.mark.slow)])
def test_honest_workers_are_never_doubted(steps: int) -> None:
    """As long as keys last, and with updates too small to change most elements."""
    for rate in (0.3, 1e-3, 1e-7):
        model = dense()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        with session(model, optimizer) as within:
            train(model, optimizer, batches(steps))
            within.bring_home()
            assert within.fleet.verifier is not None
            assert within.fleet.verifier.doubts == 0
            assert within.losses == ()


def test_double_precision_is_checked_as_finely() -> None:
    model = dense().double()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    data = [(x.double(), y) for x, y in batches(20)]
    with session(model, optimizer) as within:
        train(model, optimizer, data)
        within.bring_home()
        assert within.fleet.verifier is not None
        assert within.fleet.verifier.doubts == 0
    model = dense().double()
    optimizer = OPTIMIZERS["momentum"](model.parameters())

    def lie(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[7] += 1e-9  # far below what single precision could tell
        return value

    with session(model, optimizer, [Lying("liar", "combine", 4, lie)]) as within:
        train(model, optimizer, data[:3])
        within.bring_home()
        assert [loss.name for loss in within.losses] == ["liar"]


# ---------------------------------------------------------------------- refusals


class Custom(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (OPTIMIZERS["adam"], {}, "cannot be checked"),
        (lambda p: Custom(p, lr=0.1), {}, "cannot carry out this optimizer"),
        (lambda p: torch.optim.Adagrad(p), {}, "cannot carry out this optimizer"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), {}, "this setting"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"check": False}, "this setting"),
    ],
)
def test_refused(
    optimizer: Callable[[Any], torch.optim.Optimizer], options: dict[str, Any], message: str
) -> None:
    model = dense()
    with pytest.raises(InputError, match=message):
        session(model, optimizer(model.parameters()), **options)


def test_other_schemes_keep_no_weights() -> None:
    model = dense()
    with pytest.raises(InputError, match="does not keep weights"):
        offload(
            model, "measured", [InlineAccelerator()], resident=OPTIMIZERS["sgd"](model.parameters())
        )


def test_general_coefficients_keep_no_weights() -> None:
    model = dense()
    scheme = Permuted(coefficients="general", public_base=False)
    with pytest.raises(InputError, match="coefficients"):
        offload(
            model, scheme, [InlineAccelerator()], resident=OPTIMIZERS["sgd"](model.parameters())
        )


def test_a_setting_changed_later_is_refused_and_nothing_lost() -> None:
    data = batches(3)
    want, _ = reference(dense, "momentum", data)
    model = dense()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with session(model, optimizer):
        train(model, optimizer, data)
        optimizer.param_groups[0]["maximize"] = True
        with pytest.raises(InputError, match="this setting"):
            train(model, optimizer, data[:1])
    assert equal(want, model)
