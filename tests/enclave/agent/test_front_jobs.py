"""A tail trained behind a sealed front, in a real enclave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("onnx", reason="models are cut as ONNX (pip: cenacle[cut])")
pytest.importorskip("onnxruntime", reason="fronts run in ONNX Runtime (pip: cenacle[serving])")
pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

from cenacle.cut.front_runner import OnnxFront
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.tail_file import write_tail
from cenacle.cut.to_onnx import graph_to_onnx
from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.errors import DataError
from cenacle.training import MemoryTensors, read_model, train
from cenacle.training.graph import Graph
from cenacle.training.models import model_tensors
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.randomness import torch_generator
from tests.support.house import House, Sealed

pytestmark = pytest.mark.processes

PLAN = {
    "epsilon": 20.0,
    "delta": 1e-3,
    "clipping_norm": 1.0,
    "noise_multiplier": 1.0,
    "sampling_probability": 0.2,
}


def _front() -> OnnxModel:
    nodes = [
        {"op": "linear", "name": "one", "out_features": 16},
        {"op": "tanh", "name": "bent"},
    ]
    graph = Graph(GraphModel.from_fields({"type": "graph", "nodes": nodes}).nodes, (4,))
    graph.reset(torch_generator(3, "weights"))
    plain = Preprocessing(shape=(4,), integers=False, scale=1.0)
    return OnnxModel.from_proto(graph_to_onnx(graph.nodes, model_tensors(graph), plain))


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    generator = np.random.Generator(np.random.Philox(key=6))
    x = generator.standard_normal((160, 4)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(np.int64)}


@pytest.fixture(scope="module")
def assets(house: House, samples: dict[str, Any]) -> dict[str, Sealed]:
    folder = house.path("front")
    folder.mkdir()
    write_tail(_front(), folder / "front.safetensors")
    safetensors.numpy.save_file(samples, folder / "data.safetensors")
    may: dict[str, Any] = {"recipes": ["mlp"], "privacy": "unbounded"}
    data, front = folder / "data.safetensors", folder / "front.safetensors"
    return {
        "data": house.seal("hospital-a", data, **may),
        "front": house.seal("lab", front, **may),
    }


def _job(**recipe: Any) -> dict[str, Any]:
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "tensors",
                "assets": ["data"],
                "inputs": "x",
                "labels": "y",
                "classes": [0, 1],
                "front": {"asset": "front", "output": "output"},
            },
            "model": {"type": "mlp", "hidden": [16]},
            "optimizer": {"type": "adam", "learning_rate": 0.02},
            "epochs": 40,
            "batch_size": 16,
            **recipe,
        },
    }


def test_the_tail_is_trained_inside_as_it_would_be_at_home(
    house: House, assets: dict[str, Sealed], samples: dict[str, Any]
) -> None:
    outputs = {"model": "model", "metrics": "metrics"}
    digest = house.agree(house.contract(assets, _job(), outputs))
    outcome = house.run(digest, assets)
    assert outcome.error is None, outcome.error
    house.verify(outcome.receipt)
    assert house.metrics(outcome)["pooled"]["accuracy"] > 0.7
    tensors, metadata = read_model(house.open(outcome, "model"))
    assert metadata["front"] == {"output": "output", "samples": "x", "others": {}, "scale": 1.0,
                                 "integers": False}  # fmt: skip
    recipe = Recipe.from_fields(_job()["recipe"])
    home = train(recipe, {"data": MemoryTensors(samples)}, front=OnnxFront(_front()))
    for name, array in home.model_tensors.items():
        np.testing.assert_allclose(tensors[name], array, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_privacy_plan_protects_the_data_and_asks_nothing_of_the_front(
    house: House, assets: dict[str, Sealed]
) -> None:
    job = _job(holdout={"fraction": 0.0}, epochs=2)
    contract = house.contract(assets, job, {"model": "model"}, privacy=PLAN)
    assert contract.protects("data")
    assert not contract.protects("front")
    outcome = house.run(house.agree(contract), assets)
    assert outcome.error is None, outcome.error
    found = house.verify(outcome.receipt)
    assert found.receipt.privacy is not None


@pytest.mark.slow
def test_an_asset_that_is_no_front_is_refused_inside(
    house: House, assets: dict[str, Sealed], tmp_path: Path
) -> None:
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    other = house.seal("lab", tmp_path / "other.safetensors", recipes=["mlp"], privacy="unbounded")
    wrong = {**assets, "front": other}
    digest = house.agree(house.contract(wrong, _job(), {"model": "model"}))
    outcome = house.run(digest, wrong)
    assert isinstance(outcome.error, DataError)
    assert "no tail of a model" in outcome.error.what
    assert not (outcome.out / "receipt.json").exists()
