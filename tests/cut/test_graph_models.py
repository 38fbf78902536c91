"""Tails as graphs that recipes train, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="models are cut as ONNX (pip: cenacle[cut])")
pytest.importorskip("onnxruntime", reason="tails run in ONNX Runtime (pip: cenacle[serve])")
pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cenacle.cut.graph_models import GraphTail, onnx_to_graph
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.program import to_proto
from cenacle.errors import DataError
from cenacle.training.graph import Graph
from cenacle.training.models import load_tensors


def exported(module: nn.Module, shape: tuple[int, ...]) -> OnnxModel:
    """What a tail of a torch model is, with weights that are none of them plain."""
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) * 0.5 + 0.1)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(module.eval(), (torch.rand(2, *shape),), dynamic_shapes=(batch,))
    return OnnxModel.from_proto(to_proto(program))


class Residual(nn.Module):
    """MobileNetV3's parts: a padded stride, a depthwise convolution, gates, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(4, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8, momentum=0.01, eps=1e-3)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(self.pad(x))))
        y = nn.functional.hardswish(self.depth(x))
        gate = nn.functional.hardsigmoid(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))
        x = x + y * gate
        x = nn.functional.silu(nn.functional.max_pool2d(x, 2))
        scores: torch.Tensor = self.head(x.mean([2, 3]))
        return scores


