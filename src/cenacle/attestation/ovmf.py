"""An OVMF firmware file: the firmware volumes that it measures into PCR 0 when it boots.

Formats: UEFI Platform Initialization 1.8, volume 3 (firmware volumes, files and sections).
The file holds one compressed section with two volumes, PEIFV and DXEFV; the boot code unpacks
them to memory and measures both there (edk2, ``OvmfPkg`` and ``SecurityPkg/Tcg/Tcg2Pei``).
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cenacle.errors import InputError

__all__ = ["Firmware", "below_4g", "pei_digests", "read_ovmf"]

_LZMA: Final = bytes.fromhex("98584eee143959429d6edc7bd79403cf")
_VOLUME_FILE: Final = 0x0B
_GUIDED_SECTION: Final = 0x02
_VOLUME_SECTION: Final = 0x17
_LARGE_FILE: Final = 0x01
_MAX_UNPACKED: Final = 64 * 1024 * 1024
_MAX_MEMORY: Final = 256 * 1024 * 1024  # of the decompressor, which the file itself demands
_HEADER: Final = 56

# PlatformPei, and what it writes into its variable mPlatformInfoHob on QEMU's q35.
_PLATFORM_PEI: Final = bytes.fromhex("6d382c22bc5ab44fb124fbb82488acf4")
_Q35: Final = 0x29C0
_ADDRESS_BITS: Final = 36
_SPLIT: Final = {"q35": (0xB0000000, 0x80000000), "pc": (0xE0000000, 0xC0000000)}
_ALIGNMENT: Final = 32  # of variables of this size
_MOST_PLACES: Final = 64


@dataclass(frozen=True, slots=True)
class Firmware:
    """What a firmware file unpacks to.

    Attributes:
        pei: the PEI volume as it is in the file. In memory its modules' variables have values
            when it is measured, so its hash is not the one in the event log.
        dxe: the DXE volume, which is measured as it is.
        dxe_name: the GUID that names the DXE volume, as device paths write it.
    """

    pei: bytes
    dxe: bytes
    dxe_name: bytes


def read_ovmf(raw: bytes) -> Firmware:
    """Unpack an ``OVMF_CODE*.fd`` (or a whole ``OVMF.fd``).

    Raises:
        InputError: it is no such file.
    """
    for volume in _volumes(raw):
        for kind, content in _files(volume):
            if kind != _VOLUME_FILE:
                continue
            inner = [
                v for v in _unpacked_volumes(content) if v[40:44] == b"_FVH" and len(v) >= _HEADER
            ]
            if len(inner) == 2:
                pei, dxe = inner
                return Firmware(pei, dxe, _volume_name(dxe))
    raise _error("no firmware volume file with a PEI and a DXE volume")


def below_4g(memory: int, model: str) -> int:
    """How much of a machine's memory QEMU puts below 4 GiB, in bytes."""
    threshold, low = _SPLIT[model]
    return low if memory >= threshold else memory


