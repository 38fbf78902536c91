"""Models from files that nobody vouches for: what is taken, what is refused, and the one form."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut import OnnxModel, TensorSpec
from cenacle.cut import onnx_model as module
from cenacle.errors import CenacleError, DataError, InputError

F = TensorProto.FLOAT
value = helper.make_tensor_value_info


def small(**changes: Any) -> onnx.ModelProto:
    """A linear layer and an activation."""
    weight = numpy_helper.from_array(np.arange(16, dtype="f").reshape(4, 4), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(
        changes.pop("nodes", nodes),
        "g",
        changes.pop("inputs", [value("x", F, ["n", 4])]),
        changes.pop("outputs", [value("y", F, ["n", 4])]),
        changes.pop("weights", [weight]),
    )
    opsets = changes.pop("opsets", [helper.make_opsetid("", 18)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **changes)


def write(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = OnnxModel.from_proto(small())
    digest = model.save(tmp_path / "m.onnx")
    again = OnnxModel.load(tmp_path / "m.onnx")
    assert again.digest == digest == model.digest
    assert again.inputs == (TensorSpec("x", "F32", (None, 4)),)
    assert again.outputs == (TensorSpec("y", "F32", (None, 4)),)
    assert again.parameters == ("w",)
    assert OnnxModel.from_bytes(model.to_bytes()).digest == digest
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_every_way_to_store_numbers_becomes_the_same(tmp_path: Path) -> None:
    array = np.arange(16, dtype="f").reshape(4, 4)
    listed = helper.make_tensor("w", F, [4, 4], array.ravel().tolist())
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(array))
    in_node = small(weights=[])
    in_node.graph.node.insert(0, node)
    also_input = small(inputs=[value("x", F, ["n", 4]), value("w", F, [4, 4])])
    onnx.save(small(), tmp_path / "apart.onnx", save_as_external_data=True, size_threshold=0)
    digests = {
        OnnxModel.from_proto(p).digest
        for p in (small(), small(weights=[listed]), in_node, also_input)
    }
    digests.add(OnnxModel.load(tmp_path / "apart.onnx").digest)
    assert len(digests) == 1


def test_constants_of_all_kinds_are_stored() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value_float=2.0),
        helper.make_node("Constant", [], ["b"], value_floats=[1.0, 2.0, 3.0, 4.0]),
        helper.make_node("Constant", [], ["c"], value_int=4),
        helper.make_node("Constant", [], ["d"], value_ints=[-1, 4]),
        helper.make_node("Mul", ["x", "a"], ["e"]),
        helper.make_node("Mul", ["e", "b"], ["f"]),
        helper.make_node("Reshape", ["f", "d"], ["y"]),
    ]
    model = OnnxModel.from_proto(small(nodes=nodes, weights=[]))
    found = {t.name: numpy_helper.to_array(t).tolist() for t in model.proto.graph.initializer}
    assert found == {"a": 2.0, "b": [1.0, 2.0, 3.0, 4.0], "c": 4, "d": [-1, 4]}
    assert model.parameters == ("b",)
    assert [n.op_type for n in model.proto.graph.node] == ["Mul", "Mul", "Reshape"]


def test_large_models_keep_their_weights_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EMBED_AT_MOST", 8)
    model = OnnxModel.from_proto(small())
    digest = model.save(tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert OnnxModel.load(tmp_path / "m.onnx").digest == model.digest
    assert model.save(tmp_path / "m.onnx") == digest
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    data[5] ^= 1
    (tmp_path / "m.onnx.data").write_bytes(data)
    with pytest.raises(DataError, match="not those that the model was saved with"):
        OnnxModel.load(tmp_path / "m.onnx")


def external(location: str, **entries: Any) -> onnx.ModelProto:
    model = small()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return model


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "a/../../secret", "", "a\\b", "a\nb", "x" * 2000, ".", "sub"],
)
def test_weights_are_read_from_the_models_own_folder_only(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s" * 64)
    with pytest.raises(InputError):
        OnnxModel.load(write(folder / "m.onnx", external(location)))


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "missing"])
def test_weights_behind_links_and_in_no_file_are_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 64)
    location = "w.bin"
    if kind == "file":
        (folder / "w.bin").symlink_to(tmp_path / "secret")
    elif kind == "folder":
        (folder / "link").symlink_to(tmp_path)
        location = "link/secret"
    elif kind == "fifo":
        os.mkfifo(folder / "w.bin")
    with pytest.raises(InputError):
        OnnxModel.load(write(folder / "m.onnx", external(location)))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"offset": 1}, "an end at byte 65"),
        ({"offset": 1 << 40}, "an end at byte"),
        ({"length": 63}, "found 63 bytes; expected 64"),
        ({"offset": -1}, "offset '-1'"),
        ({"offset": "9" * 30}, "a number of bytes"),
        ({"length": "x"}, "a number of bytes"),
    ],
)
def test_weights_beyond_their_file_are_refused(
    entries: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    with pytest.raises(DataError, match=why):
        OnnxModel.load(write(tmp_path / "m.onnx", external("w.bin", **entries)))


def test_weights_may_lie_in_folders_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "a").write_bytes(b"\0" * 64)
    assert OnnxModel.load(write(tmp_path / "m.onnx", external("a/b/a"))).parameters == ("w",)


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    model = external("w.bin")
    for k in range(3):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"again{k}"
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    with pytest.raises(
        DataError, match=r"overlap.*found 256 bytes in all; expected at most the file's 64"
    ):
        OnnxModel.load(write(tmp_path / "m.onnx", model))


def test_a_model_in_memory_may_not_name_files() -> None:
    with pytest.raises(DataError, match="lies outside the model"):
        OnnxModel.from_proto(external("w.bin"))


def node(kind: str, domain: str = "") -> Any:
    return helper.make_node(kind, ["x"], ["y"], domain=domain)


def function(name: str, *calls: str) -> Any:
    names = ["x", *(f"v{k}" for k in range(len(calls)))]
    nodes = [
        helper.make_node(call, [names[k]], [names[k + 1]], domain="own" if call[0] == "f" else "")
        for k, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], [names[-1]], nodes, opsets)


def calls(*functions: Any) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return small(nodes=[node("f0", "own")], weights=[], opsets=opsets, functions=list(functions))


def test_functions_are_put_in_place_of_their_calls() -> None:
    model = OnnxModel.from_proto(calls(function("f0", "f1", "f1"), function("f1", "Relu", "Neg")))
    assert [n.op_type for n in model.proto.graph.node] == ["Relu", "Neg", "Relu", "Neg"]
    assert not model.proto.functions
    assert [entry.domain for entry in model.proto.opset_import] == [""]


def deep() -> onnx.ModelProto:
    nested = node("Identity")
    for _ in range(30):
        inner = helper.make_graph([nested], "g", [], [value("y", F, None)])
        nested = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    return small(nodes=[nested])


def training() -> onnx.ModelProto:
    model = small()
    model.training_info.add().algorithm.name = "steal"
    return model


def sparse() -> onnx.ModelProto:
    model = small()
    tensor = model.graph.sparse_initializer.add()
    tensor.dims.extend([1 << 40, 1 << 20])
    return model


def wrong_size() -> onnx.ModelProto:
    model = small()
    model.graph.initializer[0].dims[0] = 1 << 40
    return model


def foreign(kind: str, domain: str) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    return small(nodes=[node(kind, domain)], opsets=opsets)


def million() -> onnx.ModelProto:
    steps = [["Relu"]] + [[f"f{k + 1}"] * 10 for k in reversed(range(6))]
    return calls(*(function(f"f{k}", *step) for k, step in enumerate(reversed(steps))))


def heavy() -> onnx.ModelProto:
    """Functions of which the innermost holds 1 MB, called ten thousand times in all."""
    model = million()
    del model.functions[:]
    model.functions.extend(function(f"f{k}", *[f"f{k + 1}"] * 10) for k in range(4))
    model.functions.append(function("f4", "Relu"))
    tensor = numpy_helper.from_array(np.zeros(250_000, "f"))
    model.functions[-1].node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    return model


def texts() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    return small(weights=[tensor])


def sequence() -> onnx.ModelProto:
    return small(inputs=[helper.make_tensor_sequence_value_info("x", F, None)])


def later_format() -> onnx.ModelProto:
    model = small()
    model.ir_version = 99
    return model


def unordered() -> onnx.ModelProto:
    late = helper.make_node("Neg", ["x"], ["h"])
    return small(nodes=[helper.make_node("Relu", ["h"], ["y"]), late])


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "another domain": (lambda: foreign("Run", "evil"), "evil.Run"),
    "python": (lambda: foreign("PythonOp", "com.microsoft"), "com.microsoft.PythonOp"),
    "classic learning": (lambda: foreign("Scaler", "ai.onnx.ml"), "ai.onnx.ml.Scaler"),
    "unknown operator": (lambda: small(nodes=[node("Nonesuch")]), "Nonesuch"),
    "training": (training, "a graph for training"),
    "sparse": (sparse, "sparse weights"),
    "a size that is a lie": (wrong_size, "64 bytes; expected"),
    "a circle": (lambda: calls(function("f0", "f1"), function("f1", "f0")), "in a circle"),
    "a million nodes": (million, "too large"),
    "gigabytes of constants": (heavy, "too large"),
    "too deep": (deep, "nested deeper"),
    "text": (texts, "element type 8"),
    "a sequence": (sequence, "no tensor"),
    "no output": (lambda: small(outputs=[]), "no graph with an output"),
    "an output of nothing": (lambda: small(outputs=[value("z", F, ["n"])]), "nothing makes"),
    "two of one name": (lambda: small(nodes=[node("Relu"), node("Neg")]), "name of its own"),
    "not in order": (unordered, "onnx.checker"),
    "a later opset": (lambda: small(opsets=[helper.make_opsetid("", 9999)]), "version 9999"),
    "a later format": (later_format, "version 99 "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_model_of_known_operators_is_refused(name: str, tmp_path: Path) -> None:
    make, why = HOSTILE[name]
    proto = make()
    path = write(tmp_path / "m.onnx", proto)
    with pytest.raises(DataError, match=why):
        OnnxModel.load(path)
    if proto.graph.output:
        with pytest.raises(DataError, match=why):
            OnnxModel.from_proto(proto)


class Trap:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trap",))


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.onnx"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(Trap(), protocol))
        with pytest.raises(InputError, match="a pickle or an archive"):
            OnnxModel.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Trap()))
    with pytest.raises(InputError, match="a pickle or an archive"):
        OnnxModel.load(path)
    assert not Path("trap").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            OnnxModel.load(path)


def test_nothing_unknown_is_carried_along() -> None:
    content = small().SerializeToString() + bytes([0xFA, 0x7F, 6]) + b"hidden"
    assert b"hidden" not in OnnxModel.from_bytes(content).to_bytes()


def test_domains_that_are_not_used_are_dropped_and_known_ones_taken() -> None:
    opsets = [helper.make_opsetid(d, 1) for d in ("com.microsoft", "never.used")]
    proto = small(
        nodes=[node("Gelu", "com.microsoft")], opsets=[helper.make_opsetid("", 18), *opsets]
    )
    model = OnnxModel.from_proto(proto)
    assert [entry.domain for entry in model.proto.opset_import] == ["", "com.microsoft"]


@pytest.mark.parametrize(
    ("weight", "learned"),
    [
        (np.ones((2, 2), "f"), True),
        (np.ones(1, "f"), False),
        (np.float32(3), False),
        (np.ones(2, "f2"), True),
        (np.ones(2, "i1"), True),
        (np.ones(512, "i8"), False),
        (np.ones(5000, "i8"), True),
        (np.ones(9, "?"), False),
    ],
)
def test_which_stored_tensors_count_as_learned(weight: Any, learned: bool) -> None:
    proto = small()
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(weight), "other"))
    assert ("other" in OnnxModel.from_proto(proto).parameters) is learned


def test_sizes_of_a_resize_are_no_weights() -> None:
    scales = numpy_helper.from_array(np.array([1, 2], "f"), "scales")
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"])]
    model = OnnxModel.from_proto(
        small(nodes=nodes, weights=[scales], outputs=[value("y", F, ["n", 8])])
    )
    assert model.parameters == ()


@pytest.mark.parametrize(
    ("shape", "kind", "found"),
    [
        (["n", None, 3], F, TensorSpec("x", "F32", (None, None, 3))),
        ([2, 3], TensorProto.BFLOAT16, TensorSpec("x", "BF16", (2, 3))),
        ([], TensorProto.BOOL, TensorSpec("x", "BOOL", ())),
    ],
)
def test_inputs_as_specs(shape: list[Any], kind: int, found: TensorSpec) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    info = [value("x", kind, shape)]
    model = OnnxModel.from_proto(small(nodes=nodes, inputs=info, outputs=[value("y", kind, shape)]))
    assert model.inputs == (found,)


def test_inputs_without_a_usable_type_are_named() -> None:
    for kind, shape, why in ((TensorProto.STRING, ["n"], "STRING"), (F, None, "shape")):
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
        proto = small(
            nodes=nodes, inputs=[value("x", kind, shape)], outputs=[value("y", kind, shape)]
        )
        with pytest.raises(DataError, match=why):
            _ = OnnxModel.from_proto(proto).inputs


CONTENT = small().SerializeToString()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255), st.booleans())
def test_any_damage_is_an_error_or_another_model_and_never_a_crash(
    place: int, flip: int, cut_off: bool
) -> None:
    damaged = bytearray(CONTENT)
    damaged[place] ^= flip
    content = bytes(damaged[:place]) if cut_off else bytes(damaged)
    try:
        model = OnnxModel.from_bytes(content)
        _ = (model.layers(), model.inputs, model.outputs)
    except CenacleError:
        return
    onnx.checker.check_model(model.proto)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error(content: bytes) -> None:
    with pytest.raises(CenacleError):
        OnnxModel.from_bytes(content)
