"""The tail's file: equal bytes for equal tails, whole or not at all, and hostile ones refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from cenacle.cut import onnx_checks, tail_file
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.operators import CONTRIBUTED
from cenacle.cut.runtime import TailRuntime
from cenacle.cut.segments import make_segments, stored_weights
from cenacle.cut.tail_file import write_tail
from cenacle.cut.tail_format import (
    GRAPH,
    MANIFEST,
    TailManifest,
    read_graph,
    read_manifest,
    segment_graph,
)
from cenacle.cut.tail_graph import LOCATION, MAX_GRAPH_BYTES, check_graph
from cenacle.documents.base import canonical_json
from cenacle.errors import DataError, DocumentError, UnavailableError
from cenacle.sealing import TensorReader
from cenacle.sealing.safetensors_format import build_header

Feeds = dict[str, Any]


def test_the_file_is_plain_safetensors_with_the_weights_under_their_names(
    tail: tuple[OnnxModel, Feeds], tmp_path: Path
) -> None:
    model, _ = tail
    path = tmp_path / "tail.safetensors"
    digest = write_tail(model, path, segment_bytes=1 << 10)
    assert digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    tensors = load_file(path)
    weights = {t.name: t for t in model.proto.graph.initializer}
    stored = {name for name in tensors if not name.startswith("cenacle.tail/")}
    assert stored <= set(weights)
    for name in stored:
        np.testing.assert_array_equal(tensors[name], numpy_helper.to_array(weights[name]))
    for name in set(weights) - stored:  # small constants stay in the graph
        assert len(weights[name].raw_data) <= 1024


def test_equal_tails_make_equal_bytes(tail: tuple[OnnxModel, Feeds], tmp_path: Path) -> None:
    model, _ = tail
    again = OnnxModel.from_proto(model.proto)
    first = write_tail(model, tmp_path / "a", segment_bytes=1 << 10)
    assert write_tail(again, tmp_path / "b", segment_bytes=1 << 10) == first
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_segments_are_as_small_as_rows_allow_and_read_forward(
    tail: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    model, _ = tail
    sealed.write(model)
    whole = {"recurrent", "captured", "w", "r"}  # an operator that cannot be split
    with sealed.open() as reader:
        starts = []
        for segment in read_manifest(reader).segments:
            sizes = {}
            for piece in segment.weights:
                spec = reader.spec(piece.tensor)
                rows = None if piece.start is None else (piece.stop or 0) - piece.start
                size = spec.stop - spec.start if rows is None else rows * spec.row_bytes
                sizes[piece.name] = size
                if piece.start in (None, 0):
                    starts.append(spec.start)
            if len({piece.tensor for piece in segment.weights} & whole) == 0 and len(sizes) > 1:
                largest = max(sizes.values())
                assert sum(sizes.values()) <= (1 << 10) + 256 or largest > 1 << 10
        seen = list(dict.fromkeys(starts))
        assert seen == sorted(seen)


def test_no_path_and_no_comment_of_its_maker_is_written(
    dense: tuple[OnnxModel, Feeds], tmp_path: Path
) -> None:
    proto = ModelProto()
    proto.CopyFrom(dense[0].proto)
    secret = "/home/canary/model.py"
    proto.doc_string = proto.graph.doc_string = proto.producer_name = secret
    for node in proto.graph.node:
        node.doc_string = secret
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=secret)
    for tensor in proto.graph.initializer:
        tensor.doc_string = secret
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = secret
        value.metadata_props.add(key="source", value=secret)
    write_tail(OnnxModel.from_proto(proto), tmp_path / "tail", segment_bytes=1 << 10)
    assert b"canary" not in (tmp_path / "tail").read_bytes()


def test_nothing_is_left_behind_when_the_disk_is_full(
    dense: tuple[OnnxModel, Feeds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tail"
    target.write_bytes(b"what was there")
    calls = []

    def full(fd: int, data: bytes, offset: int) -> None:
        calls.append(offset)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tail_file, "pwrite_all", full)
    with pytest.raises(UnavailableError, match="no room"):
        write_tail(dense[0], target)
    assert [path.name for path in tmp_path.iterdir()] == ["tail"]
    assert target.read_bytes() == b"what was there"


def test_a_weight_under_a_name_of_the_format_is_refused(builder: Any, tmp_path: Path) -> None:
    x = builder.input("x", np.ones((1, 4), np.float32))
    builder.node("MatMul", [x, builder.weight("cenacle.tail/graph", 4, 4)], "y")
    with pytest.raises(DataError, match="keep for themselves"):
        write_tail(builder.model(("y", ["batch", 4])), tmp_path / "tail")


def test_an_output_that_nothing_computes_is_refused(builder: Any, tmp_path: Path) -> None:
    builder.input("x", np.ones((1, 4), np.float32))
    builder.node("Relu", ["x"], "z")
    model = builder.model(("z", ["batch", 4]))
    for name, words in (("x", "computes nothing"), ("w", "computed by no operator")):
        model.proto.graph.output[0].name = name
        with pytest.raises(DataError, match=words):
            make_segments(model.proto, stored_weights(model.proto.graph), 1 << 10)


# What a hostile file says of itself. Each change is made to a genuine file's tensors.

Tensors = dict[str, Any]


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        fields = json.loads(tensors[MANIFEST].tobytes())
        change(fields)
        tensors[MANIFEST] = np.frombuffer(canonical_json(fields), np.uint8)

    return apply


def _graph(change: Callable[[ModelProto], None], name: str = GRAPH) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        model = ModelProto.FromString(tensors[name].tobytes())
        change(model)
        tensors[name] = np.frombuffer(model.SerializeToString(), np.uint8)

    return apply


def _external(key: str, value: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


def _extra_file(model: ModelProto) -> None:
    tensor = TensorProto(name="z", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=LOCATION)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="length", value="4")
    model.graph.initializer.append(tensor)


def _file_in_attribute(model: ModelProto) -> None:
    tensor = TensorProto(data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = model.graph.node.add(op_type="Constant", output=["unused"])
    node.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=tensor))


def _file_in_branch(model: ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    tensor = TensorProto(name="z", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    inner.initializer.append(tensor)
    node = model.graph.node.add(op_type="If", input=["x"], output=["unused"])
    node.attribute.append(AttributeProto(name="then_branch", type=AttributeProto.GRAPH, g=inner))


def _function(model: ModelProto) -> None:
    model.functions.add(name="f", domain="custom")


def _sparse(model: ModelProto) -> None:
    model.graph.sparse_initializer.add().values.name = "s"


def _custom(model: ModelProto) -> None:
    model.graph.node[0].domain = "custom"


def _context(model: ModelProto) -> None:
    """An operator of ONNX Runtime's own that reads a file which it names."""
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "EPContext"


