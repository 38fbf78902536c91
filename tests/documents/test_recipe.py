from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.documents.base import parse_json, parse_yaml
from cenacle.documents.recipe import Recipe
from cenacle.errors import DocumentError

YAML = """
task: classification
data:
  form: table
  assets: [hospital-a, hospital-b]
  ignore: [patient]
  target: diagnosis
  classes: [malignant, benign]
model: {type: mlp, hidden: [32, 16], dropout: 0.1}
optimizer: {type: adamw, learning_rate: 0.003}
schedule: {type: cosine, warmup_epochs: 2}
epochs: 40
seed: 7
holdout: {fraction: 0.25}
compare_alone: true
early_stopping: {patience: 4}
"""


def fields() -> dict[str, Any]:
    return copy.deepcopy(parse_yaml(YAML))


def graph(*nodes: dict[str, Any]) -> dict[str, Any]:
    return fields() | {"model": {"type": "graph", "nodes": list(nodes)}}


def images() -> dict[str, Any]:
    data = {
        "form": "tensors",
        "assets": ["a"],
        "inputs": "images",
        "labels": "labels",
        "classes": list(range(10)),
        "scale": 0.00392156862745098,
    }
    return fields() | {"data": data, "model": {"type": "cnn", "channels": [8, 16]}}


HEAD = {"op": "linear", "name": "head", "out_features": 2}


def test_round_trip_through_canonical_json() -> None:
    for document in (fields(), images(), graph(HEAD)):
        recipe = Recipe.from_fields(document)
        again = Recipe.from_fields(parse_json(recipe.canonical_bytes()))
        assert again == recipe
        assert again.digest == recipe.digest
        assert again.canonical_bytes() == recipe.canonical_bytes()


def test_defaults_are_written_out() -> None:
    document = fields()
    del document["schedule"], document["early_stopping"]
    written = Recipe.from_fields(document).to_fields()
    assert written["batch_size"] == 32
    assert written["schedule"] == {"type": "constant"}
    assert written["holdout"] == {"fraction": 0.25, "stratified": True}
    assert "early_stopping" not in written


def test_every_field_moves_the_digest() -> None:
    base = Recipe.from_fields(fields()).digest
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"epochs": 41},
        {"batch_size": 33},
        {"compare_alone": False},
        {"optimizer": {"type": "adam", "learning_rate": 0.003}},
        {"model": {"type": "logistic"}},
    ]
    digests = {Recipe.from_fields(fields() | change).digest for change in changes}
    assert len(digests | {base}) == len(changes) + 1


def test_aliases_include_the_initial_weights() -> None:
    document = graph(HEAD)
    document["model"]["initial_weights"] = "pretrained"
    assert Recipe.from_fields(document).aliases == ("hospital-a", "hospital-b", "pretrained")
    document["model"]["initial_weights"] = "hospital-a"
    with pytest.raises(DocumentError, match="'hospital-a' is named twice"):
        Recipe.from_fields(document)


