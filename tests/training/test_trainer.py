from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cenacle.documents.recipe import Recipe
from cenacle.errors import EnclaveError, VerificationError
from cenacle.training.loop import Rows, learning_rate, reproducible
from cenacle.training.models import build_model, model_tensors
from cenacle.training.randomness import torch_generator
from cenacle.training.trainer import Batches, Trainer

MakeRecipe = Callable[..., Recipe]


def rows(count: int = 37, features: int = 5, seed: int = 0) -> Rows:
    generator = torch_generator(seed, "rows")
    x = torch.randn(count, features, generator=generator)
    noise = torch.randn(count, generator=generator)
    return Rows(x, (x[:, 0] - x[:, 1] + 0.5 * noise > 0).long())


def trainer(recipe: Recipe, data: Rows, validation: Rows | None = None) -> Trainer:
    model = build_model(recipe, tuple(data.inputs.shape[1:]), integers=False)
    return Trainer(recipe, model, data, validation)


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (
            {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        ),
        (
            {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
        (
            {"type": "adam", "learning_rate": 0.01, "betas": [0.8, 0.99], "weight_decay": 0.1},
            lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.99), weight_decay=0.1),
        ),
        (
            {"type": "adamw", "learning_rate": 0.01, "eps": 1e-6},
            lambda p: torch.optim.AdamW(p, 0.01, eps=1e-6, weight_decay=0.01),
        ),
    ],
)
def test_equals_a_plain_loop(make_recipe: MakeRecipe, optimizer: Any, make: Any) -> None:
    recipe = make_recipe(optimizer=optimizer, batch_size=10, epochs=2)
    data = rows()
    ours = trainer(recipe, data)
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    initial = iter(model_tensors(ours.model).values())
    module.load_state_dict(
        {
            name: torch.tensor(value)
            for name, value in zip(module.state_dict(), initial, strict=True)
        }
    )
    reference = make(module.parameters())
    for epoch in range(2):
        order = torch.randperm(37, generator=torch_generator(5, "shuffle", epoch))
        for chosen in torch.split(order, 10):
            reference.zero_grad()
            outputs = module(data.inputs[chosen])
            torch.nn.functional.cross_entropy(outputs, data.targets[chosen]).backward()  # type: ignore[no-untyped-call]
            reference.step()
    ours.run()
    for got, wanted in zip(model_tensors(ours.model).values(), module.parameters(), strict=True):
        np.testing.assert_array_equal(got, wanted.detach().numpy())


def test_logistic_regression_finds_scikit_learns_optimum(make_recipe: MakeRecipe) -> None:
    data = rows(200)
    # Two outputs with penalty lambda/2 |w|^2 each equal one output with C = 2 / (n lambda).
    decay = 0.02
    recipe = make_recipe(
        model={"type": "logistic"},
        optimizer={"type": "sgd", "learning_rate": 0.5, "momentum": 0.9, "weight_decay": decay},
        batch_size=200,
        epochs=600,
    )
    ours = trainer(recipe, data)
    ours.run()
    tensors = model_tensors(ours.model)
    joined = np.column_stack([tensors["output.weight"], tensors["output.bias"]])
    # torch decays the bias like any weight, so the reference sees it as a feature of ones.
    reference = LogisticRegression(
        C=2 / (200 * decay), fit_intercept=False, tol=1e-8, max_iter=5000
    )
    reference.fit(np.column_stack([data.inputs, np.ones(200)]), data.targets.numpy())
    np.testing.assert_allclose(joined[1] - joined[0], reference.coef_[0], rtol=1e-3, atol=1e-4)


