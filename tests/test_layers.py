"""The shape of the package: layers, public names, sizes, what an import costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cenacle

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cenacle.__file__).parent
MAX_LINES = 450

# Run by Python or by alembic and imported by nobody.
SCRIPTS = {"cenacle.__main__", "cenacle.enclave.__main__"}
MIGRATIONS = "cenacle.broker.store.migrations"


def _name(path: Path) -> str:
    parts = ["cenacle", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(
    name for name in SOURCES if name not in SCRIPTS and not name.startswith(MIGRATIONS)
)


def test_a_package_imports_only_from_packages_below_it() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_package_has_its_place_among_the_layers() -> None:
    """``exhaustive = false`` lets packages that do not exist yet be named; none may be missing."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    contract = text[text.index("[tool.importlinter]") :]
    for path in PACKAGE.iterdir():
        if (path.is_dir() and (path / "__init__.py").exists()) or path.name == "errors.py":
            assert f'cenacle.{path.stem}"' in contract or f"(cenacle.{path.stem})" in contract


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_modules_stay_readable(name: str) -> None:
    text = SOURCES[name].read_text("utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    if name not in SCRIPTS:
        assert ast.get_docstring(tree), "a module begins with what it is for"


def _defined(tree: ast.Module) -> set[str]:
    """Public classes and functions that the module itself defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    # Commands are reached through the app that they are registered with.
    return {
        n.name for n in found if not any(".command(" in ast.unparse(d) for d in n.decorator_list)
    }


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_sorted_and_real(name: str) -> None:
    tree = ast.parse(SOURCES[name].read_text("utf-8"))
    module: ModuleType = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if listed is None:
        assert not _defined(tree), "only a package without code of its own has no __all__"
        return
    # As ruff sorts them (RUF022): constants, then classes, then the rest.
    order = sorted(listed, key=lambda n: (not n.isupper(), not n[:1].isupper(), n))
    assert list(listed) == order
    assert len(set(listed)) == len(listed)
    for public in listed:
        assert not public.startswith("_")
        assert hasattr(module, public), public
    assert _defined(tree) <= set(listed), sorted(_defined(tree) - set(listed))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("cenacle.cli.main", ("torch", "sklearn", "pyarrow", "sqlalchemy", "fastapi", "uvicorn")),
        ("cenacle.documents", ("torch", "numpy", "httpx", "sqlalchemy", "cenacle.sealing")),
        ("cenacle.attestation", ("torch", "numpy", "httpx", "sqlalchemy", "cenacle.broker")),
        ("cenacle.crypto", ("torch", "numpy", "yaml", "pydantic")),
        ("cenacle.errors", ("cryptography", "pydantic")),
    ],
)
def test_imports_stay_light(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not [name for name in unwanted if name in loaded]
