"""Keras models from files: every layer can be the cut, and nothing in a file is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="models are brought into ONNX with onnxscript")
if find_spec("keras") is None:  # importing it here would fix its backend
    pytest.skip("Keras is not installed", allow_module_level=True)
h5py = pytest.importorskip("h5py")

from cenacle.cut.keras_archive import check_config, check_weights, open_archive  # noqa: E402
from cenacle.cut.keras_source import import_keras  # noqa: E402
from cenacle.cut.onnx_model import OnnxModel  # noqa: E402
from cenacle.cut.program import quiet  # noqa: E402
from cenacle.cut.sources import load_model  # noqa: E402
from cenacle.errors import DataError, InputError  # noqa: E402
from tests.support.architectures import check_every_cut, relative_error, run  # noqa: E402

ROWS = 3
LAYERS = {"conv", "bn", "dw", "sep", "add", "emb", "lstm", "cat", "inner", "inner.first", "head"}
Parts = dict[str, bytes]


@pytest.fixture(scope="module")
def keras() -> Any:
    return import_keras()


@pytest.fixture(scope="module")
def mixed(keras: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Branches, normalisation, depthwise and separable convolutions, an embedding, an LSTM, a
    model inside the model."""
    layers = keras.layers
    with quiet():
        keras.utils.set_random_seed(3)
        image = keras.Input((8, 8, 3), name="image")
        ids = keras.Input((4,), dtype="int32", name="ids")
        x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(image)
        x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
        left = layers.DepthwiseConv2D(3, strides=2, padding="same", name="dw")(x)
        right = layers.SeparableConv2D(6, 3, 2, "same", activation="relu", name="sep")(x)
        x = layers.GlobalAveragePooling2D(name="gap")(layers.Add(name="add")([left, right]))
        words = layers.Embedding(9, 5, mask_zero=True, name="emb")(ids)
        both = layers.Concatenate(name="cat")([x, layers.LSTM(4, name="lstm")(words)])
        inner = keras.Sequential(
            [keras.Input((10,)), layers.Dense(7, "relu", name="first"), layers.Dropout(0.5)],
            name="inner",
        )
        head = layers.Dense(3, activation="softmax", name="head")(keras.ops.tanh(inner(both)))
        model = keras.Model([image, ids], head, name="mixed")
        generator = np.random.default_rng(4)
        bn = model.get_layer("bn")
        bn.set_weights([generator.uniform(0.5, 1.5, 6).astype(np.float32) for _ in range(4)])
        path = tmp_path_factory.mktemp("keras") / "mixed.keras"
        model.save(path)
    return path, model


@pytest.fixture(scope="module")
def parts(mixed: tuple[Path, Any]) -> Parts:
    with zipfile.ZipFile(mixed[0]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, parts: Parts, *, kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def test_every_layer_of_a_file_can_be_the_cut(mixed: tuple[Path, Any], tmp_path: Path) -> None:
    path, original = mixed
    model = load_model(path)
    assert [(spec.name, spec.shape) for spec in model.inputs] == [
        ("image", (None, 8, 8, 3)),
        ("ids", (None, 4)),
    ]
    assert [spec.name for spec in model.outputs] == ["head"]
    assert set(model.layers()) >= LAYERS
    # One layer each, however many operations it takes; weights by their Keras paths.
    assert not [name for name in model.layers() if name.startswith("lstm.")]
    stored = {variable.path for variable in original.variables if "seed" not in variable.path}
    assert {"conv/kernel", "bn/moving_mean", "lstm/lstm_cell/kernel", "inner/first/bias"} <= stored
    assert stored <= {tensor.name for tensor in model.proto.graph.initializer}

    generator = np.random.default_rng(5)
    image = generator.standard_normal((ROWS, 8, 8, 3), np.float32)
    inputs = {"image": image, "ids": np.array([[1, 2, 0, 0], [3, 4, 5, 6], [8, 0, 0, 0]], np.int32)}
    expected = {"head": original([image, inputs["ids"]], training=False).detach().numpy()}
    assert relative_error(run(model, inputs)["head"], expected["head"]) <= 1e-6
    model.save(tmp_path / "whole.onnx")
    again = OnnxModel.load(tmp_path / "whole.onnx")
    assert check_every_cut(again, inputs, expected, fast=True) >= len(LAYERS) - 1


def test_a_sequential_model_is_taken_as_it_is(keras: Any) -> None:
    with quiet():
        model = keras.Sequential(
            [keras.Input((4,), name="x"), keras.layers.Dense(3, name="a"), keras.layers.ReLU()]
        )
    found = load_model(model)
    x = np.ones((2, 4), np.float32)
    [value] = run(found, {"x": x}).values()
    np.testing.assert_allclose(value, model(x).detach().numpy(), rtol=1e-6)
    assert found.parameters == ("a/kernel", "a/bias")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda k: k.Sequential([k.layers.Dense(3)]), "no graph"),
        (lambda k: k.Sequential([k.Input((None, 3)), k.layers.LSTM(2)]), "unusable shape"),
        (
            lambda k: k.Sequential([k.Input(batch_shape=(2, 3, 3)), k.layers.LSTM(2)]),
            "unusable shape",
        ),
    ],
    ids=["no inputs", "any length", "fixed rows"],
)
def test_models_without_fixed_sizes_are_refused(
    keras: Any, build: Callable[[Any], Any], words: str
) -> None:
    with quiet():
        model = build(keras)
    with pytest.raises(DataError, match=words):
        load_model(model)


