from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cenacle.attestation.tpm_device import ATTESTATION_KEY, TpmDevice
from cenacle.attestation.tpm_keys import EccParameters, Public, RsaParameters, Signature
from cenacle.attestation.tpm_structures import (
    Attest,
    CertifyInfo,
    ClockInfo,
    PcrSelection,
    QuoteInfo,
    Reader,
    hash_name,
    hasher,
    pack_selections,
    parse_selections,
    pcr_composite,
    tpm2b,
    unpack_tpm2b,
)
from cenacle.errors import EvidenceError

# Written out by hand from Part 2: magic, type, signer, extra data, clock, firmware, quote.
QUOTE = bytes.fromhex(
    "ff544347 8018"
    "0022 000b" + "11" * 32 + "0004 6e6f6e63"
    "0000000000001234 00000005 00000002 01"
    "2019102300163636"
    "00000001 000b 03 81 04 00"
    "0020" + "22" * 32
)
CERTIFY = bytes.fromhex(
    "ff544347 8017 0000 0000 0000000000000001 00000000 00000000 00 0000000000000000"
    "0003 000b01 0003 000b02"
)
RSA = bytes.fromhex("0001 000b 00050072 0000 0010 0014 000b 0800 00000000 0100" + "c1" * 256)
ECC = bytes.fromhex("0023 000b 00050072 0002 abcd 0010 0018 000b 0003 0010 0001 01 0002 0203")
STORAGE = bytes.fromhex("0001 000b 00030072 0000 0006 0080 0043 0010 0800 00010001 0001 c1")
SIGNATURE = bytes.fromhex("0018 000b 0002 0102 0002 0304")


def test_a_quote_is_read_field_by_field() -> None:
    quote = Attest.parse(QUOTE)
    assert quote.qualified_signer == bytes.fromhex("000b") + b"\x11" * 32
    assert quote.extra_data == b"nonc"
    assert quote.clock_info == ClockInfo(0x1234, 5, 2, True)
    assert quote.firmware_version == 0x2019102300163636
    assert quote.attested == QuoteInfo((PcrSelection(0x0B, (0, 7, 10)),), b"\x22" * 32)
    assert quote.pack() == QUOTE


def test_a_certification_is_read_field_by_field() -> None:
    certified = Attest.parse(CERTIFY)
    assert certified.attested == CertifyInfo(b"\x00\x0b\x01", b"\x00\x0b\x02")
    assert certified.pack() == CERTIFY


def test_keys_and_signatures_are_read_field_by_field() -> None:
    rsa, ecc, storage = (Public.parse(data) for data in (RSA, ECC, STORAGE))
    assert rsa.key == RsaParameters(2048, 0, b"\xc1" * 256)
    assert ecc.key == EccParameters(3, None, b"\x01", b"\x02\x03")
    assert ecc.auth_policy == b"\xab\xcd"
    assert storage.symmetric is not None
    assert (storage.symmetric.key_bits, storage.scheme) == (128, None)
    for data, parsed in ((RSA, rsa), (ECC, ecc), (STORAGE, storage)):
        assert parsed.pack() == data
        assert parsed.name == b"\x00\x0b" + hashlib.sha256(data).digest()
    assert Signature.parse(SIGNATURE) == Signature(0x18, 0x0B, b"\x01\x02", b"\x03\x04")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: b"\xfe" + q[1:], "was not made by a TPM"),
        (lambda q: q[:4] + bytes.fromhex("8019") + q[6:], "is of another type"),
        (lambda q: q[:4] + bytes.fromhex("801a") + q[6:], "is of another type"),
        (lambda q: q[:-1], "is cut off"),
        (lambda q: q + b"\x00", "is followed by other bytes"),
        (lambda q: b"", "is cut off"),
        (lambda q: q[:64] + b"\x02" + q[65:], "neither yes nor no"),
        (lambda q: q[:73] + bytes.fromhex("00000011") + q[77:], "too many banks"),
        (lambda q: q[:73] + bytes.fromhex("ffffffff") + q[77:], "too many banks"),
        (lambda q: q[:79] + b"\x02" + q[80:], "registers in a wrong form"),
        (lambda q: q[:79] + b"\xff" + q[80:], "registers in a wrong form"),
    ],
)
def test_a_damaged_quote_is_refused(change: Callable[[bytes], bytes], said: str) -> None:
    with pytest.raises(EvidenceError, match=said):
        Attest.parse(change(QUOTE))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("0008" + RSA.hex()[4:], "unknown type"),
        ("0001 0004" + RSA.hex()[8:], "rests on SHA-1"),
        ("0001 0012" + RSA.hex()[8:], "unknown hash"),
        ("0001 000b 80050072" + RSA.hex()[16:], "reserved attributes"),
        ("0001 000b 00050072 0000 0001" + RSA.hex()[24:], "unknown cipher"),
        ("0001 000b 00050072 0000 0010 0018" + RSA.hex()[28:], "unknown scheme"),
        (RSA.hex() + "00", "followed by other bytes"),
        (RSA.hex()[:-2], "cut off"),
    ],
)
def test_a_damaged_key_is_refused(data: str, said: str) -> None:
    with pytest.raises(EvidenceError, match=said):
        Public.parse(bytes.fromhex(data))


