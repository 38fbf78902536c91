"""dm-verity: the hash tree over a block device, whose root vouches for every block.

The same bytes as ``veritysetup format --format 1 --hash sha256``: a superblock, then the
levels of the tree from the root down, each block of hashes padded with zeros.

Source: Documentation/admin-guide/device-mapper/verity.rst of Linux, and cryptsetup's
"DMVerity" on-disk format.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

from cenacle.errors import InputError

__all__ = ["BLOCK", "VerityTable", "append_verity"]

BLOCK: Final = 4096
_SECTORS: Final = BLOCK // 512
_DIGEST: Final = 32
_SUPERBLOCK: Final = struct.Struct("<8sII16s32sIIQH6x256s168x")
_ALGORITHM: Final = "sha256"


@dataclass(frozen=True)
class VerityTable:
    """What the kernel must be told to open a verified device.

    Attributes:
        data_blocks: blocks of data, 4096 bytes each.
        hash_start: block of the same device where the tree begins, after its superblock.
        root: root hash, 32 bytes.
        salt: hashed before every block, at most 256 bytes.
    """

    data_blocks: int
    hash_start: int
    root: bytes
    salt: bytes

    def argument(self) -> str:
        """The value of the kernel argument ``cenacle.verity``, commas instead of spaces."""
        fields = (
            1,
            BLOCK,
            BLOCK,
            self.data_blocks,
            self.hash_start,
            _ALGORITHM,
            self.root.hex(),
            self.salt.hex() or "-",
        )
        return ",".join(map(str, fields))

    @property
    def sectors(self) -> int:
        """Length of the verified device in 512-byte sectors."""
        return self.data_blocks * _SECTORS


def append_verity(file: BinaryIO, salt: bytes) -> VerityTable:
    """Append superblock and hash tree to a file of whole blocks, opened for reading and writing.

    Raises:
        InputError: the file is empty or no whole number of blocks, or the salt is too long.
    """
    size = file.seek(0, 2)
    if size == 0 or size % BLOCK or len(salt) > 256:
        raise InputError(
            "dm-verity needs whole blocks of data and at most 256 bytes of salt",
            found=f"{size} bytes, {len(salt)} bytes of salt",
        )
    blocks = size // BLOCK
    file.seek(0)
    start = hashlib.sha256(salt)

    def hashed(block: bytes) -> bytes:
        one = start.copy()
        one.update(block)
        return one.digest()

    level = b"".join(hashed(file.read(BLOCK)) for _ in range(blocks))
    levels = []
    while True:
        padded = level.ljust(-(-len(level) // BLOCK) * BLOCK, b"\0")
        if len(level) == _DIGEST:
            root = level  # one block of data: its hash is the root, and there is no tree
            break
        levels.append(padded)
        level = b"".join(hashed(padded[at : at + BLOCK]) for at in range(0, len(padded), BLOCK))
    file.seek(size)
    file.write(_superblock(blocks, salt))
    for one in reversed(levels):
        file.write(one)
    return VerityTable(blocks, blocks + 1, root, salt)


def _superblock(blocks: int, salt: bytes) -> bytes:
    packed = _SUPERBLOCK.pack(
        b"verity\0\0",
        1,
        1,  # "normal": salt first
        bytes(16),
        _ALGORITHM.encode(),
        BLOCK,
        BLOCK,
        blocks,
        len(salt),
        salt,
    )
    return packed.ljust(BLOCK, b"\0")
