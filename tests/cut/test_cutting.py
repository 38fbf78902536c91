"""Cutting: the parts together are the whole, and what must not be cut is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut import Cut, Cutter, OnnxModel, cut
from cenacle.cut.onnx_runtime import Session
from cenacle.errors import InputError

Feeds = dict[str, np.ndarray[Any, Any]]


class Builder(Protocol):
    """What ``conftest.py`` gives."""

    random: np.random.Generator
    nodes: list[Any]
    weights: list[Any]
    feeds: Feeds

    def weight(self, name: str, *shape: int) -> str: ...
    def constant(self, name: str, values: Any, dtype: Any = ...) -> str: ...
    def input(self, name: str, values: Any) -> str: ...
    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str: ...
    def model(self, *outputs: tuple[str, list[Any]]) -> OnnxModel: ...


F = TensorProto.FLOAT


def run(model: OnnxModel, feeds: Feeds) -> Feeds:
    names = [spec.name for spec in model.outputs]
    given_ = {spec.name: feeds[spec.name] for spec in model.inputs}
    return dict(zip(names, Session(model.to_bytes(), threads=1).run(given_, names), strict=True))


def check(model: OnnxModel, made: Cut, feeds: Feeds) -> None:
    """Front and tail give what the whole gives; their interfaces fit."""
    assert made.front.inputs == model.inputs
    assert made.front.outputs == made.tail.inputs == made.crossing
    assert made.tail.outputs == model.outputs
    for part in (made.front, made.tail):
        onnx.checker.check_model(part.proto, full_check=True)
        assert part.proto.opset_import == model.proto.opset_import
    expected, crossing = run(model, feeds), run(made.front, feeds)
    found = run(made.tail, crossing)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def scoped(node: Any, *scopes: str, classes: tuple[str, ...] = ()) -> None:
    """As torch writes layers beside a node."""
    kinds = classes or ("Layer",) * len(scopes)
    for key, value in (
        ("pkg.torch.onnx.name_scopes", ["", *scopes, node.output[0]]),
        ("pkg.torch.onnx.class_hierarchy", ["Model", *kinds, "op"]),
        ("pkg.torch.onnx.stack_trace", "/home/vendor/secret.py, line 3"),
    ):
        node.metadata_props.add(key=key, value=repr(value))


def chain(b: Builder) -> OnnxModel:
    """Three linear layers with activations, the first two in a block."""
    h = b.input("x", b.random.normal(size=(3, 8)).astype("f"))
    for k, scopes in enumerate((("block", "block.0"), ("block", "block.1"), ("head",))):
        wide = b.weight(f"{scopes[-1]}.weight", 8, 8)
        b.node("Gemm", [h, wide, b.weight(f"{scopes[-1]}.bias", 8)], f"linear{k}", transB=1)
        scoped(b.nodes[-1], *scopes)
        h = b.node("Relu", [f"linear{k}"], f"relu{k}")
        scoped(b.nodes[-1], *scopes[:1])
    return b.model((h, ["batch", 8]))


def residual(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 4, 6, 6)).astype("f"))
    b.node("Conv", [x, b.weight("stem", 8, 4, 1, 1)], "stem out")
    b.node("Conv", ["stem out", b.weight("a", 8, 8, 3, 3)], "a out", pads=[1, 1, 1, 1])
    b.node("Relu", ["a out"], "a relu")
    b.node("Conv", ["a relu", b.weight("b", 8, 8, 3, 3)], "b out", pads=[1, 1, 1, 1])
    b.node("Add", ["b out", "stem out"], "sum")
    b.node("GlobalAveragePool", ["sum"], "pooled")
    b.node("Flatten", ["pooled"], "y")
    return b.model(("y", ["batch", 8]))


def by_size(b: Builder) -> OnnxModel:
    """A tail that asks for the batch size of the model's input, as exporters write it."""
    x = b.input("x", b.random.normal(size=(3, 4, 4)).astype("f"))
    b.node("Shape", [x], "shape")
    b.node("Gather", ["shape", b.constant("zero", [0])], "rows")
    b.node("Concat", ["rows", b.constant("rest", [16])], "flat", axis=0)
    b.node("Concat", ["rows", b.constant("two", [2, 4])], "wide", axis=0)
    b.node("MatMul", [x, b.weight("a", 4, 4)], "h")
    b.node("Reshape", ["h", "flat"], "i")
    b.node("MatMul", ["i", b.weight("b", 16, 8)], "j")
    b.node("Expand", [b.weight("token", 1, 2, 4), "wide"], "tokens")
    b.node("Reshape", ["j", "wide"], "k")
    b.node("Add", ["k", "tokens"], "y")
    return b.model(("y", ["batch", 2, 4]))


