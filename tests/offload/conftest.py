"""What tests of offloading share: comparing an offloaded model with the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import Offload, offload


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Run:
    """One forward and backward pass: outputs and gradients by name, and the session."""

    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor | None]
    session: Offload | None = None


def leaves(value: Any) -> tuple[torch.Tensor, ...]:
    """All floating-point tensors in a nested output."""
    if isinstance(value, torch.Tensor):
        return (value,) if value.is_floating_point() else ()
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return tuple(leaf for one in value for leaf in leaves(one))
    return ()


def step(call: Callable[[], Any], model: nn.Module, *inputs: Any) -> Run:
    """Forward and backward; inputs that require gradients count as parameters."""
    named = {**dict(model.named_parameters()), **{f"input {i}": v for i, v in enumerate(inputs)}}
    watched = {n: p for n, p in named.items() if isinstance(p, torch.Tensor) and p.requires_grad}
    torch.manual_seed(5)
    outputs = leaves(call())
    if not any(o.requires_grad for o in outputs):
        return Run(tuple(o.detach().clone() for o in outputs), {})
    # A loss whose gradient differs everywhere and is not small.
    loss = sum(
        (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)).sum()
        for o in outputs
        if o.requires_grad
    )
    assert isinstance(loss, torch.Tensor)
    found = torch.autograd.grad(loss, list(watched.values()), allow_unused=True)
    return Run(tuple(o.detach().clone() for o in outputs), dict(zip(watched, found, strict=True)))


Compare = Callable[..., Offload]


@pytest.fixture
def same_as_plain() -> Compare:
    """``check(model, *inputs, scheme=..., **kwargs)``: float64, outputs and all gradients."""

    def check(
        model: nn.Module,
        *inputs: Any,
        scheme: str = "measured",
        call: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Offload:
        model = model.double()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        plain = copy.deepcopy(model)

        def run(one: nn.Module) -> Any:
            return one(*inputs, **kwargs) if call is None else call(one, *inputs, **kwargs)

        expected = step(lambda: run(plain), plain, *inputs)
        with offload(model, scheme, [InlineAccelerator()]) as session:
            found = step(lambda: run(model), model, *inputs)
        assert len(found.outputs) == len(expected.outputs)
        for one, other in zip(found.outputs, expected.outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, wanted in expected.gradients.items():
            got = found.gradients[name]
            assert (got is None) == (wanted is None), name
            if wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10, msg=name)
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, value in plain.state_dict().items():  # running averages included
            torch.testing.assert_close(after[name], value)
        return session

    return check
