"""The report's fields at their places, and everything that is not a report."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.snp_report import (
    REPORT_BYTES,
    SIGNED_BYTES,
    SnpReport,
    tcb_parts,
)
from cenacle.errors import EvidenceError


def test_every_field_is_read_from_its_place(amd: Any) -> None:
    report = amd.Guest(
        version=5,
        guest_svn=7,
        policy=1 << 17 | 1 << 16 | 0x0137,
        platform=0b10100101,
        vmpl=2,
        key_info=1,
        launch_tcb=b"\x01\x02\x00\x00\x00\x00\x03\x04",
        put={
            0x10: b"f" * 16,
            0x20: b"i" * 16,
            0x38: b"12345678",
            0xC0: b"h" * 32,
            0xE0: b"k" * 48,
            0x110: b"a" * 48,
            0x140: b"r" * 32,
            0x160: b"m" * 32,
            0x1E0: b"abcdefgh",
            0x1E8: bytes([30, 55, 1, 0, 29, 54, 1, 0]),
            0x1F8: (3).to_bytes(8, "little"),
            0x200: (7).to_bytes(8, "little"),
        },
    ).report()
    found = SnpReport.parse(report)
    assert len(report) == REPORT_BYTES == 1184
    assert (found.version, found.guest_svn, found.vmpl, found.signer) == (5, 7, 2, "VCEK")
    assert found.abi == "1.55"
    assert {name for name, on in found.policy.items() if on} == {"smt"}
    on = {name for name, on in found.platform.items() if on}
    assert on == {"smt_en", "ecc_en", "alias_check_complete", "tio_en"}
    assert (found.family_id, found.image_id) == (b"f" * 16, b"i" * 16)
    assert found.report_data == bytes(range(64))
    assert (found.measurement, found.host_data) == (b"\x4d" * 48, b"h" * 32)
    assert (found.id_key_digest, found.author_key_digest) == (b"k" * 48, b"a" * 48)
    assert (found.report_id, found.report_id_ma) == (b"r" * 32, b"m" * 32)
    assert (found.current_tcb, found.committed_tcb) == (b"12345678", b"abcdefgh")
    assert found.reported_tcb == amd.TCBS["Milan"]
    assert found.launch_tcb == b"\x01\x02\x00\x00\x00\x00\x03\x04"
    assert found.cpuid == (0x19, 1, 1)
    assert found.chip_id == bytes(range(1, 65))
    assert (found.current_firmware, found.committed_firmware) == ("1.55.30", "1.54.29")
    assert found.mitigations == (3, 7)
    assert found.signed == report[:SIGNED_BYTES]
    found.verify(amd.vek_key().public_key())


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (16, "smt"),
        (18, "migrate_ma"),
        (19, "debug"),
        (20, "single_socket"),
        (21, "cxl_allow"),
        (22, "mem_aes_256_xts"),
        (23, "rapl_dis"),
        (24, "ciphertext_hiding_dram"),
        (25, "page_swap_disable"),
    ],
)
def test_each_bit_of_the_guest_policy(amd: Any, bit: int, name: str) -> None:
    found = SnpReport.parse(amd.Guest(policy=1 << 17 | 1 << bit).report())
    assert [flag for flag, on in found.policy.items() if on] == [name]


@pytest.mark.parametrize(
    ("product", "parts"),
    [
        ("Milan", {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}),
        ("Genoa", {"bootloader": 10, "tee": 2, "snp": 23, "microcode": 84}),
        ("Turin", {"fmc": 3, "bootloader": 5, "tee": 2, "snp": 9, "microcode": 71}),
    ],
)
def test_the_tcb_is_laid_out_by_product(amd: Any, product: Any, parts: dict[str, int]) -> None:
    assert tcb_parts(amd.TCBS[product], product) == parts


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 0}, "unknown version"),
        ({"version": 1}, "unknown version"),
        ({"version": 4}, "unknown version"),
        ({"version": 6}, "unknown version"),
        ({"policy": 0x0137}, "guest policy of an SNP report is malformed"),
        ({"policy": 1 << 17 | 1 << 26}, "guest policy of an SNP report has bits"),
        ({"policy": 1 << 17 | 1 << 63}, "guest policy of an SNP report has bits"),
        ({"platform": 1 << 6}, "platform information of an SNP report has bits"),
        ({"platform": 1 << 8}, "platform information of an SNP report has bits"),
        ({"vmpl": 4}, "was not asked for by the guest"),
        ({"vmpl": 0xFFFFFFFF}, "was not asked for by the guest"),
        ({"key_info": 2}, "is not signed; found MASK_CHIP_KEY"),
        ({"key_info": 7 << 2}, "is not signed; found signing key NONE"),
        ({"key_info": 2 << 2}, "signed in an unknown way"),
        ({"key_info": 1 << 5}, "uses reserved bytes; found non-zero at 0x48"),
        ({"put": {0x34: b"\x02"}}, "signed in an unknown way"),
        ({"put": {0x4C: b"\x01"}}, "reserved bytes; found non-zero at 0x4C"),
        ({"put": {0x18B: b"\x01"}}, "reserved bytes; found non-zero at 0x18B"),
        ({"put": {0x19F: b"\x01"}}, "reserved bytes; found non-zero at 0x18B"),
        ({"put": {0x1EB: b"\x01"}}, "reserved bytes; found non-zero at 0x1EB"),
        ({"put": {0x1EF: b"\x01"}}, "reserved bytes; found non-zero at 0x1EF"),
        ({"put": {0x1F8: b"\x01"}}, "reserved bytes; found non-zero at 0x1F8"),
        ({"put": {0x207: b"\x01"}}, "reserved bytes; found non-zero at 0x1F8"),
        ({"put": {0x29F: b"\x01"}}, "reserved bytes; found non-zero at 0x208"),
        ({"version": 2, "put": {0x188: b"\x19"}}, "reserved bytes; found non-zero at 0x188"),
    ],
)
def test_a_malformed_report_is_refused(amd: Any, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        SnpReport.parse(amd.Guest(**change).report())


def test_a_vlek_signs_where_the_chips_own_key_is_masked(amd: Any) -> None:
    assert SnpReport.parse(amd.Guest(signer="VLEK", key_info=2).report()).signer == "VLEK"


@pytest.mark.parametrize("at", [0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48, 0x330, 0x49F])
def test_bytes_beside_the_signature_are_refused(amd: Any, at: int) -> None:
    report = bytearray(amd.Guest().report())
    report[at] = 1
    with pytest.raises(EvidenceError, match="uses reserved bytes"):
        SnpReport.parse(bytes(report))


@pytest.mark.parametrize("size", [0, 1, 0x2A0, 1183, 1185, 4096])
def test_another_length_is_refused(amd: Any, size: int) -> None:
    data = (amd.Guest().report() + bytes(4096))[:size]
    with pytest.raises(EvidenceError, match="wrong length"):
        SnpReport.parse(data)


@pytest.mark.parametrize("r", [0, 1 << 383])
def test_impossible_signatures_are_refused(amd: Any, r: int) -> None:
    report = bytearray(amd.Guest().report())
    report[0x2A0:0x2E8] = r.to_bytes(72, "little")
    with pytest.raises(EvidenceError, match="not signed by the VCEK"):
        SnpReport.parse(bytes(report)).verify(amd.vek_key().public_key())


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=REPORT_BYTES, max_size=REPORT_BYTES), st.sampled_from([2, 3, 5, None]))
def test_parsing_anything_raises_nothing_else(data: bytes, version: int | None) -> None:
    if version is not None:
        data = version.to_bytes(4, "little") + data[4:]
    try:
        SnpReport.parse(data)
    except EvidenceError as error:
        assert error.what  # noqa: PT017 - either outcome is right, another exception is not
