from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.dcap_quote import (
    MAX_QUOTE_BYTES,
    EnclaveReport,
    TdReport,
    parse_quote,
)
from cenacle.errors import EvidenceError

World = Any  # of conftest, which tests cannot import


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_quote_of_an_enclave_is_read(world: World, sgx_report: Any, version: int) -> None:
    body = sgx_report(
        mr_enclave=b"\x11" * 32,
        mr_signer=b"\x22" * 32,
        isv_prod_id=0x1234,
        isv_svn=7,
        config_svn=5,
        config_id=b"\x33" * 64,
        isv_family_id=b"\x44" * 16,
        isv_ext_prod_id=b"\x55" * 16,
        misc_select=1,
        cet=2,
    )
    quote = parse_quote(world.quote(version, body))
    report = quote.report
    assert isinstance(report, EnclaveReport)
    assert (quote.header.version, quote.header.tee) == (version, "sgx")
    assert (report.mr_enclave, report.mr_signer) == (b"\x11" * 32, b"\x22" * 32)
    assert (report.isv_prod_id, report.isv_svn, report.config_svn) == (0x1234, 7, 5)
    assert (report.config_id, report.isv_family_id) == (b"\x33" * 64, b"\x44" * 16)
    assert (report.isv_ext_prod_id, report.misc_select, report.cet_attributes) == (
        b"\x55" * 16,
        1,
        2,
    )
    assert (report.attributes, report.xfrm) == (5, 0xE7)
    assert report.report_data == bytes(range(64))
    assert quote.certification_type == 5
    assert quote.certification_data.startswith(b"-----BEGIN CERTIFICATE-----")
    assert len(quote.signed) == 48 + 384 + (6 if version == 5 else 0)


@pytest.mark.parametrize(("version", "td"), [(4, "1.0"), (5, "1.0"), (5, "1.5")])
def test_a_quote_of_a_domain_is_read(world: World, td_report: Any, version: int, td: str) -> None:
    world.tee = "tdx"
    names = ["mr_seam", "mr_td", "mr_config_id", "mr_owner", "mr_owner_config", "rtmr0", "rtmr3"]
    if td == "1.5":
        names.append("mr_service_td")
    values = {name: bytes([number]) * 48 for number, name in enumerate(names, 1)}
    quote = parse_quote(world.quote(version, td_report(td, **values)))
    assert isinstance(quote.report, TdReport)
    assert quote.report.version == td
    assert {name: getattr(quote.report, name) for name in names} == values
    assert quote.report.report_data == bytes(range(64))
    assert quote.header.tee == "tdx"


def test_padding_of_zeros_is_cut_off(world: World, sgx_report: Any) -> None:
    exact = world.quote(3, sgx_report())
    assert parse_quote(exact + bytes(100)).raw == exact


def _with(offset: int, form: str, value: int) -> Any:
    def change(quote: bytes) -> bytes:
        data = bytearray(quote)
        struct.pack_into(form, data, offset, value)
        return bytes(data)

    return change


@pytest.mark.parametrize(
    ("version", "change", "reason"),
    [
        (3, lambda q: b"", "impossible size"),
        (3, lambda q: q + bytes(MAX_QUOTE_BYTES), "impossible size"),
        (3, lambda q: q[:40], "ends inside its header"),
        (3, lambda q: q[:100], "ends inside its report"),
        (3, lambda q: q[:-1], "ends inside its signature data"),
        (3, lambda q: q + b"x", "something follows the quote"),
        (3, _with(0, "<H", 2), "unknown version"),
        (3, _with(0, "<H", 6), "unknown version"),
        (3, _with(2, "<H", 3), "unknown kind of key"),
        (3, _with(4, "<I", 0x81), "unknown kind of enclave"),
        (4, _with(4, "<I", 0x82), "unknown kind of enclave"),
        (3, _with(12, "<H", 0), "another vendor"),
        (3, _with(48 + 25, "<H", 1), "reserved bytes"),
        (5, _with(48, "<H", 4), "report of an unknown type"),
        (5, _with(48, "<H", 2), "another size than its type"),
        (5, _with(50, "<I", 383), "another size than its type"),
        (5, _with(4, "<I", 0x81), "of different kinds"),
        (4, _with(48 + 384 + 4 + 128, "<H", 5), "certified in an unknown way"),
        (4, _with(48 + 384 + 4 + 130, "<I", 1), "bytes left over"),
        (3, _with(48 + 384 + 4 + 128 + 448, "<H", 33), "bytes left over|ends inside"),
        (3, _with(48 + 384, "<I", 100), "something follows"),
    ],
)
def test_what_is_not_exactly_a_quote_is_refused(
    world: World, sgx_report: Any, version: int, change: Any, reason: str
) -> None:
    quote = change(world.quote(version, sgx_report()))
    with pytest.raises(EvidenceError, match=reason):
        parse_quote(quote)


def test_every_shorter_quote_is_refused(world: World, td_report: Any) -> None:
    world.tee = "tdx"
    quote = world.quote(5, td_report("1.5"))
    parse_quote(quote)
    for size in range(len(quote)):
        with pytest.raises(EvidenceError):
            parse_quote(quote[:size])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from([3, 4, 5]), st.sampled_from([0, 0x81]))
def test_hostile_bytes_are_refused_in_words(noise: bytes, version: int, tee: int) -> None:
    vendor = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
    head = struct.pack("<HHIHH", version, 2, tee, 0, 0) + vendor + bytes(20)
    for data in (noise, head + noise):
        with pytest.raises(EvidenceError):
            parse_quote(data)
