"""NPZ, NPY, safetensors and PyTorch files, and what is refused because it could run code."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError, InputError
from cenacle.sealing import TensorReader, seal_path

ARRAYS: dict[str, Any] = {
    "images": np.arange(3 * 400_000, dtype=np.uint8).reshape(3, -1),
    "weights": np.random.default_rng(0).random((1000, 300), np.float32),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "fortran cube": np.asfortranarray(np.arange(24, dtype=">i2").reshape(2, 3, 4)),
    "big": np.arange(200_000, dtype=">i8"),
    "scalar": np.array(7, np.int32),
    "empty": np.empty((4, 0), np.float16),
    "flags": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
}


@pytest.fixture
def key() -> SecretBytes:
    return SecretBytes(bytes(range(32)))


def check(path: Path, key: SecretBytes, arrays: dict[str, Any]) -> None:
    with TensorReader(path, key) as reader:
        assert sorted(reader.names) == sorted(arrays)
        for name, array in arrays.items():
            found = reader.read(name)
            assert found.shape == array.shape
            assert found.dtype == array.dtype.newbyteorder("<")
            assert np.array_equal(found, array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, key: SecretBytes, save: Any) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    info = seal_path(tmp_path / "a.npz", tmp_path / "sealed", key)
    assert info.schema["tensors"]["weights"] == {"dtype": "F32", "shape": [1000, 300]}
    check(tmp_path / "sealed", key, ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_npy(tmp_path: Path, key: SecretBytes, name: str) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[name])
    seal_path(tmp_path / "a.npy", tmp_path / "sealed", key)
    check(tmp_path / "sealed", key, {"data": ARRAYS[name]})


def test_objects_are_refused(tmp_path: Path, key: SecretBytes) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.savez(tmp_path / "a.npz", good=np.zeros(3), bad=np.array([[1], [2, 3]], object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match=r"pickled Python objects.*Convert it"):
            seal_path(tmp_path / name, tmp_path / "sealed", key)
    assert not (tmp_path / "sealed").exists()


def npz(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return out.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}"
HOSTILE = {
    "empty": b"",
    "no zip": b"PK\x03\x04 nope",
    "no array": npz(a_npy=b"nope"),
    "other member": npz(readme=b"hello"),
    "code in the header": npz(a_npy=npy("__import__('os').system('true')")),
    "too short": npz(a_npy=npy(GOOD, bytes(7))),
    "too long": npz(a_npy=npy(GOOD, bytes(9))),
    "huge": npz(a_npy=npy("{'descr':'<f8','fortran_order':False,'shape':(1<<60,)}", bytes(8))),
    "2^120 items": npz(
        a_npy=npy(f"{{'descr':'<f8','fortran_order':False,'shape':({1 << 60},{1 << 60})}}", b"")
    ),
    "negative": npz(a_npy=npy("{'descr':'<f8','fortran_order':False,'shape':(-1,-1)}", bytes(8))),
    "bool size": npz(a_npy=npy("{'descr':'<f8','fortran_order':False,'shape':(True,)}", bytes(8))),
    "bad type": npz(a_npy=npy("{'descr':'nope','fortran_order':False,'shape':(1,)}", bytes(8))),
    "subarray": npz(
        a_npy=npy("{'descr':[('a','<f4',(2,))],'fortran_order':False,'shape':(1,)}", bytes(8))
    ),
    "version 9": npz(a_npy=npy(GOOD, bytes(8), b"\x09\x00")),
    "deep": npz(a_npy=npy("(" * 900 + ")" * 900)),
    "open bracket": npz(a_npy=npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,")),
    "text": npz(a_npy=npy("{'descr':'<U2','fortran_order':False,'shape':(1,)}", bytes(8))),
    "void": npz(a_npy=npy("{'descr':'|V0','fortran_order':False,'shape':(1,)}")),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives(tmp_path: Path, key: SecretBytes, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError):
        seal_path(tmp_path / "a.npz", tmp_path / "sealed", key)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_archives_never_crash(
    tmp_path: Path, key: SecretBytes, data: st.DataObject
) -> None:
    out = io.BytesIO()
    np.savez_compressed(out, a=np.arange(10.0), b=np.zeros((2, 2), np.uint8))
    content = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.npz").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CenacleError):
        seal_path(tmp_path / "a.npz", tmp_path / "sealed", key)


def test_safetensors(tmp_path: Path, key: SecretBytes) -> None:
    arrays = {n: np.ascontiguousarray(a, a.dtype.newbyteorder("<")) for n, a in ARRAYS.items()}
    del arrays["complex"]
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"made": "here"})
    seal_path(tmp_path / "a.safetensors", tmp_path / "sealed", key)
    check(tmp_path / "sealed", key, arrays)


def test_a_malformed_safetensors_file(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(DataError, match="safetensors"):
        seal_path(tmp_path / "a.safetensors", tmp_path / "sealed", key)


def model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dicts(tmp_path: Path, key: SecretBytes, suffix: str) -> None:
    state = model().state_dict()
    state["tied"] = state["0.weight"]
    state["half"] = torch.arange(4).to(torch.bfloat16)
    state["strided"] = torch.arange(12).reshape(3, 4).t()
    state["empty"] = torch.empty(0, 3)
    torch.save(state, tmp_path / f"a{suffix}")
    info = seal_path(tmp_path / f"a{suffix}", tmp_path / "sealed", key)
    assert info.schema["tensors"]["half"]["dtype"] == "BF16"
    with TensorReader(tmp_path / "sealed", key) as reader:
        for name, tensor in state.items():
            expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert np.array_equal(reader.read(name), expected.numpy())


class Evil:
    """What a hostile checkpoint holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_other_pytorch_files_are_refused_unexecuted(tmp_path: Path, key: SecretBytes) -> None:
    mark = tmp_path / "mark"
    contents: dict[str, Any] = {
        "module": model(),
        "evil": {"a": Evil(mark)},
        "list": [torch.zeros(1)],
        "nested": {"model": model().state_dict()},
        "numbers": {"lr": 0.1},
        "keys": {1: torch.zeros(1)},
        "nothing": {},
        "sparse": {"a": torch.eye(3).to_sparse()},
        "complex128": {"a": torch.zeros(1, dtype=torch.complex128)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(DataError, match="not a plain state dict"):
            seal_path(tmp_path / f"{name}.pt", tmp_path / "sealed", key)
    torch.save(model().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": Evil(mark)}))
    (tmp_path / "bytes.pt").write_bytes(b"nope")
    for name in ("old", "bare", "bytes"):
        with pytest.raises(DataError, match="no zip archive"):
            seal_path(tmp_path / f"{name}.pt", tmp_path / "sealed", key)
    assert not mark.exists()
    assert not (tmp_path / "sealed").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_damaged_pytorch_files_never_crash(
    tmp_path: Path, key: SecretBytes, data: st.DataObject
) -> None:
    out = io.BytesIO()
    torch.save({"a": torch.arange(10.0)}, out)
    content = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.pt").write_bytes(content)
    with contextlib.suppress(CenacleError):
        seal_path(tmp_path / "a.pt", tmp_path / "sealed", key)


def test_without_torch(tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(model().state_dict(), tmp_path / "a.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"Run pip install 'cenacle\[train\]'"):
        seal_path(tmp_path / "a.pt", tmp_path / "sealed", key)


@pytest.mark.parametrize("name", ["a.pkl", "a.PICKLE", "a.joblib", "a.dill", "a.p"])
@pytest.mark.parametrize("kind", [None, "file", "tensors", "table"])
def test_pickles_are_refused_whatever_is_asked(
    tmp_path: Path, key: SecretBytes, name: str, kind: str | None
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"a": Evil(tmp_path / "mark")}))
    with pytest.raises(DataError, match=r"pickle is refused.*safetensors"):
        seal_path(tmp_path / name, tmp_path / "sealed", key, kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == [name]