def test_another_backend_is_refused() -> None:
    script = (
        "import sys, types\n"
        "keras = sys.modules['keras'] = types.ModuleType('keras')\n"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'jax')\n"
        "from cenacle.cut.keras_source import import_keras\n"
        "import_keras()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "KERAS_BACKEND=torch" in done.stderr.splitlines()[-1]


# --- files that would run code, read other files, or never end ----------------------------------


def _object(name: str, module: str | None, config: Any = None, **more: Any) -> dict[str, Any]:
    return {"class_name": name, "module": module, "config": config or {}, **more}


@pytest.mark.parametrize(
    "layer",
    [
        _object("Lambda", "keras.layers", {"function": {"class_name": "__lambda__", "config": {}}}),
        _object("__lambda__", "builtins", {"value": "x"}),
        _object("TorchModuleWrapper", "keras.layers", {"module": "gASVx"}),
        _object("TFSMLayer", "keras.layers", {"filepath": "/etc/passwd"}),
        _object("StringLookup", "keras.layers", {"vocabulary": "/etc/passwd"}),
        _object("TextVectorization", "keras.layers"),
        _object("Dense", "users.code"),
        _object("Dense", None),
        _object("Dense", "keras.layers", registered_name="users>Dense"),
        _object("function", "builtins", "get_file", registered_name="get_file"),
        _object("function", "keras.utils", "get_file"),
        _object("function", "keras.activations", "relu", registered_name="users>relu"),
        _object("Popen", "subprocess"),
        _object("system", "os"),
        _object("load_model", "keras.saving"),
        _object("Scan", "keras.src.ops.core"),
        _object("__bytes__", None, {"value": "x"}),
        _object("a.b", "keras.initializers"),
        {"class_name": ["Dense"], "module": "keras.layers", "config": {}},
    ],
    ids=lambda layer: f"{layer['class_name']} of {layer['module']}",
)
def test_objects_from_outside_keras_are_refused(layer: dict[str, Any]) -> None:
    outer = {"module": "keras", "class_name": "Sequential", "config": {"layers": [layer]}}
    with pytest.raises(DataError) as caught:
        check_config(outer)
    assert caught.value.remedy


def test_a_description_is_a_model_of_bounded_depth() -> None:
    wrongs: list[Any] = [[], {}, {"class_name": "Dense", "module": "keras.layers"}]
    for wrong in wrongs:
        with pytest.raises(DataError, match="no model"):
            check_config(wrong)
    deep: Any = {}
    for _ in range(300):
        deep = {"config": deep}
    with pytest.raises(DataError, match="deep"):
        check_config({"class_name": "Sequential", "module": "keras", "config": deep})


def test_what_only_training_needs_is_left_out(parts: Parts) -> None:
    config = json.loads(parts["config.json"])
    config["compile_config"] = {"loss": _object("function", "users", "steal")}
    assert "compile_config" not in check_config(config)


