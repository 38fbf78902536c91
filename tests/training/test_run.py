from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits

from cenacle.documents.recipe import Recipe
from cenacle.errors import CenacleError, DataError, DocumentError
from cenacle.training import MemoryTable, MemoryTensors, load_model, predict, train
from cenacle.training.data import load_dataset
from cenacle.training.split import split_rows
from tests.support.hospitals import hospital_job

MakeRecipe = Callable[..., Recipe]
Tables = dict[str, MemoryTable]


def hospital_recipe(seed: int) -> Recipe:
    return Recipe.from_fields({**hospital_job()["recipe"], "seed": seed})


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_hospitals_together_beat_each_alone(hospitals: Tables, seed: int) -> None:
    assert {alias: table.num_rows for alias, table in hospitals.items()} == {
        "hospital-a": 310,
        "hospital-b": 170,
        "hospital-c": 89,
    }
    result = train(hospital_recipe(seed), hospitals)
    metrics = result.metrics
    assert metrics["measured_on"] == "holdout"
    assert metrics["pooled"]["accuracy"] > 0.94
    alone = [metrics["alone"][alias]["accuracy"] for alias in hospitals]
    assert metrics["pooled"]["accuracy"] > max(alone) + 0.03
    # All four models are measured on the very same rows.
    held = sum(counts["holdout"] for counts in metrics["rows"].values())
    assert {metrics["pooled"]["rows"], *(m["rows"] for m in metrics["alone"].values())} == {held}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert json.loads(json.dumps(result.metadata, allow_nan=False)) == result.metadata
    assert "530 parameters" in result.description


@pytest.mark.slow
def test_hospitals_win_for_many_seeds(hospitals: Tables) -> None:
    for seed in range(40):
        metrics = train(hospital_recipe(seed), hospitals).metrics
        alone = max(values["accuracy"] for values in metrics["alone"].values())
        assert metrics["pooled"]["accuracy"] > alone


def three_parts(images: Any, labels: Any, *cuts: int) -> dict[str, MemoryTensors]:
    """The images and labels of three parties, cut at these rows."""
    parts = np.array_split(np.arange(len(images)), cuts)
    return {
        alias: MemoryTensors({"images": images[rows], "labels": labels[rows]})
        for alias, rows in zip(("a", "b", "c"), parts, strict=True)
    }


def image_recipe(scaling: dict[str, Any], **fields: Any) -> Recipe:
    """Ten classes of images of :func:`three_parts`, scaled as the keywords of ``data`` say."""
    data = {
        "form": "tensors",
        "assets": ["a", "b", "c"],
        "inputs": "images",
        "labels": "labels",
        "classes": list(range(10)),
        **scaling,
    }
    return Recipe.from_fields({"task": "classification", "data": data, **fields})


def test_digits_with_a_cnn() -> None:
    digits = load_digits()
    recipe = image_recipe(
        {"scale": 0.0625},
        model={"type": "cnn", "channels": [16, 32], "batch_norm": True},
        optimizer={"type": "adam", "learning_rate": 0.005},
        schedule={"type": "cosine"},
        epochs=6,
        batch_size=64,
        seed=1,
    )
    result = train(recipe, three_parts(digits.images, digits.target, 900, 1500))
    assert result.metrics["pooled"]["accuracy"] > 0.97
    assert result.metrics["pooled"]["auc"] > 0.99
    model = load_model(result.model_tensors, result.metadata)
    predicted = predict(model, result.metadata, digits.images[:200])
    assert np.mean(np.array(predicted.labels) == digits.target[:200]) > 0.97


def read_idx(path: Path) -> Any:
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


@pytest.mark.slow
def test_mnist_with_a_cnn(mnist: Path) -> None:
    images = read_idx(mnist / "train-images-idx3-ubyte.gz")
    labels = read_idx(mnist / "train-labels-idx1-ubyte.gz")
    recipe = image_recipe(
        {"standardize": True},
        model={"type": "cnn", "channels": [16, 32], "hidden": [64]},
        optimizer={"type": "adam", "learning_rate": 0.002},
        epochs=1,
        batch_size=128,
    )
    result = train(recipe, three_parts(images, labels, 30_000, 50_000))
    assert result.metrics["pooled"]["accuracy"] > 0.96
    model = load_model(result.model_tensors, result.metadata)
    test_images = read_idx(mnist / "t10k-images-idx3-ubyte.gz")
    test_labels = read_idx(mnist / "t10k-labels-idx1-ubyte.gz")
    predicted = predict(model, result.metadata, test_images)
    assert np.mean(np.array(predicted.labels) == test_labels) > 0.96


