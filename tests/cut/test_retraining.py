"""A public model cut, its tail trained on private data and made ready to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="models are cut as ONNX (pip: cenacle[cut])")
pytest.importorskip("onnxruntime", reason="tails run in ONNX Runtime (pip: cenacle[serve])")
pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

from onnx import helper

from cenacle.crypto import SecretBytes
from cenacle.cut.accuracy import Samples, head_accuracy, spread
from cenacle.cut.front_runner import OnnxFront
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.retraining import export_tail, prepare, without_front
from cenacle.cut.runtime import TailRuntime
from cenacle.cut.tail_file import write_tail
from cenacle.cut.to_onnx import graph_to_onnx
from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.errors import CenacleError, InputError
from cenacle.sealing import SealedReader, TensorReader, seal_path
from cenacle.training import MemoryTensors, load_model, predict, train, write_model
from cenacle.training.graph import Graph
from cenacle.training.models import model_tensors
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.randomness import torch_generator

NODES: list[dict[str, Any]] = [
    {"op": "conv2d", "name": "stem.conv", "out_channels": 6, "kernel_size": 3, "padding": 1},
    {"op": "relu", "name": "stem.relu"},
    {"op": "max_pool2d", "name": "stem.pool", "kernel_size": 2},
    {"op": "conv2d", "name": "body.conv", "out_channels": 8, "kernel_size": 3},
    {"op": "batch_norm", "name": "body.norm"},
    {"op": "relu6", "name": "body.relu"},
    {"op": "adaptive_avg_pool2d", "name": "pool"},
    {"op": "flatten", "name": "flat"},
    {"op": "linear", "name": "head", "out_features": 9},
]
SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def public() -> OnnxModel:
    """A public model: random, which for features of blobs is enough."""
    graph = Graph(GraphModel.from_fields({"type": "graph", "nodes": NODES}).nodes, SHAPE)
    graph.reset(torch_generator(4, "weights"))
    plain = Preprocessing(shape=SHAPE, integers=False, scale=1.0)
    return OnnxModel.from_proto(graph_to_onnx(graph.nodes, model_tensors(graph), plain))


def blobs(rows: int = 240) -> dict[str, NDArray[Any]]:
    """Bright squares on the left, on the right, or nowhere: three classes, unevenly coded."""
    generator = np.random.Generator(np.random.Philox(key=8))
    images = generator.integers(0, 60, (rows, *SHAPE)).astype(np.uint8)
    labels = generator.integers(0, 3, rows)
    for row, label in enumerate(labels):
        top = generator.integers(0, 8)
        if label:
            left = 1 if label == 1 else 7
            images[row, 0, top : top + 4, left : left + 4] = 250 if label == 1 else 150
    return {"images": images, "labels": labels * 5}


CLASSES = [0, 5, 10]


def recipe(front: dict[str, Any], model: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.from_fields(
        {
            "task": "classification",
            "data": {
                "form": "tensors",
                "assets": ["data"],
                "inputs": "images",
                "labels": "labels",
                "classes": CLASSES,
                "scale": 1 / 255,
                "front": front,
            },
            "model": model,
            "optimizer": {"type": "adam", "learning_rate": 0.02},
            "epochs": 12,
            "batch_size": 16,
            **more,
        }
    )


def _sealed(path: Path) -> TensorReader:
    target = path.with_suffix(".sealed")
    key = bytes(range(32))
    seal_path(path, target, SecretBytes(key))
    return TensorReader(SealedReader(target, SecretBytes(key)))


def sources(tensors: dict[str, NDArray[Any]], weights: bytes) -> dict[str, MemoryTensors]:
    found = {"data": MemoryTensors(tensors)}
    if weights:
        found["weights"] = MemoryTensors(safetensors.numpy.load(weights))
    return found


@pytest.mark.parametrize(("head", "fold"), [("fresh", False), ("fresh", True), ("linear", False)])
def test_a_trained_tail_is_served_as_it_was_measured(
    public: OnnxModel, tmp_path: Path, head: Any, fold: bool
) -> None:
    prepared = prepare(public, "stem.pool", 3, head=head, fold_norms=fold)
    assert any(node.op == "batch_norm" for node in prepared.graph.nodes) is (
        head == "fresh" and not fold
    )
    assert prepared.cut.secret_parameters == ("body.conv.weight", "body.conv.bias",
        "body.norm.weight", "body.norm.bias", "body.norm.running_mean", "body.norm.running_var",
        "head.weight", "head.bias")  # fmt: skip
    front_path = tmp_path / "front.onnx"
    digest = prepared.cut.front.save(front_path)
    front = OnnxFront.load(front_path)
    weights = prepared.weights_file() if head == "fresh" else b""
    made = recipe(
        prepared.front_fields("front", digest),
        prepared.model_fields("weights" if weights else None),
        **({} if head == "fresh" else {"epochs": 40}),
    )
    tensors = blobs()
    result = train(made, sources(tensors, weights), front=front)
    assert result.metrics["pooled"]["accuracy"] > (0.9 if head == "fresh" else 0.6)
    file = write_model(result.model_tensors, result.metadata)
    tail = export_tail(file, front=OnnxModel.load(front_path), probabilities=True)
    assert [spec.name for spec in tail.inputs] == [prepared.crossing.name]
    path = tmp_path / "tail.safetensors"
    write_tail(tail, path)
    reader = _sealed(path)
    served = TailRuntime(reader, threads=1)
    images = tensors["images"][:7]
    crossing = front.run({front.inputs[0].name: images.astype(np.float32) / np.float32(255)})
    (answer,) = served.run(crossing).values()
    served.close()
    reader.close()
    model = load_model(result.model_tensors, result.metadata)
    wanted = predict(model, result.metadata, images, front=front).probabilities
    assert wanted is not None
    np.testing.assert_allclose(answer, wanted, rtol=1e-5, atol=1e-6)


def test_another_front_is_refused(public: OnnxModel) -> None:
    prepared = prepare(public, "stem.pool", 3)
    tensors = blobs(40)
    made = recipe(
        prepared.front_fields("front", prepared.cut.front.digest),
        prepared.model_fields("weights"),
        epochs=1,
    )
    front = OnnxFront(prepared.cut.front)
    result = train(made, sources(tensors, prepared.weights_file()), front=front)
    file = write_model(result.model_tensors, result.metadata)
    other = prepare(public, "body.norm", 3).cut.front
    with pytest.raises(InputError, match="behind another front"):
        export_tail(file, front=other)
    with pytest.raises(InputError, match="not given"):
        export_tail(file)


def test_the_model_whole_is_trained_from_the_same_start(public: OnnxModel) -> None:
    prepared = prepare(public, "stem.pool", 3)
    made = recipe(prepared.front_fields("front"), prepared.model_fields("weights"))
    whole, weights = without_front(public, made, 3, head="fresh", fold_norms=False)
    assert whole.front is None
    assert {"stem.conv.weight", "head.weight"} < set(weights)
    start = safetensors.numpy.load(prepared.weights_file())
    for name, array in start.items():
        np.testing.assert_array_equal(weights[name], array)
    found = {"data": MemoryTensors(blobs()), "whole": MemoryTensors(weights)}
    assert train(whole, found).metrics["pooled"]["accuracy"] > 0.9


def unusual() -> OnnxModel:
    """A sine in its middle, which no recipe trains."""
    graph = Graph(GraphModel.from_fields({"type": "graph", "nodes": NODES}).nodes, SHAPE)
    plain = Preprocessing(shape=SHAPE, integers=False, scale=1.0)
    proto = graph_to_onnx(graph.nodes, model_tensors(graph), plain)
    for place, node in enumerate(proto.graph.node):
        if node.op_type == "BatchNormalization":
            odd = helper.make_node("Sin", [node.output[0]], ["odd"], name="odd")
            scopes = odd.metadata_props.add()
            scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", repr(["", "body.odd", "sin"])
            after = proto.graph.node[place + 1]
            after.input[0] = "odd"
            proto.graph.node.insert(place + 1, odd)
            break
    return OnnxModel.from_proto(proto)


def test_a_tail_that_cannot_be_retrained_names_the_nearest_that_can() -> None:
    with pytest.raises(CenacleError) as raised:
        prepare(unusual(), "stem.pool", 3)
    assert "body.odd" in str(raised.value)
    assert "--at body.odd" in str(raised.value.remedy)
    assert prepare(unusual(), "body.odd", 3).graph.nodes[0].op == "relu6"
    assert prepare(unusual(), "stem.pool", 3, head="linear").graph.tensors == {}


def test_cuts_are_measured_by_a_linear_head(public: OnnxModel) -> None:
    calls: list[tuple[int, int]] = []
    samples = Samples(blobs(), scale=1 / 255)
    found = head_accuracy(
        public,
        spread(["stem.conv", "stem.relu", "stem.pool", "body.relu", "flat"], 3),
        samples,
        progress=lambda done, whole: calls.append((done, whole)),
    )
    assert list(found) == ["stem.conv", "stem.pool", "flat"]
    assert calls[-1] == (3, 3)
    assert all(value is not None and value > 0.6 for value in found.values()), found


def test_data_without_the_named_tensors_is_refused() -> None:
    with pytest.raises(InputError, match="no tensor 'labels'"):
        Samples({"images": np.zeros((3, 2))})