def _bomb(parts: Parts) -> Parts:
    return {**parts, "model.weights.h5": b"\0" * (50 << 20)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: {**parts, "assets/vocabulary.txt": b"a"}, "no model needs"),
        (lambda parts: {**parts, "../config.json": b"{}"}, "no model needs"),
        (lambda parts: {**parts, "/etc/x": b""}, "no model needs"),
        (lambda parts: {**parts, "model.weights.npz": b""}, "no model needs"),
        (_bomb, "unpacks to too much"),
        (lambda parts: {n: c for n, c in parts.items() if n != "config.json"}, "incomplete"),
        (lambda parts: {**parts, "config.json": b"{"}, "no JSON"),
        (lambda parts: {**parts, "config.json": b"[" * 100_000}, "no JSON"),
        (lambda parts: {**parts, "model.weights.h5": b"no HDF5"}, "unreadable"),
        (lambda parts: {**parts, "model.weights.h5": parts["model.weights.h5"][:999]}, "weights"),
    ],
    ids=["asset", "parent", "root", "npz", "bomb", "part", "json", "deep", "h5", "cut off"],
)
def test_archives_with_anything_else_are_refused(
    tmp_path: Path, parts: Parts, change: Callable[[Parts], Parts], words: str
) -> None:
    path = _write(tmp_path / "m.keras", change(parts), kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=words), open_archive(path):
        pass


def test_links_in_archives_and_other_files_are_refused(tmp_path: Path, parts: Parts) -> None:
    entry = zipfile.ZipInfo("config.json")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.keras", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    (tmp_path / "text.keras").write_text("no zip")
    for name in ("link", "text"):
        with pytest.raises(DataError), open_archive(tmp_path / f"{name}.keras"):
            pass
    with pytest.raises(InputError), open_archive(tmp_path / "none.keras"):
        pass


def _external_link(file: Any, secret: Path) -> None:
    file["a"] = h5py.ExternalLink(str(secret), "/x")


def _external_data(file: Any, secret: Path) -> None:
    file.create_dataset("a", (4,), "u1", external=[(str(secret), 0, 4)])


def _virtual(file: Any, secret: Path) -> None:
    layout = h5py.VirtualLayout((4,), "u1")
    layout[:] = h5py.VirtualSource(str(secret), "x", (4,))
    file.create_virtual_dataset("a", layout)


def _sparse(file: Any, secret: Path) -> None:
    file.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")


def _loop(file: Any, secret: Path) -> None:
    file.create_group("a")["again"] = file["/"]


def _soft(file: Any, secret: Path) -> None:
    file["x"] = np.zeros(3)
    file["a"] = h5py.SoftLink("/x")


def _texts(file: Any, secret: Path) -> None:
    file.create_dataset("a", data=["text"], dtype=h5py.string_dtype())


def _pointers(file: Any, secret: Path) -> None:
    file.create_dataset("a", (1,), dtype=h5py.ref_dtype)


@pytest.mark.parametrize(
    "write",
    [_external_link, _external_data, _virtual, _sparse, _loop, _soft, _texts, _pointers],
    ids=lambda write: write.__name__.strip("_"),
)
def test_weights_that_point_elsewhere_are_refused(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    (tmp_path / "secret").write_bytes(b"key!")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        write(file, tmp_path / "secret")
    with pytest.raises(DataError):
        check_weights(tmp_path / "w.h5")


def test_a_description_that_asks_for_more_than_its_weights_is_refused(
    tmp_path: Path, parts: Parts
) -> None:
    """A terabyte of random numbers, if Keras were left to build it first."""
    config = json.loads(parts["config.json"])
    dense = next(layer for layer in config["config"]["layers"] if layer["name"] == "emb")
    dense["config"]["input_dim"] = 1 << 36
    path = _write(tmp_path / "m.keras", {**parts, "config.json": json.dumps(config).encode()})
    with pytest.raises(DataError, match="do not fit"):
        load_model(path)


def test_the_environment_is_left_as_it_was(keras: Any) -> None:
    assert os.environ.get("KERAS_BACKEND") in {None, "torch"}
    assert keras.backend.backend() == "torch"
