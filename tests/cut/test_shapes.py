"""Sizes of tensors: through what operators they are followed, and what stops a hostile graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cenacle.cut import OnnxModel
from cenacle.cut.shapes import BATCH, infer_sizes
from cenacle.errors import DataError, InputError

F = TensorProto.FLOAT
HUGE = np.array([1 << 20] * 3)


def model(nodes: list[Any], shape: list[Any], constants: dict[str, Any], **more: Any) -> ModelProto:
    value = helper.make_tensor_value_info
    stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    outputs = [value("y", F, ["n", None])]
    graph = helper.make_graph(nodes, "g", [value("x", F, shape)], outputs, stored)
    graph.value_info.extend(more.get("stated", []))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def node(kind: str, inputs: str, output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


SIZED = [
    node("Shape", "x", "s"),
    node("Gather", "s zero", "rows"),
    node("Reshape", "rows one", "rows again"),
]
SIZED[-1].input[0] = "rows"
SIZED[-1].output[0] = "rows_again"
INTS = {
    "zero": np.array([0]),
    "one": np.array([-1]),
    "two": np.array([2, -1]),
    "four": np.array([4]),
}


@pytest.mark.parametrize(
    ("nodes", "shape", "axes"),
    [
        ([node("Relu", "x")], ["n", 3], (BATCH, 3)),
        ([node("Relu", "x")], ["n", "words"], (BATCH, "words")),
        ([node("Transpose", "x")], ["n", "words"], ("words", BATCH)),
        ([node("Transpose", "x")], ["n", 3], (3, BATCH)),
        ([node("Concat", "x x", axis=0)], ["n", 3], (None, 3)),
        # A reshape by sizes that pass through a reshape of their own: no inference follows that.
        (
            [*SIZED, node("Concat", "rows_again two", "to", axis=0), node("Reshape", "x to")],
            ["n", 6],
            (BATCH, 2, 3),
        ),
        (
            [*SIZED, node("Mul", "rows_again four", "many"),
             node("Concat", "many one", "to", axis=0), node("Reshape", "x to")],
            ["n", 4, 5],
            (None, 5),
        ),
    ],
    ids=["same", "named", "turned named", "turned", "doubled", "reshaped", "folded"],
)  # fmt: skip
def test_axes_are_followed(nodes: list[Any], shape: list[Any], axes: tuple[Any, ...]) -> None:
    found = OnnxModel.from_proto(model(nodes, shape, INTS))
    assert infer_sizes(found.proto).axes("y") == axes


def test_what_the_model_says_is_believed_where_inference_stops() -> None:
    value = helper.make_tensor_value_info
    nodes = [node("QuickGelu", "x", "h", domain="com.microsoft"), node("Relu", "h")]
    unknown = OnnxModel.from_proto(model(nodes, ["n", 3], {}))
    with pytest.raises(DataError, match="of tensor 'h' is unknown"):
        infer_sizes(unknown.proto).spec("h")
    stated = OnnxModel.from_proto(model(nodes, ["n", 3], {}, stated=[value("h", F, ["n", 3])]))
    sizes = infer_sizes(stated.proto)
    assert sizes.axes("h") == sizes.axes("y") == (BATCH, 3)
    # But not against what follows from the graph.
    nodes[0] = node("Relu", "x", "h")
    lying = model(nodes, ["n", 3], {}, stated=[value("h", F, ["n", 9])])
    assert infer_sizes(OnnxModel.from_proto(lying).proto).axes("h") == (BATCH, 3)


def test_a_first_axis_that_is_not_the_batch_cannot_cross() -> None:
    found = OnnxModel.from_proto(model([node("Concat", "x x", axis=0)], ["n", 3], {}))
    with pytest.raises(InputError, match="mixes the rows"):
        infer_sizes(found.proto).spec("y")


def _broad(count: int, rank: int) -> dict[str, Any]:
    shapes = [[1] * k + [64] + [1] * (rank - k - 1) for k in range(count)]
    return {f"c{k}": np.ones(shape, np.int64) for k, shape in enumerate(shapes)}


BOMBS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a constant of a size": ([node("ConstantOfShape", "big", "h")], {"big": HUGE}),
    "an expansion": ([node("Expand", "c big", "h")], {"c": np.ones(1), "big": HUGE}),
    "a range": (
        [node("Range", "a b c", "h")],
        {"a": np.array(0), "b": np.array(1 << 40), "c": np.array(1)},
    ),
    "an endless range": (
        [node("Range", "a b c", "h")],
        {"a": np.array(0), "b": np.array(9), "c": np.array(0)},
    ),
    "many operands": ([node("Max", " ".join(f"c{k}" for k in range(8)), "h")], _broad(8, 8)),
    "steps that grow": (
        [node("Concat", " ".join(["c0"] * 64), "c1", axis=0)]
        + [node("Concat", " ".join([f"c{k}"] * 64), f"c{k + 1}", axis=0) for k in range(1, 8)],
        {"c0": np.ones(64, np.int64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_graph_cannot_make_the_inference_fill_the_memory(name: str) -> None:
    nodes, constants = BOMBS[name]
    found = OnnxModel.from_proto(model([*nodes, node("Relu", "x")], ["n", 3], constants))
    assert infer_sizes(found.proto).axes("y") == (BATCH, 3)
