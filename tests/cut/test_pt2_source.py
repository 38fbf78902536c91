"""Archives of torch.export: what is in them is read, and nothing of it is run."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript", reason="models are brought into ONNX with onnxscript")

import torch
from torch import nn

from cenacle.cut.program import quiet
from cenacle.cut.pt2_archive import read_archive
from cenacle.cut.pt2_source import load_program
from cenacle.cut.sources import load_model
from cenacle.errors import DataError, InputError
from tests.support.architectures import relative_error, run

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
Parts = dict[str, bytes]


class Net(nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4, 1, 1), 2.0))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(image)).relu() * self.scale
        return {"logits": self.head(y.mean((2, 3))), "total": y.flatten(1).sum(1) + 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(2)
    module = Net().eval()
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch")
    with quiet():
        program = torch.export.export(
            module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},)
        )
        torch.export.save(program, path)
    return path, module


@pytest.fixture(scope="module")
def parts(saved: tuple[Path, nn.Module]) -> Parts:
    with zipfile.ZipFile(saved[0]) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _write(path: Path, parts: Parts, *, top: str = "net", packed: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(f"{top}/{name}", content)
    return path


def test_a_program_answers_as_the_module_that_it_came_from(saved: tuple[Path, nn.Module]) -> None:
    path, module = saved
    model = load_model(path)
    assert [spec.name for spec in model.inputs] == ["image"]
    assert [spec.name for spec in model.outputs] == ["logits", "total"]
    assert {"conv", "norm", "head"} <= set(model.layers())
    assert {"conv.weight", "norm.running_mean", "head.bias", "scale"} <= set(model.parameters)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = module(x)
    found = run(model, {"image": x.numpy()})
    for name, value in expected.items():
        assert relative_error(found[name], value.numpy()) <= 1e-6


# --- archives that would run code in torch.export.load ------------------------------------------


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def _saved_trap(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Trap(mark),), buffer)
    return buffer.getvalue()


def _edited(parts: Parts, name: str, edit: Callable[[Any], None]) -> Parts:
    description = json.loads(parts[name])
    edit(description)
    return {**parts, name: json.dumps(description).encode()}


def test_sample_inputs_stay_a_pickle(tmp_path: Path, parts: Parts) -> None:
    """The attack is real: PyTorch's own loader runs it. Here it is not even read."""
    mark = tmp_path / "ran"
    path = _write(tmp_path / "net.pt2", {**parts, SAMPLES: _saved_trap(mark)})
    assert load_program(path).graph_signature.user_inputs == ("image",)
    assert not mark.exists()
    with quiet():
        torch.export.load(path)
    assert mark.exists()


def test_a_symbolic_size_is_no_code(tmp_path: Path, parts: Parts) -> None:
    """PyTorch evaluates these texts as Python."""
    mark = tmp_path / "ran"
    attack = f"__import__('os').mkdir({str(mark)!r})"

    def edit(model: Any) -> None:
        values = model["graph_module"]["graph"]["tensor_values"]
        values["image"]["sizes"][0]["as_expr"]["expr_str"] = attack

    path = _write(tmp_path / "net.pt2", _edited(parts, MODEL, edit))
    with pytest.raises(DataError, match="is code"):
        load_model(path)
    assert not mark.exists()


def _pickled_weight(parts: Parts, mark: Path) -> Parts:
    def edit(table: Any) -> None:
        table["config"]["conv.weight"]["use_pickle"] = True

    return {**_edited(parts, WEIGHTS, edit), "data/weights/weight_0": _saved_trap(mark)}


def _opaque_constant(parts: Parts, mark: Path) -> Parts:
    def edit(table: Any) -> None:
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}
        table["config"]["thing"] = payload | {"tensor_meta": None}

    pickled = pickle.dumps(Trap(mark))
    return {**_edited(parts, CONSTANTS, edit), "data/constants/opaque_obj_0": pickled}


def _legacy(name: str) -> Callable[[Parts, Path], Parts]:
    return lambda parts, mark: {**parts, name: _saved_trap(mark)}


def _in_graph(edit: Callable[[Any, Path], None]) -> Callable[[Parts, Path], Parts]:
    def changed(parts: Parts, mark: Path) -> Parts:
        return _edited(parts, MODEL, lambda model: edit(model["graph_module"]["graph"], mark))

    return changed


def _mkdir(graph: Any, mark: Path) -> None:
    node = graph["nodes"][1]
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "", "arg": {"as_string": str(mark)}, "kind": 1}]


def _from_file(graph: Any, mark: Path) -> None:
    node = graph["nodes"][1]
    node["target"] = "torch.ops.aten.from_file.default"
    node["inputs"] = [{"name": "filename", "arg": {"as_string": str(mark)}, "kind": 1}]


