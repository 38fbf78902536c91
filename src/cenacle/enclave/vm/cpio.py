"""A writer of the archive that the kernel unpacks as its first root folder ("newc" cpio).

Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, Final

from cenacle.enclave.vm.tree import Tree
from cenacle.errors import InputError

__all__ = ["write_cpio"]

_TRAILER: Final = "TRAILER!!!"
_LIMIT: Final = 1 << 32


def write_cpio(tree: Tree, file: BinaryIO, seconds: int = 0) -> None:
    """Write a tree as an archive: equal trees give equal bytes.

    Raises:
        InputError: a file of 4 GiB or more.
    """
    number = 0
    for path, node in tree.entries():
        if not path:
            continue
        number += 1
        content = node.read()
        if len(content) >= _LIMIT:
            raise InputError("a file is too large for an initial root folder", found=f"/{path}")
        links = 2 if stat.S_ISDIR(node.mode) else 1
        _write(file, path, content, number, node.mode, links, seconds)
    _write(file, _TRAILER, b"", 0, 0, 1, 0)
    file.write(bytes(-file.tell() % 512))


def _write(
    file: BinaryIO, path: str, content: bytes, number: int, mode: int, links: int, seconds: int
) -> None:
    name = os.fsencode(path) + b"\0"
    fields = (number, mode, 0, 0, links, seconds, len(content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    file.write(head + bytes(-len(head) % 4))
    file.write(content + bytes(-len(content) % 4))
