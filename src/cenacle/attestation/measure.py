"""Measurements that are really taken: SHA-256 over the files that an enclave runs.

A folder is measured whole, not by a list of what was once installed in it: a file that nobody
listed can be imported all the same, before the one that it shadows. Byte-code caches are left
out because an enclave never reads them (it starts with ``-X pycache_prefix`` pointing
nowhere). What is not measured: the kernel, libc and other system libraries; the hardware
kinds measure those.
"""

from __future__ import annotations

import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Final

import cenacle
from cenacle.attestation.bytecode import module_roots, relative_name
from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import Digest
from cenacle.errors import UnavailableError

__all__ = [
    "MEASURED_ROOT",
    "import_folders",
    "measure_bytecode",
    "measure_dependencies",
    "measure_enclave",
    "measure_interpreter",
    "measure_package",
]

MEASURED_ROOT: Final = Path("/usr/share/cenacle/measured-root")
"""A file of images of virtual machines; see :func:`measure_enclave`."""

_CACHE = frozenset({"__pycache__"})
_NOT_ENCLAVE = _CACHE | {"site-packages", "dist-packages", "test", "tests", "idlelib"}
_NOT_CODE = (".pyi", ".h", ".hpp", "/RECORD")
_THREADS = min(4, os.cpu_count() or 1)
_READ_BYTES = 1 << 20
_BATCH = 64  # files for a thread at a time: most are small


def _file_hash(path: str) -> bytes:
    # hashlib.file_digest would clear a buffer of 256 KiB for each of many thousand small files.
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while piece := os.read(descriptor, _READ_BYTES):
            digest.update(piece)
    finally:
        os.close(descriptor)
    return digest.digest()


def _file_hashes(files: Sequence[tuple[str, str]]) -> list[bytes]:
    return [_file_hash(path) for _, path in files]


def _digest(files: Iterable[tuple[str, str]]) -> Digest:
    """SHA-256 over sorted (name, SHA-256 of content) pairs, length-prefixed."""
    try:
        listed = sorted(files)
        batches = [listed[at : at + _BATCH] for at in range(0, len(listed), _BATCH)]
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(chain.from_iterable(pool.map(_file_hashes, batches)))
    except OSError as error:
        raise UnavailableError(
            "a file of the enclave cannot be measured",
            found=f"{error.strerror}: {error.filename}",
            remedy="install Python and Cenacle readable for the user who runs the enclave",
        ) from None
    total = hashlib.sha256(b"cenacle/measure/v1\x00")
    for (name, _), file_hash in zip(listed, hashes, strict=True):
        total.update(encode_fields(os.fsencode(name), file_hash))
    return "sha256:" + total.hexdigest()


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Names relative to ``root`` and paths of the files in it, through symbolic links too."""
    start = len(os.path.join(root, ""))  # noqa: PTH118
    folders = [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    if entry.name not in skipped:
                        if entry.is_symlink():
                            _refuse_loop(Path(entry.path), root)
                        folders.append(entry.path)
                elif entry.is_file():
                    yield entry.path[start:], entry.path


def _refuse_loop(link: Path, root: Path) -> None:
    above = [link.parent, *link.parent.parents]
    inside = above[: above.index(root) + 1]
    if link.resolve() in {folder.resolve() for folder in inside}:
        raise UnavailableError(
            "a folder of the enclave cannot be measured: it contains itself",
            found=link,
            remedy="remove that symbolic link",
        )


def measure_package(root: Path | None = None) -> Digest:
    """Every file of the installed ``cenacle`` package but byte-code caches.

    Raises:
        UnavailableError: something in it cannot be read.
    """
    return _digest(_walk(root or Path(cenacle.__file__).parent, _CACHE))


def measure_interpreter() -> Digest:
    """The Python binary, its shared library and the standard library it imports."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = {
        "bin": Path(sys.executable).resolve(),
        # Python looks here before it looks into the folder of the standard library.
        "zip": stdlib.parent / "python{}{}.zip".format(*sys.version_info),
    }
    shared = sysconfig.get_config_var("LDLIBRARY")
    folder = sysconfig.get_config_var("LIBDIR")
    if shared and folder:
        files["lib"] = Path(folder, shared)
    present = [(name, str(path)) for name, path in files.items() if path.is_file()]
    return _digest(
        [*present, *((f"stdlib/{name}", path) for name, path in _walk(stdlib, _NOT_ENCLAVE))]
    )


def import_folders() -> Iterator[Path]:
    """Where an enclave's Python looks for modules, after its standard library."""
    # A source tree's folder is searched first of all, so what lies beside the package counts.
    for name in [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *site.getsitepackages()]:
        try:
            os.scandir(name or os.devnull).close()
        except OSError:
            continue  # Python finds nothing in a folder that it cannot list
        yield Path(name)


def measure_dependencies(roots: Iterable[Path] | None = None) -> Digest:
    """Every file in the folders where Python finds installed packages, used or not.

    One that is not used today could be tomorrow: many packages import others if they are
    there, load plugins by their metadata, or are shadowed by a folder of the same name.
    ``cenacle`` itself is measured as the package.

    Raises:
        UnavailableError: something in them cannot be read.
    """
    return _digest(
        (f"{index}/{name}", path)
        for index, root in enumerate(import_folders() if roots is None else roots)
        for name, path in _walk(root, _CACHE)
        if not name.endswith(_NOT_CODE) and not name.startswith("cenacle/")
    )


def measure_bytecode(cache: Path) -> Digest:
    """Every file below the folder where this interpreter looks for byte code.

    Raises:
        UnavailableError: something in it cannot be read, or belongs to no measured source.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = module_roots(stdlib, list(import_folders()))
    return _digest(
        (relative_name(Path("/", name), roots), path) for name, path in _walk(cache, frozenset())
    )


def measure_enclave() -> dict[str, Digest]:
    """The measurements that every process enclave takes of itself, by name.

    None in a virtual machine whose root is measured whole, by the hash on its command line: to
    hash it again would take longer than its boot. Whoever plants that mark elsewhere shows less
    than every contract for a process demands.

    Raises:
        UnavailableError: something cannot be read.
    """
    if MEASURED_ROOT.is_file():
        return {}
    measured = {
        "interpreter": measure_interpreter(),
        "package": measure_package(),
        "dependencies": measure_dependencies(),
    }
    if sys.pycache_prefix is not None and Path(sys.pycache_prefix).is_dir():
        measured["bytecode"] = measure_bytecode(Path(sys.pycache_prefix))
    return measured
