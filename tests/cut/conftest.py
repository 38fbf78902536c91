"""Small tails, sealed, for every kind of operator whose weights are split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cenacle.crypto import SecretBytes
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.tail_file import write_tail
from cenacle.sealing import SealedInfo, SealedWriter, TensorReader

# Set before anything can import ONNX Runtime: a full opt-out of its telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

Array = NDArray[Any]
Feeds = dict[str, Array]


class Builder:
    """Builds a model node by node; weights are random."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(7)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.feeds: Feeds = {}

    def weight(self, name: str, *shape: int, dtype: Any = np.float32) -> str:
        values = self.random.normal(size=shape).astype(dtype)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def input(self, name: str, values: Array, *, batched: bool = True) -> str:
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        shape: list[Any] = list(values.shape)
        if batched:
            shape[0] = "batch"
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        self.feeds[name] = values
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def model(self, *outputs: tuple[str, list[Any]], kind: int = TensorProto.FLOAT) -> OnnxModel:
        found = [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs]
        graph = helper.make_graph(self.nodes, "tail", self.inputs, found, self.weights)
        return OnnxModel.from_proto(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        )


def _dense(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(3, 24)).astype(np.float32))
    b.node("Gemm", [x, b.weight("a", 40, 24), b.weight("a bias", 40)], "h", transB=1)
    b.node("Relu", ["h"], "h relu")
    b.node("Gemm", ["h relu", b.weight("b", 40, 32), b.weight("b bias", 32)], "i", alpha=0.5)
    b.node("Gemm", ["i", b.weight("c", 48, 32), b.constant("one", 1.5, np.float32)], "j", transB=1)
    b.node("Gemm", ["j", b.weight("d", 20, 48)], "y", transB=1)
    return b.model(("y", ["batch", 20]))


def _products(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 5, 24)).astype(np.float32))
    b.node("MatMul", [x, b.weight("a", 24, 40)], "h")
    b.node("Transpose", [b.weight("b", 32, 40)], "b turned", perm=[1, 0])
    b.node("MatMul", ["h", "b turned"], "i")
    b.node("Add", ["i", b.weight("b bias", 32)], "j")
    b.node("Softmax", ["j"], "y", axis=-1)
    return b.model(("y", ["batch", 5, 32]))


def _convolutions(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 4, 9, 9)).astype(np.float32))
    pads = [1, 1, 1, 1]
    b.node("Conv", [x, b.weight("a", 32, 4, 3, 3), b.weight("a bias", 32)], "h", pads=pads)
    norm = [b.weight(f"norm {i}", 32) for i in range(3)]
    variance = b.constant("norm 3", b.random.uniform(0.5, 1, 32), np.float32)
    b.node("BatchNormalization", ["h", *norm, variance], "i")
    b.node("Conv", ["i", b.weight("d", 32, 1, 3, 3)], "j", group=32, pads=pads)
    b.node("Conv", ["j", b.weight("e", 48, 32, 1, 1)], "k")
    b.node("GlobalAveragePool", ["k"], "l")
    b.node("Flatten", ["l"], "y")
    return b.model(("y", ["batch", 48]))


def _text(b: Builder) -> OnnxModel:
    ids = b.input("ids", np.array([[0, 5, -1, 63], [-64, 31, 32, 7]], np.int64))
    mask = b.input("mask", np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.bool_))
    b.node("Gather", [b.weight("table", 64, 16), ids], "h")
    b.node("Unsqueeze", [mask, b.constant("last", [-1])], "m")
    b.node("Where", ["m", "h", b.constant("zero", 0.0, np.float32)], "i")
    b.node("MatMul", ["i", b.weight("a", 16, 40)], "j")
    b.node("ReduceMean", ["j", b.constant("axis", [1])], "y", keepdims=0)
    return b.model(("y", ["batch", 40]))


def _recurrent(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(3, 6, 8)).astype(np.float32))
    b.node("Transpose", [x], "time first", perm=[1, 0, 2])
    weights = [b.weight("w", 1, 64, 8), b.weight("r", 1, 64, 16), b.weight("b", 1, 128)]
    b.nodes.append(
        helper.make_node("LSTM", ["time first", *weights], ["all", "last"], hidden_size=16)
    )
    b.node("Squeeze", ["last", b.constant("first", [0])], "h")
    b.node("Gemm", ["h", b.weight("c", 10, 16)], "y", transB=1)
    return b.model(("y", ["batch", 10]))