def put(path: str, value: Any) -> dict[str, Any]:
    document = fields()
    place: Any = document
    *parents, last = path.split(".")
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", "clustering", "task"),
        ("surprise", 1, "unknown field"),
        ("data.surprise", 1, "unknown field"),
        ("data.form", "graph", "form"),
        ("data.form", None, "form"),
        ("data.assets", [], "assets"),
        ("data.assets", ["a", "a"], "asset 'a' is named twice"),
        ("data.assets", ["../etc/passwd"], "assets"),
        ("data.features", [], "features"),
        ("data.features", ["x", "x"], "feature 'x' is named twice"),
        ("data.features", ["x", "diagnosis"], "is also a feature"),
        ("data.features", ["x"], "ignore belongs to features"),
        ("data.features", ["x"] * 10_001, "named twice"),
        ("data.features", "some", "features"),
        ("data.ignore", ["diagnosis"], "also ignored"),
        ("data.ignore", ["x", "x"], "named twice"),
        ("data.target", "", "target"),
        ("data.classes", None, "names its classes"),
        ("data.classes", ["one"], "classes"),
        ("data.classes", ["one", "one"], "named twice"),
        ("data.classes", ["one", 2], "all text"),
        ("data.classes", [True, 1], "all text"),
        ("data.classes", [0.5, 1.5], "classes"),
        ("data.classes", [0, 2**53], "classes"),
        ("data.standardize", "yes", "standardize"),
        ("data.standardize_target", True, "belongs to a regression"),
        ("model", {"type": "transformer"}, "model"),
        ("model", {"type": "mlp", "hidden": []}, "hidden"),
        ("model", {"type": "mlp", "hidden": [0]}, "hidden"),
        ("model", {"type": "mlp", "hidden": [4.5]}, "hidden"),
        ("model", {"type": "mlp", "hidden": ["4"]}, "hidden"),
        ("model", {"type": "mlp", "hidden": [65_537]}, "hidden"),
        ("model", {"type": "mlp", "hidden": [65_536, 65_536]}, "parameters"),
        ("model", {"type": "mlp", "hidden": [4] * 33}, "hidden"),
        ("model", {"type": "mlp", "hidden": [4], "dropout": 1.0}, "dropout"),
        ("model", {"type": "mlp", "hidden": [4], "activation": "__import__"}, "activation"),
        ("model", {"type": "linear"}, "cannot do a classification"),
        ("model", {"type": "cnn", "channels": [4]}, "reads tensors"),
        ("optimizer", {"type": "sgd"}, "learning_rate"),
        ("optimizer", {"type": "lion", "learning_rate": 0.1}, "optimizer"),
        ("optimizer.learning_rate", 0, "learning_rate"),
        ("optimizer.learning_rate", -0.1, "learning_rate"),
        ("optimizer.learning_rate", 1000.0, "learning_rate"),
        ("optimizer.learning_rate", "fast", "learning_rate"),
        ("optimizer.betas", [0.9, 1.0], "betas"),
        ("optimizer", {"type": "sgd", "learning_rate": 0.1, "nesterov": True}, "momentum"),
        ("schedule.warmup_epochs", 40, "below epochs"),
        ("schedule.type", "step", "schedule"),
        ("epochs", 0, "epochs"),
        ("epochs", 10_001, "epochs"),
        ("epochs", True, "epochs"),
        ("epochs", 1.5, "epochs"),
        ("batch_size", 0, "batch_size"),
        ("seed", -1, "seed"),
        ("seed", 2**53, "seed"),
        ("holdout.fraction", 0.95, "fraction"),
        ("holdout.fraction", -0.1, "fraction"),
        ("holdout.fraction", 0, "needs a holdout"),
        ("early_stopping.patience", 0, "patience"),
        ("early_stopping.validation_fraction", 0.0, "validation_fraction"),
    ],
)
def test_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Recipe.from_fields(put(path, value))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_refuses_numbers_that_are_not_finite(number: float) -> None:
    with pytest.raises(DocumentError):
        Recipe.from_fields(put("optimizer.learning_rate", number))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["cat", "dog"]}, "integers or booleans"),
        ({"inputs": "labels"}, "inputs and labels"),
        ({"integers": True}, "neither scaled"),
        ({"integers": True, "scale": 1.0}, "graph model with embeddings"),
        ({"scale": 0}, "scale"),
        ({"shape": []}, "shape"),
        ({"shape": [1, 1, 1, 1, 1]}, "shape"),
        ({"shape": [0, 4]}, "shape"),
    ],
)
def test_refuses_tensor_data(change: dict[str, Any], message: str) -> None:
    document = images()
    document["data"] |= change
    with pytest.raises(DocumentError, match=message):
        Recipe.from_fields(document)


def test_regression() -> None:
    document = fields() | {"task": "regression", "model": {"type": "linear"}}
    with pytest.raises(DocumentError, match="has no classes"):
        Recipe.from_fields(document)
    del document["data"]["classes"]
    assert Recipe.from_fields(document).model.type == "linear"
    with pytest.raises(DocumentError, match="'logistic' cannot do a regression"):
        Recipe.from_fields(document | {"model": {"type": "logistic"}})


def test_batch_norm_needs_batches() -> None:
    norm = {"op": "batch_norm", "name": "norm"}
    assert Recipe.from_fields(graph(norm, HEAD)).batch_size == 32
    with pytest.raises(DocumentError, match="batch_size above 1"):
        Recipe.from_fields(graph(norm, HEAD) | {"batch_size": 1})


