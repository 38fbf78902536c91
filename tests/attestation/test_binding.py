from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation import report_data
from cenacle.attestation.binding import REPORT_DATA_BYTES

ARGUMENTS = (b"nonce", "sha256:" + "0" * 64, b"hpke", b"signing")


def test_known_answer() -> None:
    assert report_data(*ARGUMENTS).hex() == (
        "ffa896769be7dbe7f2a4ee847a077253feceb04282f9714c1a58f888f03634f9"
        "2103b629047832b8e02334afcf63b3bd1f086fda6de3d6b43bef9ebf50ebf3a1"
    )


def test_is_what_the_description_says() -> None:
    fields = [b"cenacle/report-data/v1", b"nonce", b"sha256:" + b"0" * 64, b"hpke", b"signing"]
    joined = b"".join(struct.pack(">Q", len(field)) + field for field in fields)
    assert report_data(*ARGUMENTS) == hashlib.sha512(joined).digest()
    assert len(report_data(*ARGUMENTS)) == REPORT_DATA_BYTES == 64


@pytest.mark.parametrize(
    "other",
    [
        (b"nonc", "e" + ARGUMENTS[1], b"hpke", b"signing"),
        (b"nonce", ARGUMENTS[1] + "h", b"pke", b"signing"),
        (b"nonce", ARGUMENTS[1], b"hpkes", b"igning"),
        (b"nonce", ARGUMENTS[1], b"signing", b"hpke"),
        (b"nonce", ARGUMENTS[1], b"", b"hpkesigning"),
        (b"", "nonce" + ARGUMENTS[1], b"hpke", b"signing"),
        (b"nonce\0", ARGUMENTS[1], b"hpke", b"signing"),
        (b"nonce", ARGUMENTS[1].upper(), b"hpke", b"signing"),
    ],
)
def test_moving_a_byte_over_a_border_changes_it(other: tuple[bytes, str, bytes, bytes]) -> None:
    assert report_data(*other) != report_data(*ARGUMENTS)


parts = st.tuples(
    st.binary(max_size=9), st.text("abc", max_size=9), st.binary(max_size=9), st.binary(max_size=9)
)


@given(parts, parts)
@settings(max_examples=200)
def test_two_tuples_never_share_it(
    one: tuple[bytes, str, bytes, bytes], other: tuple[bytes, str, bytes, bytes]
) -> None:
    assert (report_data(*one) == report_data(*other)) == (one == other)