@pytest.mark.parametrize(
    "key",
    [
        RsaParameters(1024, 0, b"\xc1" * 128),
        RsaParameters(2048, 3, b"\xc1" * 256),
        RsaParameters(2048, 0, b"\xc1" * 255),
        RsaParameters(2048, 0, b"\x01" * 256),
        RsaParameters(2048, 0, b""),
        EccParameters(0x0001, None, b"\x01", b"\x02"),
        EccParameters(0x0003, None, b"\x01", b"\x02"),
        EccParameters(0x0003, None, b"", b""),
        EccParameters(0x0003, None, b"\xff" * 200, b"\x02"),
    ],
)
def test_numbers_that_are_no_key_are_refused(key: RsaParameters | EccParameters) -> None:
    public = Public.parse(RSA if isinstance(key, RsaParameters) else ECC)
    changed = Public(public.name_alg, public.attributes, b"", public.symmetric, public.scheme, key)
    with pytest.raises(EvidenceError, match="is no key"):
        changed.public_key()


@pytest.mark.parametrize("scheme", ["0005", "0015", "001a", "0010", "ffff"])
def test_other_signature_schemes_are_refused(scheme: str) -> None:
    with pytest.raises(EvidenceError, match="unknown scheme"):
        Signature.parse(bytes.fromhex(scheme) + SIGNATURE[2:])


def test_sha1_signatures_are_refused() -> None:
    with pytest.raises(EvidenceError, match="rests on SHA-1"):
        Signature.parse(bytes.fromhex("0014 0004 0001 00"))


def test_only_strong_hashes_have_names() -> None:
    assert [hash_name(n) for n in (0x0B, 0x0C, 0x0D)] == ["sha256", "sha384", "sha512"]
    for number in (0, 0x04, 0x10, 0x12, 0x27, 0xFFFF):
        with pytest.raises(EvidenceError):
            hasher(number)


def test_a_composite_is_the_hash_of_the_values_in_order() -> None:
    values = {7: b"b" * 32, 0: b"a" * 32}
    assert pcr_composite(0x0B, values) == hashlib.sha256(b"a" * 32 + b"b" * 32).digest()
    assert pcr_composite(0x0C, values) == hashlib.sha384(b"a" * 32 + b"b" * 32).digest()


def test_sized_buffers() -> None:
    assert tpm2b(b"ab") == b"\x00\x02ab"
    assert unpack_tpm2b(b"\x00\x02ab") == b"ab"
    for wrong in (b"", b"\x00", b"\x00\x03ab", b"\x00\x01ab"):
        with pytest.raises(EvidenceError):
            unpack_tpm2b(wrong)
    with pytest.raises(EvidenceError, match="too large"):
        tpm2b(bytes(65536))