def test_regression_in_the_unit_of_the_target() -> None:
    data = load_diabetes()
    columns = {f"x{i}": data.data[:, i] for i in range(10)} | {"progression": data.target}
    rows = pa.table(columns)
    sources = {"a": MemoryTable(rows.slice(0, 250)), "b": MemoryTable(rows.slice(250))}
    recipe = Recipe.from_fields(
        {
            "task": "regression",
            "data": {
                "form": "table",
                "assets": ["a", "b"],
                "target": "progression",
                "standardize_target": True,
            },
            "model": {"type": "linear"},
            "optimizer": {"type": "adam", "learning_rate": 0.02},
            "epochs": 40,
            "seed": 2,
        }
    )
    result = train(recipe, sources)
    assert result.metrics["pooled"]["rmse"] < 65 < data.target.std()
    assert result.metrics["pooled"]["r2"] > 0.35
    model = load_model(result.model_tensors, result.metadata)
    values = predict(model, result.metadata, rows).values
    assert values is not None
    assert np.corrcoef(values, data.target)[0, 1] > 0.65


def test_a_party_with_one_class_trains_alone_and_pooled(
    make_recipe: MakeRecipe, tables: Tables
) -> None:
    columns = tables["c"].read()
    one_class = columns.set_column(
        columns.column_names.index("label"), "label", pa.array(["no"] * columns.num_rows)
    )
    recipe = make_recipe(compare_alone=True, epochs=30)
    result = train(recipe, tables | {"c": MemoryTable(one_class)})
    confusion = np.array(result.metrics["alone"]["c"]["confusion"])
    assert confusion[:, 1].sum() == 0
    assert result.metrics["alone"]["c"]["balanced_accuracy"] == 0.5


def test_one_party_alone_is_the_pooled_model(make_recipe: MakeRecipe, tables: Tables) -> None:
    data = make_recipe().to_fields()["data"] | {"assets": ["a"]}
    metrics = train(make_recipe(data=data, compare_alone=True), tables).metrics
    assert metrics["alone"]["a"] == metrics["pooled"]


def test_without_holdout_the_training_rows_measure(make_recipe: MakeRecipe, tables: Tables) -> None:
    metrics = train(make_recipe(holdout={"fraction": 0}), tables).metrics
    assert metrics["measured_on"] == "training"
    assert metrics["pooled"]["rows"] == 83
    assert metrics["rows"]["b"] == {"training": 25, "holdout": 0}


def test_holdout_rows_never_move_the_model(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(early_stopping={"patience": 1})
    splits = split_rows(recipe, load_dataset(recipe, tables))
    spoiled = {}
    for (alias, table), split in zip(tables.items(), splits, strict=True):
        rows = table.read().to_pydict()
        for row in split.holdout:
            for name in ("x0", "x1", "x2"):
                rows[name][row] = 12345.0
        spoiled[alias] = MemoryTable(rows)
    one, two = train(recipe, tables), train(recipe, spoiled)
    for name, array in one.model_tensors.items():
        assert array.tobytes() == two.model_tensors[name].tobytes()
    assert one.metadata == two.metadata
    assert one.metrics["pooled"] != two.metrics["pooled"]


def test_initial_weights_come_from_an_asset(make_recipe: MakeRecipe, tables: Tables) -> None:
    nodes = [{"op": "linear", "name": "head", "out_features": 2}]
    model = {"type": "graph", "nodes": nodes, "initial_weights": "pretrained"}
    frozen = {"type": "sgd", "learning_rate": 1e-30}
    recipe = make_recipe(model=model, optimizer=frozen)
    weights = {
        "head.weight": np.arange(10, dtype=np.float32).reshape(2, 5),
        "head.bias": np.array([0.5, -0.5], dtype=np.float32),
    }
    result = train(recipe, {**tables, "pretrained": MemoryTensors(weights)})
    for name, array in weights.items():
        np.testing.assert_allclose(result.model_tensors[name], array, atol=1e-20)
    with pytest.raises(DataError, match="the initial weights are of another model"):
        train(recipe, {**tables, "pretrained": MemoryTensors({"head.weight": np.zeros((2, 5))})})
    with pytest.raises(DataError, match="'pretrained' are not an asset of tensors"):
        train(recipe, tables)


def test_embedding_graph_learns(make_recipe: MakeRecipe) -> None:
    generator = np.random.default_rng(0)
    words = generator.integers(0, 20, (300, 6))
    labels = ((words == 3).any(axis=1)).astype(np.int64)
    recipe = make_recipe(
        data={
            "form": "tensors",
            "assets": ["a"],
            "inputs": "words",
            "labels": "labels",
            "classes": [0, 1],
            "integers": True,
        },
        model={
            "type": "graph",
            "nodes": [
                {"op": "embedding", "name": "e", "num_embeddings": 20, "embedding_dim": 8},
                {"op": "mean", "name": "m", "axis": 1},
                {"op": "linear", "name": "head", "out_features": 2},
            ],
        },
        optimizer={"type": "adam", "learning_rate": 0.1},
        epochs=20,
    )
    source = MemoryTensors({"words": words, "labels": labels})
    result = train(recipe, {"a": source})
    assert result.metrics["pooled"]["accuracy"] > 0.9
    words[17, 2] = 20
    with pytest.raises(DataError, match="row 17 holds an index outside"):
        train(recipe, {"a": source})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "graph", "nodes": [{"op": "flatten", "name": "f"}]}}, "output"),
        ({"early_stopping": {"validation_fraction": 0.01}}, "no validation rows"),
    ],
)
def test_refusals(
    make_recipe: MakeRecipe, tables: Tables, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, DocumentError), match=message):
        train(make_recipe(**changes), tables)