def masked(b: Builder) -> OnnxModel:
    """A mask that is made once and read by every layer."""
    x = b.input("x", b.random.normal(size=(2, 6, 8)).astype("f"))
    lengths = b.input("mask", np.array([[1, 1, 1, 0, 0, 0], [1] * 6]))
    b.node("Equal", [lengths, b.constant("none", 0)], "padding")
    b.node("Unsqueeze", ["padding", b.constant("axes", [1, 2])], "wide")
    b.node("Expand", ["wide", b.constant("square", [1, 4, 6, 6])], "square mask")
    h = x
    for k in range(2):
        b.node("MatMul", [h, b.weight(f"w{k}", 8, 8)], f"q{k}")
        b.node("Unsqueeze", [f"q{k}", b.constant(f"one{k}", [1])], f"r{k}")
        b.node("Transpose", [f"r{k}"], f"t{k}", perm=[0, 1, 3, 2])
        b.node("MatMul", [f"r{k}", f"t{k}"], f"s{k}")
        low = b.constant(f"low{k}", -9.0, np.float32)
        b.node("Where", ["square mask", low, f"s{k}"], f"m{k}")
        b.node("Softmax", [f"m{k}"], f"p{k}")
        b.node("MatMul", [f"p{k}", f"r{k}"], f"o{k}")
        b.node("ReduceMean", [f"o{k}", b.constant(f"first{k}", [1])], f"h{k}", keepdims=0)
        h = f"h{k}"
    return b.model(("h1", ["batch", 6, 8]))


