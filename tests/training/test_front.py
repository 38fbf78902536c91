"""Training behind a frozen front."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from cenacle.documents.privacy import PrivacyPlan
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError, DocumentError, InputError
from cenacle.training import (
    MemoryTensors,
    Privacy,
    load_model,
    predict,
    read_model,
    train,
    write_model,
)
from cenacle.training.evaluation import evaluate, evaluate_tensors

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Port:
    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Front:
    """Any function of arrays as a front; keeps how many rows each call had."""

    def __init__(
        self,
        function: Callable[..., NDArray[Any]],
        *inputs: Port,
        output: str = "features",
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.outputs = (Port(output, "F32", (None, None)),)
        self.calls: list[int] = []

    def run(self, inputs: Arrays, /) -> dict[str, NDArray[Any]]:
        assert set(inputs) == {port.name for port in self.inputs}
        self.calls.append(len(next(iter(inputs.values()))))
        return {self.outputs[0].name: self.function(**inputs)}


def squares(x: NDArray[Any]) -> NDArray[Any]:
    """On a circle the classes cannot be told apart by lines; behind this they can."""
    return np.asarray(x * x, np.float32)


IMAGE = Port("x", "F32", (None, 4))


def images(rows: int = 120, seed: int = 1) -> MemoryTensors:
    generator = np.random.Generator(np.random.Philox(key=seed))
    x = generator.integers(-100, 100, (rows, 2, 2))
    labels = (np.square(x).sum(axis=(1, 2)) > 13_000).astype(np.int64)
    return MemoryTensors({"x": x.astype(np.int16), "y": labels})


FIELDS: dict[str, Any] = {
    "task": "classification",
    "data": {
        "form": "tensors",
        "assets": ["a", "b"],
        "inputs": "x",
        "labels": "y",
        "classes": [0, 1],
        "shape": [4],
        "scale": 0.01,
        "front": {"asset": "front", "output": "features"},
    },
    "model": {"type": "logistic"},
    "optimizer": {"type": "adam", "learning_rate": 0.05},
    "epochs": 20,
    "batch_size": 16,
    "holdout": {"fraction": 0.25},
}


def recipe(**data: Any) -> Recipe:
    fields = copy.deepcopy(FIELDS)
    top = {name: data.pop(name) for name in list(data) if name in Recipe.model_fields}
    fields["data"] |= data
    return Recipe.from_fields(fields | top)


SOURCES = {"a": images(), "b": images(70, 2)}


@pytest.mark.parametrize("standardize", [False, True])
def test_the_model_is_trained_on_what_the_front_gives(standardize: bool) -> None:
    front = Front(squares, IMAGE)
    result = train(recipe(standardize=standardize), SOURCES, front=front)
    assert result.metrics["pooled"]["accuracy"] > 0.9
    assert sum(front.calls) == 190, "each sample once"
    described = read_model(write_model(result.model_tensors, result.metadata))
    assert described[1]["front"]["output"] == "features"
    assert described[1]["preprocessing"]["scale"] == 1.0
    model = load_model(*described)
    samples = SOURCES["a"].read("x")
    found = predict(model, described[1], samples, front=front)
    assert np.mean(np.array(found.labels) == SOURCES["a"].read("y")) > 0.9
    named = predict(model, described[1], {"x": samples}, front=front)
    np.testing.assert_array_equal(named.probabilities, found.probabilities)
    with pytest.raises(InputError, match="behind a front"):
        predict(model, described[1], samples)


def test_a_front_may_read_several_tensors_and_integers() -> None:
    def embed(ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
        assert ids.dtype == np.int64
        assert mask.dtype == np.int64
        return np.asarray((ids * mask).sum(axis=1, keepdims=True) / 10, np.float32)

    ids = np.tile(np.arange(40)[:, None] % 8, (1, 3))
    tensors = MemoryTensors(
        {"ids": ids, "mask": np.ones((40, 3), np.uint8), "y": (ids[:, 0] > 3).astype(np.int64)}
    )
    front = Front(embed, Port("ids", "I64", (None, 3)), Port("mask", "I64", (None, 3)))
    fields = copy.deepcopy(FIELDS)
    fields["data"] = {
        **FIELDS["data"],
        "assets": ["a"],
        "inputs": "ids",
        "integers": True,
        "standardize": True,
        "shape": None,
        "scale": 1.0,
        "front": {"asset": "front", "output": "features", "inputs": {"mask": "mask"}},
    }
    del fields["data"]["shape"]
    made = Recipe.from_fields(fields)
    result = train(made, {"a": tensors}, front=front)
    assert result.metrics["pooled"]["accuracy"] > 0.9
    model = load_model(result.model_tensors, result.metadata)
    inputs = {name: tensors.read(name) for name in ("ids", "mask")}
    assert len(predict(model, result.metadata, inputs, front=front).labels) == 40
    with pytest.raises(DataError, match="lacks tensor 'mask'"):
        predict(model, result.metadata, ids, front=front)


PLAN = PrivacyPlan.from_fields(
    {
        "epsilon": 100.0,
        "delta": 1e-3,
        "clipping_norm": 1.0,
        "noise_multiplier": 0.5,
        "sampling_probability": 0.5,
    }
)
PRIVATE: dict[str, Any] = {
    "optimizer": {"type": "sgd", "learning_rate": 0.1},
    "holdout": {"fraction": 0.0},
    "epochs": 2,
}


def test_under_a_privacy_plan_no_row_reaches_anothers_features() -> None:
    """A front that subtracts the mean of its batch would carry one record into all the others."""

    def mixing(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x - x.mean(axis=0) + squares(x), np.float32)

    front = Front(mixing, IMAGE)
    privacy = Privacy(PLAN, bytes(32))
    result = train(recipe(**PRIVATE), SOURCES, front=front, privacy=privacy)
    assert set(front.calls) == {1}
    plain = Front(squares, IMAGE)
    alike = train(recipe(**PRIVATE), SOURCES, front=plain, privacy=privacy)
    # Alone, a row is its own mean, so the two fronts give the same.
    for name, array in result.model_tensors.items():
        np.testing.assert_array_equal(array, alike.model_tensors[name])


def _nothing(x: NDArray[Any]) -> NDArray[Any]:
    return np.full((len(x), 2), np.nan, np.float32)


REFUSED: list[tuple[str, Front, dict[str, Any], str]] = [
    ("no-output", Front(squares, IMAGE, output="other"), {}, "no output 'features'"),
    ("other-shape", Front(squares, Port("x", "F32", (None, 5))), {}, "does not fit the front"),
    ("integers", Front(squares, Port("x", "I64", (None, 4))), {}, "does not fit the front"),
    ("two-inputs", Front(squares, IMAGE, Port("z", "F32", (None, 4))), {}, "other inputs"),
    ("not-finite", Front(_nothing, IMAGE), {}, "no finite numbers for row 0"),
    (
        "float64",
        Front(lambda x: x.astype(np.float64), IMAGE),
        {},
        "not one array of numbers",
    ),
    ("rows-lost", Front(lambda x: squares(x)[:1], IMAGE), {}, "not one array of numbers"),
    (
        "too-much",
        Front(lambda x: np.broadcast_to(np.float32(0), (len(x), 2**30)), IMAGE),
        {},
        "too much",
    ),
]


@pytest.mark.parametrize(
    ("front", "change", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refuses_a_front_that_does_not_fit(
    front: Front, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train(recipe(**change), SOURCES, front=front)


def test_a_recipe_with_a_front_needs_one() -> None:
    with pytest.raises(InputError, match="nothing that runs it"):
        train(recipe(), SOURCES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"front": {"asset": "a", "output": "f"}}, "asset 'a' is named twice"),
        ({"front": {"asset": "front"}}, "output"),
        ({"front": {"asset": "front", "output": "f", "inputs": {"m": "y"}}}, "both 'y'"),
        (
            {
                "model": {
                    "type": "graph",
                    "nodes": [
                        {"op": "embedding", "name": "e", "num_embeddings": 2, "embedding_dim": 2}
                    ],
                }
            },
            "an embedding reads integers",
        ),
    ],
)
def test_refuses_recipes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        recipe(**data)


def test_the_front_is_an_alias_of_the_job_and_no_data() -> None:
    assert recipe().aliases == ("a", "b", "front")
    assert recipe().data.assets == ("a", "b")


def test_a_model_behind_a_front_is_measured_on_tensors() -> None:
    front = Front(squares, IMAGE)
    result = train(recipe(), SOURCES, front=front)
    file = write_model(result.model_tensors, result.metadata)
    tensors = {name: SOURCES["b"].read(name) for name in ("x", "y")}
    assert evaluate_tensors(file, tensors, front=front)["accuracy"] > 0.9
    with pytest.raises(InputError, match="behind a front"):
        evaluate_tensors(file, tensors)
    with pytest.raises(DataError, match="lacks tensor 'y'"):
        evaluate_tensors(file, {"x": tensors["x"]}, front=front)
    with pytest.raises(DataError, match="reads tensors"):
        evaluate(file, pa.table({"x": [1.0]}))


def test_a_model_without_a_front_is_measured_on_tensors_too() -> None:
    fields = copy.deepcopy(FIELDS)
    del fields["data"]["front"]
    result = train(Recipe.from_fields(fields), SOURCES)
    file = write_model(result.model_tensors, result.metadata)
    tensors = {name: SOURCES["b"].read(name) for name in ("x", "y")}
    assert 0.3 < evaluate_tensors(file, tensors, samples="x")["accuracy"] <= 1.0
    with pytest.raises(DataError, match="not said which tensor"):
        evaluate_tensors(file, tensors)
    with pytest.raises(DataError, match="does not know"):
        evaluate_tensors(file, {**tensors, "y": tensors["y"] + 5}, samples="x")
    with pytest.raises(InputError, match="without a front"):
        evaluate_tensors(file, tensors, samples="x", front=Front(squares, IMAGE))


def test_every_layer_of_a_cut_network_can_be_trained_privately() -> None:
    nodes = [
        {"op": "reshape", "name": "image", "shape": [1, 2, 2]},
        {"op": "pad", "name": "pad", "padding": [0, 1, 0, 1]},
        {"op": "conv2d", "name": "conv", "out_channels": 4, "kernel_size": 2},
        {"op": "relu6", "name": "relu"},
        {"op": "adaptive_avg_pool2d", "name": "pool"},
        {"op": "conv2d", "name": "squeeze", "out_channels": 4, "kernel_size": 1},
        {"op": "hard_sigmoid", "name": "gate"},
        {"op": "scale_channels", "name": "scaled", "inputs": ["relu", "gate"]},
        {"op": "hard_swish", "name": "swish"},
        {"op": "select", "name": "one", "axis": 2, "index": 0},
        {"op": "flatten", "name": "flat"},
        {"op": "linear", "name": "head", "out_features": 2},
    ]
    made = recipe(**PRIVATE, model={"type": "graph", "nodes": nodes})
    result = train(made, SOURCES, front=Front(squares, IMAGE), privacy=Privacy(PLAN, bytes(32)))
    assert result.events[0].steps == 4
    assert all(np.isfinite(array).all() for array in result.model_tensors.values())
