"""Which folders of the host a Python enclave needs to read, and its fixed environment."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import cenacle
from cenacle.errors import UnavailableError

__all__ = [
    "ENVIRONMENT",
    "NO_BYTECODE",
    "SYSTEM_FILES",
    "SYSTEM_LIBRARIES",
    "THREAD_VARIABLES",
    "enclave_environment",
    "interpreter_command",
    "interpreter_folders",
]

# Byte code beside the sources is not measured, so an enclave must not run it. It runs none, or
# that of a folder which it measures.
NO_BYTECODE = "/nonexistent/cenacle-bytecode"

ENVIRONMENT = {
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "LOGNAME": "enclave",
    # ONNX Runtime would report its use to its maker; an enclave has no way there, and keeps quiet.
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONNOUSERSITE": "1",
    # torch insists on a folder that exists; nothing can ever be written to this one.
    "TORCHINDUCTOR_CACHE_DIR": "/proc",
}
THREAD_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

SYSTEM_LIBRARIES = tuple(
    Path(name)
    for name in (
        "/usr/lib",
        "/usr/lib32",
        "/usr/lib64",
        "/usr/libx32",
        "/usr/local/lib",
        "/lib",
        "/lib32",
        "/lib64",
        "/libx32",
        "/nix/store",
    )
)
SYSTEM_FILES = (Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo"))


def interpreter_folders() -> tuple[Path, ...]:
    """The interpreter, its virtual environment, its packages and this package.

    Each is given as Python names it and, where that is a symbolic link, as it resolves, so
    that both spellings exist inside. Raises UnavailableError if one of them would expose the
    user's home folder or the whole disk.
    """
    named = {
        Path(name)
        for name in (
            sys.prefix,
            sys.exec_prefix,
            sys.base_prefix,
            sys.base_exec_prefix,
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("platstdlib"),
        )
    }
    named.add(Path(cenacle.__file__).parent)
    every = {path for path in named if path.is_dir()} | {p.resolve() for p in named if p.is_dir()}
    home = Path("~").expanduser().resolve()
    for path in every:
        if path == Path("/") or home.is_relative_to(path):
            raise UnavailableError(
                "Python is installed in a folder that an enclave must not see",
                found=path,
                expected="an interpreter or virtual environment in a folder of its own",
                remedy="make a virtual environment with python -m venv .venv and install there",
            )
    # A folder inside another listed one needs no mount of its own.
    return tuple(
        sorted(
            path
            for path in every
            if not any(path != other and path.is_relative_to(other) for other in every)
        )
    )


def interpreter_command(bytecode: Path | None = None) -> list[str]:
    """Python without the user's site folder, script folder or byte code beside sources.

    ``-I`` would do the same but ignore ``PYTHONHASHSEED``, and the environment is ours anyway.

    Args:
        bytecode: a folder of byte code, which the enclave measures; by default there is none.
    """
    prefix = NO_BYTECODE if bytecode is None else bytecode
    return [sys.executable, "-s", "-P", "-B", "-X", f"pycache_prefix={prefix}"]


def enclave_environment(threads: int) -> dict[str, str]:
    """The whole environment of an enclave: nothing of the host's passes through."""
    environment = dict(ENVIRONMENT)
    environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    source = Path(cenacle.__file__).parent.parent
    if not any(source.is_relative_to(p) for p in (Path(sys.prefix), Path(sys.base_prefix))):
        environment["PYTHONPATH"] = str(source)  # an editable install or a source tree
    return environment