def test_linear_regression_finds_least_squares(make_recipe: MakeRecipe) -> None:
    generator = torch_generator(0, "rows")
    x = torch.randn(100, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3 + 0.1 * torch.randn(100, generator=generator)
    recipe = make_recipe(
        task="regression",
        data={"form": "table", "assets": ["a"], "target": "y"},
        model={"type": "linear"},
        optimizer={"type": "sgd", "learning_rate": 0.1, "momentum": 0.5},
        batch_size=100,
        epochs=300,
    )
    ours = trainer(recipe, Rows(x, y))
    ours.run()
    wanted = np.linalg.lstsq(np.column_stack([x, np.ones(100)]), y.numpy(), rcond=None)[0]
    got = model_tensors(ours.model)
    np.testing.assert_allclose(got["output.weight"][0], wanted[:3], atol=1e-4)
    np.testing.assert_allclose(got["output.bias"], wanted[3:], atol=1e-4)


@pytest.mark.parametrize(
    ("count", "size", "bounds"),
    [
        (1, 4, ((0, 1),)),
        (4, 4, ((0, 4),)),
        (5, 4, ((0, 5),)),
        (6, 4, ((0, 4), (4, 6))),
        (9, 4, ((0, 4), (4, 9))),
        (3, 1, ((0, 1), (1, 2), (2, 3))),
        (2, 100, ((0, 2),)),
    ],
)
def test_batches(count: int, size: int, bounds: tuple[tuple[int, int], ...]) -> None:
    assert Batches(count, size).bounds == bounds


def test_cosine_schedule(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        optimizer={"type": "sgd", "learning_rate": 2.0},
        schedule={"type": "cosine", "warmup_epochs": 2, "final": 0.1},
        epochs=12,
    )
    rates = [learning_rate(recipe, step, 120) for step in range(120)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[19] == rates[20] == 2.0
    assert rates[70] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert all(a >= b for a, b in pairwise(rates[19:]))
    constant = make_recipe(optimizer={"type": "sgd", "learning_rate": 2.0})
    assert learning_rate(constant, 99, 120) == 2.0


def test_a_loss_that_is_not_finite_stops_training(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(optimizer={"type": "sgd", "learning_rate": 100.0}, epochs=200)
    data = rows()
    with pytest.raises(EnclaveError, match=r"training diverged.*Lower the learning rate"):
        trainer(recipe, Rows(data.inputs * 1e15, data.targets)).run()


def test_a_last_step_that_overflows_is_caught(make_recipe: MakeRecipe) -> None:
    data = {"form": "table", "assets": ["a"], "target": "y"}
    recipe = make_recipe(
        task="regression",
        data=data,
        model={"type": "linear"},
        optimizer={"type": "sgd", "learning_rate": 100.0},
        epochs=1,
        batch_size=8,
    )
    huge = Rows(torch.full((8, 1), 3e18), torch.full((8,), -1e18))
    ours = trainer(recipe, huge)
    with torch.no_grad():
        ours.model.get_parameter("output.weight").zero_()
    with pytest.raises(EnclaveError, match="a weight is not a finite number"):
        ours.run()


def test_early_stopping_keeps_the_best(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        model={"type": "mlp", "hidden": [32]},
        optimizer={"type": "adam", "learning_rate": 0.05},
        epochs=200,
        early_stopping={"patience": 3},
    )
    validation = rows(30, seed=9)
    ours = trainer(recipe, rows(30), validation)
    losses: list[float] = []

    def watch() -> None:
        if ours.step % len(ours.bounds) == 0:
            outputs = ours.outputs(validation.inputs)
            losses.append(torch.nn.functional.cross_entropy(outputs, validation.targets).item())

    ours.run(watch)
    assert ours.finished
    assert ours.epoch == len(losses) == losses.index(min(losses)) + 1 + 3 < 200
    final = torch.nn.functional.cross_entropy(ours.outputs(validation.inputs), validation.targets)
    assert final.item() == min(losses)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, m: t.pop("model/output.weight"),
        lambda t, m: t.update({"model/output.weight": np.zeros((3, 3), np.float32)}),
        lambda t, m: t.update({"unknown/x": np.zeros(1)}),
        lambda t, m: t.update({"optimizer/0/exp_avg": np.zeros(3, np.float32)}),
        lambda t, m: t.update({"optimizer/99/exp_avg": np.zeros(3, np.float32)}),
        lambda t, m: t.update({"optimizer/x": np.zeros(3, np.float32)}),
        lambda t, m: m.pop("epoch"),
        lambda t, m: m.update(epoch="one"),
        lambda t, m: m.update(step=10_000),
        lambda t, m: m.update(losses=None),
    ],
)
def test_refuses_a_state_that_does_not_fit(
    make_recipe: MakeRecipe, spoil: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> None:
    recipe = make_recipe()
    ours = trainer(recipe, rows())
    ours.run()
    tensors, meta = ours.state()
    spoil(tensors, meta)
    with pytest.raises(VerificationError, match="does not fit"):
        trainer(recipe, rows()).restore(tensors, meta)


def test_settings_of_torch_are_restored() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    seen: list[Any] = []

    def fail() -> None:
        with reproducible(1):
            seen.extend((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))
            raise EnclaveError("stop")

    with pytest.raises(EnclaveError):
        fail()
    assert seen == [True, 1]
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


def test_state_is_plain_arrays_and_json(make_recipe: MakeRecipe) -> None:
    ours = trainer(make_recipe(early_stopping={}), rows(), rows(8, seed=1))
    ours.run()
    tensors, meta = ours.state()
    assert all(type(array) is np.ndarray for array in tensors.values())
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    assert not math.isinf(meta["best_loss"])