def _metadata(model: ModelProto) -> None:
    model.metadata_props.add(key="ort_config", value="{}")


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.__setitem__(name, value)


def _segment(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["segments"][1].__setitem__(name, value)


def _piece(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["segments"][1]["weights"][0].__setitem__(name, value)


ATTACKS: dict[str, Callable[[Tensors], Any]] = {
    "attribute-in-a-file": _graph(_file_in_attribute),
    "branch-in-a-file": _graph(_file_in_branch),
    "control-characters": _graph(lambda m: m.graph.node[0].output.append("a\nb")),
    "custom-operators": _graph(_custom),
    "extra-file": _graph(_extra_file),
    "extra-tensor": lambda t: t.__setitem__("more", np.zeros(1, np.float32)),
    "file-context": _graph(_context),
    "file-elsewhere": _graph(_external("location", "/etc/passwd")),
    "file-in-memory": _graph(_external("location", "*/_ORT_MEM_ADDR_/*")),
    "functions": _graph(_function),
    "functions-in-a-segment": _graph(_function, segment_graph(0)),
    "input-of-another-name": _graph(lambda m: setattr(m.graph.input[0], "name", "other")),
    "manifest-of-another-format": _manifest(_set("format", "cenacle.tail/2")),
    "manifest-without-segments": _manifest(_set("segments", [])),
    "manifest-with-more": _manifest(_set("more", 1)),
    "manifest-with-odd-type": _manifest(lambda f: f["inputs"][0].__setitem__("dtype", "BF16")),
    "manifest-with-negative-size": _manifest(lambda f: f["inputs"][0].__setitem__("shape", [-1])),
    "manifest-with-text": _manifest(lambda f: f["inputs"][0].__setitem__("shape", ["batch"])),
    "metadata": _graph(_metadata),
    "missing-graph": lambda t: t.pop(GRAPH),
    "missing-manifest": lambda t: t.pop(MANIFEST),
    "missing-segment": lambda t: t.pop(segment_graph(1)),
    "missing-weight": lambda t: t.pop("c"),
    "no-graph": lambda t: t.__setitem__(GRAPH, np.zeros(0, np.uint8)),
    "no-json": lambda t: t.__setitem__(MANIFEST, np.frombuffer(b"[1,", np.uint8)),
    "numbers-for-a-graph": lambda t: t.__setitem__(GRAPH, np.zeros(8, np.float32)),
    "output-never-made": _manifest(lambda f: f["outputs"][0].__setitem__("name", "nothing")),
    "pickle": lambda t: t.__setitem__(GRAPH, np.frombuffer(b"\x80\x04N.", np.uint8)),
    "segment-of-another-graph": lambda t: t.__setitem__(segment_graph(1), t[segment_graph(0)]),
    "segment-takes-later-value": _manifest(_segment("inputs", ["y"])),
    "segment-takes-unlisted-weight": _manifest(_piece("tensor", "more")),
    "sparse": _graph(_sparse),
    "too-many-rows": _manifest(lambda f: _last_rows(f)),
    "weights-twice": _manifest(lambda f: f["weights"].append(f["weights"][0])),
}


def _last_rows(fields: dict[str, Any]) -> None:
    piece = next(p for s in fields["segments"] for p in s["weights"] if p["start"])
    piece["stop"] = 1 << 20


def _file(tensors: Tensors) -> bytes:
    kinds = {"f4": "F32", "u1": "U8"}
    header, order = build_header(
        {name: (kinds[array.dtype.str[1:]], array.shape) for name, array in tensors.items()}
    )
    return header + b"".join(tensors[name].tobytes() for name in order)


def _refusal(reader: TensorReader, limit: int | None) -> DataError | None:
    try:
        TailRuntime(reader, memory_limit=limit, threads=1).close()
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_hostile_tail_is_refused(
    dense: tuple[OnnxModel, Feeds], sealed: Any, attack: str
) -> None:
    """Paged and whole alike: each looks at the manifest and at its own graphs."""
    sealed.write(dense[0])
    tensors = load_file(sealed.plain)
    ATTACKS[attack](tensors)
    sealed.plain.write_bytes(_file(tensors))
    sealed.seal()
    refused = 0
    for limit in (None, 9000):
        with sealed.open() as reader:
            error = _refusal(reader, limit)
        if error is not None:
            assert not re.search("[\x00-\x1f]", error.diagnostics())
            refused += 1
    both = "manifest" in attack or "missing" in attack or attack not in _ONE_GRAPH
    assert refused == (2 if both else 1)


# Changes of one graph: seen by whoever uses it.
_ONE_GRAPH = {
    "attribute-in-a-file",
    "branch-in-a-file",
    "control-characters",
    "custom-operators",
    "extra-file",
    "file-context",
    "file-elsewhere",
    "file-in-memory",
    "functions",
    "functions-in-a-segment",
    "input-of-another-name",
    "metadata",
    "no-graph",
    "pickle",
    "segment-of-another-graph",
    "sparse",
    "numbers-for-a-graph",
}


def test_the_genuine_file_in_another_order_is_taken(
    dense: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    """So the attacks above are refused for what they change, not for how they are written."""
    model, feeds = dense
    sealed.write(model)
    sealed.plain.write_bytes(_file(load_file(sealed.plain)))
    sealed.seal()
    for limit in (None, 9000):
        with sealed.open() as reader, TailRuntime(reader, memory_limit=limit, threads=1) as one:
            assert one.run(feeds)["y"].shape == (3, 20)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_graphs_with_any_bytes_changed_end_in_data_errors_or_names(
    data: st.DataObject, genuine: bytes
) -> None:
    graph = bytearray(genuine)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(graph) - 1))
        graph[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(graph)))
    for candidate in (bytes(graph), bytes(graph[:cut])):
        try:
            inputs, outputs = check_graph(candidate)
        except DataError:
            continue
        assert all(isinstance(name, str) for name in (*inputs, *outputs))
        # What passes has no field that this reader does not know, in ONNX's eyes either.
        try:
            model = ModelProto.FromString(candidate)
        except DecodeError:  # it looks into packed numbers and types too, and so refuses more
            continue
        assert not model.functions
        assert not model.metadata_props
        assert not any(t.external_data for t in model.graph.initializer)


