"""A writer of EROFS, the kernel's read-only file system, without compression.

Equal trees give equal bytes: nodes in the order of their names, no owners but root, one time
for everything, no identifiers drawn at random. Layout: superblock at byte 1024 of the first
block, inodes from the next 32-byte slot on, then the blocks of folders, links and files, each
file in one piece (data layout "flat plain").

Source: Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux 6.1.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from cenacle.enclave.vm.tree import Node, Tree
from cenacle.errors import InputError

__all__ = ["BLOCK", "MAGIC", "write_erofs"]

BLOCK: Final = 4096
MAGIC: Final = 0xE0F5E1E2

_SUPER_OFFSET: Final = 1024
_SLOT: Final = 32
_SUPER: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")
_COMPACT: Final = struct.Struct("<HHHHIIIIHHI")
_EXTENDED: Final = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT: Final = struct.Struct("<QHBB")
_TYPES: Final = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}
_NO_BLOCK: Final = 0xFFFFFFFF
_BIG: Final = 1 << 32
_VOLUME: Final = b"cenacle"


@dataclass
class _Inode:
    node: Node
    number: int
    size: int = 0
    offset: int = 0
    block: int = _NO_BLOCK
    links: int = 1

    @property
    def nid(self) -> int:
        return self.offset // _SLOT

    @property
    def extended(self) -> bool:
        return self.size >= _BIG or self.links > 0xFFFF

    def pack(self, seconds: int) -> bytes:
        mode = self.node.mode
        if self.extended:
            return _EXTENDED.pack(
                1, 0, mode, 0, self.size, self.block, self.number, 0, 0, seconds, 0, self.links
            )
        return _COMPACT.pack(0, 0, mode, self.links, self.size, 0, self.block, self.number, 0, 0, 0)


def write_erofs(tree: Tree, file: BinaryIO, seconds: int = 0) -> int:
    """Write a tree as a file system image.

    Args:
        file: opened for writing at its start; receives whole blocks.
        seconds: the time of every node, since 1970.

    Returns:
        The number of 4096-byte blocks.

    Raises:
        InputError: the tree does not fit the format (over 16 TiB).
    """
    inodes = {
        path: _Inode(node, number) for number, (path, node) in enumerate(tree.entries(), start=1)
    }
    children = _children(inodes)
    for path, names in children.items():
        folder = inodes[path]
        folder.links = 2 + sum(stat.S_ISDIR(inodes[child].node.mode) for _, child in names[2:])
        folder.size = _folder_size([name for name, _ in names])
    for inode in inodes.values():
        if not stat.S_ISDIR(inode.node.mode):
            inode.size = inode.node.size
    blocks = _place(inodes)
    file.write(_head(inodes, blocks, seconds))
    for path, inode in inodes.items():
        if stat.S_ISDIR(inode.node.mode):
            data: Iterator[bytes] = _folder_blocks(
                [(name, inodes[child]) for name, child in sorted(children[path])]
            )
        else:
            data = inode.node.blocks()
        _copy(path, data, inode.size, file)
    return blocks


def _children(inodes: dict[str, _Inode]) -> dict[str, list[tuple[bytes, str]]]:
    """Folder -> its entries (name, path), ``.`` and ``..`` first."""
    found: dict[str, list[tuple[bytes, str]]] = {}
    for path, inode in inodes.items():
        above, _, name = path.rpartition("/")
        if stat.S_ISDIR(inode.node.mode):
            found[path] = [(b".", path), (b"..", above)]
        if path:
            found[above].append((os.fsencode(name), path))
    return found


def _pages(names: list[bytes]) -> Iterator[list[bytes]]:
    """Sorted names, as many to a block as fit with their entries."""
    page: list[bytes] = []
    used = 0
    for name in sorted(names):
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            yield page
            page, used = [], 0
        page.append(name)
        used += need
    yield page


def _folder_size(names: list[bytes]) -> int:
    *full, last = _pages(names)
    return len(full) * BLOCK + sum(_DIRENT.size + len(name) for name in last)


def _folder_blocks(entries: list[tuple[bytes, _Inode]]) -> Iterator[bytes]:
    inodes = dict(entries)
    pages = list(_pages(list(inodes)))
    for index, page in enumerate(pages):
        offset = _DIRENT.size * len(page)
        head = b""
        for name in page:
            kind = _TYPES[stat.S_IFMT(inodes[name].node.mode)]
            head += _DIRENT.pack(inodes[name].nid, offset, kind, 0)
            offset += len(name)
        block = head + b"".join(page)
        yield block if index == len(pages) - 1 else block.ljust(BLOCK, b"\0")


def _place(inodes: dict[str, _Inode]) -> int:
    """Give every inode its slot and its first block; returns the number of blocks."""
    offset = _SUPER_OFFSET + _SUPER.size
    for inode in inodes.values():
        length = _EXTENDED.size if inode.extended else _COMPACT.size
        offset = -(-offset // length) * length  # an inode never crosses a block
        inode.offset = offset
        offset += length
    block = -(-offset // BLOCK)
    for inode in inodes.values():
        if inode.size:
            inode.block = block
            block += -(-inode.size // BLOCK)
    if block >= _NO_BLOCK:
        raise InputError("an image is too large for its file system", found=f"{block} blocks")
    return block


def _head(inodes: dict[str, _Inode], blocks: int, seconds: int) -> bytes:
    root = inodes[""]
    last = max(inode.offset + _EXTENDED.size for inode in inodes.values())
    head = bytearray(-(-last // BLOCK) * BLOCK)
    _SUPER.pack_into(
        head,
        _SUPER_OFFSET,
        MAGIC,
        0,  # no checksum: dm-verity covers every byte
        0,
        BLOCK.bit_length() - 1,
        0,
        root.nid,
        len(inodes),
        seconds,
        0,
        blocks,
        0,
        0,
        bytes(16),
        _VOLUME,
        0,
        0,
        0,
        0,
    )
    for inode in inodes.values():
        packed = inode.pack(seconds)
        head[inode.offset : inode.offset + len(packed)] = packed
    first = min((i.block for i in inodes.values() if i.size), default=blocks)
    return bytes(head[: first * BLOCK])


def _copy(path: str, data: Iterator[bytes], size: int, file: BinaryIO) -> None:
    done = 0
    for block in data:
        file.write(block)
        done += len(block)
    if done != size:
        raise InputError(
            "a file changed while it was copied into an image",
            found=f"/{path}: {done} bytes",
            expected=f"{size} bytes",
            remedy="build again while nothing is being installed",
        )
    file.write(bytes(-done % BLOCK))
