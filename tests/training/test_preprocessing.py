from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cenacle.documents.recipe import Recipe
from cenacle.errors import DocumentError
from cenacle.training.preprocessing import Preprocessing

MakeRecipe = Callable[..., Recipe]


def image_recipe(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    data = {
        "form": "tensors",
        "assets": ["a"],
        "inputs": "x",
        "labels": "y",
        "classes": [0, 1],
        "standardize": True,
    }
    return make_recipe(data=data | changes)


def test_standardizes_features_in_float64(make_recipe: MakeRecipe) -> None:
    generator = np.random.default_rng(0)
    # A large offset: in float32 the deviation would drown in rounding.
    x = generator.standard_normal((5000, 3)) * [1e-3, 2.0, 50.0] + [1e6, 0.0, -7.0]
    scaling = Preprocessing.fit(make_recipe(), (3,), x, np.zeros(5000, int))
    assert scaling.inputs is not None
    np.testing.assert_allclose(scaling.inputs.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaling.inputs.std, x.std(axis=0), rtol=1e-6)
    out = scaling.apply(x)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 3.3, 1e9, 1e-9])
def test_a_constant_feature_becomes_zero(make_recipe: MakeRecipe, constant: float) -> None:
    x = np.full((1001, 1), constant)
    scaling = Preprocessing.fit(make_recipe(), (1,), x, np.zeros(1001, int))
    assert scaling.inputs is not None
    assert scaling.inputs.std == (1.0,)
    np.testing.assert_allclose(scaling.apply(x), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 4, 5), (0, 2, 3)), ((4, 5), (0, 1, 2)), ((6,), (0,))]
)
def test_moments_by_rank(
    make_recipe: MakeRecipe, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (4500, *shape), dtype=np.uint8)
    scaling = Preprocessing.fit(image_recipe(make_recipe, scale=0.5), shape, x, np.zeros(4500))
    assert scaling.inputs is not None
    np.testing.assert_allclose(scaling.inputs.mean, np.ravel((x * 0.5).mean(axis=axes)))
    np.testing.assert_allclose(scaling.inputs.std, np.ravel((x * 0.5).std(axis=axes)))
    out = scaling.apply(x)
    np.testing.assert_allclose(out.mean(axis=axes), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=axes), 1, atol=1e-4)


def test_targets_come_back(make_recipe: MakeRecipe) -> None:
    data = {"form": "table", "assets": ["a"], "target": "y", "standardize_target": True}
    recipe = make_recipe(task="regression", data=data)
    y = np.array([100.0, 200.0, 400.0])
    scaling = Preprocessing.fit(recipe, (1,), np.zeros((3, 1)), y)
    scaled = scaling.apply_target(y)
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(scaling.restore_target(scaled), y, rtol=1e-6)


def test_round_trip_as_json(make_recipe: MakeRecipe) -> None:
    x = np.random.default_rng(0).standard_normal((20, 3))
    scaling = Preprocessing.fit(make_recipe(), (3,), x, np.zeros(20))
    assert Preprocessing.from_fields(scaling.to_fields()) == scaling


@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [0]},
        {"scale": 0.0},
        {"inputs": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}},
        {"inputs": {"mean": [0.0], "std": [0.0]}},
        {"inputs": {"mean": [0.0], "std": [1.0, 1.0, 1.0]}},
        {"target": {"mean": [], "std": []}},
    ],
)
def test_refuses_contradictions(change: dict[str, Any]) -> None:
    sound = {"shape": [3], "integers": False, "scale": 1.0}
    Preprocessing.from_fields(sound)
    with pytest.raises(DocumentError):
        Preprocessing.from_fields(sound | change)


def ranged(make_recipe: MakeRecipe, ranges: dict[str, list[float]]) -> Recipe:
    data = make_recipe().to_fields()["data"]
    return make_recipe(data=data | {"standardize": False, "ranges": ranges})


def test_ranges_clamp_and_scale(make_recipe: MakeRecipe) -> None:
    recipe = ranged(make_recipe, {"b": [10, 20], "c": [-1e30, 1e30]})
    x = np.array([[5.0, 9.0, 0.0], [-7.0, 15.0, 1e35], [0.5, 30.0, -1e30]])
    scaling = Preprocessing.fit(recipe, (3,), x, np.zeros(3, int), ("a", "b", "c"))
    np.testing.assert_array_equal(
        scaling.apply(x), np.array([[5, -1, 0], [-7, 0, 1], [0.5, 1, -1]], np.float32)
    )
    assert scaling.ranges == (None, (10.0, 20.0), (-1e30, 1e30))
    assert x[1, 2] == 1e35  # the stored values stay
    again = Preprocessing.from_fields(scaling.to_fields())
    np.testing.assert_array_equal(again.apply(x), scaling.apply(x))
    # They are the recipe's: no row moves them.
    assert Preprocessing.fit(recipe, (3,), x[:1], np.zeros(1, int), ("a", "b", "c")) == scaling


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": [[0.0, 1.0]]},
        {"ranges": [[1.0, 0.0], None]},
        {"ranges": [[0.0, 0.0], None]},
        {"integers": True},
        {"shape": [1, 2]},
        {"inputs": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}},
    ],
)
def test_ranges_that_do_not_fit(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "shape": [2],
        "integers": False,
        "scale": 1.0,
        "ranges": [[0.0, 1.0], None],
    }
    Preprocessing.from_fields(fields)
    with pytest.raises(DocumentError):
        Preprocessing.from_fields(fields | change)
