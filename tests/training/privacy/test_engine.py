"""The loop around the rules: releases, records, refusals, and what must stay as it was."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cenacle.errors import InputError
from cenacle.training.privacy import (
    AdaptiveClip,
    GiveLossPerExampleError,
    KeepExamplesApartError,
    Noise,
    PrivacyError,
    ReplaceBatchNormError,
    ReplaceOperationError,
    Sampling,
    UnprotectedGradientError,
    make_private,
    register_rule,
    targets,
)

KEY = bytes(range(32))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(examples: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(examples, 4), torch.randint(0, 3, (examples,))


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda x, y: functional.cross_entropy(model(x), y, reduction="none")


def private_of(model: nn.Module, **changes: Any) -> Any:
    options: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 0.0, "expected_batch": 8}
    return make_private(model, **(options | changes))


def test_the_model_stays_what_it_is() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    private = private_of(model, noise_multiplier=1.0)
    losses = private.backward(loss_of(model), *data())
    assert type(model) is nn.Sequential
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(p.requires_grad for p in parameters)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model[0]._forward_hooks
    assert not model[0]._backward_hooks
    assert losses.shape == (8,)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, loss_of(model)(*data()).detach())
    plain = loss_of(model)(*data()).sum()
    plain.backward()  # type: ignore[no-untyped-call]  # and it still trains without protection, where somebody asks for that
    assert not hasattr(data()[0], "_cenacle_private")


def test_the_divisor_is_the_expected_batch_not_the_realised() -> None:
    model = net()
    x, y = data()
    private_of(model, expected_batch=8).backward(loss_of(model), x[:2], y[:2])
    few = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    private_of(model, expected_batch=2).backward(loss_of(model), x[:2], y[:2])
    for small, p in zip(few, model.parameters(), strict=True):
        torch.testing.assert_close(4 * small, p.grad)


@pytest.mark.parametrize("batch", [(), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))])
def test_an_empty_batch_is_a_step_of_noise(batch: tuple[Tensor, ...]) -> None:
    model = net()
    private = private_of(model, noise_multiplier=2.0)

    def never(*_: Tensor) -> Tensor:
        raise AssertionError

    assert private.backward(never, *batch).shape == (0,)
    assert all(p.grad is not None and bool((p.grad != 0).all()) for p in model.parameters())
    assert private.record.steps == 1


def test_noise_has_the_scale_that_the_record_says() -> None:
    model = nn.Linear(300, 300)
    private = private_of(
        model, clip=0.5, noise_multiplier=3.0, expected_batch=10, noise=Noise(key=KEY)
    )
    private.release()
    assert model.weight.grad is not None
    assert float(model.weight.grad.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert not private.record.events[0].secure


def test_accumulating_equals_one_pass() -> None:
    model = net()
    x, y = data()
    private = private_of(model, clip=0.1)
    private.backward(loss_of(model), x, y)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norms = private.norms
    private.accumulate(loss_of(model), x[:3], y[:3])
    private.accumulate(loss_of(model), x[3:], y[3:])
    private.release()
    for one, p in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
    torch.testing.assert_close(norms, private.norms)


def test_a_step_drops_gradients_of_before() -> None:
    model = net()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e9)
    private_of(model).backward(loss_of(model), *data())
    assert all(p.grad is not None and float(p.grad.abs().max()) <= 1 for p in model.parameters())


def test_record_counts_equal_steps() -> None:
    model = net()
    sampling = Sampling("poisson", population=100, rate=0.08)
    private = private_of(model, noise_multiplier=1.5, sampling=sampling)
    for _ in range(3):
        private.backward(loss_of(model), *data())
    (event,) = private.record.events
    assert (event.steps, event.clip, event.noise_multiplier) == (3, 1.0, 1.5)
    assert event.sampling == sampling
    assert event.clipping == "flat"
    assert event.group_clips == (1.0,)
    assert event.secure
    assert event.to_dict()["sampling"]["rate"] == 0.08
    private.noise_multiplier = 2.0
    private.release()
    assert [e.steps for e in private.record.events] == [3, 1]


def test_per_layer_bounds_compose_to_the_whole() -> None:
    model = net()
    private = private_of(model, clip=2.0, per_layer=True)
    private.backward(loss_of(model), *data())
    (event,) = private.record.events
    assert event.clipping == "per_layer"
    assert math.sqrt(sum(c * c for c in event.group_clips)) == pytest.approx(2.0)


def test_the_clip_follows_the_quantile() -> None:
    model = net()
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.3, count_noise=0.5)
    private = private_of(model, clip=50.0, adaptive=adaptive, noise=Noise(key=KEY))
    for _ in range(40):
        private.backward(loss_of(model), *data())
    assert private.clip == pytest.approx(float(private.norms.median()), rel=0.4)
    clips = [event.clip for event in private.record.events]
    assert clips[0] == 50.0
    assert all(e.count_noise_multiplier == 0.5 for e in private.record.events)
    assert AdaptiveClip(smallest=1.0).next(1.0, 1e9, 1.0) == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0}, {"clip": math.nan}, {"clip": math.inf}, {"noise_multiplier": -1.0},
        {"expected_batch": 0}, {"micro_batch": 0},
        {"per_layer": True, "adaptive": AdaptiveClip()},
    ],
)  # fmt: skip
def test_settings_that_protect_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        private_of(net(), **changes)


@pytest.mark.parametrize("quantile", [0.0, 1.0, math.nan])
def test_quantiles(quantile: float) -> None:
    with pytest.raises(PrivacyError):
        AdaptiveClip(quantile=quantile)


# ---------------------------------------------------------------------------- refusals


class Mixing(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.how(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x - x.mean(0),
        lambda x: x.flip(0),
        lambda x: x / x.norm(),
        lambda x: x + x[:1],
        lambda x: x.cumsum(0),
        lambda x: torch.softmax(x, 0),
        lambda x: x.sort(0).values,
        lambda x: x[x[:, 0].argsort()],
        lambda x: functional.batch_norm(x, torch.zeros(4), torch.ones(4)) * x.std(0),
    ],
)
def test_examples_that_mix_before_a_layer_are_refused(how: Callable[[Tensor], Tensor]) -> None:
    model = Mixing(how)
    with pytest.raises(KeepExamplesApartError, match="other examples"):
        private_of(model).backward(loss_of(model), *data())


@pytest.mark.parametrize(
    "mix",
    [
        lambda each: each * each.detach().mean(),
        lambda each: each - each.mean(),
        lambda each: functional.softmax(each, 0),
        lambda each: each + each.roll(1),
        lambda each: each.flip(0),
        lambda each: each.cumsum(0),
    ],
)
def test_losses_that_mix_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    model = net()
    with pytest.raises(KeepExamplesApartError, match="other examples"):
        private_of(model).backward(lambda x, y: mix(loss_of(model)(x, y)), *data())


@pytest.mark.parametrize(
    "reduce", [torch.mean, torch.sum, lambda e: e[:3], lambda e: e[:, None], lambda e: e.tolist()]
)
def test_a_loss_that_is_not_one_number_per_example(reduce: Callable[[Tensor], Any]) -> None:
    model = net()
    with pytest.raises(GiveLossPerExampleError, match="one number per example"):
        private_of(model).backward(lambda x, y: reduce(loss_of(model)(x, y)), *data())


def test_a_loss_without_parameters_is_refused() -> None:
    model = net()
    with pytest.raises(GiveLossPerExampleError, match="trainable"):
        private_of(model).backward(lambda x, y: loss_of(model)(x, y).detach(), *data())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4),
                                   nn.InstanceNorm1d(4, track_running_stats=True)])  # fmt: skip
def test_batch_norm_is_refused_with_the_remedy(layer: nn.Module) -> None:
    with pytest.raises(ReplaceBatchNormError, match="GroupNorm"):
        private_of(nn.Sequential(nn.Linear(4, 4), layer))


def test_batch_norm_switched_on_later_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    private = private_of(model)
    private.backward(loss_of(model), *data())
    model.train()
    with pytest.raises(ReplaceBatchNormError):
        private.backward(loss_of(model), *data())


def test_layers_without_rules_are_refused_by_name() -> None:
    with pytest.raises(ReplaceOperationError, match="'1'"):
        private_of(nn.Sequential(nn.Linear(4, 4), nn.EmbeddingBag(4, 3)))


class Odd(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.odd, self.how = nn.Parameter(torch.randn(3, 4)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.odd)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: torch.cdist(x, w),
        lambda x, w: torch.tensordot(x, w, dims=([1], [1])),
        lambda x, w: torch.cat([x, w])[:, :3],
        lambda x, w: torch.addmm(w.sum(), x, w.t()),
        lambda x, w: torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=2),
    ],
)
def test_operations_without_rules_name_the_parameter(
    how: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = Odd(how)
    with pytest.raises(ReplaceOperationError, match="odd"):
        private_of(model).backward(loss_of(model), *data())


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, gradient.t() @ x


def test_a_custom_function_that_hides_a_parameter_is_refused() -> None:
    model = Odd(lambda x, w: Hidden.apply(x, w))  # type: ignore[no-untyped-call]
    with pytest.raises(UnprotectedGradientError, match="odd"):
        private_of(model).backward(loss_of(model), *data())
    assert model.odd.grad is None


def test_checkpointing_is_refused() -> None:
    model = net()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        inner = model[0](x)
        out = checkpoint(nn.Sequential(model[1], model[2]), inner, use_reentrant=True)
        return functional.cross_entropy(out, y, reduction="none")

    with pytest.raises(UnprotectedGradientError):
        private_of(model).backward(loss, *data())
    assert all(p.grad is None for p in model.parameters())


def test_time_first_is_refused() -> None:
    layer = nn.Linear(4, 3)

    def loss(x: Tensor) -> Tensor:
        return layer(x.transpose(0, 1)).square().sum((0, 2))  # type: ignore[no-any-return]

    with pytest.raises(KeepExamplesApartError, match="first"):
        private_of(layer).backward(loss, torch.randn(5, 7, 4))
    with pytest.raises(KeepExamplesApartError, match="first"):  # as many steps as examples
        private_of(layer).backward(loss, torch.randn(3, 3, 4))


def test_batches_of_different_lengths_are_refused() -> None:
    model = net()
    x, y = data()
    with pytest.raises(GiveLossPerExampleError, match="different numbers"):
        private_of(model).backward(loss_of(model), x, y[:5])


def test_changing_an_input_in_place_is_refused() -> None:
    layer = nn.Linear(4, 3)

    def loss(x: Tensor) -> Tensor:
        x = x * 1
        out = layer(x)
        x.mul_(2)
        return out.square().sum(1)  # type: ignore[no-any-return]

    with pytest.raises(KeepExamplesApartError, match="in place"):
        private_of(layer).backward(loss, data()[0])


def test_nothing_trainable() -> None:
    model = net().requires_grad_(requires_grad=False)
    with pytest.raises(PrivacyError, match="no trainable"):
        private_of(model).backward(loss_of(model), *data())


@pytest.mark.parametrize("moment", ["forward", "loss"])
def test_a_failure_leaves_the_loop_usable(moment: str) -> None:
    model = net()
    private = private_of(model)
    x, y = data()

    def failing(x: Tensor, y: Tensor) -> Tensor:
        out = loss_of(model)(x, y)
        if moment == "forward":
            raise RuntimeError("on purpose")
        return out.mean()

    with pytest.raises((RuntimeError, InputError)):
        private.backward(failing, x, y)
    assert not hasattr(x, "_cenacle_private")
    assert private.record.steps == 0
    private.backward(loss_of(model), x, y)
    assert private.record.steps == 1


def test_dropout_is_drawn_anew_for_every_example() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    private = private_of(model)
    before = torch.get_rng_state()
    private.backward(loss_of(model), *data())
    assert not torch.equal(before, torch.get_rng_state())


def test_bfloat16_autocast(checks: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(6, 32)

    def losses(of: nn.Module) -> Callable[..., Tensor]:
        def loss(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                out = of(x)
            return checks.square_loss(out.to(x.dtype))  # type: ignore[no-any-return]

        return loss

    found = checks.private_sums(model, losses, [x], 1.0)
    checks.close(found, checks.reference(model, losses, [x], 1.0), rtol=0.05, norms=False)
    norm = math.sqrt(sum(float(s.square().sum()) for s in found.sums.values()))
    assert 1 < norm <= 6


def test_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.RULES, torch.cdist, None)

    @register_rule(torch.cdist)
    def rule(tape: Any, func: Any, x: Tensor, w: Tensor, **options: Any) -> Tensor:
        distances: Tensor = func(x[:, None], tape.expanded("cdist", w, 3), **options)
        return distances[:, 0]

    model = Odd(lambda x, w: torch.cdist(x, w))
    private_of(model).backward(loss_of(model), *data())
    assert model.odd.grad is not None


class Look(torch.autograd.Function):
    """Looks, when its gradient comes, which of some tensors are still there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, look: Callable[[], None]) -> Tensor:
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.look()
        return gradient, None


@pytest.mark.parametrize("layered", [False, True])
def test_activations_are_given_up_as_soon_as_they_are_used(layered: bool) -> None:
    """Where gradients are formed or clipped at once, nothing waits for the end of the pass."""
    layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
    private = private_of(layers, per_layer=layered)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def loss(x: Tensor) -> Tensor:
        x = Look.apply(x.clone().requires_grad_(), lambda: alive.append(  # type: ignore[no-untyped-call]
            sum(ref() is not None for ref in kept)))  # fmt: skip
        for layer in layers:
            x = torch.tanh(layer(x))
            kept.append(weakref.ref(x))
        return x.square().sum((1, 2, 3))

    gc.disable()
    try:
        for _ in range(2):
            private.backward(loss, torch.randn(5, 3, 16, 16))
    finally:
        gc.enable()
    assert alive
    assert max(alive) == 0
