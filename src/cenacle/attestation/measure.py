"""Measurements that are really taken: SHA-256 over the files that an enclave runs.

Byte-code caches are left out because an enclave never reads them (it starts with
``-X pycache_prefix`` pointing nowhere). What is not measured: the kernel, libc and other
system libraries; the hardware kinds measure those.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import cenacle
from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import Digest
from cenacle.errors import UnavailableError

__all__ = ["measure_dependencies", "measure_enclave", "measure_interpreter", "measure_package"]

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"}
_STARTUP_FILES = ("sitecustomize.py", "usercustomize.py")
_NOT_CODE = (".pyi", ".h", ".hpp", "RECORD")
_THREADS = min(4, os.cpu_count() or 1)


def _file_hash(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest(files: Iterable[tuple[str, Path]]) -> Digest:
    """SHA-256 over sorted (name, SHA-256 of content) pairs, length-prefixed."""
    listed = sorted(files)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(_file_hash, (path for _, path in listed), chunksize=64))
    except OSError as error:
        raise UnavailableError(
            "a file of the enclave cannot be measured", found=f"{error.strerror}: {error.filename}"
        ) from None
    total = hashlib.sha256(b"cenacle/measure/v1\x00")
    for (name, _), file_hash in zip(listed, hashes, strict=True):
        total.update(encode_fields(name.encode("utf-8", "surrogateescape"), file_hash))
    return "sha256:" + total.hexdigest()


def _walk(root: Path, skipped: frozenset[str] | set[str]) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def measure_package(root: Path | None = None) -> Digest:
    """Every file of the installed ``cenacle`` package but byte-code caches."""
    return _digest(_walk(root or Path(cenacle.__file__).parent, {"__pycache__"}))


def measure_interpreter() -> Digest:
    """The Python binary, its shared library and the standard library it imports."""
    files = {"bin": Path(sys.executable).resolve()}
    shared = sysconfig.get_config_var("LDLIBRARY")
    folder = sysconfig.get_config_var("LIBDIR")
    if shared and folder and (library := Path(folder, shared)).is_file():
        files["lib"] = library
    stdlib = Path(sysconfig.get_path("stdlib"))
    listed = [(f"stdlib/{name}", path) for name, path in _walk(stdlib, _SKIPPED_FOLDERS)]
    return _digest([*files.items(), *listed])


def _closure(name: str, extras: tuple[str, ...]) -> Iterator[metadata.Distribution]:
    """The installed distributions that ``name`` with these extras requires, transitively."""
    # A marker's "extra" clauses are read textually: an extra requirement that is installed
    # but unneeded is measured too, which is stricter, never laxer.
    wanted = [(name, frozenset(extras))]
    seen: set[str] = set()
    while wanted:
        current, current_extras = wanted.pop()
        key = re.sub(r"[-_.]+", "-", current).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(current)
        except metadata.PackageNotFoundError:
            continue  # an optional requirement that is not installed cannot run
        yield distribution
        for requirement in distribution.requires or ():
            head, _, marker = requirement.partition(";")
            needed = set(re.findall(r"extra\s*==\s*[\"']([^\"']+)", marker))
            if needed and not needed & current_extras:
                continue
            if match := re.match(r"\s*([A-Za-z0-9._-]+)", head):
                wanted.append((match.group(1), frozenset()))


def _recorded(distribution: metadata.Distribution) -> Iterator[str]:
    """The distribution's files, from its RECORD (PEP 376) or, failing that, from its metadata."""
    record = distribution.read_text("RECORD")
    if record is None:
        yield from (entry.as_posix() for entry in distribution.files or ())
    else:
        yield from (row[0] for row in csv.reader(record.splitlines()) if row)


def _dependency_files() -> Iterator[tuple[str, Path]]:
    folders = set()
    for distribution in _closure("cenacle", ("train", "sandbox")):
        distribution_name = distribution.name  # parses the metadata anew at every access
        if distribution_name == "cenacle":
            continue  # measured as the package
        folder = str(distribution.locate_file(""))
        folders.add(folder)
        for name in _recorded(distribution):
            if name.startswith("..") or "__pycache__/" in name or name.endswith(_NOT_CODE):
                continue
            if os.path.isfile(path := os.path.join(folder, name)):  # noqa: PTH113, PTH118 - hot
                yield f"{distribution_name}/{name}", Path(path)
    for folder in sorted(folders):  # what Python runs at start, whoever owns it
        for file in [*Path(folder).glob("*.pth"), *(Path(folder, n) for n in _STARTUP_FILES)]:
            if file.is_file():
                yield f"startup/{file.name}", file


def measure_dependencies() -> Digest:
    """Every code file of the distributions that the enclave's program requires."""
    return _digest(_dependency_files())


def measure_enclave() -> dict[str, Digest]:
    """The measurements that every process enclave takes of itself, by name."""
    return {
        "interpreter": measure_interpreter(),
        "package": measure_package(),
        "dependencies": measure_dependencies(),
    }
