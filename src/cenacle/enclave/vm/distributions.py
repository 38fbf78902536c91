"""The Python packages of an image: those of this installation, file by file, and their byte code.

An image holds the running installation of ``cenacle`` with the distributions that it requires.
Sources are compiled by the image's own interpreter and left out, so that the guest neither
compiles nor looks for caches: what it imports is what was measured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cenacle
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import InputError, UnavailableError

__all__ = ["PACKAGES", "Distribution", "add_distributions", "compile_sources", "required"]

PACKAGES: Final = "usr/lib/python3/dist-packages"
"""Where Debian's interpreter finds packages."""

_STDLIB: Final = "usr/lib/python3.11"
_NATIVE: Final = f"{_STDLIB}/lib-dynload/"
_PYTHON: Final = "usr/bin/python3.11"
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
# torch reads its own sources when it is imported.
_KEEP_SOURCES: Final = (f"{PACKAGES}/torch/",)
_SITE: Final = f"{_STDLIB}/sitecustomize.py"
_FIND_BYTE_CODE_FIRST: Final = b"""\
# Where byte code and source of a module lie side by side, run the byte code: both are measured,
# and nothing is compiled at run time. Otherwise Python would prefer the source.
import sys
from importlib.machinery import EXTENSION_SUFFIXES as NATIVE
from importlib.machinery import ExtensionFileLoader, FileFinder
from importlib.machinery import SourceFileLoader, SourcelessFileLoader

FINDER = FileFinder.path_hook(
    (ExtensionFileLoader, NATIVE),
    (SourcelessFileLoader, [".pyc"]),
    (SourceFileLoader, [".py"]),
)
sys.path_hooks[-1:] = [FINDER]
sys.path_importer_cache.clear()
"""
_SKIPPED_FOLDERS: Final = frozenset(
    {"__pycache__", "include", "tests", "idlelib", "turtledemo", "lib2to3"}
)
_SKIPPED_ENDS: Final = (
    *(".a", ".c", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".pxd", ".pyc", ".pyi", ".pyx"),
    *("/INSTALLER", "/RECORD", "/REQUESTED", "/direct_url.json"),
)
# What a broker and the command line need, and an enclave never imports.
_HOST_ONLY: Final = frozenset(
    {
        *("alembic", "fastapi", "httptools", "psycopg", "rich"),
        *("sqlalchemy", "typer", "uvicorn", "uvloop"),
    }
)
_COMPILE_TIMEOUT_S: Final = 1800


@dataclass(frozen=True, order=True)
class Distribution:
    """One installed package.

    Attributes:
        digest: ``sha256:`` over the names and contents of its files in the image.
    """

    name: str
    version: str
    digest: str

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


def required(
    extras: Sequence[str], more: Sequence[str] = ()
) -> list[importlib.metadata.Distribution]:
    """What ``cenacle`` with these extras requires, all the way down, sorted by name.

    Args:
        more: other installed packages that programs in the image need.

    Raises:
        UnavailableError: something of it is not installed.
        InputError: ``cenacle`` has no such extra.
    """
    try:
        from packaging.requirements import Requirement  # noqa: PLC0415 - only builds need it
        from packaging.utils import canonicalize_name  # noqa: PLC0415
    except ImportError:
        raise UnavailableError(
            "an image cannot be built without the PyPI package packaging",
            remedy="pip install packaging",
        ) from None
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    queue = [("cenacle", extra) for extra in ("", *extras)]
    queue += [(str(canonicalize_name(name)), "") for name in more]
    known = importlib.metadata.metadata("cenacle").get_all("Provides-Extra") or []
    if unknown := sorted(set(extras) - set(known)):
        raise InputError(
            "cenacle has no such extra", found=", ".join(unknown), expected=", ".join(known)
        )
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UnavailableError(
                "a package that the image needs is not installed here",
                found=f"no {name}",
                remedy=f"pip install {name}",
            ) from None
        if name != "cenacle":
            found[name] = distribution
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                inner = str(canonicalize_name(requirement.name))
                if name == "cenacle" and inner in _HOST_ONLY:
                    continue
                queue += [(inner, one) for one in ("", *requirement.extras)]
    return [found[name] for name in sorted(found)]


