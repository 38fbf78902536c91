"""The Authenticode hash of an EFI program: what firmware extends when it loads one.

Source: Microsoft, "Windows Authenticode Portable Executable Signature Format" (2008),
"Calculating the PE Image Hash", and TCG PC Client Platform Firmware Profile 1.06, section
3.3.4.5: everything but the checksum, the directory entry of the certificate table, and that
table itself. A signature therefore does not change the hash.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NoReturn

from cenacle.errors import InputError

__all__ = ["authenticode_hash", "is_efi_program"]

_PE32: Final = 0x10B
_PE32_PLUS: Final = 0x20B
_CERTIFICATE_TABLE: Final = 4
_MAX_SECTIONS: Final = 96  # the Windows loader's limit


def is_efi_program(image: bytes) -> bool:
    """Whether ``image`` begins like a PE file (a Linux kernel with an EFI stub does)."""
    if len(image) < 0x40 or image[:2] != b"MZ":
        return False
    (start,) = struct.unpack_from("<I", image, 0x3C)
    return image[start : start + 4] == b"PE\0\0"


def authenticode_hash(image: bytes, algorithm: str = "sha256") -> bytes:
    """The hash of a PE or PE32+ image, signed or not.

    Args:
        image: the file's bytes.
        algorithm: a name that ``hashlib`` knows, e.g. ``sha256``.

    Raises:
        InputError: the file is not a PE image, or its headers contradict its size.
    """
    if not is_efi_program(image):
        _refuse("the file is not an EFI program", "no PE header", "a kernel with an EFI stub")
    (start,) = struct.unpack_from("<I", image, 0x3C)
    (count,) = _unpack("<H", image, start + 6)
    (optional_size,) = _unpack("<H", image, start + 20)
    optional = start + 24
    (magic,) = _unpack("<H", image, optional)
    if magic not in (_PE32, _PE32_PLUS):
        _refuse("the file is not an EFI program", f"optional header 0x{magic:x}", "0x10b or 0x20b")
    directories = optional + (112 if magic == _PE32_PLUS else 96)
    (headers_size,) = _unpack("<I", image, optional + 60)
    (directory_count,) = _unpack("<I", image, directories - 4)
    table = optional + optional_size
    if not table + 40 * count <= headers_size <= len(image) or count > _MAX_SECTIONS:
        _refuse("an EFI program's headers do not fit it", f"{headers_size} bytes of headers")

    checksum = optional + 64
    digest = hashlib.new(algorithm, usedforsecurity=False)
    digest.update(image[:checksum])
    signatures = 0
    if directory_count > _CERTIFICATE_TABLE:
        entry = directories + 8 * _CERTIFICATE_TABLE
        if entry + 8 > table:
            _refuse("an EFI program's headers do not fit it", f"{directory_count} directories")
        _, signatures = _unpack("<II", image, entry)
        digest.update(image[checksum + 4 : entry])
        digest.update(image[entry + 8 : headers_size])
    else:
        digest.update(image[checksum + 4 : headers_size])

    hashed = headers_size
    for offset, size in sorted(_sections(image, table, count)):
        if offset < hashed or offset + size > len(image):
            _refuse("an EFI program's section does not fit it", f"{size} bytes at {offset}")
        digest.update(image[offset : offset + size])
        hashed += size
    rest = len(image) - signatures
    if rest < hashed:
        _refuse("an EFI program's certificate table does not fit it", f"{signatures} bytes")
    digest.update(image[hashed:rest])
    return digest.digest()


def _sections(image: bytes, table: int, count: int) -> list[tuple[int, int]]:
    """Offset and size in the file of every section that has bytes there."""
    found = []
    for index in range(count):
        size, offset = _unpack("<II", image, table + 40 * index + 16)
        if size:
            found.append((offset, size))
    return found


def _unpack(form: str, image: bytes, offset: int) -> tuple[int, ...]:
    if offset + struct.calcsize(form) > len(image):
        _refuse("an EFI program is cut off", f"{len(image)} bytes", f"> {offset} bytes")
    return struct.unpack_from(form, image, offset)


def _refuse(what: str, found: object, expected: object = None) -> NoReturn:
    raise InputError(what, found=found, expected=expected, remedy="give an unpacked bzImage or UKI")