def pei_digests(firmware: Firmware, memory: int, processors: int) -> tuple[bytes, ...]:
    """What the SHA-256 of the PEI volume can be when it is measured, on QEMU's q35.

    One module, PlatformPei, writes facts of the machine into a variable of its own in that
    volume before the volume is measured (``EFI_HOB_PLATFORM_INFO`` of edk2-stable202211, which
    Debian 12 has). Where in the module's zeros the variable lies is not said in the file, so
    there is one digest for each place; none of them stands for other code.

    Empty where the facts are not known: other layouts, more than 30 GiB of memory, processors
    whose address width the firmware believes (``-cpu host`` under KVM). Then the digest has to
    come from a boot.

    Args:
        memory: in bytes.
        processors: virtual ones (``-smp``).
    """
    low = below_4g(memory, "q35")
    if memory - low > 28 << 30:
        return ()
    written = _platform_info(low, processors)
    digests = []
    start, end = _file_range(firmware.pei, _PLATFORM_PEI)
    for place in range(-(-start // _ALIGNMENT) * _ALIGNMENT, end - len(written), _ALIGNMENT):
        if firmware.pei[place : place + len(written)] == bytes(len(written)):
            in_memory = bytearray(firmware.pei)
            in_memory[place : place + len(written)] = written
            digests.append(hashlib.sha256(in_memory).digest())
    return tuple(digests) if len(digests) <= _MOST_PLACES else ()


def _platform_info(low: int, processors: int) -> bytes:
    """``EFI_HOB_PLATFORM_INFO``, packed; its header of 24 bytes is still empty."""
    reserved = 0x80000 + 0x8000 * processors  # for resuming from sleep, and each processor's stack
    return struct.pack(
        "<24xHQBIBBBHQBII9xQQIIQQQIIIIIBB",
        _Q35,
        *(0, 0, 0),  # no confidential machine, full boot
        *(1, 0, 0, 0),  # resuming from sleep is supported, no SMM
        1 << _ADDRESS_BITS,
        _ADDRESS_BITS,
        *(0x80000000, 0),  # uncacheable from here
        *(0x800000000, 0x800000000),  # 64-bit PCI window
        *(0xC0000000, 0x3C000000),  # 32-bit PCI window
        *(0x6000, 0xA000),  # PCI ports
        0,
        *(processors, processors, 64),
        *(low - reserved, reserved),
        *(1, 1),  # QEMU's firmware configuration is there, with DMA
    )


def _file_range(volume: bytes, name: bytes) -> tuple[int, int]:
    """Where the file of this name lies in a volume; empty if it does not."""
    for start, end, found, _ in _walk(volume):
        if found == name:
            return start, end
    return 0, 0


def _volumes(raw: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + 56 <= len(raw):
        if raw[offset + 40 : offset + 44] == b"_FVH":
            (size,) = struct.unpack_from("<Q", raw, offset + 32)
            if not 56 <= size <= len(raw) - offset:
                raise _error(f"a firmware volume of {size} bytes at {offset}")
            yield raw[offset : offset + size]
            offset += size
        else:
            offset += 4096  # volumes begin at flash blocks


def _files(volume: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of every file of a volume."""
    for start, end, _, kind in _walk(volume):
        yield kind, volume[start:end]


def _walk(volume: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Content's start and end, name and type of every file of a volume."""
    header, extended = struct.unpack_from("<H2xH", volume, 48)
    offset = header
    if extended:
        if extended + 20 > len(volume):
            raise _error(f"a volume's extended header at {extended}")
        offset = extended + struct.unpack_from("<I", volume, extended + 16)[0]
    offset = (offset + 7) & ~7
    while offset + 24 <= len(volume) and volume[offset : offset + 24] != b"\xff" * 24:
        size, start = int.from_bytes(volume[offset + 20 : offset + 23], "little"), 24
        if volume[offset + 19] & _LARGE_FILE and offset + 32 <= len(volume):
            size, start = struct.unpack_from("<Q", volume, offset + 24)[0], 32
        if not start <= size <= len(volume) - offset:
            raise _error(f"a file of {size} bytes in a volume")
        name = volume[offset : offset + 16]
        yield offset + start, offset + size, name, volume[offset + 18]
        offset = (offset + size + 7) & ~7


def _sections(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of every section."""
    offset = 0
    while offset + 4 <= len(content):
        size, start = int.from_bytes(content[offset : offset + 3], "little"), 4
        if size == 0xFFFFFF and offset + 8 <= len(content):
            size, start = struct.unpack_from("<I", content, offset + 4)[0], 8
        if not start <= size <= len(content) - offset:
            raise _error(f"a section of {size} bytes")
        yield content[offset + 3], content[offset + start : offset + size]
        offset = (offset + size + 3) & ~3


def _unpacked_volumes(content: bytes) -> Iterator[bytes]:
    for kind, section in _sections(content):
        if kind == _GUIDED_SECTION and section[:16] == _LZMA and len(section) > 20:
            (start,) = struct.unpack_from("<H", section, 16)  # counted with the section's header
            unpacked = _decompress(section[max(start - 4, 0) :])
            yield from (inner for k, inner in _sections(unpacked) if k == _VOLUME_SECTION)


def _decompress(packed: bytes) -> bytes:
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MAX_MEMORY)
        unpacked = unpacker.decompress(packed, _MAX_UNPACKED)
    except (lzma.LZMAError, MemoryError) as error:
        raise _error(f"a compressed section that does not unpack ({error})") from None
    if len(unpacked) == _MAX_UNPACKED:
        raise _error(f"a compressed section of more than {_MAX_UNPACKED} bytes")
    return unpacked


def _volume_name(volume: bytes) -> bytes:
    (extended,) = struct.unpack_from("<H", volume, 52)
    if not extended or extended + 16 > len(volume):
        raise _error("a DXE volume without a name")
    return volume[extended : extended + 16]


def _error(found: str) -> InputError:
    return InputError(
        "the firmware file is not an OVMF that this version understands",
        found=found,
        expected="OVMF_CODE_4M.fd or another OVMF build",
    )
