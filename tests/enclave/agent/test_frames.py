"""Frames from a process that is not trusted: bounded, and read without believing a length."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.enclave.frames import MAX_PAYLOAD, read_frame, send_frame
from cenacle.errors import EnclaveError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None)
@given(header=st.dictionaries(st.text(max_size=10), json_values), payload=st.binary(max_size=500))
def test_what_is_sent_arrives(header: dict[str, Any], payload: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(theirs, header, payload)
        received, body = read_frame(ours)
        assert (received, bytes(body)) == (header, payload)


def test_a_large_payload_arrives_in_pieces(pair: Pair) -> None:
    ours, theirs = pair
    payload = bytes(range(256)) * (100 << 10)  # 25 MiB: more than one step of the buffer
    sender = threading.Thread(target=send_frame, args=(theirs, {"kind": "output"}, payload))
    sender.start()
    header, received = read_frame(ours)
    sender.join()
    assert header == {"kind": "output"}
    assert received == payload


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_an_error_in_words(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EnclaveError):
            header, _ = read_frame(ours)
            assert isinstance(header, dict)


def _frame(header: bytes, payload_length: int = 0) -> bytes:
    return struct.pack(">IQ", len(header), payload_length) + header


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IQ", (1 << 20) + 1, 0),
        struct.pack(">IQ", 0xFFFFFFFF, 0),
        struct.pack(">IQ", 2, MAX_PAYLOAD + 1) + b"{}",
        struct.pack(">IQ", 2, 2**64 - 1) + b"{}",
        _frame(b""),
        _frame(b"[]"),
        _frame(b"null"),
        _frame(b"{"),
        _frame(b"\xff\xfe"),
        _frame(b"[" * 100_000),
        _frame(b'{"n":' + b"9" * 5000 + b"}"),
    ],
    ids=[
        "header too long",
        "header of 4 GiB",
        "payload too long",
        "payload of 16 EiB",
        "empty header",
        "list",
        "null",
        "truncated JSON",
        "no UTF-8",
        "nested too deeply",
        "endless number",
    ],
)
def test_what_is_no_frame_is_refused_without_quoting_it(pair: Pair, data: bytes) -> None:
    ours, theirs = pair
    sender = threading.Thread(target=theirs.sendall, args=(data,))
    sender.start()
    with pytest.raises(EnclaveError, match="broke the protocol") as caught:
        read_frame(ours)
    ours.close()
    sender.join()
    # The numbers are the sender's: they could carry a record's value.
    assert not any(character.isdigit() for character in str(caught.value))


def test_memory_grows_with_what_arrives_and_not_with_what_is_promised(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(_frame(b"{}", MAX_PAYLOAD))
    theirs.sendall(b"x" * 1000)
    theirs.shutdown(socket.SHUT_WR)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        with pytest.raises(EnclaveError, match="ended without a result"):
            read_frame(ours)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024  # KiB


@pytest.mark.parametrize("cut", [0, 3, 12, 13, 15])
def test_a_sender_that_ends_early_is_named(pair: Pair, cut: int) -> None:
    ours, theirs = pair
    theirs.sendall((_frame(b"{}", 4) + b"1234")[:cut])
    theirs.close()
    with pytest.raises(EnclaveError, match="ended without a result"):
        read_frame(ours)


def test_a_reader_that_is_gone_is_an_error_in_words(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    with pytest.raises(EnclaveError, match="ended without a result"):
        send_frame(theirs, {"kind": "job"}, b"x" * (1 << 20))


def test_a_process_that_dies_with_unread_bytes_is_an_error_in_words(pair: Pair) -> None:
    ours, theirs = pair
    ours.sendall(b"unread")
    theirs.close()  # the reader gets ECONNRESET, not an end of the stream
    with pytest.raises(EnclaveError, match="ended without a result"):
        read_frame(ours)
