"""Programs: a directory of Python code as canonical bytes, and imported from memory.

::

    CENPKG1\\0 | number of files (4) | { path length (2) | path | size (8) | bytes } ...

Integers are big endian; entries are sorted by path and the content is stored as it is, so
equal content gives equal bytes (and one digest), and nothing expands when it is read.

A directory with ``__init__.py`` is packed under its own name as one package; any other is
packed as the root of modules and packages, like an entry of ``sys.path``.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Final, Self

from cenacle.errors import DataError
from cenacle.sealing.disk import disk_errors, open_source

__all__ = ["MAX_PACKAGE_BYTES", "PackageFinder", "pack", "package_digest", "package_files"]

MAX_PACKAGE_BYTES: Final = 64 << 20
_MAX_FILE: Final = 16 << 20
_MAX_FILES: Final = 4096
_MAX_PATH: Final = 255
_MAGIC: Final = b"CENPKG1\x00"
_COUNT: Final = struct.Struct(">I")
_PATH: Final = struct.Struct(">H")
_SIZE: Final = struct.Struct(">Q")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_SKIPPED: Final = {"__pycache__"}
_COMPILED: Final = (".pyc", ".so", ".pyd", ".dll", ".dylib", ".pth", ".egg", ".whl")


def _bad(what: str, found: object, expected: str, remedy: str | None = None) -> DataError:
    return DataError(what, found=found, expected=expected, remedy=remedy)


def pack(directory: Path | str) -> bytes:
    """The canonical bytes of a program.

    ``__pycache__``, ``*.pyc`` and hidden files are left out.

    Raises:
        DataError: no Python files, symbolic links, compiled modules, odd names, or more than
            4096 files, 16 MiB in one or 64 MiB in all.
        InputError: the directory cannot be read.
    """
    root = Path(directory)
    with disk_errors(f"read {root}"):
        files = dict(_walk(root, ""))
    if "__init__.py" in files:
        name = root.resolve().name
        if not name.isidentifier():
            raise _bad(
                "a package's directory cannot be imported under its name",
                repr(name),
                "a Python identifier",
                "rename the directory, for example with underscores",
            )
        files = {f"{name}/{path}": content for path, content in files.items()}
    parts = [_MAGIC, _COUNT.pack(len(files))]
    for path in sorted(files):
        _check_path(path)
        encoded = path.encode("ascii")
        parts += [_PATH.pack(len(encoded)), encoded, _SIZE.pack(len(files[path])), files[path]]
    packed = b"".join(parts)
    package_files(packed)  # what is packed must load
    return packed


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    total = count = 0
    pending = [(folder, prefix)]
    while pending:
        current, below = pending.pop()
        with os.scandir(current) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.name in _SKIPPED or entry.name.startswith(".") or entry.name.endswith(".pyc"):
                continue
            path = below + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                pending.append((Path(entry.path), path + "/"))
                continue
            if not stat.S_ISREG(mode):
                raise _bad(
                    f"a program contains {path[:200]!r}, which is no ordinary file",
                    "a symbolic link or a special file",
                    "ordinary files only",
                    "replace it with the file itself",
                )
            content = _read(Path(entry.path), path)
            total += len(content)
            count += 1
            if total > MAX_PACKAGE_BYTES or count > _MAX_FILES:
                raise _too_big(f"more than {count - 1} files or {MAX_PACKAGE_BYTES >> 20} MiB")
            yield path, content


def _read(path: Path, name: str) -> bytes:
    with os.fdopen(open_source(path), "rb") as file:
        content = file.read(_MAX_FILE + 1)
    if len(content) > _MAX_FILE:
        raise _too_big(f"{name[:200]!r} of more than {_MAX_FILE >> 20} MiB")
    return content


def _too_big(found: str) -> DataError:
    return _bad(
        "a program is too big",
        found,
        f"{_MAX_FILES} files, {_MAX_FILE >> 20} MiB each, {MAX_PACKAGE_BYTES >> 20} MiB in all",
        "seal data and weights as assets of their own",
    )


def package_digest(packed: bytes) -> str:
    """``sha256:`` of the packed bytes; what a contract approves."""
    return f"sha256:{hashlib.sha256(packed).hexdigest()}"


def package_files(packed: bytes | memoryview) -> dict[str, bytes]:
    """Path to content, after a strict check; only bytes that :func:`pack` makes are taken.

    Raises:
        DataError: truncated, extended, unsorted, or with paths or sizes that are refused.
    """
    view = memoryview(packed)
    if len(view) > MAX_PACKAGE_BYTES + _MAX_FILES * (_MAX_PATH + 16):
        raise _too_big(f"{len(view)} bytes")
    if len(view) < 12 or bytes(view[:8]) != _MAGIC:
        raise _bad("this is not a packed program", "other first bytes", "the mark CENPKG1")
    (count,) = _COUNT.unpack_from(view, 8)
    files: dict[str, bytes] = {}
    previous = ""
    position = 12
    try:
        for _ in range(count):
            (length,) = _PATH.unpack_from(view, position)
            path = str(view[position + 2 : position + 2 + length], "ascii")
            (size,) = _SIZE.unpack_from(view, position + 2 + length)
            position += 2 + length + 8
            if size > len(view) - position:
                raise _malformed("a file that is cut short")
            _check_path(path)
            if path <= previous:
                raise _malformed("files that are not sorted")
            files[path], previous = bytes(view[position : position + size]), path
            position += size
    except (struct.error, UnicodeDecodeError):
        raise _malformed("an entry that is cut short or not ASCII") from None
    if position != len(view) or count > _MAX_FILES:
        raise _malformed("more than its files")
    _check_modules(files)
    return files


def _malformed(found: str) -> DataError:
    return _bad("a packed program is malformed", found, "bytes as pack() makes them")


def _check_path(path: str) -> None:
    parts = path.split("/")
    if len(path) > _MAX_PATH or not all(_PART.fullmatch(part) for part in parts):
        raise _bad(
            "a program has a file whose name is refused",
            repr(path[:200]),
            "ASCII letters, digits, '_', '.', '-' and '+'; no leading '.'",
            "rename the file",
        )
    if path.endswith(_COMPILED) or not _SKIPPED.isdisjoint(parts):
        raise _bad(
            "a program contains compiled code, which cannot be reviewed or loaded",
            repr(path[:200]),
            "Python source and data files",
            "remove it; use what the enclave has installed",
        )


def _check_modules(files: Mapping[str, bytes]) -> None:
    modules = _modules(files)
    if not modules:
        raise _bad("a program has no Python files", f"{len(files)} files", "one or more .py files")
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    for path in files:
        if path in folders or (path.endswith(".py") and path[:-3] + "/__init__.py" in files):
            raise _bad("a program has a file and a folder of one name", repr(path), "one of them")
    for name in {name.partition(".")[0] for name in modules}:
        if name in sys.stdlib_module_names or name == "cenacle":
            raise _bad(
                "a program has a module that would hide one of Python's or Cenacle's own",
                repr(name),
                "another name",
                "rename the module",
            )


def _modules(files: Mapping[str, bytes]) -> dict[str, str]:
    """Module name to path; folders with Python files but no ``__init__.py`` have an empty path."""
    found: dict[str, str] = {}
    for path in files:
        if not path.endswith(".py"):
            continue
        parts = path[:-3].split("/")
        if parts[-1] == "__init__":
            parts.pop()
        if not parts or not all(part.isidentifier() for part in parts):
            continue
        found[".".join(parts)] = path
        for depth in range(1, len(parts)):
            found.setdefault(".".join(parts[:depth]), "")
    return found


class PackageFinder(importlib.abc.MetaPathFinder):
    """Imports a packed program from memory; nothing of it is written to disk.

    Use it as a context manager, or call :meth:`install` and :meth:`remove`.

    Args:
        packed: bytes of :func:`pack`.
        expected_digest: the digest a contract approved.

    Raises:
        DataError: malformed, or not the expected program.
    """

    def __init__(self, packed: bytes | memoryview, *, expected_digest: str | None = None) -> None:
        self.digest = package_digest(bytes(packed))
        if expected_digest is not None and expected_digest != self.digest:
            raise _bad("a program is not the one that was approved", self.digest, expected_digest)
        self.files = package_files(packed)
        self._modules = _modules(self.files)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names that can be imported, sorted."""
        return tuple(sorted(self._modules))

    def install(self) -> None:
        """Put the program first in the import order.

        Raises:
            DataError: a module of that name is loaded already.
        """
        for name in self._modules:
            if name in sys.modules:
                raise _bad(
                    "a program has a module that is loaded already",
                    repr(name),
                    "a name that nothing else uses",
                    "rename the module",
                )
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Take the program and its modules out again. Safe to call twice."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in self._modules:
            sys.modules.pop(name, None)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules:
            return None
        source = self._modules[fullname]
        package = source == "" or source.endswith("/__init__.py")
        loader = _Loader(self.files, source)
        spec = importlib.util.spec_from_loader(fullname, loader, is_package=package)
        if spec is not None and source:
            # An origin with has_location gives tracebacks and pkgutil.get_data a __file__.
            spec.origin, spec.has_location = _PREFIX + source, True
        return spec

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_PREFIX: Final = "<sealed>/"


class _Loader(importlib.abc.ExecutionLoader):
    def __init__(self, files: Mapping[str, bytes], path: str) -> None:
        self._files = files
        self._path = path

    def is_package(self, fullname: str) -> bool:  # noqa: ARG002
        return self._path == "" or self._path.endswith("/__init__.py")

    def get_filename(self, fullname: str) -> str:  # noqa: ARG002
        return _PREFIX + self._path

    def get_source(self, fullname: str) -> str:  # noqa: ARG002
        return importlib.util.decode_source(self._files.get(self._path, b""))

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        content = self._files.get(self._path, b"")
        return self.source_to_code(content, _PREFIX + self._path)

    def get_data(self, path: str) -> bytes:
        """A data file next to the code, for :func:`pkgutil.get_data`."""
        try:
            return self._files[path.removeprefix(_PREFIX)]
        except KeyError:
            raise FileNotFoundError("no such file in the sealed program") from None
