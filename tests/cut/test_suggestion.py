"""The table of all cuts: what it counts, which it calls good, and its picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut import Choice, OnnxModel, Suggestion, cut, suggest
from cenacle.cut.costs import node_costs, peak_bytes
from cenacle.cut.plot import plot_choices
from cenacle.cut.shapes import infer_sizes
from cenacle.errors import InputError

F = TensorProto.FLOAT


def model(
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, Any] | None = None,
) -> OnnxModel:
    value = helper.make_tensor_value_info
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, F, shape) for name, shape in inputs.items()],
        [value(name, F, shape) for name, shape in outputs.items()],
        stored,
    )
    opsets = [helper.make_opsetid("", 23)]
    return OnnxModel.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def ones(*shape: int) -> Any:
    return np.ones(shape, "f")


def node(kind: str, inputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), ["y"], **attributes)


COSTS: dict[str, tuple[Any, dict[str, list[Any]], list[Any], dict[str, Any], int]] = {
    # 6 x 5 outputs in 8 channels, each a sum over 4 / 2 channels and a 3 x 3 kernel
    "conv": (
        node("Conv", "x w", group=2, pads=[1, 1, 1, 1]),
        {"x": ["n", 4, 6, 5]},
        ["n", 8, 6, 5],
        {"w": ones(8, 2, 3, 3)},
        6 * 5 * 8 * 2 * 9,
    ),
    "transposed conv": (
        node("ConvTranspose", "x w", strides=[2, 2]),
        {"x": ["n", 4, 6, 5]},
        ["n", 3, 12, 10],
        {"w": ones(4, 3, 2, 2)},
        4 * 6 * 5 * 3 * 4,
    ),
    "gemm": (
        node("Gemm", "x w b", transB=1),
        {"x": ["n", 7]},
        ["n", 5],
        {"w": ones(5, 7), "b": ones(5)},
        35,
    ),
    "matmul": (node("MatMul", "x w"), {"x": ["n", 3, 7]}, ["n", 3, 5], {"w": ones(7, 5)}, 105),
    "einsum": (
        node("Einsum", "x w", equation="bij, jk -> bik"),
        {"x": ["n", 3, 7]},
        ["n", 3, 5],
        {"w": ones(7, 5)},
        105,
    ),
    # scores: 2 heads x 6 x 9 x 4; their mixture: 2 x 6 x 9 x 5
    "attention": (
        node("Attention", "q k v"),
        {"q": ["n", 2, 6, 4], "k": ["n", 2, 9, 4], "v": ["n", 2, 9, 5]},
        ["n", 2, 6, 5],
        {},
        2 * 6 * 9 * (4 + 5),
    ),
    # 6 steps, 4 gates of 3, from 5 inputs and 3 states
    "lstm": (
        node("LSTM", "t w r", hidden_size=3),
        {"t": [6, "n", 5]},
        [6, 1, "n", 3],
        {"w": ones(1, 12, 5), "r": ones(1, 12, 3)},
        6 * 4 * 3 * (5 + 3),
    ),
    "an activation": (node("Relu", "x"), {"x": ["n", 3, 7]}, ["n", 3, 7], {}, 21),
    "a move": (node("Transpose", "x"), {"x": ["n", 3, 7]}, [7, 3, "n"], {}, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_multiply_accumulates_of_one_row(name: str) -> None:
    made, inputs, output, weights, expected = COSTS[name]
    found = model([made], inputs, {"y": output}, weights)
    shapes = {key: [None if isinstance(s, str) else s for s in v] for key, v in inputs.items()}
    sizes = infer_sizes(found.proto, {"t": [6, 1, 5]} if name == "lstm" else shapes)
    assert node_costs(found.index, sizes) == [expected]


def test_what_cannot_be_counted_is_said_to_be_a_lower_bound() -> None:
    inner = helper.make_node("MatMul", ["h", "w"], ["z"])
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("z", F, None)])
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("ReduceSum", ["h"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    weights = {"w0": ones(4, 4), "w": ones(4, 4)}
    found = suggest(model(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, weights))
    assert not next(one for one in found if one.layer == "h").exact


def test_peak_memory_is_of_what_lives_at_once() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),  # x and a: 200
        helper.make_node("Concat", ["a", "a"], ["b"], axis=1),  # a and b: 300
        helper.make_node("ReduceSum", ["b"], ["c"], keepdims=0),  # b and c
        helper.make_node("Add", ["c", "one"], ["y"]),
    ]
    found = model(nodes, {"x": ["n", 25]}, {"y": []}, {"one": np.float32(1)})
    sizes = infer_sizes(found.proto)
    assert peak_bytes(found.index, [0, 1, 2, 3], ("x",), sizes) == (300, True)
    assert peak_bytes(found.index, [2, 3], ("b",), sizes) == (204, True)
    assert peak_bytes(found.index, [], (), sizes) == (0, True)


def network() -> OnnxModel:
    """Two convolutions, a pooling after each, and a head."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], "c0"),
        helper.make_node("MaxPool", ["c0"], ["p0"], "p0", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1"], ["c1"], "c1"),
        helper.make_node("GlobalAveragePool", ["c1"], ["p1"], "p1"),
        helper.make_node("Flatten", ["p1"], ["flat"], "flat"),
        helper.make_node("MatMul", ["flat", "w2"], ["head"], "head"),
        helper.make_node("Softmax", ["head"], ["y"], "softmax"),
    ]
    weights = {"w0": ones(8, 3, 1, 1), "w1": ones(16, 8, 1, 1), "w2": ones(16, 10)}
    return model(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 10]}, weights)


