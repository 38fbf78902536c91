"""Models from files and code: what is taken, what is refused, and with which words."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript", reason="models are brought into ONNX with onnxscript")

import torch
from safetensors.torch import save_file
from torch import nn

from cenacle.cut.program import CLASSES, SCOPES
from cenacle.cut.sources import SOURCES, Source, load_model, parse_input, register_source
from cenacle.cut.specs import TensorSpec
from cenacle.errors import CenacleError, DataError, InputError
from tests.support.architectures import relative_error, run


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


class Branches(nn.Module):
    """Two inputs, one of integers; a residual sum; a recurrent layer; outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.memory = nn.LSTM(6, 5, batch_first=True)
        self.side = nn.Linear(4, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        _, (state, _) = self.memory(self.words(ids))
        both = self.dropout(state[0] + self.side(numbers))
        return {"scores": self.head(both), "features": both}


SPECS = [TensorSpec("ids", "I64", (None, 3)), TensorSpec("numbers", "F32", (None, 4))]


def test_a_module_keeps_its_names_and_answers_alike() -> None:
    torch.manual_seed(1)
    module = Branches()
    assert module.training
    model = load_model(module, inputs=SPECS)
    assert module.training, "the module is left as it was"
    assert model.inputs == tuple(SPECS)
    assert [spec.name for spec in model.outputs] == ["scores", "features"]
    assert [spec.shape for spec in model.outputs] == [(None, 2), (None, 5)]
    assert set(module.state_dict()) <= {tensor.name for tensor in model.proto.graph.initializer}
    assert {"words", "memory", "side", "head"} <= set(model.layers())
    for rows in (1, 4):
        ids, numbers = torch.randint(0, 11, (rows, 3)), torch.randn(rows, 4)
        with torch.no_grad():
            expected = module.eval()(ids, numbers)
        found = run(model, {"ids": ids.numpy(), "numbers": numbers.numpy()})
        for name, value in expected.items():
            assert relative_error(found[name], value.numpy()) <= 1e-6


def test_a_model_says_nothing_of_who_wrote_it() -> None:
    content = load_model(Branches(), inputs=SPECS).proto
    keys = {entry.key for node in content.graph.node for entry in node.metadata_props}
    assert keys <= {SCOPES, CLASSES}
    assert os.fsencode(Path(__file__).name) not in content.SerializeToString()
    assert not content.metadata_props
    assert not content.graph.metadata_props


class _Same(nn.Module):
    """The parts that a query must not meet."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return self.run(x)


class _Counting(nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x * self.seen


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (_Same(lambda x: nn.functional.dropout(x, 0.5)), "random numbers"),
        (_Same(lambda x: x, nn.BatchNorm1d(4, track_running_stats=False)), "parts.0"),
        (_Same(lambda x: x.view(2, 4) + 1), "fixes the number of rows"),
        (_Same(lambda x: x if x.sum() > 0 else -x), "torch.export"),
        (_Same(lambda x: torch.linalg.qr(x[:, :2, None])[0]), "aten.linalg_qr"),
        (_Counting(), "seen"),
        (nn.Linear(4, 2, device="meta"), "weight without values"),
        (nn.LazyLinear(2), "weight without values"),
    ],
    ids=["dropout", "batch-statistics", "rows", "branch", "operator", "state", "meta", "lazy"],
)
def test_a_model_that_cannot_be_cut_is_named(module: nn.Module, words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_model(module, inputs=[TensorSpec("x", "F32", (None, 4))])
    assert words in caught.value.diagnostics()
    assert caught.value.remedy


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        [],
        [parse_input("x=F32[N,4]"), parse_input("y=F32[N,4]")],
        [3],
        {"z": torch.ones(2, 4)},
    ],
    ids=["none", "empty", "two", "number", "name"],
)
def test_wrong_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError):
        load_model(nn.Linear(4, 2), inputs=inputs)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("image=F32[N,3,224,224]", TensorSpec("image", "F32", (None, 3, 224, 224))),
        ("ids = I64[N, 128]", TensorSpec("ids", "I64", (None, 128))),
        ("F32[1,2]", TensorSpec("input_0", "F32", (1, 2))),
        ("flag=BOOL[]", TensorSpec("flag", "BOOL", ())),
    ],
)
def test_inputs_are_written_as_specs(text: str, spec: TensorSpec) -> None:
    assert parse_input(text) == spec


_MALFORMED = ["", "x", "x=F32", "x=F32[n]", "x=F32[-1]", "x=F32[N,]", "x=f4[1]"]


@pytest.mark.parametrize("text", _MALFORMED)
def test_malformed_inputs_are_refused(text: str) -> None:
    with pytest.raises(CenacleError):
        parse_input(text)


@pytest.mark.parametrize(
    "name",
    ["m.pt", "m.PTH", "m.pkl", "m.x", "m.bin", "m.ckpt", "m.joblib", "m.h5", "m.pb", "m"],
)
def test_other_formats_are_refused_unread(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert ".keras" in str(caught.value.expected)
    assert not (tmp_path / "ran").exists()


def test_a_saved_model_of_tensorflow_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(InputError, match="tf2onnx"):
        load_model(tmp_path)


def test_kinds_of_files_can_be_added_but_not_taken_over(tmp_path: Path) -> None:
    for taken in (".onnx", ".pkl"):
        with pytest.raises(ValueError, match="taken"):
            register_source(Source("mine", (taken,), lambda path: pytest.fail(str(path))))
    whole = load_model(nn.Linear(4, 2), inputs=[TensorSpec("input", "F32", (None, 4))])
    register_source(Source("mine", (".mine",), lambda _: whole))
    try:
        (tmp_path / "a.mine").write_bytes(b"")
        assert load_model(tmp_path / "a.mine") is whole
    finally:
        del SOURCES[".mine"]


CODE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), [torch.zeros(1, 4)]

def fail():
    raise RuntimeError("no such thing")

def number():
    return 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cenacle_users_code.py"
    path.write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return path


def test_the_users_code_builds_a_model_that_weights_fill(code: Path) -> None:
    weights = {
        "0.weight": torch.full((3, 4), 0.5),
        "0.bias": torch.zeros(3),
        "2.weight": torch.ones(2, 3),
        "2.bias": torch.tensor([0.0, 1.0]),
    }
    save_file(weights, "weights.safetensors")
    torch.save(weights, "weights.pt")
    for spec, file in (
        (f"{code.name}:build", "weights.safetensors"),
        ("cenacle_users_code:build", "weights.pt"),
    ):
        model = load_model(spec, weights=Path(file))
        [found] = run(model, {"input": np.ones((2, 4), np.float32)}).values()
        np.testing.assert_allclose(found, [[6, 7]] * 2)


@pytest.mark.parametrize("function", ["missing", "fail", "number"])
def test_code_that_builds_no_model_is_refused(code: Path, function: str) -> None:
    with pytest.raises(InputError, match="build"):
        load_model(f"{code.name}:{function}")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.ones(2, 4)}, "1 missing (bias)"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2), "x": torch.ones(1)}, "(x)"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "another shape (weight)"),
        ({"weight": 3, "bias": torch.ones(2)}, "dict"),
    ],
    ids=["missing", "left over", "shape", "no tensor"],
)
def test_weights_must_fit_exactly(tmp_path: Path, weights: dict[str, Any], words: str) -> None:
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(DataError) as caught:
        load_model(nn.Linear(4, 2), weights=tmp_path / "w.pth", inputs=[torch.zeros(2, 4)])
    assert words in caught.value.diagnostics()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_a_file_of_weights_runs_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save({"weight": Trap(tmp_path / "ran")}, path)
    with pytest.raises(DataError, match="cannot be read"):
        load_model(nn.Linear(4, 2), weights=path, inputs=[torch.zeros(2, 4)])
    assert not (tmp_path / "ran").exists()