def early_output(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    b.node("MatMul", [x, b.weight("a", 8, 8)], "features")
    b.node("MatMul", ["features", b.weight("b", 8, 3)], "y")
    return b.model(("y", ["batch", 3]), ("features", ["batch", 8]))


@pytest.mark.parametrize(
    ("make", "at", "crossing"),
    [
        (chain, "block", ["relu1"]),
        (chain, "block.*", ["relu1"]),
        (chain, "block.0", ["linear0"]),
        (chain, "relu0", ["relu0"]),
        (residual, "a out", ["stem out", "a out"]),
        (residual, "b out", ["stem out", "b out"]),
        (residual, "sum", ["sum"]),
        (by_size, "h", ["h"]),
        (by_size, "j", ["j"]),
        (masked, "q0", ["mask", "q0"]),
        (masked, "h0", ["mask", "h0"]),
        (early_output, "features", ["features"]),
    ],
)
def test_what_crosses(
    make: Callable[..., OnnxModel], at: str, crossing: list[str], builder: Builder
) -> None:
    model = make(builder)
    made = cut(model, at)
    assert [spec.name for spec in made.crossing] == crossing
    check(model, made, builder.feeds)
    assert made.batched


@pytest.mark.parametrize("make", [chain, residual, by_size, masked, early_output])
def test_every_cut_gives_what_the_whole_gives_for_other_batches_too(
    make: Callable[..., OnnxModel], builder: Builder, tmp_path: Path
) -> None:
    model = make(builder)
    model.save(tmp_path / "whole.onnx")
    cutter = Cutter(OnnxModel.load(tmp_path / "whole.onnx"))
    made = 0
    for name in cutter.layers.names:
        try:
            found = cutter.cut(name)
        except InputError:
            fault = cutter.fault(cutter.front_of(cutter.resolve(name))) or ""
            assert "nothing would be left" in fault
            continue
        found.front.save(tmp_path / "front.onnx")
        found.tail.save(tmp_path / "tail.onnx")
        front, tail = (OnnxModel.load(tmp_path / f"{p}.onnx") for p in ("front", "tail"))
        again = Cut(name, front, tail, found.crossing, (), ())
        for rows in (1, 5):
            check(
                model,
                again,
                {n: np.resize(v, (rows, *v.shape[1:])) for n, v in builder.feeds.items()},
            )
        made += 1
    assert made >= 1


def test_cuts_of_models_with_all_kinds_of_operators(tail: tuple[OnnxModel, Feeds]) -> None:
    model, feeds = tail
    cutter = Cutter(model)
    for name in cutter.layers.names:
        fault = cutter.fault(cutter.front_of(cutter.layers.members[name]))
        if fault is None:
            check(model, cutter.cut(name), feeds)
        else:
            assert "used on both sides" in fault or "nothing would be left" in fault


def test_constants_are_copied_and_weights_are_not(builder: Builder) -> None:
    model = by_size(builder)
    made = cut(model, "h")
    stored = [{t.name for t in part.proto.graph.initializer} for part in (made.front, made.tail)]
    assert stored[0] & set(model.parameters) == {"a"} == set(made.public_parameters)
    assert stored[1] & set(model.parameters) == {"b", "token"} == set(made.secret_parameters)
    assert not stored[0] & stored[1]


def test_a_front_holds_no_name_of_the_tail_and_no_line_of_the_vendors_code(
    builder: Builder,
) -> None:
    made = cut(chain(builder), "block.0")
    front = made.front.to_bytes()
    for word in (b"secret.py", b"/home", b"head", b"block.1", b"linear2"):
        assert word not in front
    assert b"block.0" in front
    assert b"secret.py" not in made.tail.to_bytes()


def test_metadata_of_the_whole_stays(builder: Builder) -> None:
    proto = chain(builder).proto
    proto.producer_name, proto.domain, proto.model_version = "maker", "org.example", 7
    proto.metadata_props.add(key="licence", value="CC0")
    made = cut(OnnxModel.from_proto(proto), "block")
    for part in (made.front.proto, made.tail.proto):
        assert (part.producer_name, part.domain, part.model_version) == ("maker", "org.example", 7)
        assert [(p.key, p.value) for p in part.metadata_props] == [("licence", "CC0")]
        assert part.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_equal_cuts_have_equal_bytes(builder: Builder, tmp_path: Path) -> None:
    model = residual(builder)
    digests = set()
    for k in range(2):
        model.save(tmp_path / f"{k}.onnx")
        digests.add(cut(OnnxModel.load(tmp_path / f"{k}.onnx"), "sum").front.save(tmp_path / "f"))
    assert len(digests) == 1
    assert digests == {cut(model, "sum").front.digest}


def tied(b: Builder) -> OnnxModel:
    ids = b.input("ids", np.array([[1, 2, 3]]))
    table = b.weight("embedding", 16, 8)
    b.node("Gather", [table, ids], "h")
    b.node("MatMul", ["h", b.weight("mix", 8, 8)], "i")
    b.node("Transpose", [table], "turned", perm=[1, 0])
    b.node("MatMul", ["i", "turned"], "j")
    b.node("Softmax", ["j"], "y")
    return b.model(("y", ["batch", 3, 16]))


def tied_in_front(b: Builder) -> OnnxModel:
    """The same, but the turned table is used first, so that it would cross as a tensor."""
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    table = b.weight("table", 8, 8)
    b.node("Transpose", [table], "turned", perm=[1, 0])
    b.node("MatMul", [x, "turned"], "h")
    b.node("MatMul", ["h", b.weight("mix", 8, 8)], "i")
    b.node("MatMul", ["i", "turned"], "j")
    b.node("MatMul", ["j", b.weight("head", 8, 2)], "y")
    return b.model(("y", ["batch", 2]))


def lstm(b: Builder) -> OnnxModel:
    """A recurrent layer as one operator would be; and one unrolled into nodes."""
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    b.node("MatMul", [x, b.weight("embed.weight", 8, 8)], "h")
    scoped(b.nodes[-1], "embed")
    wide = b.weight("cell.weight", 8, 8)
    for k in range(3):
        b.node("MatMul", ["h" if k == 0 else f"state{k - 1}", wide], f"step{k}")
        scoped(b.nodes[-1], "cell", classes=("torch.nn.modules.rnn.LSTM",))
        b.node("Tanh", [f"step{k}"], f"state{k}")
        scoped(b.nodes[-1], "cell", classes=("torch.nn.modules.rnn.LSTM",))
    b.node("MatMul", ["state2", b.weight("head.weight", 8, 3)], "y")
    scoped(b.nodes[-1], "head")
    return b.model(("y", ["batch", 3]))


def loop(b: Builder) -> OnnxModel:
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    b.node("MatMul", [x, b.weight("a", 8, 8)], "h")
    b.weight("inner", 8, 8)
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["v", "inner"], ["w"], "multiply inside"),
            helper.make_node("Tanh", ["w"], ["v out"]),
            helper.make_node("Identity", ["going"], ["going out"]),
        ],
        "body",
        [
            info("step", TensorProto.INT64, []),
            info("going", TensorProto.BOOL, []),
            info("v", F, None),
        ],
        [info("going out", TensorProto.BOOL, []), info("v out", F, None)],
    )
    times, yes = b.constant("times", 3), b.constant("yes", True, np.bool_)
    b.node("Loop", [times, yes, "h"], "looped", body=body)
    b.node("Reshape", ["looped", b.constant("flat", [-1, 8])], "flat out")
    b.node("MatMul", ["flat out", b.weight("c", 8, 3)], "y")
    return b.model(("y", ["batch", 3]))


