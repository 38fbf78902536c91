"""Byte code that equals its sources wherever it is made, so that it can be measured.

Python compiles a module anew at each start unless it finds byte code, which it then runs in
place of the source: an enclave may only use byte code that is measured. What Python itself
writes differs from run to run, by times of files, absolute paths and the sharing of objects.
Here

- a file holds the hash of its source and is checked against it (PEP 552, ``checked-hash``), so
  that byte code of another source is not run by mistake. The hash is no protection: anybody can
  compute it;
- the paths in code objects are relative names; Python puts in the real path when it loads them;
- code is written in version 2 of the marshal format, which has no references between objects:
  those depend on what else lives in the process.

Equal sources and equal interpreters give equal bytes if ``PYTHONHASHSEED`` is the same, which
decides the order of constant sets.
"""

from __future__ import annotations

import importlib.util
import marshal
import struct
import sys
from pathlib import Path
from typing import Final

import cenacle
from cenacle.errors import UnavailableError

__all__ = ["compiled", "module_roots", "relative_name", "written_to"]

_CHECKED_HASH: Final = 0b11
_NO_REFERENCES: Final = 2


def compiled(source: bytes, name: str) -> bytes:
    """The content of a ``.pyc`` file.

    Args:
        source: of the module, as its file holds it.
        name: relative path of the source; stands in the code objects.

    Raises:
        SyntaxError: the source is no Python.
    """
    code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    return b"".join(
        (
            importlib.util.MAGIC_NUMBER,
            struct.pack("<L", _CHECKED_HASH),
            importlib.util.source_hash(source),
            marshal.dumps(code, _NO_REFERENCES),
        )
    )


def written_to(cache: Path, source: Path) -> Path:
    """Where Python looks for the byte code of ``source`` under ``-X pycache_prefix=cache``."""
    before, sys.pycache_prefix = sys.pycache_prefix, str(cache)
    try:
        return Path(importlib.util.cache_from_source(str(source), optimization=""))
    finally:
        sys.pycache_prefix = before


def module_roots(stdlib: Path, folders: list[Path]) -> dict[str, Path]:
    """Name -> folder below which modules are found; those further in come first."""
    named = {"package": Path(cenacle.__file__).parent, "stdlib": stdlib}
    named |= {str(index): folder for index, folder in enumerate(folders)}
    return dict(sorted(named.items(), key=lambda item: len(item[1].parts), reverse=True))


def relative_name(path: Path, roots: dict[str, Path]) -> str:
    """``ROOT/PATH`` below the innermost root: the same on every machine.

    Raises:
        UnavailableError: it lies below none of them.
    """
    for name, folder in roots.items():
        if path.is_relative_to(folder):
            return f"{name}/{path.relative_to(folder).as_posix()}"
    raise UnavailableError(
        "byte code belongs to no folder from which an enclave imports",
        found=path,
        expected="a module of Python, of Cenacle or of an installed package",
        remedy="remove the byte-code cache; it is made again",
    )