def _branches(b: Builder) -> OnnxModel:
    """Tied weights, two inputs and outputs, a branch that captures a weight, and an odd name."""
    x = b.input("x", b.random.normal(size=(2, 16)).astype(np.float32))
    scale = b.input("scale", np.array(0.5, np.float32), batched=False)
    tied = b.weight("tied/wéight", 16, 16)
    b.node("Gemm", [x, tied], "h", transB=1)
    b.node("Mul", ["h", scale], "i")
    b.node("ReduceSum", ["i"], "sum", keepdims=0)
    b.node("Greater", ["sum", b.constant("none", 0.0, np.float32)], "many")
    branches = {}
    for name, kind in (("then", "Add"), ("else", "Sub")):
        out = helper.make_tensor_value_info(f"{name} out", TensorProto.FLOAT, None)
        nodes = [helper.make_node(kind, ["i", "captured"], [f"{name} out"])]
        branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [out])
    b.weight("captured", 2, 16)
    b.node("If", ["many"], "j", **branches)
    b.node("Gemm", ["j", tied], "y", transB=1)
    b.node("Tanh", ["h"], "z")
    return b.model(("y", ["batch", 16]), ("z", ["batch", 16]))


def _quantized(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 32)).astype(np.float32))
    b.constant("q", b.random.integers(-127, 128, (32, 64)), np.int8)
    b.constant("scale", b.random.uniform(0.01, 0.02, 64), np.float32)
    b.constant("offset", np.zeros(64), np.int8)
    b.node("DequantizeLinear", ["q", "scale", "offset"], "w", axis=1)
    b.node("MatMul", [x, "w"], "h")
    b.node("Where", [b.constant("kept", b.random.integers(0, 2, 2048).reshape(32, 64), np.bool_),
                     "w", b.constant("nothing", 0.0, np.float32)], "v")  # fmt: skip
    b.node("Add", ["h", b.weight("bias", 64)], "i")
    b.node("MatMul", [x, "v"], "k")
    b.node("Add", ["i", "k"], "y")
    return b.model(("y", ["batch", 64]))


def _double(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(4, 12)).astype(np.float64))
    b.node("MatMul", [x, b.weight("a", 12, 64, dtype=np.float64)], "h")
    b.node("Gemm", ["h", b.weight("b", 6, 64, dtype=np.float64)], "y", transB=1)
    return b.model(("y", ["batch", 6]), kind=TensorProto.DOUBLE)


MODELS: dict[str, Callable[[Builder], OnnxModel]] = {
    "branches": _branches,
    "convolutions": _convolutions,
    "dense": _dense,
    "double": _double,
    "products": _products,
    "quantized": _quantized,
    "recurrent": _recurrent,
    "text": _text,
}


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture(params=sorted(MODELS))
def tail(request: pytest.FixtureRequest, builder: Builder) -> tuple[OnnxModel, Feeds]:
    """Each of the small tails with an input."""
    return MODELS[request.param](builder), builder.feeds


@pytest.fixture
def dense(builder: Builder) -> tuple[OnnxModel, Feeds]:
    return _dense(builder), builder.feeds


@pytest.fixture
def text(builder: Builder) -> tuple[OnnxModel, Feeds]:
    return _text(builder), builder.feeds


class Sealed:
    """A tail's file, sealed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = SecretBytes.random()
        self.plain = folder / "tail.safetensors"
        self.path = folder / "tail.sealed"
        self.info: SealedInfo | None = None

    def write(self, model: OnnxModel, *, segment_bytes: int = 1 << 10) -> None:
        write_tail(model, self.plain, segment_bytes=segment_bytes)
        self.seal()

    def seal(self) -> None:
        """Small chunks, so that small tails have many."""
        with SealedWriter(self.path, self.key, "tensors", chunk_log2=8) as writer:
            writer.write(self.plain.read_bytes())
        self.info = writer.info

    def open(self) -> TensorReader:
        assert self.info is not None
        return TensorReader(self.path, self.key, expected_digest=self.info.digest, threads=1)


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Sealed]:
    made = Sealed(tmp_path)
    yield made
    made.key.wipe()
