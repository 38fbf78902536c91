"""Programs: one content, one digest; imported from memory; nothing hostile taken."""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError, InputError
from cenacle.sealing import (
    PackageFinder,
    SealedReader,
    pack,
    package_digest,
    package_files,
    read_package,
    seal_bytes,
    seal_path,
    unseal_path,
)

FILES = {
    "__init__.py": "from .net import width\nimport pkgutil\n"
    "text = pkgutil.get_data(__name__, 'data/words.txt')\n"
    "def run(ctx):\n    return width + ctx\n",
    "net.py": "from prog7.deep.inner import two\nwidth = 40 + two\n",
    "deep/inner.py": "two = 2\ndef fail():\n    raise ValueError('from the program')\n",
    "data/words.txt": "words",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return write(tmp_path / "prog7", FILES)


def test_equal_content_gives_equal_bytes(program: Path, tmp_path: Path) -> None:
    packed = pack(program)
    other = tmp_path / "elsewhere" / "prog7"
    for name in reversed(FILES):
        write(other, {name: FILES[name]})
    os.utime(other / "net.py", (0, 0))
    (other / "net.py").chmod(0o755)
    write(other, {"__pycache__/net.cpython-311.pyc": "x", "old.pyc": "x", ".git/config": "x"})
    assert pack(other) == packed
    assert package_digest(packed).startswith("sha256:")
    (other / "data/words.txt").write_text("Words")
    assert package_digest(pack(other)) != package_digest(packed)


def test_paths_are_sorted_under_the_name_of_the_package(program: Path) -> None:
    assert list(package_files(pack(program))) == [
        "prog7/__init__.py",
        "prog7/data/words.txt",
        "prog7/deep/inner.py",
        "prog7/net.py",
    ]


def test_import_from_memory(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(program)
    opened: list[str] = []
    genuine = builtins.open

    def spy(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return genuine(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    with PackageFinder(packed, expected_digest=package_digest(packed)) as finder:
        assert finder.modules == ("prog7", "prog7.deep", "prog7.deep.inner", "prog7.net")
        module = importlib.import_module("prog7")
        assert module.run(1) == 43
        assert module.text == b"words"
        assert module.__file__ == "<sealed>/prog7/__init__.py"
        with pytest.raises(FileNotFoundError):
            pkgutil.get_data("prog7", "absent")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("prog7.absent")
        try:
            importlib.import_module("prog7.deep.inner").fail()
        except ValueError:
            text = traceback.format_exc()
        assert "raise ValueError('from the program')" in text
    assert "prog7" not in sys.modules
    assert "prog7.net" not in sys.modules
    assert not [name for name in opened if "prog7" in name]
    assert not [path for path in tmp_path.rglob("*") if "pycache" in path.name]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("prog7")
    finder.remove()


def test_a_root_of_modules(tmp_path: Path) -> None:
    write(tmp_path / "any-name", {"main7.py": "import helper7\nx = helper7.x", "helper7.py": "x=1"})
    with PackageFinder(pack(tmp_path / "any-name")) as finder:
        assert finder.modules == ("helper7", "main7")
        assert importlib.import_module("main7").x == 1


def test_another_program_than_the_approved_one(program: Path) -> None:
    with pytest.raises(DataError, match="not the one that was approved"):
        PackageFinder(pack(program), expected_digest="sha256:" + "0" * 64)


def test_a_module_that_is_loaded_already(program: Path) -> None:
    packed = pack(program)
    with PackageFinder(packed):
        importlib.import_module("prog7")
        with pytest.raises(DataError, match="loaded already"):
            PackageFinder(packed).install()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "symlink": (lambda p: (p / "link.py").symlink_to("/etc/passwd"), "no ordinary file"),
    "symlinked folder": (lambda p: (p / "link").symlink_to("/etc"), "no ordinary file"),
    "fifo": (lambda p: os.mkfifo(p / "pipe"), "no ordinary file"),
    "native code": (lambda p: (p / "fast.so").touch(), "compiled code"),
    "path file": (lambda p: (p / "x.pth").touch(), "compiled code"),
    "space in a name": (lambda p: (p / "a b.txt").touch(), "name is refused"),
    "umlaut in a name": (lambda p: (p / "ü.py").touch(), "name is refused|malformed"),
    "backslash in a name": (lambda p: (p / "a\\b.py").touch(), "name is refused"),
    "long path": (lambda p: write(p, {"x" * 200 + "/" + "y" * 100: ""}), "name is refused"),
    "module and folder": (
        lambda p: write(p, {"m.py": "", "m/__init__.py": ""}),
        "a file and a folder",
    ),
    "big file": (lambda p: os.truncate(p / "net.py", (16 << 20) + 1), "too big"),
    "many files": (lambda p: write(p, {f"d/{i}": "" for i in range(4096)}), "too big"),
    "much in all": (
        lambda p: [(p / f"d{i}").write_bytes(bytes(16 << 20)) for i in range(4)],
        "too big",
    ),
}


@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_programs_that_are_refused(
    program: Path, change: Callable[[Path], object], match: str
) -> None:
    change(program)
    with pytest.raises(DataError, match=match):
        pack(program)


@pytest.mark.parametrize("name", ["json", "os", "cenacle", "sys", "__future__"])
def test_programs_that_would_hide_modules(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="would hide"):
        pack(write(tmp_path / name, {"__init__.py": ""}))
    with pytest.raises(DataError, match="would hide"):
        pack(write(tmp_path / "root", {f"{name}.py": ""}))


def test_directories_that_are_no_programs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="identifier"):
        pack(write(tmp_path / "no-name", {"__init__.py": ""}))
    with pytest.raises(DataError, match="no Python files"):
        pack(write(tmp_path / "data", {"a.txt": ""}))
    with pytest.raises(InputError, match="cannot read"):
        pack(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot read"):
        pack(tmp_path / "file")


def archive(*entries: tuple[bytes, bytes], count: int | None = None, tail: bytes = b"") -> bytes:
    packed = b"CENPKG1\0" + struct.pack(">I", len(entries) if count is None else count)
    for path, content in entries:
        packed += struct.pack(">H", len(path)) + path + struct.pack(">Q", len(content)) + content
    return packed + tail


HOSTILE = {
    "empty": b"",
    "other mark": b"PK\x03\x04" + bytes(20),
    "no files": archive(),
    "absolute": archive((b"/etc/passwd.py", b"")),
    "above": archive((b"../a.py", b"")),
    "above within": archive((b"a/../../a.py", b"")),
    "here": archive((b"./a.py", b"")),
    "empty part": archive((b"a//b.py", b"")),
    "empty path": archive((b"", b"")),
    "trailing slash": archive((b"a/", b"")),
    "zero byte": archive((b"a\0.py", b"")),
    "hidden": archive((b".a.py", b"")),
    "not ASCII": archive((b"\xff.py", b"")),
    "unsorted": archive((b"b.py", b""), (b"a.py", b"")),
    "twice": archive((b"a.py", b""), (b"a.py", b"")),
    "file is a folder": archive((b"a.py", b""), (b"a.py/b.py", b"")),
    "bytecode": archive((b"a.py", b""), (b"b.pyc", b"")),
    "cached": archive((b"__pycache__/a.py", b"")),
    "too few": archive((b"a.py", b""), count=2),
    "too many": archive((b"a.py", b""), (b"b.py", b""), count=1),
    "a trillion": archive((b"a.py", b""), count=0xFFFFFFFF),
    "tail": archive((b"a.py", b""), tail=b"x"),
    "huge size": b"CENPKG1\0\0\0\0\x01\0\x04a.py" + b"\xff" * 8 + b"x",
    "cut": archive((b"a.py", b"12345"))[:-1],
}


@pytest.mark.parametrize("packed", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives(packed: bytes, tmp_path: Path, key: SecretBytes) -> None:
    with pytest.raises(DataError):
        package_files(packed)
    with pytest.raises(DataError):
        PackageFinder(packed)
    seal_bytes(packed, tmp_path / "sealed", key, kind="package")
    with pytest.raises(DataError):
        unseal_path(tmp_path / "sealed", tmp_path / "opened", key)
    assert [path.name for path in tmp_path.iterdir()] == ["sealed"]


@settings(max_examples=200)
@given(data=st.binary(max_size=80))
def test_arbitrary_bytes_never_crash(data: bytes) -> None:
    for packed in (data, b"CENPKG1\0\0\0\0\x01" + data):
        try:
            files = package_files(packed)
        except CenacleError:
            continue
        assert archive(*((path.encode(), content) for path, content in files.items())) == packed


def test_sealed_and_opened(program: Path, tmp_path: Path, key: SecretBytes) -> None:
    info = seal_path(program, tmp_path / "sealed", key)
    packed = pack(program)
    assert info.kind == "package"
    assert info.schema == {
        "package": package_digest(packed),
        "files": sorted(package_files(packed)),
    }
    with SealedReader(tmp_path / "sealed", key, expected_digest=info.digest) as reader:
        assert read_package(reader) == packed
    unseal_path(tmp_path / "sealed", tmp_path / "opened", key)
    assert pack(tmp_path / "opened" / "prog7") == packed
    assert (tmp_path / "opened" / "prog7" / "net.py").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="exists"):
        unseal_path(tmp_path / "sealed", tmp_path / "opened", key)


def test_what_is_no_program(tmp_path: Path, key: SecretBytes) -> None:
    seal_bytes(b"x", tmp_path / "sealed", key)
    with pytest.raises(InputError, match="no program"):
        read_package(SealedReader(tmp_path / "sealed", key))