def test_every_cut_is_there_with_its_numbers() -> None:
    found = {one.layer: one for one in suggest(network())}
    assert list(found) == ["c0", "p0", "c1", "p1", "flat", "head"]
    first, last = found["p0"], found["flat"]
    total = 24 + 128 + 160
    assert (first.parameters, first.parameter_bytes) == (288, 1152)
    assert first.share == 288 / total
    assert first.crossing_bytes == 8 * 4 * 4 * 4
    assert [spec.shape for spec in first.crossing] == [(None, 8, 4, 4)]
    # the second convolution, its pooling, the head and its softmax
    assert first.macs == 16 * 16 * 8 + 16 + 160 + 10
    assert first.memory == 4 * 288 + 4 * (128 + 256)
    assert (last.parameters, last.macs, last.crossing_bytes) == (160, 170, 64)
    assert last.memory == 640 + 4 * (16 + 10)
    assert all(one.exact for one in found.values())


def test_good_cuts_hide_most_for_least() -> None:
    found = suggest(network())
    # After a pooling as much is hidden as before it, and less crosses; the softmax hides nothing.
    assert [one.layer for one in found if one.good] == ["p0", "p1"]
    assert [refusal.layer for refusal in found.refused] == ["softmax"]


def test_secret_weights_and_given_sizes_bound_the_cuts() -> None:
    found = suggest(network(), secret=["w1"])
    assert [one.layer for one in found] == ["c0", "p0"]
    assert "'w1' must be secret" in found.refused[0].why
    with pytest.raises(InputError, match=r"found 1 x 3 x 9 x 8; expected n x 3 x 8 x 8"):
        suggest(network(), shapes={"x": [1, 3, 9, 8]})
    with pytest.raises(InputError, match="does not have; found z"):
        suggest(network(), shapes={"z": [1]})


def test_open_axes_are_counted_as_they_were_given() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], "h"),
        helper.make_node("MatMul", ["h", "w1"], ["y"], "last"),
    ]
    weights = {"w0": ones(4, 4), "w1": ones(4, 4)}
    text = model(nodes, {"x": ["n", "words", 4]}, {"y": ["n", "words", 4]}, weights)
    for words in (5, 128):
        (one,) = suggest(text, shapes={"x": [None, words, 4]})
        assert one.crossing_bytes == words * 16
        assert one.macs == words * 16
        assert one.crossing[0].shape == (None, None, 4)


def test_nested_layers_after_which_it_is_the_same_cut_are_one_row(builder: Any) -> None:
    b = builder
    x = b.input("x", ones(2, 4))
    b.node("MatMul", [x, b.weight("a", 4, 4)], "h", name="/block/block.0/inner/MatMul")
    b.node("MatMul", ["h", b.weight("b", 4, 4)], "y", name="/head/MatMul")
    (one,) = suggest(b.model(("y", ["batch", 4])))
    assert (one.layer, one.same) == ("block", ("block.0", "block.0.inner"))


def test_accuracies_are_put_beside_their_cuts() -> None:
    found = suggest(network()).with_accuracy({"p0": 0.5, "p1": None})
    assert {one.layer: one.accuracy for one in found if one.layer[0] == "p"} == {
        "p0": 0.5,
        "p1": None,
    }
    assert found.choices[0].to_fields()["accuracy"] is None


def test_choices_can_be_made() -> None:
    whole = network()
    for one in suggest(whole):
        made = cut(whole, one.layer)
        assert made.crossing == one.crossing
        learned = [whole.index.weights[name].elements for name in made.secret_parameters]
        assert sum(learned) == one.parameters


def _renamed(choices: Suggestion, name: str) -> list[Choice]:
    return [Choice(**{**_fields(one), "layer": name}) for one in choices]


def _fields(one: Choice) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Choice.__dataclass_fields__}


@pytest.mark.parametrize(
    "name",
    ["plain", "<script>alert(1)</script>", "a & b", '"quoted"', "\x1b[31mred", "é" * 300, "\x00"],
    ids=["plain", "tag", "ampersand", "quotes", "escape", "long", "null"],
)
def test_the_picture_is_well_formed_whatever_layers_are_called(name: str) -> None:
    choices = _renamed(suggest(network()).with_accuracy({"p0": 0.5}), name)
    picture = plot_choices(choices, name)
    tree = ElementTree.fromstring(picture)
    assert tree.tag.endswith("svg")
    assert "<script" not in picture
    kinds = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert kinds.count("polyline") == 2
    assert kinds.count("title") == len(choices)
    assert picture == plot_choices(choices, name)


def test_a_picture_of_no_cut_and_of_very_many() -> None:
    assert ElementTree.fromstring(plot_choices([], "none")) is not None
    many = list(suggest(network())) * 80
    texts = [
        e
        for e in ElementTree.fromstring(plot_choices(many, "many")).iter()
        if e.tag.endswith("}text")
    ]
    assert len(texts) < 70