def relu(name: str, *inputs: str) -> dict[str, Any]:
    return {"op": "relu", "name": name} | ({"inputs": list(inputs)} if inputs else {})


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "nodes"),
        ([relu("input")], "named twice"),
        ([relu("a"), relu("a")], "named twice"),
        ([relu("a", "b"), relu("b", "a")], "'a' reads 'b', which is not an earlier node"),
        ([relu("a", "a")], "not an earlier node"),
        ([relu("a"), relu("b", "input")], "'a' is read by no other node"),
        ([relu("a.b"), relu("a")], "lie inside each other"),
        ([relu("a"), relu("a.b")], "lie inside each other"),
        ([relu("input.x")], "lie inside each other"),
        ([relu("a", "input", "input")], "inputs"),
        ([relu("../a")], "name"),
        ([relu("a..b")], "name"),
        ([relu("a b")], "name"),
        ([{"op": "exec", "name": "a"}], "op"),
        ([{"op": "linear", "name": "a"}], "out_features"),
        ([{"op": "linear", "name": "a", "out_features": 0}], "out_features"),
        ([{"op": "add", "name": "a", "inputs": ["input"]}], "inputs"),
        ([{"op": "add", "name": "a"}], "inputs"),
        ([{"op": "dropout", "name": "a", "p": 1.5}], "p"),
        ([{"op": "flatten", "name": "a", "start_axis": 0}], "start_axis"),
        ([{"op": "conv2d", "name": "a", "out_channels": 1, "kernel_size": [3]}], "kernel_size"),
        ([{"op": "conv2d", "name": "a", "out_channels": 1, "kernel_size": 65}], "kernel_size"),
        (
            [{"op": "conv1d", "name": "a", "out_channels": 1, "kernel_size": [3, 3]}],
            "one size",
        ),
        ([{"op": "max_pool1d", "name": "a", "kernel_size": 2, "stride": [1, 1]}], "one size"),
        (
            [relu("a"), {"op": "embedding", "name": "e", "num_embeddings": 2, "embedding_dim": 2}],
            "reads the input itself",
        ),
        ([relu(f"n{i}") for i in range(1025)], "nodes"),
    ],
)
def test_refuses_graph(nodes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Recipe.from_fields(graph(*nodes))


def test_graph_may_join_earlier_nodes() -> None:
    join = {"op": "add", "name": "sum", "inputs": ["b", "a"]}
    model = Recipe.from_fields(graph(relu("a"), relu("b"), join, HEAD)).model
    assert model.type == "graph"
    assert [node.op for node in model.nodes] == ["relu", "relu", "add", "linear"]


def test_does_not_import_torch() -> None:
    script = "import sys, cenacle.documents.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
PATHS = [
    (key, *rest)
    for key, value in fields().items()
    for rest in ([(), *((inner,) for inner in value)] if isinstance(value, dict) else [()])
]


@given(path=st.sampled_from(PATHS), value=json_values)
@settings(max_examples=150, deadline=None)
def test_any_value_anywhere_is_refused_or_round_trips(path: tuple[str, ...], value: Any) -> None:
    document = fields()
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    try:
        recipe = Recipe.from_fields(document)
    except DocumentError:
        return
    assert Recipe.from_fields(parse_json(recipe.canonical_bytes())) == recipe


def test_every_recipe_in_the_guide_is_valid() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert Recipe.from_fields(parse_yaml(block)).epochs


def test_the_guide_names_every_layer() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    schema = json.dumps(Recipe.model_json_schema())
    ops = set(re.findall(r'"op": {"(?:const|enum)": (\[.*?\]|".*?")', schema))
    names = {name for op in ops for name in re.findall(r"\w+", op)}
    assert len(names) > 20
    assert {name for name in names if f"`{name}`" not in guide} == set()


def test_public_ranges_of_features() -> None:
    document = fields()
    document["data"] |= {"standardize": False, "ranges": {"radius": [5, 30.5]}}
    recipe = Recipe.from_fields(document)
    assert recipe.data.form == "table"
    assert recipe.data.ranges == {"radius": (5.0, 30.5)}
    assert Recipe.from_fields(parse_json(recipe.canonical_bytes())) == recipe


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"standardize": True}, "set standardize: false"),
        ({"ranges": {"radius": [3, 3]}}, "the range of 'radius' is empty"),
        ({"ranges": {"radius": [3, 1]}}, "the range of 'radius' is empty"),
        ({"ranges": {"radius": [3]}}, "ranges"),
        ({"ranges": {}}, "ranges"),
        ({"ranges": {"radius": [0, 1e31]}}, "ranges"),
    ],
)
def test_ranges_that_make_no_sense(change: dict[str, Any], problem: str) -> None:
    document = fields()
    document["data"] |= {"standardize": False, "ranges": {"radius": [5, 30]}} | change
    with pytest.raises(DocumentError, match=problem):
        Recipe.from_fields(document)
