"""The registry of importers, by file name suffix and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cenacle.errors import InputError
from cenacle.sealing.container import KINDS
from cenacle.sealing.parallel import Progress
from cenacle.sealing.writer import SealedWriter

__all__ = ["Importer", "Options", "find_importer", "importer"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of :func:`cenacle.sealing.seal_path` asked for.

    Attributes:
        allow_missing: accept empty cells, nulls, NaN and infinities in tables.
        progress: called with (bytes done, bytes in all) of the source.
    """

    allow_missing: bool = False
    progress: Progress | None = None


ImportFunction = Callable[[Path, SealedWriter, Options], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Importer:
    """How one sort of file becomes the plaintext of a container.

    Attributes:
        name: for messages, e.g. ``CSV``.
        kind: kind of the container it fills; empty if it takes none but refuses the file.
        suffixes: lower-case endings of file names.
        run: writes the content and returns the manifest's schema.
    """

    name: str
    kind: str
    suffixes: tuple[str, ...]
    run: ImportFunction


_IMPORTERS: Final[list[Importer]] = []


def importer(
    name: str, kind: str, suffixes: tuple[str, ...]
) -> Callable[[ImportFunction], ImportFunction]:
    """Register an importer. A longer suffix wins over a shorter, a later one over an earlier."""

    def register(run: ImportFunction) -> ImportFunction:
        _IMPORTERS.append(Importer(name, kind, suffixes, run))
        return run

    return register


def find_importer(path: Path, kind: str | None = None) -> Importer:
    """The importer for a file.

    Args:
        path: the user's file; only its name is looked at.
        kind: what it shall become; ``file`` seals any file's bytes as they are.

    Raises:
        InputError: the kind is unknown, or cannot be made from such a file.
    """
    if kind is not None and kind not in KINDS:
        raise InputError("unknown kind of content", found=kind, expected=", ".join(KINDS))
    name = path.name.lower()
    best: tuple[int, Importer] | None = None
    for candidate in _IMPORTERS:
        for suffix in candidate.suffixes:
            if name.endswith(suffix) and (best is None or len(suffix) >= best[0]):
                best = (len(suffix), candidate)
    assert best is not None  # the plain importer has the empty suffix
    found = best[1]
    if not found.kind or kind in (None, found.kind):
        return found
    if kind == "file":
        return next(entry for entry in _IMPORTERS if entry.kind == "file")
    known = sorted({s for entry in _IMPORTERS if entry.kind == kind for s in entry.suffixes})
    raise InputError(
        f"a file of this sort cannot be sealed as {kind}",
        found=f"{found.name} ({path.suffix or 'no suffix'})",
        expected=", ".join(known) or "a directory",
        remedy="convert the file, or leave the kind out",
    )
