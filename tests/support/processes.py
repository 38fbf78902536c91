"""Who descends from whom, from ``/proc``."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["alive", "descendants"]


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
    return found


def descendants(pid: int) -> set[int]:
    """All processes below this one, without it."""
    parents = _parents()
    below: set[int] = set()
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in below | {pid}} - below
        below |= more
        grown = bool(more)
    return below


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in {"Z", "X"}:
                running.add(pid)
    return running
