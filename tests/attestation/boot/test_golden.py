from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.authenticode import authenticode_hash
from cenacle.attestation.boot_claims import differences
from cenacle.attestation.event_log import parse_event_log
from cenacle.attestation.golden import DirectBoot, golden_log, golden_pcrs, patch_setup_header
from cenacle.attestation.ovmf import Firmware, pei_digests, read_ovmf
from cenacle.errors import InputError

OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE = Firmware(b"pei", b"dxe", bytes.fromhex("c9bdb87cebf8344faaea3ee4af6516a1"))
MIB = 1 << 20
SAME = (1, 2, 3, 5, 6, 7, 8)


@pytest.fixture
def boot(kernel: bytes) -> DirectBoot:
    return DirectBoot(kernel, b"initrd" * 100, "console=ttyS0 quiet", 512 * MIB)


def test_the_registers_that_need_no_file_are_those_of_a_real_boot(
    boot: DirectBoot, real_boot: Any
) -> None:
    found = golden_pcrs(replace(boot, firmware=FIRMWARE))
    real = real_boot.pcrs()
    assert {n: found[n] for n in SAME} == {n: real[n] for n in SAME}
    assert sorted(golden_pcrs(boot)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found[4] != real[4]


def test_the_command_line_is_measured_as_in_a_real_boot(boot: DirectBoot, real_boot: Any) -> None:
    line = real_boot.fields["command_line"]
    ours = golden_log(replace(boot, command_line=line)).of(9)[0]
    theirs = parse_event_log(real_boot.log).of(9)[0]
    assert ours.digests["sha256"] == theirs.digests["sha256"]
    assert ours.data == theirs.data


def test_the_first_register_of_a_real_boot(boot: DirectBoot, real_boot: Any) -> None:
    if not OVMF.is_file():
        pytest.skip("needs OVMF: install Debian's package ovmf")
    raw = OVMF.read_bytes()
    firmware = read_ovmf(raw)
    if hashlib.sha256(raw).hexdigest() != real_boot.fields["firmware_sha256"]:
        pytest.skip("the installed OVMF is of another version than the recorded boot's")
    pei = parse_event_log(real_boot.log).of(0)[1].digests["sha256"]
    computed = pei_digests(firmware, real_boot.fields["memory"], 1)
    assert pei in computed
    assert len(set(computed)) == len(computed) < 10
    assert pei not in pei_digests(firmware, real_boot.fields["memory"], 2)
    assert pei not in pei_digests(firmware, 2 * real_boot.fields["memory"], 1)
    assert pei_digests(firmware, 64 << 30, 1) == ()
    found = golden_pcrs(replace(boot, firmware=firmware, pei_digest=pei))
    assert found[0] == real_boot.pcrs()[0]
    assert found[1] == real_boot.pcrs()[1]


def test_one_change_of_each_part_is_named(boot: DirectBoot) -> None:
    boot = replace(boot, firmware=FIRMWARE, pei_digest=bytes(32))
    expected = golden_log(boot)
    for change, told in (
        ({"command_line": "console=ttyS0 quiet init=/bin/sh"}, ["register 9: kernel command line"]),
        ({"initrd": b"Initrd" * 100}, ["register 9: initial RAM disk"]),
        ({"kernel": boot.kernel + b"x"}, ["register 4: EFI program kernel"]),
        # QEMU writes the initial RAM disk's address into the kernel's header.
        ({"memory": 1024 * MIB}, ["register 4: EFI program kernel"]),
        ({"pei_digest": b"\x01" * 32}, ["register 0: firmware volume of 3 bytes at 0x0"]),
        ({"initrd": b""}, ["register 4: EFI program kernel", "register 9: kernel command line"]),
    ):
        found = differences(golden_log(replace(boot, **change)), expected, "sha256")
        assert found == [f"{line} differs" for line in told]


def test_the_kernel_is_measured_as_qemu_hands_it_over(boot: DirectBoot) -> None:
    patched = patch_setup_header(boot)
    differ = {n for n, (a, b) in enumerate(zip(boot.kernel, patched, strict=True)) if a != b}
    fields = {0x210, 0x211, *range(0x218, 0x220), *range(0x224, 0x226), *range(0x228, 0x22C)}
    assert differ <= fields
    address, size = struct.unpack_from("<II", patched, 0x218)
    assert size == len(boot.initrd)
    assert address % 4096 == 0
    assert address + size <= boot.memory - 0x28000
    event = golden_log(boot).of(4)[0]
    assert event.digests["sha256"] == authenticode_hash(patched)
    assert patch_setup_header(replace(boot, patched=False)) == boot.kernel


@pytest.mark.parametrize(
    ("model", "memory", "below"),
    [
        ("q35", 0xB0000000 - MIB, 0xB0000000 - MIB),
        ("q35", 0xB0000000, 0x80000000),
        ("q35", 1 << 36, 0x80000000),
        ("pc", 0xB0000000, 0xB0000000),
        ("pc", 0xE0000000, 0xC0000000),
    ],
)
def test_memory_splits_below_4_gib(boot: DirectBoot, model: Any, memory: int, below: int) -> None:
    patched = patch_setup_header(replace(boot, model=model, memory=memory))
    (address,) = struct.unpack_from("<I", patched, 0x218)
    assert address == (below - 0x28000 - 1 - len(boot.initrd)) & ~0xFFF


def test_an_old_kernel_limits_the_address(boot: DirectBoot) -> None:
    kernel = bytearray(boot.kernel)
    kernel[0x236] = 0
    struct.pack_into("<I", kernel, 0x22C, 0x37FFFFFF)
    patched = patch_setup_header(replace(boot, kernel=bytes(kernel), memory=0x80000000))
    (address,) = struct.unpack_from("<I", patched, 0x218)
    assert address == (0x37FFFFFF - len(boot.initrd)) & ~0xFFF


def test_what_cannot_be_booted_so(boot: DirectBoot, silent_kernel: bytes, program: Any) -> None:
    for change, reason in (
        ({"kernel": b"MZ"}, "not a bzImage"),
        ({"kernel": program.image}, "not a bzImage"),
        ({"kernel": silent_kernel}, "does not measure"),
        ({"command_line": "caf\u00e9"}, "not ASCII"),
        ({"command_line": "a\0b"}, "not ASCII"),
        ({"command_line": "quiet vga=normal"}, "QEMU reads vga="),
        ({"memory": MIB, "initrd": bytes(MIB)}, "does not fit"),
    ):
        with pytest.raises(InputError, match=reason):
            golden_log(replace(boot, **change))
    for place, value in ((0x206, 0x09), (0x211, 0)):
        kernel = bytearray(boot.kernel)
        kernel[place] = value
        with pytest.raises(InputError, match="too old"):
            golden_log(replace(boot, kernel=bytes(kernel)))


def test_neither_command_line_nor_initrd(boot: DirectBoot) -> None:
    log = golden_log(replace(boot, initrd=b"", command_line=""))
    assert log.of(9) == ()
    alone = golden_log(replace(boot, initrd=b"")).of(9)
    assert [e.digests["sha256"] for e in alone] == [
        hashlib.sha256("console=ttyS0 quiet\0".encode("utf-16-le")).digest()
    ]
