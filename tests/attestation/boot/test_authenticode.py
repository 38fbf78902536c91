from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from cenacle.attestation.authenticode import authenticode_hash, is_efi_program
from cenacle.errors import InputError


def expected(image: bytes, optional: int, end: int | None = None) -> bytes:
    """The hash by its definition: all but the checksum, the directory entry and the signatures."""
    checksum, entry = optional + 64, optional + 112 + 32
    parts = image[:checksum] + image[checksum + 4 : entry] + image[entry + 8 : end]
    return hashlib.sha256(parts).digest()


def test_it_is_the_hash_of_the_specification(program: Any) -> None:
    assert authenticode_hash(program.image) == expected(program.image, program.optional)
    longer = program.image + b"appended"
    assert authenticode_hash(longer) == expected(longer, program.optional)
    assert len(authenticode_hash(program.image, "sha384")) == 48


def test_a_signature_does_not_change_it(program: Any) -> None:
    plain = authenticode_hash(program.image)
    assert authenticode_hash(program.with_certificates(b"certificates" * 9)) == plain
    assert authenticode_hash(program.with_certificates(b"others")) == plain


def test_every_other_byte_does(program: Any) -> None:
    plain = authenticode_hash(program.image)
    checksum, entry = program.optional + 64, program.optional + 112 + 32
    unhashed = {*range(checksum, checksum + 4), *range(entry, entry + 8)}
    for place in range(len(program.image)):
        altered = bytearray(program.image)
        altered[place] ^= 0x01
        try:
            same = authenticode_hash(bytes(altered)) == plain
        except InputError:
            same = False
        assert not same or place in unhashed


def test_every_truncation_is_refused_or_another_hash(program: Any) -> None:
    plain = authenticode_hash(program.image)
    for size in range(0, len(program.image), 7):
        try:
            assert authenticode_hash(program.image[:size]) != plain
        except InputError:
            continue


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [
        (24, "<H", 0x107),  # magic of a ROM image
        (24 + 60, "<I", 0),
        (24 + 60, "<I", 1 << 30),
        (24 + 112 + 36, "<I", 1 << 30),  # the certificate table's size
        (6, "<H", 97),  # sections
        (20, "<H", 0xFFFF),
    ],
)
def test_headers_that_lie(program: Any, place: int, form: str, value: int) -> None:
    image = bytearray(program.image)
    struct.pack_into(form, image, program.optional - 24 + place, value)
    with pytest.raises(InputError, match="EFI program"):
        authenticode_hash(bytes(image))


def test_sections_that_overlap_or_leave_the_file(program: Any) -> None:
    table = program.optional + 112 + 128
    for offset in (0, 1 << 30):
        image = bytearray(program.image)
        struct.pack_into("<I", image, table + 20, offset)
        with pytest.raises(InputError, match="section"):
            authenticode_hash(bytes(image))


@pytest.mark.parametrize("image", [b"", b"MZ", b"\x7fELF" + bytes(200), b"MZ" + bytes(200)])
def test_what_is_no_program(image: bytes) -> None:
    assert not is_efi_program(image)
    with pytest.raises(InputError, match="not an EFI program"):
        authenticode_hash(image)


def test_an_image_of_32_bits_and_one_without_directories(program: Any) -> None:
    image = bytearray(program.image)
    struct.pack_into("<I", image, program.optional + 108, 4)
    plain = hashlib.sha256(bytes(image[: program.optional + 64] + image[program.optional + 68 :]))
    assert authenticode_hash(bytes(image)) == plain.digest()
    image = bytearray(program.image)
    struct.pack_into("<H", image, program.optional, 0x10B)
    struct.pack_into("<I", image, program.optional + 92, 16)
    checksum, entry = program.optional + 64, program.optional + 96 + 32
    parts = image[:checksum] + image[checksum + 4 : entry] + image[entry + 8 :]
    assert authenticode_hash(bytes(image)) == hashlib.sha256(parts).digest()