def test_a_reader_never_reads_beyond_its_end() -> None:
    reader = Reader(b"\x00\x01\x02", "a sample")
    assert reader.u16() == 1
    with pytest.raises(EvidenceError, match="a sample is cut off; found 3 bytes"):
        reader.u16()
    assert reader.take(1) == b"\x02"
    reader.end()


_SELECTIONS = st.lists(
    st.builds(
        PcrSelection,
        st.sampled_from((0x04, 0x0B, 0x0C, 0x0D)),
        st.sets(st.integers(0, 23)).map(lambda found: tuple(sorted(found))),
        st.sampled_from((3, 4)),
    ),
    max_size=4,
).map(tuple)


@given(_SELECTIONS)
def test_selections_come_back(selections: tuple[PcrSelection, ...]) -> None:
    assert parse_selections(pack_selections(selections)) == selections


_PARSERS: list[Callable[[bytes], Any]] = [Attest.parse, Public.parse, Signature.parse]
_SAMPLES = (QUOTE, CERTIFY, RSA[:40], RSA, ECC, STORAGE, SIGNATURE)


@settings(max_examples=150)
@given(st.sampled_from(_SAMPLES), st.data())
@example(b"", None)
def test_hostile_bytes_parse_exactly_or_are_refused(sample: bytes, data: Any) -> None:
    """Whatever is accepted is written back byte for byte: nothing in it went unread."""
    raw = bytearray(sample)
    if data is not None:
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        raw = raw[: data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=4))
    for parse in (*_PARSERS, parse_selections):
        try:
            found = parse(bytes(raw))
        except EvidenceError:
            continue
        packed = pack_selections(found) if isinstance(found, tuple) else found.pack()
        assert packed == raw
        if isinstance(found, Public):
            try:
                found.public_key()
            except EvidenceError:
                continue


def test_a_real_tpm_writes_what_is_read_here(device: TpmDevice) -> None:
    selection = PcrSelection(0x0B, (0, 7, 10))
    with device.attestation_key() as ak:
        assert ak.public.pack()[:-68] == ATTESTATION_KEY.pack()[:-4]
        message, signed = device.quote(ak, selection, b"nonce")
        signature = Signature.parse(signed)
        ak.public.verify(signature, message)
        quote = Attest.parse(message)
        assert (quote.pack(), signature.pack(), quote.extra_data) == (message, signed, b"nonce")
        assert isinstance(quote.attested, QuoteInfo)
        assert quote.attested.selections == (selection,)
        assert quote.attested.digest == pcr_composite(0x0B, device.registers(selection))
        assert device.esapi.read_public(ak.handle)[1].marshal() == tpm2b(ak.public.name)


@pytest.fixture
def evidence_folder() -> Path:
    default = Path(__file__).parents[4] / "shared" / "evidence"
    folder = Path(os.environ.get("CENACLE_EVIDENCE", default))
    if not folder.is_dir():
        pytest.skip(f"no genuine evidence in {folder}; set CENACLE_EVIDENCE")
    return folder


def test_a_genuine_azure_quote(evidence_folder: Path) -> None:
    file = evidence_folder / "az-snp-vtpm" / "az-snp-vtpm_evidence-v1.json"
    fields = json.loads(file.read_text("utf-8"))["tpm_quote"]
    message = bytes.fromhex(fields["message"])
    quote = Attest.parse(message)
    values = {n: bytes.fromhex(value) for n, value in enumerate(fields["pcrs"])}
    assert quote.pack() == message
    assert isinstance(quote.attested, QuoteInfo)
    assert quote.attested.selections == (PcrSelection(0x0B, tuple(range(24))),)
    assert quote.attested.digest == pcr_composite(0x0B, values)
