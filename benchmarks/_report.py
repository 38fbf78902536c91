"""One way to print a benchmark: hardware, versions, figures, and JSON on the last line."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment", "report"]

_PACKAGES = ("cenacle", "cryptography", "numpy", "pyarrow", "torch")


def environment() -> dict[str, Any]:
    """Hardware and versions, as far as the system tells."""
    from cryptography.hazmat.backends.openssl import backend  # noqa: PLC0415

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "openssl": backend.openssl_version_text(),
        **versions,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def report(name: str, results: dict[str, Any], *, as_json: bool) -> None:
    """Print a benchmark's results with the environment they were taken in.

    Args:
        name: the benchmark's name, e.g. ``sealing``.
        results: JSON-serializable figures by name.
        as_json: print one JSON object, alone on the last line, after the table.
    """
    found = environment()
    print(f"benchmark {name}: python {' '.join(sys.argv)}")
    for key, value in {**found, **results}.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"  {key:<24} {shown}")
    if as_json:
        print(json.dumps({"benchmark": name, **results, "environment": found}))
    sys.stdout.flush()
