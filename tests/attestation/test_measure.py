"""Measurements move with every byte that an enclave may run, and with nothing else."""

from __future__ import annotations

import os
import shutil
import site
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cenacle
from cenacle.attestation import measure_enclave
from cenacle.attestation.measure import (
    measure_dependencies,
    measure_interpreter,
    measure_package,
)
from cenacle.errors import UnavailableError


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, without byte-code caches."""
    return shutil.copytree(
        Path(cenacle.__file__).parent,
        tmp_path / "cenacle",
        ignore=shutil.ignore_patterns("__pycache__"),
    )


def test_a_copy_measures_like_the_original(package: Path) -> None:
    assert measure_package(package) == measure_package()
    assert measure_package(package).startswith("sha256:")


Change = Callable[[Path], object]

CHANGES = [
    pytest.param(lambda p: _flip(p / "errors.py", 0), id="the first byte of a file"),
    pytest.param(lambda p: _flip(p / "errors.py", -1), id="the last byte of a file"),
    pytest.param(lambda p: _flip(p / "documents" / "base.py", 1000), id="a byte in a subfolder"),
    pytest.param(lambda p: (p / "errors.py").write_bytes(b""), id="a file emptied"),
    pytest.param(lambda p: (p / "py.typed").write_bytes(b" "), id="a file that is not code"),
    pytest.param(lambda p: (p / "errors.py").unlink(), id="a file removed"),
    pytest.param(lambda p: (p / "more.py").touch(), id="an empty file added"),
    pytest.param(lambda p: (p / ".hidden").touch(), id="a hidden file added"),
    pytest.param(lambda p: (p / "errors.pyc").touch(), id="byte code outside a cache added"),
    pytest.param(lambda p: (p / "errors.so").touch(), id="an extension module added"),
    pytest.param(lambda p: (p / "errors.py").rename(p / "error.py"), id="a file renamed"),
    pytest.param(lambda p: (p / "errors.py").rename(p / "crypto" / "errors.py"), id="moved"),
    pytest.param(lambda p: _swap(p / "errors.py", p / "__main__.py"), id="two contents swapped"),
    pytest.param(lambda p: _package(p / "errors"), id="a folder that shadows a module"),
]


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _package(folder: Path) -> None:
    folder.mkdir()
    (folder / "__init__.py").write_text("evil = True\n")


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_moves_the_measurement(package: Path, change: Change) -> None:
    before = measure_package(package)
    change(package)
    assert measure_package(package) != before


def test_a_linked_folder_counts_like_its_content(package: Path, tmp_path: Path) -> None:
    """``errors`` would be imported before ``errors.py``, wherever the link leads."""
    before = measure_package(package)
    _package(tmp_path / "elsewhere")
    (package / "errors").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    linked = measure_package(package)
    assert linked != before
    _flip(tmp_path / "elsewhere" / "__init__.py", 0)
    assert measure_package(package) not in {before, linked}


def test_a_linked_file_counts_like_its_content(package: Path, tmp_path: Path) -> None:
    before = measure_package(package)
    (package / "errors.py").rename(tmp_path / "errors.py")
    (package / "errors.py").symlink_to(tmp_path / "errors.py")
    assert measure_package(package) == before
    _flip(tmp_path / "errors.py", 0)
    assert measure_package(package) != before


def test_folders_that_contain_themselves(package: Path, tmp_path: Path) -> None:
    for target in (".", "..", str(package)):
        link = package / "crypto" / "loop"
        link.symlink_to(target, target_is_directory=True)
        with pytest.raises(UnavailableError, match="cannot be measured"):
            measure_package(package)
        link.unlink()
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "other").symlink_to(other, target_is_directory=True)
    (other / "one").symlink_to(one, target_is_directory=True)
    (package / "loop").symlink_to(one, target_is_directory=True)
    with pytest.raises(UnavailableError, match="contains itself"):
        measure_package(package)


def test_byte_code_caches_are_not_read_and_not_measured(package: Path) -> None:
    before = measure_package(package)
    for folder in (package, package / "crypto"):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"anything")
    assert measure_package(package) == before


def test_times_owners_and_order_do_not_matter(package: Path) -> None:
    before = measure_package(package)
    os.utime(package / "errors.py", (0, 0))
    (package / "errors.py").chmod(0o640)
    shutil.copy(package / "errors.py", package / "z.py")
    (package / "errors.py").unlink()
    (package / "z.py").rename(package / "errors.py")
    assert measure_package(package) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_what_cannot_be_read_is_an_error(package: Path) -> None:
    for path, mode in ((package / "errors.py", 0), (package / "crypto", 0)):
        path.chmod(mode)
        try:
            with pytest.raises(UnavailableError, match="cannot be measured") as caught:
                measure_package(package)
        finally:
            path.chmod(0o755)
        assert str(path) in str(caught.value.found)


def test_what_vanishes_or_never_was_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be measured") as caught:
        measure_package(tmp_path / "absent")
    assert "absent" in str(caught.value.found)


def test_unreadable_files_are_refused_as_any_user(package: Path) -> None:
    """A device that cannot be read stands in for a file of another user, also for root."""
    (package / "mem.py").symlink_to("/proc/self/mem")
    with pytest.raises(UnavailableError, match="cannot be measured") as caught:
        measure_package(package)
    assert caught.value.remedy


def test_a_broken_link_is_no_file(package: Path) -> None:
    before = measure_package(package)
    (package / "broken.py").symlink_to(package / "nowhere")
    assert measure_package(package) == before


# --- installed packages ----------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A small folder of installed packages."""
    folder = tmp_path / "site-packages"
    for name, text in {
        "pure/__init__.py": "",
        "pure/inner.py": "x = 1\n",
        "native.cpython-311-x86_64-linux-gnu.so": "\x7fELF",
        "pure-1.0.dist-info/METADATA": "Name: pure\n",
        "pure-1.0.dist-info/RECORD": "pure/__init__.py,,\npure/inner.py,,\n",
        "cenacle/__init__.py": "",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def write(name: str, text: str = "import evil\n") -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(write("evil.pth"), id="a .pth file, run at every start"),
        pytest.param(write("sitecustomize.py"), id="sitecustomize, run at every start"),
        pytest.param(write("usercustomize.py"), id="usercustomize, run at every start"),
        pytest.param(write("pure/inner.py"), id="a listed file changed"),
        pytest.param(write("pure/unlisted.py"), id="a file that no RECORD lists"),
        pytest.param(write("pure/inner/__init__.py"), id="a folder that shadows a module"),
        pytest.param(write("pure/inner.cpython-311-x86_64-linux-gnu.so"), id="a shadowing module"),
        pytest.param(write("orjson.py"), id="a module that others import if it is there"),
        pytest.param(
            write("evil-1.dist-info/entry_points.txt", "[pydantic]\nx = evil\n"),
            id="a plugin announced by metadata",
        ),
        pytest.param(lambda f: (f / "pure" / "inner.py").unlink(), id="a file removed"),
    ],
)
def test_every_file_that_could_be_imported_counts(installed: Path, change: Change) -> None:
    before = measure_dependencies([installed])
    change(installed)
    assert measure_dependencies([installed]) != before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(write("pure/__pycache__/inner.cpython-311.pyc"), id="byte-code caches"),
        pytest.param(write("pure/inner.pyi"), id="type stubs"),
        pytest.param(write("pure/include/pure.h"), id="C headers"),
        pytest.param(write("pure-1.0.dist-info/RECORD"), id="the installer's own list"),
        pytest.param(write("cenacle/x.py"), id="the package, which is measured by itself"),
    ],
)
def test_what_does_not_count(installed: Path, change: Change) -> None:
    before = measure_dependencies([installed])
    change(installed)
    assert measure_dependencies([installed]) == before