def _old_interpreter(graph: Any, mark: Path) -> None:
    graph["nodes"][1]["target"] = "torch.ops.aten.save.default"


def _name(graph: Any, mark: Path) -> None:
    graph["nodes"][1]["name"] = f"x = __import__('os').mkdir({str(mark)!r})"


def _control_flow(graph: Any, mark: Path) -> None:
    graph["nodes"][1]["inputs"][0]["arg"] = {"as_graph": {"name": "g", "graph": {}}}


def _path(graph: Any, mark: Path) -> None:
    graph["nodes"][1]["inputs"][0]["arg"] = {"as_string": str(mark)}


ATTACKS: dict[str, Callable[[Parts, Path], Parts]] = {
    "pickled weight": _pickled_weight,
    "opaque constant": _opaque_constant,
    "script object": _legacy("data/constants/custom_obj_0"),
    "legacy weights": _legacy("data/weights/model.pt"),
    "legacy constants": _legacy("data/constants/model.pt"),
    "compiled program": _legacy("data/aotinductor/model/a.so"),
    "any function": _in_graph(_mkdir),
    "reads a file": _in_graph(_from_file),
    "old interpreter": _in_graph(_old_interpreter),
    "name as source": _in_graph(_name),
    "control flow": _in_graph(_control_flow),
    "a path": _in_graph(_path),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_archives_that_would_run_code_are_refused(tmp_path: Path, parts: Parts, name: str) -> None:
    mark = tmp_path / "ran"
    path = _write(tmp_path / "net.pt2", ATTACKS[name](copy.deepcopy(parts), mark))
    with pytest.raises(DataError) as caught:
        load_model(path)
    assert caught.value.remedy
    assert not mark.exists()


# --- archives that are damaged ------------------------------------------------------------------


def _weight(field: str, value: Any) -> Callable[[Parts], Parts]:
    def edit(table: Any) -> None:
        table["config"]["conv.weight"]["tensor_meta"][field] = value

    return lambda parts: _edited(parts, WEIGHTS, edit)


def _program(*path: Any, value: Any) -> Callable[[Parts], Parts]:
    def edit(model: Any) -> None:
        for step in path[:-1]:
            model = model[step]
        model[path[-1]] = value

    return lambda parts: _edited(parts, MODEL, edit)


_HUGE = [{"as_int": 1 << 40}, {"as_int": 3}, {"as_int": 3}, {"as_int": 3}]
_STILL = [{"as_int": 0}] * 4
DAMAGES: dict[str, Callable[[Parts], Parts]] = {
    "no program": lambda parts: {n: c for n, c in parts.items() if n != MODEL},
    "two programs": lambda parts: {**parts, "models/other.json": parts[MODEL]},
    "no weight": lambda parts: {n: c for n, c in parts.items() if n != "data/weights/weight_0"},
    "short weight": lambda parts: {**parts, "data/weights/weight_0": b"\0" * 8},
    "huge weight": _weight("sizes", _HUGE),
    "repeated weight": lambda parts: _weight("strides", _STILL)(_weight("sizes", _HUGE)(parts)),
    "far weight": _weight("storage_offset", {"as_int": 1 << 40}),
    "negative stride": _weight("strides", [{"as_int": -1}] * 4),
    "no type": _weight("dtype", 999),
    "no JSON": lambda parts: {**parts, MODEL: b"{"},
    "deep JSON": lambda parts: {**parts, MODEL: b"[" * 100_000},
    "a list": lambda parts: {**parts, MODEL: b"[]"},
    "big endian": lambda parts: {**parts, "byteorder": b"big"},
    "no nodes": _program("graph_module", "graph", "nodes", value=[]),
    "no graph": _program("graph_module", value={}),
    "unknown operator": _program(
        "graph_module", "graph", "nodes", 1, "target", value="torch.ops.aten.no_such.default"
    ),
    "later version": _program("schema_version", "major", value=99),
    "outside": lambda parts: {**parts, "extra/../../x": b""},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_archives_are_refused(tmp_path: Path, parts: Parts, name: str) -> None:
    path = _write(tmp_path / "net.pt2", DAMAGES[name](copy.deepcopy(parts)))
    with pytest.raises(DataError):
        load_program(path)


def test_what_is_no_archive_is_refused(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(InputError):
        read_archive(tmp_path / "none.pt2")
    path = tmp_path / "net.pt2"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="no archive"):
        read_archive(path)
    with pytest.raises(DataError, match="compressed"):
        read_archive(_write(tmp_path / "packed.pt2", parts, packed=True))
    whole = _write(tmp_path / "whole.pt2", parts).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError):
        read_archive(path)