def test_global_settings_are_left_alone(make_recipe: MakeRecipe, tables: Tables) -> None:
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    state = np.random.get_state(legacy=False)
    train(make_recipe(), tables, threads=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    after = np.random.get_state(legacy=False)
    np.testing.assert_equal(state, after)


# --- any valid recipe builds and trains, or is refused with words ------------------------

activations = st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid"])
unary = st.one_of(
    st.fixed_dictionaries({"op": activations}),
    st.fixed_dictionaries({"op": st.just("linear"), "out_features": st.integers(1, 6)}),
    st.fixed_dictionaries({"op": st.just("dropout"), "p": st.floats(0, 0.95)}),
    st.fixed_dictionaries({"op": st.sampled_from(["layer_norm", "batch_norm", "flatten"])}),
    st.fixed_dictionaries({"op": st.just("group_norm"), "groups": st.integers(1, 3)}),
    st.fixed_dictionaries({"op": st.just("reshape"), "shape": st.just([1, 5])}),
    st.fixed_dictionaries({"op": st.just("mean"), "axis": st.integers(1, 2)}),
    st.fixed_dictionaries(
        {
            "op": st.just("conv1d"),
            "out_channels": st.integers(1, 3),
            "kernel_size": st.integers(1, 3),
        }
    ),
)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    for index, node in enumerate(draw(st.lists(unary, max_size=5))):
        nodes.append(node | {"name": f"n{index}"})
        if index and draw(st.booleans()):
            joined = [f"n{index}", f"n{index - 1}"]
            op = draw(st.sampled_from(["add", "multiply", "concat"]))
            nodes.append({"op": op, "name": f"join{index}", "inputs": joined})
    nodes.append({"op": "linear", "name": "head", "out_features": 2})
    return {"type": "graph", "nodes": nodes}


models = st.one_of(
    st.just({"type": "logistic"}),
    st.fixed_dictionaries(
        {
            "type": st.just("mlp"),
            "hidden": st.lists(st.integers(1, 9), min_size=1, max_size=3),
            "activation": activations,
            "dropout": st.floats(0, 0.95),
        }
    ),
    graphs(),
)
optimizers = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("sgd"),
            "learning_rate": st.floats(1e-6, 0.1),
            "momentum": st.floats(0, 0.99),
        }
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["adam", "adamw"]), "learning_rate": st.floats(1e-6, 0.1)}
    ),
)


@given(
    model=models,
    optimizer=optimizers,
    batch_size=st.integers(1, 100),
    fraction=st.floats(0, 0.9),
    stratified=st.booleans(),
    seed=st.integers(0, 2**53 - 1),
    alone=st.booleans(),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_recipes_train_or_say_why_not(
    make_recipe: MakeRecipe,
    tables: Tables,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    batch_size: int,
    fraction: float,
    stratified: bool,
    seed: int,
    alone: bool,
) -> None:
    try:
        recipe = make_recipe(
            model=model,
            optimizer=optimizer,
            batch_size=batch_size,
            holdout={"fraction": fraction, "stratified": stratified},
            seed=seed,
            compare_alone=alone,
            epochs=1,
        )
        result = train(recipe, tables)
    except CenacleError:
        return
    rebuilt = load_model(result.model_tensors, result.metadata)
    predicted = predict(rebuilt, result.metadata, tables["a"].read())
    assert predicted.probabilities is not None
    np.testing.assert_allclose(predicted.probabilities.sum(axis=1), 1)