def test_the_order_in_which_folders_are_searched_counts(installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "pure.py").touch()
    assert measure_dependencies([installed, other]) != measure_dependencies([other, installed])


def test_the_folders_are_those_that_python_searches(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed), "/nonexistent"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert measure_dependencies() == measure_dependencies([installed])
    monkeypatch.setenv("PYTHONPATH", str(source))
    before = measure_dependencies()
    assert before == measure_dependencies([source, installed])
    (source / "json.py").write_text("import evil\n")  # found before the standard library's
    assert measure_dependencies() != before


# --- the whole -------------------------------------------------------------------------------


def test_the_interpreter_is_measured() -> None:
    assert measure_interpreter() == measure_interpreter()


def test_a_zip_that_python_searches_first_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib" / "python"
    library.mkdir(parents=True)
    (library / "os.py").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    before = measure_interpreter()
    (library / "os.py").write_text("x")
    changed = measure_interpreter()
    assert changed != before
    zipped = library.parent / "python{}{}.zip".format(*sys.version_info)
    zipped.write_bytes(b"PK")
    assert measure_interpreter() not in {before, changed}
    zipped.unlink()
    assert measure_interpreter() == changed
    for name in ("site-packages/x.py", "test/x.py", "__pycache__/x.pyc"):
        (library / name).parent.mkdir()
        (library / name).touch()
    assert measure_interpreter() == changed


@pytest.mark.slow
def test_an_enclave_measures_all_three() -> None:
    found = measure_enclave()
    assert found == {
        "interpreter": measure_interpreter(),
        "package": measure_package(),
        "dependencies": measure_dependencies(),
    }
    assert len(set(found.values())) == 3
