"""The two verbs: what becomes what, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cenacle.sealing
from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, InputError, SealError
from cenacle.sealing import SealedReader, seal_bytes, seal_path, seal_tensors, unseal_path
from cenacle.sealing.importers import find_importer, importer
from cenacle.sealing.importers import registry as registry_module

SUFFIXES = {
    "a.csv": "table",
    "A.CSV": "table",
    "a.tsv": "table",
    "a.parquet": "table",
    "a.arrow": "table",
    "a.npz": "tensors",
    "a.npy": "tensors",
    "a.idx": "tensors",
    "a-idx3-ubyte": "tensors",
    "a-idx3-ubyte.gz": "tensors",
    "a.safetensors": "tensors",
    "a.pt": "tensors",
    "a.txt": "file",
    "a.gz": "file",
    "a": "file",
    "": "file",
    "a.csv.bak": "file",
    "a.pkl": "",
}


@pytest.mark.parametrize(("name", "kind"), SUFFIXES.items())
def test_suffixes(name: str, kind: str) -> None:
    assert find_importer(Path("folder.csv") / name if name else Path()).kind == kind


@pytest.mark.parametrize("name", [name for name, kind in SUFFIXES.items() if kind])
def test_any_file_can_be_sealed_as_it_is(name: str) -> None:
    assert find_importer(Path(name), "file").kind == "file"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.csv", "tensors"), ("a.npz", "table"), ("a.txt", "package")]
)
def test_kinds_that_do_not_fit(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"cannot be sealed as {kind}"):
        find_importer(Path(name), kind)


def test_unknown_kinds(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"unknown kind.*file, table, tensors, package"):
        seal_path(tmp_path / "a.txt", tmp_path / "sealed", key, kind="model")


def test_a_user_can_register_an_importer(
    tmp_path: Path, key: SecretBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_IMPORTERS", [*registry_module._IMPORTERS])

    @importer("shouting", "file", (".loud",))
    def shout(path: Path, writer: Any, options: Any) -> dict[str, Any]:
        writer.write(path.read_bytes().upper())
        return {"volume": 11}

    (tmp_path / "a.loud").write_bytes(b"hey")
    info = seal_path(tmp_path / "a.loud", tmp_path / "sealed", key)
    assert info.schema == {"volume": 11}
    assert SealedReader(tmp_path / "sealed", key).read_range(0, 3) == b"HEY"


@pytest.mark.parametrize("name", ["a.csv", "a.npz", "a.idx", "a.safetensors", "a.pt", "a.bin"])
@pytest.mark.parametrize("what", ["absent", "folder in the way", "same file"])
def test_unusable_paths(tmp_path: Path, key: SecretBytes, name: str, what: str) -> None:
    source, target = tmp_path / name, tmp_path / "sealed"
    if what == "folder in the way":
        source.touch()
        target.mkdir()
    elif what == "same file":
        source.touch()
        target = source
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError):
        seal_path(source, target, key)
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_is_only_a_package(tmp_path: Path, key: SecretBytes) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="directory cannot be sealed as table"):
        seal_path(tmp_path / "folder", tmp_path / "sealed", key, kind="table")


@pytest.mark.parametrize("content", [b"", b"x", bytes(3 << 20)])
def test_round_trip_of_a_file(tmp_path: Path, key: SecretBytes, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    info = seal_path(tmp_path / "a.bin", tmp_path / "sealed", key)
    opened = unseal_path(
        tmp_path / "sealed",
        tmp_path / "b.bin",
        key,
        expected_header=info.header_digest,
        expected_digest=info.digest,
    )
    assert opened == info
    assert (tmp_path / "b.bin").read_bytes() == content


def test_unsealing_the_wrong_file_or_with_the_wrong_key(
    tmp_path: Path, key: SecretBytes, other_key: SecretBytes
) -> None:
    one = seal_bytes(b"one", tmp_path / "one", key)
    seal_bytes(b"two", tmp_path / "two", key)
    with pytest.raises(SealError, match="not the one that was named"):
        unseal_path(tmp_path / "two", tmp_path / "out", key, expected_header=one.header_digest)
    with pytest.raises(SealError, match="not the one that was named"):
        unseal_path(tmp_path / "two", tmp_path / "out", key, expected_digest=one.digest)
    with pytest.raises(SealError, match="key"):
        unseal_path(tmp_path / "two", tmp_path / "out", other_key)
    assert not (tmp_path / "out").exists()


def test_tensors_need_their_suffix(tmp_path: Path, key: SecretBytes) -> None:
    seal_tensors({"a": np.zeros(3)}, tmp_path / "sealed", key)
    with pytest.raises(InputError, match=r"expected \.safetensors"):
        unseal_path(tmp_path / "sealed", tmp_path / "out.npz", key)
    info = unseal_path(tmp_path / "sealed", tmp_path / "out.safetensors", key)
    assert info.schema == {"tensors": {"a": {"dtype": "F64", "shape": [3]}}}


def test_every_error_is_ours(tmp_path: Path, key: SecretBytes) -> None:
    """A file whose suffix lies about its content."""
    for name in (name for name, kind in SUFFIXES.items() if kind in ("table", "tensors")):
        for content in (b"", b"\0" * 100, b"hello, world\n" * 5, bytes(range(256))):
            (tmp_path / name).write_bytes(content)
            with contextlib.suppress(CenacleError):
                seal_path(tmp_path / name, tmp_path / "sealed", key)


def test_the_public_names_are_complete_and_sorted() -> None:
    names = cenacle.sealing.__all__
    assert names == sorted(names)
    assert all(hasattr(cenacle.sealing, name) for name in names)
