"""Models that nobody here wrote, under every scheme, against float64.

Whole models: an error of at most three times the plain float32 model's own. Each layer, on
the operands that it got: less than 1e-5.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import benchmarks.offload
from benchmarks._offload_models import LayerErrors, build, logits
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.crypto import SecretBytes
from cenacle.offload import (
    Offload,
    make_scheme,
    offload,
    schemes,  # noqa: F401 - registers them
)
from cenacle.offload.fleet import Fleet
from cenacle.offload.schemes import base

TRAINING = ["enclave", "measured", "lowrank", "permuted"]
CASES = {  # model, side of its pictures, divisor of its widths
    "vgg9": ("vgg9", 16, 4),
    "vgg16": ("vgg16", 32, 8),
    "resnet50": ("resnet50", 64, 8),
    "vit": ("vit", 32, 12),
    "bert": ("bert", 0, 12),
    "mobilenetv2": ("mobilenetv2", 64, 4),
}
THRESHOLD = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {"permuted": {"seed": SecretBytes(bytes(32))}}


def known(scheme: str) -> bool:
    return scheme in base.SCHEMES


@dataclass
class Case:
    model: nn.Module
    inputs: dict[str, Any]
    labels: torch.Tensor

    def call(self, model: nn.Module) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in self.inputs.items()}
        if isinstance(model, nn.Sequential):
            return logits(model(*given.values()))
        return logits(model(**given))

    def step(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and all gradients as one vector."""
        model.zero_grad()
        output = self.call(model)
        functional.cross_entropy(output, self.labels).backward()  # type: ignore[no-untyped-call]
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert found
        return output.detach().double(), torch.cat(found).double()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, size, scale = CASES[request.param]
    if not name.startswith("vgg"):
        pytest.importorskip("transformers", reason="models of others need transformers")
    torch.manual_seed(0)
    model = build(name, size, scale=scale, smooth=True)
    inputs: dict[str, torch.Tensor]
    if name == "bert":
        ids = torch.randint(5, 200, (3, 9))
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(9) < 7).long().expand(3, 9)}
    else:
        inputs = {"pixel_values": torch.randn(3, 3, size, size)}
    return Case(model, inputs, torch.tensor([1, 4, 2]))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def layers(model: nn.Module) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize("scheme", TRAINING)
def test_training(case: Case, scheme: str) -> None:
    if not known(scheme):
        pytest.skip(f"scheme {scheme} is not there")
    reference = case.step(copy.deepcopy(case.model).double())
    plain = case.step(copy.deepcopy(case.model))
    model = copy.deepcopy(case.model)
    before = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    checked = LayerErrors(make_scheme(scheme, **OPTIONS.get(scheme, {})))
    with Offload(model, checked, Fleet([InlineAccelerator()])) as session:
        found = case.step(model)
        optimizer.step()
        after = case.call(model)
    assert layers(model) <= set(session.profile.layers)
    assert session.kept_inside == []
    for got, own, wanted in zip(found, plain, reference, strict=True):
        assert error(got, wanted) <= 3 * error(own, wanted)
    assert {key: e for key, e in checked.errors.items() if e >= THRESHOLD} == {}
    # The model keeps its class and its names, and optimizers work on it as before.
    assert type(model) is type(case.model)
    assert list(model.state_dict()) == before
    torch.testing.assert_close(case.call(model), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", TRAINING)
def test_inference(case: Case, scheme: str) -> None:
    if not known(scheme):
        pytest.skip(f"scheme {scheme} is not there")
    model = copy.deepcopy(case.model).eval()
    with torch.no_grad():
        reference = case.call(copy.deepcopy(model).double())
        plain = case.call(model)
        with offload(model, scheme, [InlineAccelerator()]) as session:
            found = case.call(model)
    assert layers(model) <= set(session.profile.layers)
    assert error(found, reference) <= 3 * error(plain, reference)


def test_masked_inference(case: Case) -> None:
    """Fixed point: not float32's error, but the same answers; products stay inside."""
    if not known("masked"):
        pytest.skip("scheme masked is not there")
    model = copy.deepcopy(case.model).eval()
    with torch.no_grad():
        reference = case.call(copy.deepcopy(model).double())
        with offload(model, "masked", [InlineAccelerator()]) as session:
            scheme: Any = session.scheme
            arguments = case.inputs
            example = tuple(arguments.values()) if isinstance(model, nn.Sequential) else arguments
            scheme.prepare(model, example, len(case.labels))
            session.profile.reset()
            found = case.call(model)
    sent = {name for name, cost in session.profile.layers.items() if cost.products}
    assert layers(model) <= sent
    assert error(found, reference) < 5e-3
    assert torch.equal(found.argmax(-1), reference.argmax(-1))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("scheme", ["measured", "masked"])
def test_the_benchmark_reports_its_figures(scheme: str, tmp_path: Any) -> None:
    if not known(scheme):
        pytest.skip(f"scheme {scheme} is not there")
    found: dict[str, Any] = {}
    arguments = f"--model vgg9 --size 16 --batch 2 --turns 1 --scheme {scheme} --trace".split()
    benchmarks.offload.main(
        [*arguments, str(tmp_path / "trace.json")],
        emit=lambda _name, results, as_json: found.update(results),
    )
    kinds = ["infer"] if scheme == "masked" else ["train", "infer"]
    what = ("speedup", "enclave_bound", "plain_ratio", "bound_ratio", "bytes_per_step")
    for name in [f"{kind}_{each}" for kind in kinds for each in (*what, "enclave_peak_mb")]:
        assert found[name] > 0, name
    assert 0 < found["rel_err"] < (1e-2 if scheme == "masked" else THRESHOLD)
    assert found["workers_lost"] == []
    assert (tmp_path / "trace.json").stat().st_size > 0
