from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cenacle.documents.base import unb64

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class RealBoot:
    """A boot of a virtual machine, recorded."""

    fields: dict[str, Any]

    @property
    def log(self) -> bytes:
        return unb64(self.fields["log"])

    def pcrs(self, bank: str = "sha256") -> dict[int, bytes]:
        return {int(n): bytes.fromhex(v) for n, v in self.fields["pcrs"][bank].items()}


@pytest.fixture(scope="session")
def real_boot() -> RealBoot:
    return RealBoot(json.loads((_HERE / "debian12.json").read_text()))


@pytest.fixture(scope="session")
def evidence_folder() -> Path:
    named = os.environ.get("CENACLE_EVIDENCE")
    folder = Path(named) if named else _HERE.parents[2].parent / "shared" / "evidence"
    if not folder.is_dir():
        pytest.skip("genuine evidence is not here: set CENACLE_EVIDENCE to its folder")
    return folder


@dataclass(frozen=True)
class Program:
    """A small PE32+ image; tests change its bytes."""

    image: bytes
    optional: int

    def with_certificates(self, table: bytes) -> bytes:
        """Signed: a certificate table at the end, its place in the directory."""
        image = bytearray(self.image)
        struct.pack_into("<II", image, self.optional + 112 + 32, len(image), len(table))
        return bytes(image) + table


def make_program(sections: list[bytes], trailer: bytes = b"", head: bytes = b"") -> Program:
    """A PE32+ image with these sections' bytes; ``head`` is written after the DOS header."""
    start = 0x400
    optional_size = 112 + 16 * 8
    table = start + 24 + optional_size
    headers = (table + 40 * len(sections) + 511) & ~511
    image = bytearray(headers)
    image[:2] = b"MZ"
    struct.pack_into("<I", image, 0x3C, start)
    image[0x40 : 0x40 + len(head)] = head
    image[start : start + 4] = b"PE\0\0"
    struct.pack_into("<HH", image, start + 4, 0x8664, len(sections))
    struct.pack_into("<H", image, start + 20, optional_size)
    optional = start + 24
    struct.pack_into("<H", image, optional, 0x20B)
    struct.pack_into("<I", image, optional + 60, headers)
    struct.pack_into("<I", image, optional + 64, 0xC0FFEE)  # the checksum
    struct.pack_into("<I", image, optional + 108, 16)
    offset = headers
    for place, content in enumerate(sections):
        struct.pack_into("<II", image, table + 40 * place + 16, len(content), offset)
        offset += len(content)
    return Program(bytes(image) + b"".join(sections) + trailer, optional)


@pytest.fixture(scope="session")
def program() -> Program:
    return make_program([b"code" * 128, b"data" * 64])


def make_kernel(stub: bytes = b"LOADED_IMAGE::LoadOptions\0Linux initrd\0") -> bytes:
    """A bzImage's header and an EFI program around it."""
    image = bytearray(make_program([stub.ljust(512, b"."), b"k" * 512]).image)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    image[0x211] = 0x01
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", image, 0x236, 0x7F)
    return bytes(image)


@pytest.fixture(scope="session")
def kernel() -> bytes:
    return make_kernel()


@pytest.fixture(scope="session")
def silent_kernel() -> bytes:
    """One whose EFI stub measures nothing."""
    return make_kernel(b"an older stub")
