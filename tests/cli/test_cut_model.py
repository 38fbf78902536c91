"""``cenacle cut``: the table, the files of a cut, and what is refused."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.numpy
import typer.main
from onnx import TensorProto, helper, numpy_helper

from cenacle.cli import output
from cenacle.cli.cut import cut_table, open_model
from cenacle.cli.main import app
from cenacle.cut import OnnxModel, cut_files, suggest
from cenacle.errors import UnavailableError

Command = Callable[..., Any]
F = TensorProto.FLOAT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file: two linear layers named like older exporters name them, and a softmax."""
    random = np.random.default_rng(3)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "body.weight"], ["h"], "/body/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], "/body/Relu"),
        helper.make_node("MatMul", ["r", "head.weight"], ["l"], "/head/MatMul"),
        helper.make_node("Softmax", ["l"], ["y"], "/Softmax"),
    ]
    weights = [
        numpy_helper.from_array(random.normal(size=(8, 6)).astype("f"), "body.weight"),
        numpy_helper.from_array(random.normal(size=(6, 3)).astype("f"), "head.weight"),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", F, ["n", 8])], [value("y", F, ["n", 3])], weights
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_cut_is_written_as_two_parts_and_what_belongs_together(
    alone: Command, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "cut"
    answer = alone("cut", model, "--at", "body", "--out", out)
    assert answer.code == 0, answer.err
    words = answer.out.replace("\n", " ")
    assert "cut after body: 18 of 66 learned numbers (27.3%) are in the tail" in words
    assert "front.onnx  may be given to anybody" in words
    assert "is SECRET and not yet encrypted: seal it, then delete it" in words
    assert f"cenacle seal {out}/tail.safetensors --type model" in words
    assert sorted(p.name for p in out.iterdir()) == ["cut.json", "front.onnx", "tail.safetensors"]
    described = json.loads((out / "cut.json").read_text("utf-8"))
    front = OnnxModel.load(out / "front.onnx")
    assert described["front"] == {"file": "front.onnx", "digest": front.digest}
    assert front.parameters == ("body.weight",) == tuple(described["public"]["names"])
    assert described["secret"] == {"numbers": 18, "bytes": 72, "names": ["head.weight"]}
    assert [spec["name"] for spec in described["crossing"]] == ["r"]
    tail = safetensors.numpy.load_file(out / "tail.safetensors")
    assert "head.weight" in tail
    assert "body.weight" not in tail
    assert stat.S_IMODE((out / "tail.safetensors").stat().st_mode) == 0o600
    secret = OnnxModel.load(model).proto.graph.initializer[1].raw_data
    assert secret not in (out / "front.onnx").read_bytes() + (out / "cut.json").read_bytes()


def test_the_long_form_of_the_command_is_the_same(alone: Command, model: Path) -> None:
    short = alone("cut", model, "--at", "body", "--json").json
    assert short == alone("cut", "model", model, "--at", "body", "--json").json
    assert short == alone("cut", "--json", "--at", "body", model).json
    assert short["cut"]["layer"] == "body"
    assert "front" not in short["cut"]


def test_commands_below_it_are_found_and_help_is_shown(alone: Command) -> None:
    group: Any = typer.main.get_command(app)
    assert {"model"} <= set(group.commands["cut"].commands)
    for name in group.commands["cut"].commands:
        answer = alone("cut", name, "--help")
        assert answer.code == 0
        assert f"cut {name} [OPTIONS]" in answer.out
    assert "MODEL|COMMAND" in alone("cut", "--help").out
    assert "MODEL|COMMAND" in alone("cut").out + alone("cut").err


def test_files_of_a_cut_are_replaced_only_if_asked(
    alone: Command, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    assert alone("cut", model, "--at", "body", "--out", out).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    answer = alone("cut", model, "--at", "h", "--out", out)
    assert answer.code == 5
    assert "holds files of a cut already" in answer.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert alone("cut", model, "--whole", "--out", out, "--force").code == 0
    assert sorted(p.name for p in out.iterdir()) == ["cut.json", "tail.safetensors"]
    described = json.loads((out / "cut.json").read_text("utf-8"))
    assert (described["front"], described["layer"]) == (None, None)
    assert described["secret"]["numbers"] == 66


def test_a_failure_leaves_nothing_and_keeps_the_earlier_cut(
    alone: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    assert alone("cut", model, "--at", "body", "--out", kept).code == 0
    before = {p.name: p.read_bytes() for p in kept.iterdir()}

    def full(*_: object, **__: object) -> str:
        raise UnavailableError("cannot write: the disk has no room")

    monkeypatch.setattr(cut_files, "write_tail", full)
    for out in (kept, new):
        answer = alone("cut", model, "--at", "h", "--out", out, "--force")
        assert answer.code == 6
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert not new.exists()


def test_equal_cuts_have_equal_files(alone: Command, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert alone("cut", model, "--at", "body", "--out", tmp_path / name).code == 0
    for name in ("front.onnx", "tail.safetensors", "cut.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_shows_every_cut(alone: Command, model: Path, tmp_path: Path) -> None:
    answer = alone("cut", model, "--suggest", "--plot", tmp_path / "cuts.svg")
    assert answer.code == 0, answer.err
    rows = [line.split() for line in answer.out.splitlines()]
    assert ["*", "body", "18", "27.3%", "21", "28.0%", "108", "B", "24", "B"] in rows
    assert "no cut at Softmax: nothing would be left for the tail" in answer.err
    assert ElementTree.parse(tmp_path / "cuts.svg").getroot().tag.endswith("svg")
    found = alone("cut", model, "--suggest", "--json").json
    assert [one["layer"] for one in found["choices"]] == ["body", "head"]
    assert [one["good"] for one in found["choices"]] == [True, False]
    assert found["refused"] == [{"layer": "Softmax", "why": "nothing would be left for the tail"}]


def test_a_narrow_terminal_shows_every_column(alone: Command, model: Path) -> None:
    alone("cut", model, "--suggest")  # sets the width of tests
    output.console.width = 80
    found = open_model(str(model))[0]
    with output.console.capture() as seen:
        output.console.print(cut_table(suggest(found).with_accuracy({"body": 0.915})))
    row = next(line for line in seen.get().splitlines() if "body" in line)
    assert row.split() == [
        "*",
        "body",
        "18",
        "27.3%",
        "21",
        "28.0%",
        "108",
        "B",
        "24",
        "B",
        "91.5%",
    ]


def test_accuracies_of_linear_heads_are_shown_beside_the_cuts(
    alone: Command, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 240)
    samples = (random.normal(size=(240, 8)) + 4 * labels[:, None]).astype("f")
    np.savez(tmp_path / "data.npz", images=samples, labels=labels)
    found = alone("cut", model, "--data", tmp_path / "data.npz", "--json").json
    (good,) = [one for one in found["choices"] if one["good"]]
    assert good["accuracy"] > 0.8
    answer = alone("cut", model, "--data", tmp_path / "data.npz", "--samples", "pictures")
    assert answer.code == 2
    assert "the data has no tensor 'pictures'" in answer.err


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "it is not said where to cut"),
    (("--out", "cut"), 2, "it is not said where to cut"),
    (("--at", "body", "--whole"), 2, "exclude each other"),
    (("--at", "boddy"), 2, "a good cut is --at body"),
    (("--at", "head", "--secret", "head.*"), 2, "The nearest good cut is --at body"),
    (("--at", "body", "--secret", "no*"), 2, "no weight of the model has a name"),
    (("--at", "body", "--input", "x=F32[N,9]"), 2, "does not fit the model"),
    (("--at", "body", "--input", "x=I64[N,8]"), 2, "of another type"),
    (("--at", "body", "--input", "z=F32[N,8]"), 2, "does not have; found z"),
    (("--at", "body", "--input", "what"), 2, "does not describe an input"),
    (("--at", "body", "--weights", "w.pt"), 2, "belong to models that code builds"),
]


@pytest.mark.parametrize(
    ("options", "code", "words"), REFUSED, ids=[" ".join(r[0]) or "none" for r in REFUSED]
)
def test_bad_calls_are_refused_in_a_sentence(
    options: tuple[str, ...],
    code: int,
    words: str,
    alone: Command,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = alone("cut", model, *options)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert alone("cut", model, *options, "--json").json["error"]
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["net.onnx"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.onnx", b"\x80\x04\x95", "a pickle or an archive"),
        ("m.onnx", b"garbage", "no usable ONNX model"),
        ("m.pt", b"\x80\x04\x95", "models are not taken from this"),
        ("m.txt", b"", "no kind of model"),
        (None, b"", "m.onnx"),
    ],
    ids=["pickle", "garbage", "pt", "txt", "missing"],
)
def test_files_that_are_no_models_are_refused(
    name: str | None, content: bytes, words: str, alone: Command, tmp_path: Path
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    answer = alone("cut", tmp_path / (name or "m.onnx"), "--suggest")
    assert answer.code == 2
    assert words in answer.err


def test_a_folder_that_cannot_be_written_is_named(
    alone: Command, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    answer = alone("cut", model, "--at", "body", "--out", tmp_path / "file" / "cut")
    assert answer.code == 2
    assert "cannot write into" in answer.err