@pytest.fixture(scope="module")
def genuine() -> bytes:
    """A segment's graph, whose weights are inputs."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1, alpha=0.5),
        helper.make_node("Slice", ["h", "s", "e"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "w", "y")]
    small = [
        numpy_helper.from_array(np.array([value]), name) for name, value in (("s", 0), ("e", 1))
    ]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:], small)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.ClearField("producer_name")
    found: bytes = model.SerializeToString()
    assert check_graph(found) == (("x", "w"), ("y",))
    return found


def test_a_graph_that_is_too_large_is_not_even_read() -> None:
    with pytest.raises(DataError, match="at most"):
        check_graph(memoryview(bytes(MAX_GRAPH_BYTES + 1)))


def test_the_same_operators_are_taken_when_a_model_is_cut_and_when_it_runs() -> None:
    assert onnx_checks.CONTRIBUTED == CONTRIBUTED


def test_a_manifest_says_the_same_after_a_round_trip(
    tail: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    sealed.write(tail[0])
    with sealed.open() as reader:
        manifest = read_manifest(reader)
        assert TailManifest.from_fields(json.loads(manifest.to_bytes())) == manifest
        assert read_graph(reader, MANIFEST) == manifest.to_bytes()
        assert manifest.layers == tail[0].layers()
    with pytest.raises(DocumentError):
        TailManifest.from_fields([])