class Tokens(nn.Module):
    """A transformer's dense half: norms, GELU, a class token, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 6)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.group(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        x = torch.tanh(x.transpose(1, 2)).transpose(1, 2)
        return torch.softmax(self.head(x[:, 0]), -1)


MODULES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], bool]] = [
    ("residual", Residual, (4, 17, 17), False),
    ("tokens", Tokens, (6, 8), True),
]


@pytest.mark.parametrize(
    ("make", "shape", "softmax"), [m[1:] for m in MODULES], ids=[m[0] for m in MODULES]
)
def test_a_torch_tail_becomes_a_graph_and_equals_it(
    make: Callable[[], nn.Module], shape: tuple[int, ...], softmax: bool
) -> None:
    module = make()
    tail = exported(module, shape)
    x = torch.rand(5, *shape)
    for fold in (False, True):
        found = onnx_to_graph(tail, fold_norms=fold)
        assert found.softmax is softmax
        assert found.shape == shape
        norms = any(node.op == "batch_norm" for node in found.nodes)
        assert norms is (not fold and isinstance(module, Residual))
        graph = restored(found)
        with torch.no_grad():
            ours = torch.softmax(graph(x), -1) if softmax else graph(x)
            torch.testing.assert_close(ours, module(x), rtol=1e-4, atol=1e-5)
        if isinstance(module, Residual) and not fold:
            # Weights keep the names of the state dict.
            assert {name.removesuffix(".num_batches_tracked") for name in found.tensors} == {
                name.removesuffix(".num_batches_tracked") for name in module.state_dict()
            }
            assert found.parameters == sum(t.numel() for t in module.state_dict().values())


def restored(found: GraphTail) -> Graph:
    graph = Graph(found.nodes, found.shape)
    load_tensors(graph, found.tensors, "the tail")
    graph.eval()
    return graph


# --- ONNX files of other makers ------------------------------------------------------------


def model_of(
    nodes: list[Any],
    weights: dict[str, NDArray[Any]],
    shape: tuple[int, ...],
    outputs: tuple[int, ...],
) -> OnnxModel:
    graph = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *outputs])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return OnnxModel.from_proto(proto)


def numbers(*shape: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(key=9))
    return generator.standard_normal(shape).astype(np.float32)


def single(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


HEAD = helper.make_node("Gemm", ["f", "w"], ["y"], transB=1)

OTHERS: list[tuple[str, list[Any], dict[str, NDArray[Any]], tuple[int, ...], set[str]]] = [
    (
        "gelu-of-erf",
        [
            helper.make_node("Div", ["x", "root"], ["a"]),
            helper.make_node("Erf", ["a"], ["b"]),
            helper.make_node("Add", ["b", "one"], ["c"]),
            helper.make_node("Mul", ["x", "c"], ["d"]),
            helper.make_node("Mul", ["d", "half"], ["f"]),
            HEAD,
        ],
        {"root": single(2**0.5), "one": single(1), "half": single(0.5), "w": numbers(3, 7)},
        (7,),
        {"gelu", "linear"},
    ),
    (
        "same-padding",
        [
            helper.make_node("Conv", ["x", "k"], ["a"], auto_pad="SAME_UPPER", strides=[2, 2]),
            helper.make_node("Add", ["a", "bias"], ["b"]),
            helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Squeeze", ["c", "axes"], ["f"]),
            HEAD,
        ],
        {
            "k": numbers(5, 2, 3, 3),
            "bias": numbers(1, 5, 1, 1),
            "axes": np.array([2, 3]),
            "w": numbers(3, 5),
        },
        (2, 8, 8),
        {"pad", "conv2d", "adaptive_avg_pool2d", "flatten", "linear"},
    ),
    (
        "sequence",
        [
            helper.make_node("Conv", ["x", "k", "bias"], ["a"], dilations=[2]),
            helper.make_node("BatchNormalization", ["a", "s", "bias", "m", "v"], ["b"]),
            helper.make_node("Sigmoid", ["b"], ["c"]),
            helper.make_node(
                "AveragePool",
                ["c"],
                ["d"],
                kernel_shape=[3],
                strides=[2],
                pads=[1, 1],
                count_include_pad=1,
            ),
            helper.make_node("Reshape", ["d", "flat"], ["f"]),
            HEAD,
        ],
        {
            "k": numbers(6, 4, 3),
            "bias": numbers(6),
            "s": numbers(6),
            "m": numbers(6) / 3,
            "v": np.abs(numbers(6)) + np.float32(0.5),
            "flat": np.array([-1, 30]),
            "w": numbers(3, 30),
        },
        (4, 14),
        {"conv1d", "batch_norm", "sigmoid", "avg_pool1d", "flatten", "linear"},
    ),
    (
        "turned-matrix",
        [
            helper.make_node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
            helper.make_node("Transpose", ["t"], ["tt"]),
            helper.make_node("MatMul", ["a", "tt"], ["b"]),
            helper.make_node("Add", ["bias", "b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["f"]),
            HEAD,
        ],
        {"t": numbers(4, 3), "bias": numbers(4), "w": numbers(3, 40)},
        (2, 3, 5),
        {"transpose", "linear", "flatten"},
    ),
]


@pytest.mark.parametrize(
    ("nodes", "weights", "shape", "ops"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS]
)
def test_other_exporters_ways_are_read(
    nodes: list[Any], weights: dict[str, NDArray[Any]], shape: tuple[int, ...], ops: set[str]
) -> None:
    # onnx_to_graph itself compares with ONNX Runtime.
    found = onnx_to_graph(model_of(nodes, weights, shape, (3,)))
    assert {node.op for node in found.nodes} == ops


REFUSED: list[tuple[str, list[Any], dict[str, NDArray[Any]], str]] = [
    (
        "attention",
        [
            helper.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 1], name="attend"),
            helper.make_node("MatMul", ["x", "a"], ["b"], name="scores"),
            helper.make_node("Flatten", ["b"], ["f"]),
            HEAD,
        ],
        {"w": numbers(3, 16)},
        "'scores'.*MatMul: a product of two",
    ),
    (
        "unknown",
        [
            helper.make_node("Sin", ["x"], ["a"], name="wave"),
            helper.make_node("Flatten", ["a"], ["f"]),
            HEAD,
        ],
        {"w": numbers(3, 20)},
        "'wave'.*Sin",
    ),
    (
        "shared",
        [
            helper.make_node("MatMul", ["x", "t"], ["a"], name="one"),
            helper.make_node("MatMul", ["a", "t"], ["b"], name="two"),
            helper.make_node("Flatten", ["b"], ["f"]),
            HEAD,
        ],
        {"t": numbers(5, 5), "w": numbers(3, 20)},
        "shares weights",
    ),
    (
        "batch-mean",
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1, name="centre"),
            helper.make_node("Sub", ["x", "m"], ["a"]),
            helper.make_node("Flatten", ["a"], ["f"]),
            HEAD,
        ],
        {"w": numbers(3, 20)},
        "'centre'.*over the batch",
    ),
    (
        "other-clip",
        [
            helper.make_node("Clip", ["x", "low", "high"], ["a"], name="clip"),
            helper.make_node("Flatten", ["a"], ["f"]),
            HEAD,
        ],
        {"low": single(-1), "high": single(1), "w": numbers(3, 20)},
        "between -1.0 and 1.0",
    ),
]


@pytest.mark.parametrize(
    ("nodes", "weights", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_other_layers_are_refused_by_name(
    nodes: list[Any], weights: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        onnx_to_graph(model_of(nodes, weights, (4, 5), (3,)))

    assert re.search(message, f"{raised.value.what} {raised.value.found}")
    assert "cut after" in str(raised.value.remedy)
