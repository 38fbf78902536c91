"""The byte code with which this machine's enclaves start, made once for an installation.

Compiling its modules takes an enclave longer than all else that it does before it has keys. So
the launcher keeps their byte code in a folder of the user's, starts enclaves with it, and the
enclaves measure it (``bytecode``): it is code like any other, and a contract lists the digests
that it accepts. Byte code is reproducible (:mod:`cenacle.attestation.bytecode`): who wants to
know what a digest stands for makes it anew from the sources.

A folder is named by its installation, whose paths are in it, and by the digest of what it is made
of; it never changes. An index tells which one belongs to the sources as they are now.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import cenacle
from cenacle.attestation.bytecode import compiled, module_roots, relative_name, written_to
from cenacle.attestation.measure import import_folders, measure_bytecode
from cenacle.enclave.sandbox.folders import enclave_environment, interpreter_command
from cenacle.errors import UnavailableError

__all__ = ["build", "bytecode_folder"]

# What enclaves import, and with it all that these import in their turn. One that cannot be
# imported here is none that an enclave of this installation runs.
_MODULES: Final = (
    "cenacle.enclave.agent",
    "cenacle.enclave.checkpoints",
    "cenacle.enclave.outputs",
    "cenacle.enclave.program_job",
    "cenacle.enclave.program_runner",
    "cenacle.enclave.readers",
    "cenacle.enclave.receipt",
    "cenacle.enclave.recipe_job",
    "cenacle.enclave.reference",
    "cenacle.enclave.serving_job",
    "cenacle.cut.runtime",
    "onnxruntime",
    "cenacle.training",
    "cenacle.training.run",
    "cenacle.training.sources",
    "cenacle.training.privacy",
    "cenacle.offload.session",
    "cenacle.accounting",
    "torch.optim",
)
_TIMEOUT_S: Final = 300
_KEPT_S: Final = 7 * 24 * 3600
_FORMAT: Final = 1


def bytecode_folder() -> Path:
    """A folder for ``-X pycache_prefix`` that belongs to the sources as they are now.

    Made at the first call, and when a source has changed: seconds. Several processes may call
    it at once.

    Raises:
        UnavailableError: no folder can be written to, or an interpreter cannot be started.
    """
    base = _cache_home()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(base / f"{_key()}.lock"):
            index = base / f"{_key()}.json"
            found = _valid(base, index)
            return found if found is not None else _make(base, index)
    except OSError as error:
        raise UnavailableError(
            "the byte code of enclaves cannot be kept",
            found=f"{error.strerror}: {error.filename}",
            expected=f"a folder that this user can write to: {base}",
            remedy="name another with the environment variable XDG_CACHE_HOME",
        ) from None


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "cenacle" / "bytecode"


def _key() -> str:
    parts = (sys.version, sys.executable, sys.prefix, str(Path(cenacle.__file__).parent))
    return hashlib.sha256(repr((_FORMAT, _MODULES, parts)).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _valid(base: Path, index: Path) -> Path | None:
    """The folder that the index names, if every source is the file that it was."""
    try:
        fields = json.loads(index.read_bytes())
        folder = base / str(fields["folder"])
        sources = [(str(path), int(time_ns), int(size)) for path, time_ns, size in fields["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not folder.is_dir() or _stats([path for path, _, _ in sources]) != sources:
        return None
    return folder


def _stats(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    found = []
    for path in paths:
        try:
            status = Path(path).stat()
        except OSError:
            return []
        found.append((path, status.st_mtime_ns, status.st_size))
    return found


def _make(base: Path, index: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="new-", dir=base) as place:
        made = Path(place, "bytecode")
        made.mkdir()
        fields = _build_in_a_process(made)
        fields["folder"] = f"{_key()}-{fields.pop('digest')}"
        folder = base / str(fields["folder"])
        if not folder.is_dir():
            made.rename(folder)
        written = Path(place, "index.json")
        written.write_text(json.dumps(fields), encoding="utf-8")
        written.replace(index)
    _prune(base, folder)
    return folder


def _build_in_a_process(folder: Path) -> dict[str, Any]:
    """As an enclave would be started, so that hashing and imports are what they are there."""
    try:
        run = subprocess.run(
            [*interpreter_command(), "-m", "cenacle.enclave.bytecode", str(folder)],
            env=enclave_environment(1),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        fields: dict[str, Any] = json.loads(run.stdout)
    except OSError as error:
        raise UnavailableError(
            "the interpreter of enclaves cannot be started", found=error.strerror
        ) from None
    except (subprocess.SubprocessError, ValueError) as error:
        raise UnavailableError(
            "the byte code of enclaves cannot be made",
            found=type(error).__name__,
            expected="an interpreter that imports cenacle",
            remedy="reinstall Cenacle",
        ) from None
    return fields


def _prune(base: Path, used: Path) -> None:
    """Remove folders of earlier sources, but none that an enclave may have been started with."""
    for old in base.iterdir():
        if old.is_dir() and old != used and time.time() - old.stat().st_mtime > _KEPT_S:
            shutil.rmtree(old, ignore_errors=True)


def build(folder: Path) -> dict[str, Any]:
    """Import what enclaves import, write its byte code into ``folder``, and return what to index.

    In a process of its own: it imports heavily, and byte code depends on ``PYTHONHASHSEED``.
    """
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # as cenacle.enclave.__main__
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except (ImportError, UnavailableError):
            continue
    folders = list(import_folders())
    roots = module_roots(Path(sysconfig.get_path("stdlib")), folders)
    sources = sorted({path for module in list(sys.modules.values()) if (path := _source(module))})
    for path in sources:
        target = written_to(folder, Path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        name = relative_name(Path(path), roots)
        target.write_bytes(compiled(Path(path).read_bytes(), name))
    return {
        # A folder of packages changes when one is installed or removed.
        "files": _stats([*map(str, folders), *sources]),
        "digest": measure_bytecode(folder).removeprefix("sha256:"),
    }


def _source(module: Any) -> str | None:
    spec = getattr(module, "__spec__", None)
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        return None
    return str(spec.origin)


if __name__ == "__main__":
    json.dump(build(Path(sys.argv[1])), sys.stdout)
