"""The byte code with which enclaves start: made once, measured, and useless when altered."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cenacle
from cenacle.attestation.bytecode import compiled, written_to
from cenacle.enclave import bytecode, launcher
from cenacle.enclave.bytecode import bytecode_folder
from cenacle.enclave.reference import measure_in_sandbox
from cenacle.enclave.sandbox import plan
from cenacle.errors import UnavailableError

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache folder with the byte code of this installation."""
    home = tmp_path_factory.mktemp("cache")
    made = bytecode_folder()  # the user's own, which other tests' enclaves start with as well
    ours = home / "cenacle" / "bytecode"
    shutil.copytree(made, ours / made.name)
    index = made.name.rpartition("-")[0] + ".json"
    shutil.copy(made.parent / index, ours / index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        assert bytecode_folder() == ours / made.name
        yield ours


def _index(cache: Path) -> Path:
    (found,) = cache.glob("*.json")
    return found


@pytest.mark.parametrize("name", bytecode._MODULES)
def test_what_enclaves_import_exists(name: str) -> None:
    """Where an extra is missing its modules are left out; a name that is wrong would be too."""
    assert importlib.util.find_spec(name) is not None


def test_it_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bytecode_folder()
    monkeypatch.setattr(bytecode, "interpreter_command", pytest.fail)  # no process is started
    assert bytecode_folder() == folder
    assert folder.parent == cache
    assert written_to(folder, Path(launcher.__file__)).is_file()


@pytest.mark.slow
def test_it_is_made_anew_when_a_source_has_changed_and_is_the_same_for_the_same(
    cache: Path,
) -> None:
    folder = bytecode_folder()
    index = json.loads(_index(cache).read_bytes())
    index["files"][-1][1] += 1
    _index(cache).write_text(json.dumps(index), encoding="utf-8")
    made = {path: path.read_bytes() for path in folder.rglob("*.pyc")}
    for path in made:
        path.unlink()
    folder.rename(folder.with_name("earlier"))
    assert bytecode_folder() == folder
    assert {path: path.read_bytes() for path in folder.rglob("*.pyc")} == made
    assert json.loads(_index(cache).read_bytes()) != index


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"folder": 1}', '{"folder": "", "files": [1]}'])
def test_a_damaged_index_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = _index(cache).read_bytes()
    _index(cache).write_text(damage, encoding="utf-8")

    def no_process(*_: object) -> list[str]:
        return ["/nonexistent/python"]

    monkeypatch.setattr(bytecode, "interpreter_command", no_process)
    try:
        with pytest.raises(UnavailableError, match="the interpreter of enclaves cannot be started"):
            bytecode_folder()
    finally:
        _index(cache).write_bytes(before)


@pytest.mark.slow
def test_a_copy_of_the_installation_has_byte_code_of_its_own_with_the_same_digest(
    cache: Path, tmp_path: Path
) -> None:
    package = Path(cenacle.__file__).parent
    shutil.copytree(package, tmp_path / "cenacle", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from cenacle.enclave.bytecode import bytecode_folder; print(bytecode_folder())"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = bytecode_folder(), Path(run.stdout.strip())
    assert ours != theirs
    assert ours.name.rpartition("-")[2] == theirs.name.rpartition("-")[2]
    assert written_to(theirs, tmp_path / "cenacle" / "errors.py").is_file()


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match="XDG_CACHE_HOME"):
        bytecode_folder()


def test_an_enclave_measures_what_it_was_started_with(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte code that is not its source's changes what the enclave shows, so no key is released."""
    chosen = plan(["process"])
    honest = measure_in_sandbox(chosen)
    folder = bytecode_folder()
    assert folder.name.endswith(honest["bytecode"].removeprefix("sha256:"))
    # The host writes another module's code under the right hash of the source.
    target = written_to(folder, Path(launcher.__file__))
    genuine = target.read_bytes()
    forged = bytearray(compiled(Path(launcher.__file__).read_bytes() + b"\nX = 1\n", "package/x"))
    forged[8:16] = genuine[8:16]
    target.write_bytes(forged)
    try:
        dishonest = measure_in_sandbox(chosen)
    finally:
        target.write_bytes(genuine)
    assert dishonest.pop("bytecode") != honest.pop("bytecode")
    assert dishonest == honest
