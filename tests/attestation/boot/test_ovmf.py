from __future__ import annotations

import lzma
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.ovmf import Firmware, pei_digests, read_ovmf
from cenacle.errors import InputError

LZMA = bytes.fromhex("98584eee143959429d6edc7bd79403cf")
NAME = bytes(range(16))


def section(kind: int, content: bytes) -> bytes:
    made = (4 + len(content)).to_bytes(3, "little") + bytes([kind]) + content
    return made + bytes(-len(made) % 4)


def volume(*files: tuple[int, bytes], name: bytes | None = NAME, fill: int = 0) -> bytes:
    """A firmware volume; its name stands in an extended header after the header."""
    head = 72
    body = b""
    extended = 0
    if name is not None:
        extended = head
        body += name + struct.pack("<I", 20)
    body += bytes(-(head + len(body)) % 8)
    for kind, content in files:
        size = 24 + len(content)
        body += (
            bytes(16) + b"\0\0" + bytes([kind, 0]) + size.to_bytes(3, "little") + b"\0" + content
        )
        body += b"\xff" * (-(head + len(body)) % 8)
    body += b"\xff" * (24 + fill)
    size = head + len(body)
    header = bytes(32) + struct.pack("<Q4sIHHHBB", size, b"_FVH", 0, head, 0, extended, 0, 2)
    return header.ljust(head, b"\0") + body


def firmware(*inner: bytes, packed: bytes | None = None) -> bytes:
    content = b"".join(section(0x17, part) for part in inner)
    compressed = lzma.compress(content, lzma.FORMAT_ALONE) if packed is None else packed
    guided = LZMA + struct.pack("<HH", 24, 1) + compressed
    return volume((0x0B, section(0x02, guided)))


PEI, DXE = volume((3, b"pei module"), fill=64), volume((3, b"dxe module"))


def test_both_volumes_are_found() -> None:
    found = read_ovmf(b"\0" * 8192 + firmware(PEI, DXE))
    assert (found.pei, found.dxe, found.dxe_name) == (PEI, DXE, NAME)


@settings(max_examples=100)
@given(st.binary(max_size=80), st.data())
def test_hostile_files_raise_input_errors_only(noise: bytes, data: st.DataObject) -> None:
    raw = bytearray(firmware(PEI, DXE))
    place = data.draw(st.integers(0, len(raw)))
    raw[place : place + len(noise)] = noise
    short = noise[:40].ljust(40, b"\0") + b"_FVH" + noise[40:52]
    for candidate in (bytes(raw), bytes(8192) + noise, firmware(short, short)):
        with suppress(InputError):
            pei_digests(read_ovmf(candidate), 1 << 30, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(100_000),
        firmware(PEI),
        firmware(PEI, DXE, DXE),
        firmware(PEI, volume((3, b"x"), name=None)),
        firmware(packed=b"not compressed at all"),
        volume((0x03, b"no volume inside")),
    ],
    ids=["empty", "zeros", "one", "three", "unnamed", "garbage", "module"],
)
def test_what_is_no_ovmf(raw: bytes) -> None:
    with pytest.raises(InputError, match="not an OVMF"):
        read_ovmf(raw)


def test_every_size_that_lies_is_refused_or_harmless() -> None:
    raw = firmware(PEI, DXE)
    for place in range(120):
        for value in (0x00, 0x7F, 0xFF):
            altered = bytearray(raw)
            altered[place] = value
            try:
                found = read_ovmf(bytes(altered))
            except InputError:
                continue
            assert (found.pei, found.dxe) == (PEI, DXE)


def test_every_truncation() -> None:
    raw = firmware(PEI, DXE)
    for size in range(len(raw)):
        with pytest.raises(InputError, match="not an OVMF"):
            read_ovmf(raw[:size])


def test_a_volume_without_the_module_has_no_digest() -> None:
    assert pei_digests(Firmware(PEI, DXE, NAME), 1 << 30, 1) == ()
