"""A session leaves nothing behind, sees every change of a weight, and fails clearly."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import CheckpointError, checkpoint

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.errors import InputError
from cenacle.offload import Offload, Transcript, make_scheme, offload
from cenacle.offload.fleet import Fleet


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).to(dtype)


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn((count, 2, 4, 4), generator=torch.Generator().manual_seed(1), dtype=dtype)


def session(model: nn.Module, scheme: str = "measured") -> Offload:
    return offload(model, scheme, [InlineAccelerator()])


def mode() -> Any:
    return _get_current_function_mode()  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- training

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sgd for each": partial(torch.optim.SGD, lr=0.1, foreach=True),
    "sgd fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adam fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for number in range(steps):

        def closure(label: int = number) -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images()), torch.tensor([label, 2, 4]))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_plain_model_s(name: str) -> None:
    """Weights that stay with a worker are never stale, however they are updated."""
    plain, model = network(), network()
    expected = train(plain, OPTIMIZERS[name](plain.parameters()))
    optimizer = OPTIMIZERS[name](model.parameters())
    with session(model):
        found = train(model, optimizer)
    assert found == pytest.approx(expected, rel=1e-9)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def head(model: nn.Sequential) -> nn.Linear:
    assert isinstance(model[4], nn.Linear)
    return model[4]


def _in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        head(model).weight.mul_(2)


def _data(model: nn.Sequential) -> None:
    head(model).weight.data = head(model).weight.data * 2


def _data_twice(model: nn.Sequential) -> None:
    _data(model)
    head(model).weight.data = head(model).weight.data.clone()


def _replaced(model: nn.Sequential) -> None:
    head(model).weight = nn.Parameter(head(model).weight.detach() * 2)


def _loaded(model: nn.Sequential) -> None:
    state = model.state_dict()
    model.load_state_dict({**state, "4.weight": state["4.weight"] * 2})


@pytest.mark.parametrize("change", [_in_place, _data, _data_twice, _replaced, _loaded])
def test_a_changed_weight_is_sent_again_and_others_are_not(
    change: Callable[[nn.Sequential], None],
) -> None:
    model = network().eval()
    with session(model) as running, torch.no_grad():
        model(images())
        sizes = {name: cost.bytes_sent for name, cost in running.profile.layers.items()}
        for _ in range(3):
            change(model)
            running.profile.reset()
            found = model(images())
            expected = copy.deepcopy(model)(images())
            torch.testing.assert_close(found, expected)
            resent = {name: cost.bytes_sent for name, cost in running.profile.layers.items()}
            assert resent["4"] == sizes["4"]
            assert (resent["0"] < sizes["0"]) == (change is not _loaded)


def test_writing_past_torch_has_to_be_said() -> None:
    model = network().eval()
    with session(model) as running, torch.no_grad():
        before = model(images())
        head(model).weight.data.mul_(2)
        assert torch.equal(model(images()), before)  # documented: not seen
        running.weights_changed()
        torch.testing.assert_close(model(images()), copy.deepcopy(model)(images()))


def test_frozen_weights(same_as_plain: Any) -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    running = same_as_plain(model, images())
    assert running.profile.layers["0"].products == 1  # forward only
    assert running.profile.layers["4"].products == 3


def test_frozen_weights_are_sent_once() -> None:
    model = network()
    model[4].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    with session(model) as running:
        train(model, optimizer, 1)
        running.profile.reset()
        train(model, optimizer, 1)
        batch = 3 * (64 + 5) * 8  # activations and gradients; no weight
        assert running.profile.layers["4"].bytes_sent == batch


# ---------------------------------------------------------------------- checkpoints


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, function: bool) -> None:
        super().__init__()
        self.body = network()[:3]
        self.attend = nn.MultiheadAttention(16, 2, dropout=0.2)
        self.head = nn.Linear(64, 5)
        self.reentrant = reentrant
        self.function = function

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attend(x, x, x)[0]
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.body, x, use_reentrant=self.reentrant).flatten(2)
        if self.function:
            y = checkpoint(self._block, y, use_reentrant=self.reentrant)
        else:
            y = checkpoint(self.attend, y, y, y, use_reentrant=self.reentrant)[0]
        found: torch.Tensor = self.head(y.flatten(1))
        return found


@pytest.mark.parametrize("function", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool, function: bool) -> None:
    """What a checkpoint computes again during the backward pass is offloaded again."""
    models = [Checkpointed(reentrant, function).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    gradients = []
    for model, scheme in zip(models, [None, "measured"], strict=True):
        inputs = images().requires_grad_()
        torch.manual_seed(3)
        if scheme is None:
            model(inputs).square().sum().backward()
        else:
            with session(model) as running:
                model(inputs).square().sum().backward()
            products = {name: cost.products for name, cost in running.profile.layers.items()}
            assert products.pop("head") == 3
            assert {name.partition("[")[0] for name in products} == {
                "body.0", "attend.in_proj_weight", "attend.product-1", "attend.product-2",
                "attend.out_proj",
            }  # fmt: skip
            # Twice forward (the second may stop early), and two gradients.
            assert products["body.0"] in {3, 4}
            assert products["attend.product-1"] == 4
        gradients.append([inputs.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class Inlined(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(
            lambda y: functional.scaled_dot_product_attention(y, y, y),
            self.first(x),
            use_reentrant=self.reentrant,
        )
        return found


def test_checkpoints_of_functions() -> None:
    """The limit that the guide names: a function, not a module, that computes by itself."""
    x = torch.ones(2, 3, 4)
    with session(Inlined(reentrant=True)) as running:
        running.model(x).sum().backward()
        assert running.profile.layers["product-1"].products == 1  # gradients: in the enclave
    with session(Inlined(reentrant=False)) as running, pytest.raises(CheckpointError):
        running.model(x).sum().backward()


# ---------------------------------------------------------------------- autograd


def test_inference(same_as_plain: Any) -> None:
    model = network().eval()
    with torch.no_grad():
        same_as_plain(model, images())
    expected = model(images())
    with session(model), torch.inference_mode():
        found = model(images())
        assert found.is_inference()
    torch.testing.assert_close(found.clone(), expected)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = network().eval()
        with session(model):
            first = model(images())
            head(model).weight.mul_(2)
            second = model(images())
        expected = model(images())
    torch.testing.assert_close(second, expected)
    assert not torch.equal(first, second)


def test_gradients_of_chosen_inputs() -> None:
    model, plain = network(), network()
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for one, results in ((plain, expected), (model, found)):
        x = images().requires_grad_()
        running = session(model)
        with running if one is model else torch.enable_grad():
            results += torch.autograd.grad(one(x).square().sum(), x)
            results += torch.autograd.grad(one(x).square().sum(), list(one.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_can_be_kept_and_used_twice() -> None:
    model, plain = network(), network()
    plain(images()).sum().backward(retain_graph=False)
    with session(model):
        total = model(images()).sum()
        total.backward(retain_graph=True)
        total.backward()
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one.grad, 2 * other.grad)


@pytest.mark.parametrize("scheme", ["enclave", "measured"])
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused(scheme: str, power: int) -> None:
    """Also where the first one is linear: its gradient depends on the weights then."""
    model = network().eval()
    x = images().requires_grad_()
    with session(model, scheme):
        (first,) = torch.autograd.grad(model(x).pow(power).sum(), x, create_graph=True)
        with pytest.raises(InputError, match=r"cannot be differentiated again.*second deriv"):
            first.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("scheme", ["enclave", "measured"])
def test_overwriting_what_is_still_needed_is_torch_s_error(scheme: str) -> None:
    model = nn.Linear(4, 4).double()
    with session(model, scheme):
        x = torch.ones(2, 4, dtype=torch.float64)
        y = model(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_outputs_may_be_overwritten(same_as_plain: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    same_as_plain(model, torch.randn(3, 4, dtype=torch.float64), call=lambda m, x: m(x).mul_(2))


def test_backward_after_the_end() -> None:
    model = network()
    with session(model):
        loss = model(images()).sum()
    with pytest.raises(InputError, match="ended before its gradients"):
        loss.backward()


# ---------------------------------------------------------------------- what remains


def test_parts_of_the_model_may_be_called(same_as_plain: Any) -> None:
    model = network()
    running = same_as_plain(model, images(), call=lambda m, x: m[4](m[:4](x)))
    assert list(running.profile.layers) == ["0", "4"]


def test_outside_of_the_model_nothing_is_offloaded() -> None:
    model, other = network(), nn.Linear(5, 2).double()
    with session(model) as running:
        other(model(images())) @ torch.ones(2, 2, dtype=torch.float64)
    assert list(running.profile.layers) == ["0", "4"]


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error(str(self.first(x).shape))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_no_mode(error: type[BaseException]) -> None:
    model = nn.Sequential(Failing(error))
    with session(model):
        for _ in range(2):
            with pytest.raises(error):
                model(torch.ones(2, 4))
    assert mode() is None
    assert not model._forward_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_given_back_as_it_was() -> None:
    model = network()
    hooks = [model[0].register_forward_hook(lambda *_: None)]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with session(model) as first, session(network()):
        model(images())
        assert not torch.backends.mha.get_fastpath_enabled()
    first.close()
    assert torch.backends.mha.get_fastpath_enabled() == fast
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert len(module._forward_hooks) == (1 if name == "0" else 0)
        assert not module._forward_pre_hooks
    hooks[0].remove()


def test_copies_of_the_model_are_plain() -> None:
    model = network().eval()
    with session(model) as running:
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        copied(images())
        assert not running.profile.layers
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(images()), copied(images()))


def _part(model: nn.Sequential) -> nn.Module:
    return model[0]


def _whole(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(model)


@pytest.mark.parametrize("other", [lambda m: m, _part, _whole])
def test_one_session_for_a_model(other: Callable[[Any], nn.Module]) -> None:
    model = network()
    with session(model):
        again = session(other(model))
        with pytest.raises(InputError, match="in an offload session already"), again:
            pass
        model(images())
    with session(model) as running:
        model(images())
    assert list(running.profile.layers) == ["0", "4"]


def test_a_session_is_used_once() -> None:
    model = network()
    running = session(model)
    with running:
        pass
    with pytest.raises(InputError, match="used once"), running:
        pass
    assert mode() is None


class _Closing(InlineAccelerator):
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_refused_session_lets_its_workers_go() -> None:
    worker = _Closing()
    model = network().to("meta")
    with pytest.raises(InputError, match="another device"), offload(model, "enclave", [worker]):
        pass
    assert worker.closed
    with session(network()):
        pass


def test_a_model_on_a_device_is_refused() -> None:
    model = network()
    with session(model), pytest.raises(InputError, match=r"found meta.*expected cpu"):
        model(images().to("meta"))
    assert mode() is None


def _compiled() -> nn.Module:
    found = torch.compile(network(), backend="eager")
    assert isinstance(found, nn.Module)
    return found


def _compiled_in_place() -> nn.Module:
    model = network()
    model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [
    _compiled, _compiled_in_place, lambda: nn.Sequential(torch.jit.ScriptModule()),
])  # fmt: skip
def test_compiled_models_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match="compiled model"), session(make()):
        pass


def test_functional_calls_with_other_weights(same_as_plain: Any) -> None:
    other = network().state_dict()
    other["4.weight"] = other["4.weight"] * 3

    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = torch.func.functional_call(model, other, (x,))
        second: torch.Tensor = model(x)
        return first + second

    running = same_as_plain(network().eval(), images().requires_grad_(), call=call)
    assert list(running.profile.layers) == ["0", "4"]


def test_transforms_of_torch_func_stay_inside() -> None:
    model = network().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(model, weights, (images(),))
        return found.square().sum()

    expected = torch.func.grad(loss)(parameters)
    with session(model) as running:
        found = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(found, expected)
    assert running.kept_inside == [
        "conv2d with a transform of torch.func", "linear with a transform of torch.func",
    ]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options", "message"), [
    ("rot13", {}, "scheme is not known"),
    ("measured", {"rank": 3}, "no such option"),
])  # fmt: skip
def test_unknown_schemes(scheme: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        offload(network(), scheme, [InlineAccelerator()], **options)


def test_a_scheme_may_be_made_before() -> None:
    model = network()
    with Offload(model, make_scheme("measured"), Fleet([InlineAccelerator()])) as running:
        model(images())
    assert running.leakage.inputs == "plaintext"


# ---------------------------------------------------------------------- roles


def test_inputs_are_told_from_activations(tmp_path: Any) -> None:
    model = network()
    transcript = Transcript()
    with offload(model, "measured", [InlineAccelerator()], transcript=transcript):
        model(images()).sum().backward()
    roles = [(line["layer"], line["role"]) for line in transcript.lines if line["event"] == "put"]
    assert roles == [
        ("0", "inputs"), ("0", "weights"), ("4", "activations"), ("4", "weights"),
        ("4", "gradients"), ("0", "gradients"),
    ]  # fmt: skip