REFUSED = [
    (chain, "head", (), "nothing would be left for the tail", "relu1|block"),
    (chain, "block", ("block.1.w*",), "'block.1.weight' must be secret", "block.0|relu0"),
    (chain, "blok", (), "no such layer", "block"),
    (chain, "", (), "no such layer", None),
    (tied, "i", (), "'embedding' is used on both sides", None),
    (tied_in_front, "i", (), "'table' is used on both sides", "j"),
    (lstm, "state1", (), "'cell' keeps a state", "cell"),
    (lstm, "step0", (), "'cell' keeps a state", "embed"),
    (loop, "multiply inside", (), "inside Loop", "looped|h"),
]


@pytest.mark.parametrize(
    ("make", "at", "secret", "why", "nearest"),
    REFUSED,
    ids=[f"{r[0].__name__}-{r[1]}" for r in REFUSED],
)
def test_bad_cuts_are_refused_and_the_nearest_good_one_named(
    make: Callable[..., OnnxModel],
    at: str,
    secret: tuple[str, ...],
    why: str,
    nearest: str | None,
    builder: Builder,
) -> None:
    model = make(builder)
    with pytest.raises(InputError) as caught:
        cut(model, at, secret=secret)
    assert why in str(caught.value)
    named = re.search(r"good cut is --at (\S+)$", str(caught.value.remedy))
    if nearest is None:
        assert named is None
        return
    assert named is not None
    assert re.fullmatch(nearest, named[1])
    check(model, cut(model, named[1], secret=secret), builder.feeds)


def test_a_loop_that_reads_from_outside_is_cut_around(builder: Builder) -> None:
    model = loop(builder)
    made = cut(model, "h")
    assert set(made.secret_parameters) == {"inner", "c"}
    check(model, made, builder.feeds)


def test_tied_weights_that_were_written_twice_are_noticed(builder: Builder) -> None:
    b = builder
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    b.node("MatMul", [x, b.weight("a", 8, 8)], "h")
    same = numpy_helper.to_array(b.weights[0])
    b.node("MatMul", ["h", b.constant("again", same, np.float32)], "i")
    b.node("Mul", ["i", b.constant("ones", np.ones(8), np.float32)], "j")
    b.node("Add", ["j", b.constant("more ones", np.ones(8), np.float32)], "y")
    cutter = Cutter(b.model(("y", ["batch", 8])))
    assert cutter.known_weights(cutter.cut("h")) == (("again", "a"),)
    with pytest.raises(InputError, match="'again' must be secret, and equals 'a' in the public"):
        Cutter(cutter.model, secret=["again"]).cut("h")
    assert cutter.known_weights(cutter.cut("j")) == ()


def test_sizes_of_what_a_weight_made_carry_no_weight_across(builder: Builder) -> None:
    """A reshape of an input by the sizes of a tensor that a public weight made."""
    b = builder
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    z = b.input("z", b.random.normal(size=(2, 8)).astype("f"))
    b.node("MatMul", [x, b.weight("public", 8, 8)], "h")
    b.node("Shape", ["h"], "sizes")
    b.node("Reshape", [z, "sizes"], "i")
    b.node("Add", ["h", "i"], "j")
    b.node("MatMul", ["j", b.weight("secret", 8, 8)], "k")
    b.node("Add", ["k", "i"], "l")
    b.node("Add", ["l", z], "y")
    model = b.model(("y", ["batch", 8]))
    made = cut(model, "j")
    assert [spec.name for spec in made.crossing] == ["z", "j"]
    assert "public" not in {t.name for t in made.tail.proto.graph.initializer}
    assert (made.public_parameters, made.secret_parameters) == (("public",), ("secret",))
    check(model, made, b.feeds)


def test_a_pattern_that_matches_no_weight_is_refused_with_names_that_exist(
    builder: Builder,
) -> None:
    with pytest.raises(InputError, match=r"found haed\.\*; expected a name such as .*head\.weight"):
        cut(chain(builder), "block", secret=["haed.*"])


