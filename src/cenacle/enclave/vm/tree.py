"""The files of an image before they are written: names, modes and contents, nothing else.

Owners, times, hard links and extended attributes do not exist here, so they cannot make two
builds differ. Every path is relative, without ``.`` or ``..``; folders above a path exist by
themselves, and everything belongs to root.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cenacle.errors import InputError

__all__ = ["FOLDER_MODE", "Node", "Tree"]

FOLDER_MODE = stat.S_IFDIR | 0o755
_COPY = 1 << 20
_MERGED = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_MAX_LINKS = 40


@dataclass(frozen=True)
class Node:
    """One file, folder or symbolic link.

    Attributes:
        mode: type and permission bits, as in ``st_mode``.
        content: bytes of a file or the target of a link; a file may name its source instead.
    """

    mode: int
    content: bytes | Path = b""

    @property
    def size(self) -> int:
        """Length in bytes; 0 for a folder."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def blocks(self) -> Iterator[bytes]:
        """The content in pieces of at most 1 MiB."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            while block := file.read(_COPY):
                yield block

    def read(self) -> bytes:
        """The whole content."""
        return b"".join(self.blocks())


@dataclass
class Tree:
    """Nodes by path, with the rules of a Linux root folder.

    Attributes:
        merged: whether ``bin``, ``lib``, ``lib64`` and ``sbin`` are links into ``usr``, as
            Debian has it: what is added below them goes below ``usr``.
    """

    merged: bool = True
    nodes: dict[str, Node] = field(default_factory=dict)

    def add_file(self, path: str, content: bytes | Path, mode: int = 0o644) -> None:
        """Add or replace a file; set-user-id and the like are dropped from ``mode``."""
        self._add(path, Node(stat.S_IFREG | (mode & 0o755), content))

    def add_link(self, path: str, target: str) -> None:
        """Add or replace a symbolic link."""
        self._add(path, Node(stat.S_IFLNK | 0o777, os.fsencode(target)))

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """Add an empty folder, or set the mode of one."""
        self._add(path, Node(stat.S_IFDIR | (mode & 0o1777)))

    def add_merged_links(self) -> None:
        """The links from ``/bin`` and its like into ``/usr``, for those that have a target."""
        for name in _MERGED:
            if any(path.startswith(f"usr/{name}/") for path in self.nodes):
                self.nodes[name] = Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode())

    def resolve(self, path: str) -> str:
        """Follow symbolic links to the path of a file.

        Raises:
            InputError: there is no such file, or the links go round in circles.
        """
        current = self._normal(path)
        for _ in range(_MAX_LINKS):
            node = self.nodes.get(current)
            if node is None:
                break
            if not stat.S_ISLNK(node.mode):
                return current
            target = os.fsdecode(node.read())
            joined = target if target.startswith("/") else f"{os.path.dirname(current)}/{target}"  # noqa: PTH120
            current = self._normal(os.path.normpath(joined).lstrip("/"))
        raise InputError("an image lacks a file that it needs", found=f"no {path}")

    def entries(self) -> list[tuple[str, Node]]:
        """Every node with the folders above it, the root as ``""``, in the order of bytes."""
        every = dict(self.nodes)
        for path in self.nodes:
            above = path
            while above := above.rpartition("/")[0]:
                if not stat.S_ISDIR(every.setdefault(above, Node(FOLDER_MODE)).mode):
                    raise InputError(
                        "an image has a file where it needs a folder", found=f"/{above}"
                    )
        every[""] = Node(FOLDER_MODE)
        return sorted(every.items(), key=lambda item: os.fsencode(item[0]).split(b"/"))

    def digests(self) -> dict[str, str]:
        """SHA-256 (hexadecimal) of every file, by absolute path."""
        found = {}
        for path, node in self.entries():
            if node.is_file:
                total = hashlib.sha256()
                for block in node.blocks():
                    total.update(block)
                found[f"/{path}"] = total.hexdigest()
        return found

    def write_to(self, folder: Path) -> None:
        """Make the tree below an existing folder, to run programs of it."""
        for path, node in self.entries():
            target = folder / path
            if stat.S_ISDIR(node.mode):
                target.mkdir(exist_ok=True)
            elif stat.S_ISLNK(node.mode):
                target.symlink_to(os.fsdecode(node.read()))
            else:
                with target.open("wb") as file:
                    for block in node.blocks():
                        file.write(block)
                target.chmod(node.mode & 0o755)

    def _normal(self, path: str) -> str:
        first = path.partition("/")[0]
        return f"usr/{path}" if self.merged and first in _MERGED else path

    def _add(self, path: str, node: Node) -> None:
        parts = path.split("/")
        if any(part in {"", ".", ".."} for part in parts) or "\0" in path:
            raise InputError("a path cannot be part of an image", found=repr(path))
        if max(len(os.fsencode(part)) for part in parts) > 255:
            raise InputError("a name is too long for an image", found=parts[-1][:60])
        self.nodes[self._normal(path)] = node
