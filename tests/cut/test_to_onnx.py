"""Every layer that a recipe may train, against ONNX Runtime."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="models are cut as ONNX (pip: cenacle[cut])")
ort = pytest.importorskip("onnxruntime", reason="tails run in ONNX Runtime (pip: cenacle[serve])")
torch = pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

from cenacle.cut.to_onnx import graph_to_onnx  # noqa: E402
from cenacle.documents import layers  # noqa: E402
from cenacle.documents.recipe import GraphModel  # noqa: E402
from cenacle.errors import DataError  # noqa: E402
from cenacle.training.graph import Graph  # noqa: E402
from cenacle.training.models import model_tensors  # noqa: E402
from cenacle.training.preprocessing import Moments, Preprocessing  # noqa: E402
from cenacle.training.randomness import torch_generator  # noqa: E402

IMAGE, SEQUENCE = (4, 9, 10), (4, 12)

CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"op": "linear", "out_features": 3}, (7,)),
    ({"op": "linear", "out_features": 3, "bias": False}, (7,)),
    ({"op": "linear", "out_features": 3}, (5, 7)),
    ({"op": "linear", "out_features": 3, "bias": False}, (2, 5, 7)),
    ({"op": "conv1d", "out_channels": 6, "kernel_size": 3, "padding": 1, "stride": 2}, SEQUENCE),
    ({"op": "conv2d", "out_channels": 6, "kernel_size": [3, 2], "padding": [1, 0]}, IMAGE),
    ({"op": "conv2d", "out_channels": 8, "kernel_size": 3, "groups": 4, "dilation": 2}, IMAGE),
    ({"op": "conv2d", "out_channels": 2, "kernel_size": 1, "stride": [2, 3], "bias": False}, IMAGE),
    *(({"op": op}, IMAGE) for op in layers.ACTIVATIONS),
    ({"op": "max_pool1d", "kernel_size": 3, "stride": 1, "padding": 1}, SEQUENCE),
    ({"op": "max_pool2d", "kernel_size": [2, 3]}, IMAGE),
    ({"op": "avg_pool1d", "kernel_size": 4}, SEQUENCE),
    ({"op": "avg_pool2d", "kernel_size": 3, "padding": 1, "stride": 2}, IMAGE),
    ({"op": "adaptive_avg_pool1d", "output_size": 5}, SEQUENCE),
    ({"op": "adaptive_avg_pool2d", "output_size": 4}, IMAGE),
    ({"op": "adaptive_avg_pool2d"}, IMAGE),
    ({"op": "flatten"}, IMAGE),
    ({"op": "flatten", "start_axis": 2}, IMAGE),
    ({"op": "reshape", "shape": [10, 36]}, IMAGE),
    ({"op": "transpose", "axes": [1, 3]}, IMAGE),
    ({"op": "mean", "axis": 2}, IMAGE),
    ({"op": "dropout", "p": 0.5}, IMAGE),
    ({"op": "layer_norm", "axes": 2}, IMAGE),
    ({"op": "layer_norm"}, (7,)),
    ({"op": "group_norm", "groups": 2}, IMAGE),
    ({"op": "group_norm", "groups": 3}, (6,)),
    ({"op": "batch_norm", "eps": 0.01}, IMAGE),
    ({"op": "batch_norm"}, (7,)),
    ({"op": "pad", "padding": [1, 2, 0, 3]}, IMAGE),
    ({"op": "pad", "padding": [1, 2]}, SEQUENCE),
    ({"op": "select", "axis": 1, "index": 2}, SEQUENCE),
    ({"op": "embedding", "num_embeddings": 11, "embedding_dim": 3}, (5,)),
    ({"op": "add", "inputs": ["input", "input"]}, IMAGE),
    ({"op": "multiply", "inputs": ["input", "input", "input"]}, IMAGE),
    ({"op": "concat", "inputs": ["input", "input"], "axis": 2}, IMAGE),
]


def graph_of(nodes: list[dict[str, Any]], shape: tuple[int, ...], *, integers: bool) -> Graph:
    """With weights, biases and running statistics that are none of them plain."""
    declared = GraphModel.from_fields({"type": "graph", "nodes": nodes}).nodes
    graph = Graph(declared, shape, integers=integers)
    graph.reset(torch_generator(1, "weights"))
    generator = torch_generator(2, "weights")
    with torch.no_grad():
        for name, tensor in graph.state_dict().items():
            if tensor.is_floating_point() and "weight" not in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    graph.eval()
    return graph


def run(model: Any, samples: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: samples})
    return np.asarray(found)


def compare(
    nodes: list[dict[str, Any]],
    samples: NDArray[Any],
    preprocessing: Preprocessing,
) -> None:
    graph = graph_of(nodes, preprocessing.shape, integers=preprocessing.integers)
    with torch.no_grad():
        wanted = graph(torch.from_numpy(preprocessing.apply(samples))).numpy()
    made = graph_to_onnx(graph.nodes, model_tensors(graph), preprocessing)
    kind = np.int64 if preprocessing.integers else np.float32
    found = run(made, samples.astype(kind))
    assert found.shape == wanted.shape
    restored = preprocessing.restore_target(wanted)
    np.testing.assert_allclose(found, restored, rtol=1e-5, atol=1e-5 * np.abs(restored).max())


def draw(shape: tuple[int, ...], rows: int = 3) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(key=5))
    return (generator.standard_normal((rows, *shape)) * 3).astype(np.float32)


def test_the_table_has_every_layer() -> None:
    union = get_args(get_args(layers.Node)[0])
    known = {op for kind in union for op in get_args(kind.model_fields["op"].annotation)}
    assert {case["op"] for case, _ in CASES} | {"scale_channels"} == known


@pytest.mark.parametrize(
    ("case", "shape"), CASES, ids=[f"{i}-{c['op']}" for i, (c, _) in enumerate(CASES)]
)
def test_a_layer_equals_torch(case: dict[str, Any], shape: tuple[int, ...]) -> None:
    integers = case["op"] == "embedding"
    samples: NDArray[Any] = draw(shape)
    if integers:
        samples = np.arange(15).reshape(3, 5) % 11
    plain = Preprocessing(shape=shape, integers=integers, scale=1.0)
    compare([{"name": "part.one", **case}], samples, plain)


def test_squeeze_and_excitation_equals_torch() -> None:
    nodes: list[dict[str, Any]] = [
        {"op": "adaptive_avg_pool2d", "name": "pool"},
        {"op": "conv2d", "name": "squeeze", "out_channels": 4, "kernel_size": 1},
        {"op": "hard_sigmoid", "name": "gate"},
        {"op": "scale_channels", "name": "scaled", "inputs": ["input", "gate"]},
    ]
    compare(nodes, draw(IMAGE), Preprocessing(shape=IMAGE, integers=False, scale=1.0))


HEAD: list[dict[str, Any]] = [
    {"op": "linear", "name": "hidden", "out_features": 4},
    {"op": "relu", "name": "relu"},
    {"op": "linear", "name": "head", "out_features": 1},
]


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(shape=(3,), integers=False, scale=1 / 255),
        Preprocessing(
            shape=(3,),
            integers=False,
            scale=0.5,
            inputs=Moments(mean=(1.0, 200.0, -3.0), std=(2.0, 0.5, 7.0)),
            target=Moments(mean=(40.0,), std=(3.0,)),
        ),
        Preprocessing(
            shape=(3,), integers=False, scale=1.0, ranges=((0.0, 1.5), None, (-2.0, -1.0))
        ),
    ],
    ids=["scale", "moments", "ranges"],
)
def test_scaling_is_part_of_the_model(preprocessing: Preprocessing) -> None:
    compare(HEAD, draw((3,), 9), preprocessing)


def test_channels_are_standardized_as_in_training() -> None:
    moments = Moments(mean=(1.0, 2.0, 3.0, 4.0), std=(2.0, 3.0, 4.0, 5.0))
    nodes: list[dict[str, Any]] = [{"op": "flatten", "name": "flat"}, *HEAD]
    compare(
        nodes, draw(IMAGE), Preprocessing(shape=IMAGE, integers=False, scale=0.1, inputs=moments)
    )


def test_probabilities_are_a_softmax() -> None:
    graph = graph_of([{"op": "linear", "name": "head", "out_features": 3}], (4,), integers=False)
    plain = Preprocessing(shape=(4,), integers=False, scale=1.0)
    made = graph_to_onnx(graph.nodes, model_tensors(graph), plain, probabilities=True)
    np.testing.assert_allclose(run(made, draw((4,))).sum(axis=1), 1.0, rtol=1e-6)


def test_weights_of_another_model_are_refused() -> None:
    graph = graph_of([{"op": "linear", "name": "head", "out_features": 3}], (4,), integers=False)
    plain = Preprocessing(shape=(5,), integers=False, scale=1.0)
    with pytest.raises(DataError, match="do not fit"):
        graph_to_onnx(graph.nodes, model_tensors(graph), plain)