def test_a_cut_that_would_mix_rows_is_refused(builder: Builder) -> None:
    b = builder
    x = b.input("x", b.random.normal(size=(2, 4, 6)).astype("f"))
    b.node("MatMul", [x, b.weight("a", 6, 6)], "h")
    b.node("Reshape", ["h", b.constant("fold", [-1, 6])], "folded")
    b.node("MatMul", ["folded", b.weight("b", 6, 6)], "i")
    b.node("Reshape", ["i", b.constant("unfold", [-1, 4, 6])], "y")
    model = b.model(("y", ["batch", 4, 6]))
    with pytest.raises(InputError, match=r"'folded' mixes the rows.*--at h$"):
        cut(model, "folded")


def test_shapes_of_weights_and_types_of_tensors_carry_no_weight_across(builder: Builder) -> None:
    b = builder
    x = b.input("x", b.random.normal(size=(2, 8)).astype("f"))
    late = b.weight("late", 8, 8)
    b.node("Shape", [late], "late shape")
    b.node("Gather", ["late shape", b.constant("zero", [0])], "eight")
    b.node("CastLike", [b.constant("two", 2), late], "typed")
    b.node("Reshape", [x, b.node("Concat", [b.constant("any", [-1]), "eight"], "to", axis=0)], "g")
    b.node("Mul", ["g", "typed"], "h")
    b.node("MatMul", ["h", late], "y")
    model = b.model(("y", ["batch", 8]))
    made = cut(model, "h")
    assert made.public_parameters == ()
    assert b"late" not in {t.name.encode() for t in made.front.proto.graph.initializer}
    check(model, made, b.feeds)


def test_names_of_older_exporters_are_layers() -> None:
    names = ["/f/f.0/f.0.1/Conv", "/f/f.1/norm/Mul", "/Flatten", "plain"]
    nodes = [
        helper.make_node("Relu", [str(k) if k else "x"], [str(k + 1)], name)
        for k, name in enumerate(names)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", F, ["n", 2])], [value("4", F, ["n", 2])])
    model = OnnxModel.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    )
    assert model.layers() == ("f", "f.0", "f.0.1", "f.1", "f.1.norm", "Flatten", "plain")
    assert [spec.name for spec in cut(model, "f.0").crossing] == ["1"]


UNARY = ("Relu", "Tanh", "Neg", "Sigmoid", "Identity")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[OnnxModel, str]:
    """A random graph over tensors of shape [N, 4], its weights and shape arithmetic, and a node."""
    random = np.random.default_rng(draw(st.integers(0, 99)))
    value = helper.make_tensor_value_info
    tensors = ["x0", "x1"]
    weights, nodes = [], []
    count = draw(st.integers(2, 9))
    for k in range(count):
        kind = draw(st.sampled_from(["unary", "binary", "weight", "sized"]))
        a, b = (draw(st.sampled_from(tensors)) for _ in range(2))
        name = f"t{k}"
        if kind == "unary":
            nodes.append(helper.make_node(draw(st.sampled_from(UNARY)), [a], [name], name))
        elif kind == "binary":
            nodes.append(helper.make_node("Add", [a, b], [name], name))
        elif kind == "weight":
            weights.append(numpy_helper.from_array(random.normal(size=(4, 4)).astype("f"), f"w{k}"))
            nodes.append(helper.make_node("MatMul", [a, f"w{k}"], [name], name))
        else:
            nodes.append(helper.make_node("Shape", [b], [f"{name} shape"]))
            nodes.append(helper.make_node("Reshape", [a, f"{name} shape"], [name], name))
        tensors.append(name)
    outputs = draw(st.sets(st.sampled_from(tensors[2:]), min_size=1, max_size=3)) | {tensors[-1]}
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x0", F, ["n", 4]), value("x1", F, ["n", 4])],
        [value(name, F, ["n", 4]) for name in sorted(outputs)],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return OnnxModel.from_proto(proto), draw(st.sampled_from(tensors[2:]))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 4))
def test_any_cut_of_any_graph_gives_what_the_whole_gives(
    drawn: tuple[OnnxModel, str], rows: int
) -> None:
    model, at = drawn
    cutter = Cutter(model)
    feeds = {
        name: np.random.default_rng(k).normal(size=(rows, 4)).astype("f")
        for k, name in enumerate(("x0", "x1"))
    }
    try:
        made = cutter.cut(at)
    except InputError:
        assert "nothing would be left" in (cutter.fault(cutter.front_of(cutter.resolve(at))) or "")
        return
    check(model, made, feeds)
    assert not set(made.public_parameters) & set(made.secret_parameters)
    sides = set(made.public_parameters) | set(made.secret_parameters)
    assert sides == {n for n in model.parameters if model.index.weights[n].readers}
