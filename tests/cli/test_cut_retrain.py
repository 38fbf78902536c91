"""``cenacle cut retrain`` and ``export``, as their users type them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="models are cut as ONNX (pip: cenacle[cut])")
pytest.importorskip("onnxruntime", reason="tails run in ONNX Runtime (pip: cenacle[serving])")
pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

from cenacle.cli.contract import Draft
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.to_onnx import graph_to_onnx
from cenacle.documents.base import parse_yaml
from cenacle.documents.contract import RecipeJob
from cenacle.documents.recipe import GraphModel
from cenacle.training.graph import Graph
from cenacle.training.models import model_tensors
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.randomness import torch_generator
from tests.cli.conftest import Answer, invoke

NODES: list[dict[str, Any]] = [
    {"op": "linear", "name": "body", "out_features": 12},
    {"op": "tanh", "name": "bent"},
    {"op": "linear", "name": "hidden", "out_features": 8},
    {"op": "relu", "name": "relu"},
    {"op": "linear", "name": "head", "out_features": 5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a public model and private samples."""
    folder = tmp_path_factory.mktemp("cut")
    graph = Graph(GraphModel.from_fields({"type": "graph", "nodes": NODES}).nodes, (6,))
    graph.reset(torch_generator(2, "weights"))
    plain = Preprocessing(shape=(6,), integers=False, scale=1.0)
    model = OnnxModel.from_proto(graph_to_onnx(graph.nodes, model_tensors(graph), plain))
    model.save(folder / "model.onnx")
    np.savez(folder / "mine.npz", allow_pickle=False, **samples())
    np.savez(folder / "other.npz", allow_pickle=False, x=np.zeros((9, 6)))
    (folder / "code.npz").write_bytes(b"\x80\x04cos\nsystem\n")
    return folder


def samples(rows: int = 200) -> dict[str, NDArray[Any]]:
    generator = np.random.Generator(np.random.Philox(key=5))
    x = generator.standard_normal((rows, 6)).astype(np.float32)
    return {"images": x, "labels": (x[:, 0] + x[:, 1] > 0).astype(np.int64) * 7}


def cut(folder: Path, *arguments: object) -> Answer:
    return invoke(folder / "home", ("cut", *arguments))


COMMON = ("--at", "bent", "--epochs", "20", "--learning-rate", "0.02", "--batch-size", "16")


def test_a_job_is_drafted_for_sealed_data(folder: Path, tmp_path: Path) -> None:
    call = ("retrain", folder / "model.onnx", *COMMON, "--classes", "0,7", "--out", tmp_path / "t")
    made = cut(folder, *call, "--json")
    assert made.code == 0, made.out
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert names == {"front.onnx", "front.safetensors", "weights.safetensors", "job.yaml"}
    draft = Draft.from_fields(parse_yaml((tmp_path / "t" / "job.yaml").read_bytes()))
    recipe = RecipeJob.from_fields(draft.job).recipe
    assert recipe.aliases == ("data", "weights", "front")
    assert set(draft.assets) == set(recipe.aliases)
    assert recipe.front is not None
    assert recipe.front.digest == made.json["front"]["digest"]
    assert recipe.front.digest == OnnxModel.load(tmp_path / "t" / "front.onnx").digest
    assert isinstance(recipe.model, GraphModel)
    assert [node.op for node in recipe.model.nodes] == ["linear", "relu", "linear"]
    # A second call does not replace what may be sealed already.
    again = cut(folder, *call)
    assert again.code == 5
    assert "--force" in again.err
    assert cut(folder, *call, "--force").code == 0


def test_a_rehearsal_says_that_nothing_is_protected_and_what_a_cut_costs(
    folder: Path, tmp_path: Path
) -> None:
    call = ("retrain", folder / "model.onnx", *COMMON, "--local", "--data", folder / "mine.npz")
    shown = cut(folder, *call, "--compare-whole", "--out", tmp_path / "t")
    assert shown.code == 0, shown.err
    assert "TRAINED HERE, WITHOUT AN ENCLAVE" in shown.out
    done = cut(folder, *call, "--compare-whole", "--json").json["local"]
    assert done["enclave"] is False
    assert done["accuracy"] > 0.85
    assert done["rows"] == {"training": 150, "held_out": 50}
    assert done["whole"]["accuracy"] > 0.85

    # What was trained is exported, measured and read again.
    model, front = tmp_path / "t" / "rehearsed.safetensors", tmp_path / "t" / "front.onnx"
    export = ("export", model, "--front", front, "--out", tmp_path / "served")
    made = cut(folder, *export, "--probabilities", "--json").json
    assert made["front"] == OnnxModel.load(front).digest
    assert (tmp_path / "served" / "tail.safetensors").is_file()
    assert [spec["shape"] for spec in made["outputs"]] == [[None, 2]]
    assert cut(folder, *export).code == 5
    measure = ("evaluate", model, folder / "mine.npz")
    found = invoke(folder / "home", (*measure, "--front", front, "--json"))
    assert found.json["accuracy"] > 0.85
    refused = invoke(folder / "home", measure)
    assert refused.code == 2
    assert "behind a front" in refused.err


def test_a_private_job_has_a_plan_and_no_metrics(folder: Path, tmp_path: Path) -> None:
    call = ("retrain", folder / "model.onnx", *COMMON, "--epsilon", "8", "--delta", "1e-3")
    made = cut(folder, *call, "--classes", "0,7", "--out", tmp_path)
    assert made.code == 0, made.err
    draft = Draft.from_fields(parse_yaml((tmp_path / "job.yaml").read_bytes()))
    assert draft.privacy is not None
    assert [output["kind"] for output in draft.outputs] == ["model"]


@pytest.mark.slow
def test_a_private_job_is_rehearsed(folder: Path) -> None:
    pytest.importorskip("dp_accounting", reason="noise is computed by dp-accounting")
    call = ("retrain", folder / "model.onnx", *COMMON, "--epsilon", "8", "--delta", "1e-3")
    here = cut(folder, *call, "--local", "--data", folder / "mine.npz", "--json")
    assert here.json["local"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "not said what to do"),
        (("--local",), "come together"),
        (("--out", "OUT"), "classes are not said"),
        (("--out", "OUT", "--classes", "3"), "classes cannot be used"),
        (("--out", "OUT", "--classes", "0-3", "--head", "kept"), "not the classes"),
        (("--out", "OUT", "--classes", "0-3", "--compare-whole"), "trains here"),
        (("--local", "--data", "other.npz"), "no tensor 'labels'"),
        (("--local", "--data", "code.npz"), "is damaged"),
        (("--local", "--data", "none.npz"), "cannot be read"),
        (("--local", "--data", "mine.npz", "--samples", "x"), "no tensor 'x'"),
        (("--out", "OUT", "--classes", "0-3", "--feed", "mask"), "input's tensor is not said"),
    ],
)
def test_refuses_what_cannot_be_meant(
    folder: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    places = {"OUT": tmp_path / "out", **{p.name: p for p in folder.iterdir()}}
    places["none.npz"] = folder / "none.npz"
    given = [places.get(one, one) for one in more]
    found = cut(folder, "retrain", folder / "model.onnx", "--at", "bent", *given)
    assert found.code == 2, found.err
    assert message in found.err
    assert not (tmp_path / "out").exists()
