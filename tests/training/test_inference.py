from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import cenacle.training as package
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError, DocumentError, InputError
from cenacle.training import (
    MemoryTable,
    TrainingResult,
    load_model,
    predict,
    read_model,
    train,
    write_model,
)

Tables = dict[str, MemoryTable]


@pytest.fixture(scope="module")
def trained(make_recipe: Callable[..., Recipe], tables: Tables) -> TrainingResult:
    model = {
        "type": "graph",
        "nodes": [
            {"op": "linear", "name": "block.in", "out_features": 6},
            {"op": "batch_norm", "name": "norm"},
            {"op": "relu", "name": "r"},
            {"op": "linear", "name": "head", "out_features": 2},
        ],
    }
    return train(make_recipe(model=model, epochs=20), tables)


def test_file_round_trip(trained: TrainingResult, tables: Tables) -> None:
    data = write_model(trained.model_tensors, trained.metadata)
    assert data == write_model(trained.model_tensors, trained.metadata)
    tensors, metadata = read_model(data)
    assert metadata == trained.metadata
    assert tensors.keys() == trained.model_tensors.keys()
    for name, array in tensors.items():
        assert array.shape == trained.model_tensors[name].shape
        assert array.tobytes() == trained.model_tensors[name].tobytes()
    rows = tables["a"].read()
    one = predict(load_model(tensors, metadata), metadata, rows)
    two = predict(load_model(trained.model_tensors, trained.metadata), trained.metadata, rows)
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    truth = rows.column("label").to_pylist()
    assert np.mean(np.array(one.labels) == np.array(truth)) > 0.8


def test_tables_columns_and_arrays_agree(trained: TrainingResult, tables: Tables) -> None:
    model = load_model(trained.model_tensors, trained.metadata)
    rows = tables["b"].read()
    shuffled = rows.select(["label", "x4", "x1", "x0", "x3", "x2"])
    columns = {f"x{i}": rows.column(f"x{i}").to_numpy() for i in range(5)}
    array = np.column_stack([columns[f"x{i}"] for i in range(5)])
    wanted = predict(model, trained.metadata, rows).probabilities
    for inputs in (shuffled, columns, array):
        np.testing.assert_array_equal(
            predict(model, trained.metadata, inputs).probabilities, wanted
        )


def test_the_module_is_usable_as_torch(trained: TrainingResult) -> None:
    model = load_model(trained.model_tensors, trained.metadata)
    assert not model.training
    assert sorted(model.state_dict())[0] == "block.in.bias"
    assert model(torch.zeros(3, 5)).shape == (3, 2)


NAN = float("nan")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x0": [1.0]}, "lacks columns"),
        ({f"x{i}": [] for i in range(5)}, "has no rows"),
        ({f"x{i}": [NAN] for i in range(5)}, "not a finite"),
        ({f"x{i}": ["a"] for i in range(5)}, "does not hold numbers"),
        (np.zeros((2, 4)), "do not fit"),
        (np.zeros((0, 5)), "no samples"),
        (np.full((2, 5), NAN), "not a finite"),
        (np.array([["a"] * 5]), "wrong type"),
    ],
)
def test_refuses_inputs(trained: TrainingResult, inputs: Any, message: str) -> None:
    model = load_model(trained.model_tensors, trained.metadata)
    if isinstance(inputs, dict):
        inputs = pa.table(inputs)
    with pytest.raises(DataError, match=message):
        predict(model, trained.metadata, inputs)


def test_refuses_other_modules(trained: TrainingResult) -> None:
    with pytest.raises(InputError, match="load_model"):
        predict(torch.nn.Linear(5, 2), trained.metadata, np.zeros((1, 5)))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "cenacle.model/2"},
        {"surprise": 1},
        {"nodes": []},
        {"nodes": [{"op": "relu", "name": "r", "inputs": ["nowhere"]}]},
        {"nodes": [{"op": "exec", "name": "r"}]},
        {"preprocessing": {"shape": [-1], "integers": False, "scale": 1.0}},
        {"recipe": "sha256:0"},
        {"task": None},
    ],
)
def test_refuses_hostile_metadata(trained: TrainingResult, change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        load_model(trained.model_tensors, trained.metadata | change)


def test_refuses_a_model_too_large_before_it_takes_memory(trained: TrainingResult) -> None:
    nodes = [
        {"op": "linear", "name": "a", "out_features": 65_536},
        {"op": "linear", "name": "b", "out_features": 65_536},
        {"op": "linear", "name": "c", "out_features": 2},
    ]
    with pytest.raises(DocumentError, match="too large"):
        load_model({}, trained.metadata | {"nodes": nodes})


def test_refuses_tensors_of_another_model(trained: TrainingResult) -> None:
    with pytest.raises(DataError, match="of another model"):
        load_model({}, trained.metadata)


def test_refuses_damaged_files(trained: TrainingResult) -> None:
    data = write_model(trained.model_tensors, trained.metadata)
    for cut in range(0, len(data), 97):
        with pytest.raises((DataError, DocumentError)):
            read_model(data[:cut])
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for metadata in (None, {}, {"cenacle": "{"}, {"cenacle": "[]"}, {"cenacle": "{}"}):
        changed = {**header, "__metadata__": metadata}
        if metadata is None:
            del changed["__metadata__"]
        text = json.dumps(changed).encode()
        text += b" " * (-len(text) % 8)
        with pytest.raises(DocumentError):
            read_model(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_a_missing_torch_is_one_clear_error() -> None:
    script = """
import sys
sys.modules["torch"] = None
import cenacle.training
from cenacle.errors import UnavailableError
try:
    cenacle.training.train
except UnavailableError as error:
    sys.stdout.write(error.diagnostics())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "torch, which is not installed" in done.stdout
    assert "pip install cenacle[train]" in done.stdout


def test_importing_the_package_does_not_import_torch() -> None:
    script = "import sys, cenacle.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_public_names() -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pickle'"):
        _ = package.pickle