def add_distributions(
    tree: Tree, distributions: Sequence[importlib.metadata.Distribution]
) -> list[Distribution]:
    """Add installed packages, and ``cenacle`` itself, to a tree.

    Raises:
        UnavailableError: an installation does not list its files.
    """
    described = [_describe(tree, "cenacle", cenacle.__version__, _own_files())]
    for one in distributions:
        if one.files is None:
            raise UnavailableError(
                "an installed package does not list its files",
                found=one.name,
                remedy="install it with pip",
            )
        listed = [(str(file), Path(str(one.locate_file(file)))) for file in one.files]
        described.append(_describe(tree, one.name, one.version, iter(listed)))
    return sorted(described)


def _own_files() -> Iterator[tuple[str, Path]]:
    root = Path(cenacle.__file__).parent
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            yield f"cenacle/{path.relative_to(root).as_posix()}", path


def _describe(
    tree: Tree, name: str, version: str, files: Iterator[tuple[str, Path]]
) -> Distribution:
    total = hashlib.sha256(b"cenacle/distribution/v1\0")
    for relative, path in sorted(files):
        parts = relative.split("/")
        if (
            parts[0] == ".."
            or not _SKIPPED_FOLDERS.isdisjoint(parts[:-1])
            or f"/{relative}".endswith(_SKIPPED_ENDS)
            or not path.is_file()
        ):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(len(relative).to_bytes(4, "big") + relative.encode() + content)
        executable = relative.endswith(".so") or ".so." in relative
        tree.add_file(f"{PACKAGES}/{relative}", path, 0o755 if executable else 0o644)
    return Distribution(name, version, "sha256:" + total.hexdigest())


def compile_sources(tree: Tree) -> None:
    """Replace the Python sources of a tree by byte code that the tree's interpreter makes.

    The result depends on the sources and the interpreter alone: names and constants are
    ordered by a fixed seed, and byte code carries no time.

    Raises:
        UnavailableError: the interpreter does not run here.
    """
    for path in [p for p in tree.nodes if _is_dropped(p)]:
        del tree.nodes[path]
    tree.add_file(_SITE, _FIND_BYTE_CODE_FIRST)
    sources = [p for p in tree.nodes if p.endswith(".py") and p.startswith((_STDLIB, PACKAGES))]
    needed = set(sources)
    runtime = Tree()
    for path, node in tree.nodes.items():
        if path in needed or path.startswith((_LIBRARIES, _LOADER, _PYTHON, _NATIVE)):
            runtime.nodes[path] = node
    with tempfile.TemporaryDirectory(prefix="cenacle-compile-") as folder:
        root = Path(folder)
        runtime.write_to(root)
        _run_compiler(root, sources)
        for path in sources:
            compiled = root / f"{path}c"
            if compiled.is_file():
                tree.add_file(f"{path}c", compiled.read_bytes())
                if not path.startswith(_KEEP_SOURCES):
                    del tree.nodes[path]


def _is_dropped(path: str) -> bool:
    if not path.startswith(f"{_STDLIB}/"):
        return False
    parts = path.split("/")
    return not {*_SKIPPED_FOLDERS, "test", "ensurepip"}.isdisjoint(parts[:-1])


def _run_compiler(root: Path, sources: Sequence[str]) -> None:
    """Make ``x.pyc`` beside each ``x.py``, which names its place in the image.

    A file that is no Python (templates are not) is left as it is.
    """
    if not sources:
        return
    listing = root / "sources"
    listing.write_text("".join(f"{root / path}\n" for path in sorted(sources)), "utf-8")
    command = [
        *(str(root / _LOADER), "--library-path", str(root / _LIBRARIES), str(root / _PYTHON)),
        *("-B", "-S", "-W", "ignore", "-m", "compileall", "-q", "-f", "-b"),
        *("--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"),
        *("-i", str(listing)),
    ]
    try:
        done = subprocess.run(
            command,
            env={"PYTHONHASHSEED": "0", "PYTHONHOME": str(root / "usr"), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(
            "the image's interpreter does not run here",
            found=type(error).__name__,
            remedy="build on Linux on a machine of the same architecture",
        ) from None
    made = sum((root / f"{path}c").is_file() for path in sources)
    if made < len(sources) * 0.9:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UnavailableError(
            "the image's interpreter does not compile its sources",
            found=lines[-1] if lines else f"{made} of {len(sources)} compiled",
        )
