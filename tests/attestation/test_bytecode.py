"""Byte code that is the same wherever it is made, and runs only for its own source."""

from __future__ import annotations

import importlib.util
import marshal
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest

import cenacle
from cenacle.attestation.bytecode import compiled, module_roots, relative_name, written_to
from cenacle.attestation.measure import measure_bytecode
from cenacle.errors import UnavailableError

SOURCE = b'''"""A module."""
NAMES = {"one", "two", "three", "seven", "eight"}
PAIR = ("a_shared_name", "a_shared_name")

def fails():
    if "one" in {"one", "two", "three", "four"}:
        raise ValueError("a_shared_name")
'''


def _in_another_process(before: str) -> bytes:
    program = (
        f"import sys\n{before}\nfrom cenacle.attestation.bytecode import compiled\n"
        "sys.stdout.buffer.write(compiled(sys.stdin.buffer.read(), 'package/made.py'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=SOURCE,
        capture_output=True,
        check=True,
        env={"PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(cenacle.__file__).parent.parent)},
    )
    return run.stdout


def test_it_does_not_depend_on_what_else_a_process_holds() -> None:
    plain = _in_another_process("")
    # Shared and interned objects change what marshal writes by default.
    other = _in_another_process(
        "kept = [sys.intern('a_shared_name'), sys.intern('fails'), 'three']\nimport json, decimal"
    )
    assert plain == other


def _import(cache: Path, source: Path) -> str:
    """What the module says when it is imported with this cache."""
    run = subprocess.run(
        [
            *(sys.executable, "-B", "-P", "-X", f"pycache_prefix={cache}"),
            *("-c", f"import sys; sys.path.insert(0, {str(source.parent)!r}); import said"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_python_runs_it_in_place_of_the_source(tmp_path: Path) -> None:
    source, cache = tmp_path / "said.py", tmp_path / "cache"
    source.write_bytes(b"print('source')")
    target = written_to(cache, source)
    target.parent.mkdir(parents=True)
    # What only byte code can say shows that it is byte code that runs: the hash is the source's.
    forged = bytearray(compiled(b"print('forged')", "said.py"))
    forged[8:16] = importlib.util.source_hash(source.read_bytes())
    target.write_bytes(forged)
    assert _import(cache, source) == "forged"


def test_byte_code_of_another_source_is_not_run(tmp_path: Path) -> None:
    source, cache = tmp_path / "said.py", tmp_path / "cache"
    source.write_bytes(b"print('before')")
    target = written_to(cache, source)
    target.parent.mkdir(parents=True)
    target.write_bytes(compiled(source.read_bytes(), "said.py"))
    assert _import(cache, source) == "before"
    source.write_bytes(b"print('after!')")
    assert _import(cache, source) == "after!"


def test_paths_of_this_machine_do_not_stand_in_it(tmp_path: Path) -> None:
    code = marshal.loads(compiled(SOURCE, "package/made.py")[16:])
    assert isinstance(code, CodeType)
    assert code.co_filename == "package/made.py"
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    assert [one.co_filename for one in inner] == ["package/made.py"]


def test_what_does_not_compile() -> None:
    with pytest.raises(SyntaxError):
        compiled(b"def", "package/made.py")


def test_names_are_relative_to_the_innermost_root(tmp_path: Path) -> None:
    package = Path(cenacle.__file__).parent
    roots = module_roots(tmp_path / "python", [package.parent, tmp_path / "python" / "site"])
    assert relative_name(package / "errors.py", roots) == "package/errors.py"
    assert relative_name(package.parent / "other.py", roots) == "0/other.py"
    assert relative_name(tmp_path / "python" / "site" / "x" / "y.py", roots) == "1/x/y.py"
    assert relative_name(tmp_path / "python" / "json.py", roots) == "stdlib/json.py"
    with pytest.raises(UnavailableError, match="belongs to no folder"):
        relative_name(tmp_path / "elsewhere.py", roots)


def test_a_measured_cache(tmp_path: Path) -> None:
    source = Path(cenacle.__file__)
    caches = [tmp_path / name for name in ("one", "another", "altered", "more")]
    for cache in caches:
        target = written_to(cache, source)
        target.parent.mkdir(parents=True)
        target.write_bytes(compiled(source.read_bytes(), "package/__init__.py"))
    _, _, altered, more = caches
    content = bytearray(written_to(altered, source).read_bytes())
    content[-1] ^= 1
    written_to(altered, source).write_bytes(content)
    written_to(more, source.with_name("errors.py")).write_bytes(b"")
    digests = [measure_bytecode(cache) for cache in caches]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_cache_with_byte_code_of_nowhere_is_not_measured(tmp_path: Path) -> None:
    target = written_to(tmp_path / "cache", tmp_path / "elsewhere.py")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"")
    with pytest.raises(UnavailableError, match="belongs to no folder"):
        measure_bytecode(tmp_path / "cache")
