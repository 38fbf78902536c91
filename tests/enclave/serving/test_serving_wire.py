"""Frames between enclave and host: there and back, in any pieces, and with everything wrong."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cenacle.cut.specs import TensorSpec
from cenacle.enclave.frames import HEAD
from cenacle.enclave.serving_messages import (
    Attest,
    Direction,
    Drain,
    Evidence,
    Failure,
    Infer,
    Malformed,
    Message,
    Ready,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.serving_wire import MAX_HEADER_BYTES, Decoder, encode
from cenacle.enclave.tensor_bytes import input_digest, pack_tensors, unpack_tensors
from cenacle.errors import CenacleError, DataError, EnclaveError, RefusedError

CONTRACT = "sha256:" + "5a" * 32
LIMIT = 1 << 20

TENSORS = {
    "x": np.arange(12, dtype=np.float32).reshape(3, 4),
    "mask": np.array([[True], [False], [True]]),
    "n": np.array(7, dtype=np.int64),
}

TO_ENCLAVE: list[Message] = [
    Infer(1, TENSORS),
    Infer(2**53 - 1, {}, {"serial": "a", "rows": 3}),
    Sealed(3, b"s" * 100),
    Attest(4, bytes(range(32))),
    Drain(),
]
FROM_ENCLAVE: list[Message] = [
    Ready(
        CONTRACT,
        (TensorSpec("x", "F32", (None, 4)), TensorSpec("größe", "I64", ())),
        (TensorSpec("y.label", "I64", (None,)),),
        b"h" * 1216,
        b"k" * 32,
        32,
        1 << 30,
        128,
    ),
    Result(1, TENSORS),
    SealedResult(2, b"sealed"),
    Evidence(3, b'{"a":1}'),
    Failure(4, "ticket", RefusedError("no", found="1", expected="2", remedy="pay")),
    Failure(None, "malformed", DataError("a query cannot be read")),
]


def raw(message: Message) -> bytes:
    return b"".join(encode(message))


def frame(header: bytes | dict[str, Any], payload: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return HEAD.pack(len(encoded), len(payload)) + encoded + payload


def fed(direction: Direction, data: bytes, limit: int = LIMIT) -> list[Message | Malformed]:
    return list(Decoder(direction, limit).feed(data))


def plain(message: Message | Malformed) -> Any:
    """A message in a form that compares by value."""
    fields = {name: getattr(message, name) for name in message.__dataclass_fields__}
    for name, value in fields.items():
        if name == "tensors":
            fields[name] = {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in dict(value).items()}
        elif isinstance(value, bytes | bytearray | memoryview):
            fields[name] = bytes(value)
        elif isinstance(value, CenacleError):
            fields[name] = value.to_dict()
    return type(message).__name__, fields


MESSAGES = [
    *(("to-enclave", message) for message in TO_ENCLAVE),
    *(("from-enclave", message) for message in FROM_ENCLAVE),
]


@pytest.mark.parametrize(
    ("direction", "message"),
    MESSAGES,
    ids=[f"{type(m).__name__}-{n}" for n, (_, m) in enumerate(MESSAGES)],
)
def test_messages_go_there_and_back(direction: Direction, message: Message) -> None:
    (found,) = fed(direction, raw(message))
    assert plain(found) == plain(message)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize(
    ("direction", "messages"),
    [("to-enclave", TO_ENCLAVE), ("from-enclave", FROM_ENCLAVE)],
    ids=["to", "from"],
)
def test_any_pieces_give_the_same_messages(
    direction: Direction, messages: list[Message], size: int
) -> None:
    data = b"".join(map(raw, messages))
    decoder = Decoder(direction, LIMIT)
    found: list[Message | Malformed] = []
    for at in range(0, len(data), size):
        found += decoder.feed(data[at : at + size])
    assert list(map(plain, found)) == list(map(plain, messages))
    assert decoder.idle


def test_bytes_are_received_where_the_tensors_stay() -> None:
    data = raw(Infer(1, TENSORS))
    decoder, message, at = Decoder("to-enclave", LIMIT), None, 0
    while message is None:
        with decoder.buffer() as room:
            count = min(len(room), 5, len(data) - at)
            room[:count] = data[at : at + count]
        at += count
        message = decoder.received(count)
        assert at <= len(data)
    assert isinstance(message, Infer)
    array = message.tensors["x"]
    assert array.flags.aligned
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, TENSORS["x"])


def test_contiguous_tensors_are_not_copied() -> None:
    array = np.zeros((1000, 100), np.float32)
    parts = encode(Infer(1, {"x": array}))
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), array)
    # Other layouts and byte orders are brought into this one.
    odd = np.arange(6, dtype=">f4").reshape(2, 3).T
    (found,) = fed("to-enclave", raw(Infer(1, {"x": odd})))
    assert isinstance(found, Infer)
    np.testing.assert_array_equal(found.tensors["x"], odd)
    assert found.tensors["x"].dtype == np.dtype("<f4")


def test_every_truncation_waits_and_says_that_it_waits() -> None:
    data = raw(Infer(1, TENSORS)) + raw(Attest(4, bytes(32)))
    ends = len(raw(Infer(1, TENSORS)))
    for cut in range(len(data)):
        decoder = Decoder("to-enclave", LIMIT)
        found = list(decoder.feed(data[:cut]))
        assert len(found) == (1 if cut >= ends else 0)
        assert decoder.idle == (cut in {0, ends})


# ---------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(MAX_HEADER_BYTES + 1, 0),
        HEAD.pack(2**32 - 1, 0),
        HEAD.pack(0, 0),
        HEAD.pack(1, 10),
        HEAD.pack(100, LIMIT + 1),
        HEAD.pack(100, 2**64 - 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 12,
    ],
)
def test_what_is_no_stream_of_frames_ends_it(head: bytes) -> None:
    with pytest.raises(EnclaveError, match="broke the protocol"):
        fed("to-enclave", head)


X = {"name": "x", "dtype": "F32", "shape": [1, 2]}


def infer(*tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "infer", "id": 9, "tensors": list(tensors), **more}


HOSTILE: dict[str, tuple[bytes | dict[str, Any], bytes, int | None]] = {
    "not json": (b"{]", b"", None),
    "not utf-8": (b'{"type":"\xff"}', b"", None),
    "a list": (b"[]", b"", None),
    "nested": (b"[" * 10_000, b"", None),
    "no type": ({"id": 9}, b"", 9),
    "a type of the other direction": ({"type": "result", "id": 9, "tensors": []}, b"", 9),
    "an unknown type": ({"type": "eval", "id": 9}, b"", 9),
    "a negative number": ({"type": "sealed", "id": -1}, b"", None),
    "a number that is text": ({"type": "sealed", "id": "1"}, b"", None),
    "a number that is true": ({"type": "sealed", "id": True}, b"", None),
    "a number too large": ({"type": "sealed", "id": 2**53}, b"", None),
    "no number": ({"type": "sealed"}, b"", None),
    "an unknown field": (infer(X, note=1), bytes(16), 9),
    "an unknown field of a tensor": (infer({**X, "offset": 0}), bytes(16), 9),
    "an unknown dtype": (infer({**X, "dtype": "F8"}), bytes(16), 9),
    "an object as dtype": (infer({**X, "dtype": "O"}), bytes(16), 9),
    "a dimension of zero": (infer({**X, "shape": [0, 2]}), b"", 9),
    "a negative dimension": (infer({**X, "shape": [-1, -2]}), bytes(16), 9),
    "sizes that overflow": (infer({**X, "shape": [2**40] * 8}), bytes(16), 9),
    "too many dimensions": (infer({**X, "shape": [1] * 9}), bytes(16), 9),
    "a fraction as dimension": (infer({**X, "shape": [1.5]}), bytes(16), 9),
    "an unnamed tensor": (infer({**X, "name": ""}), bytes(16), 9),
    "a control character": (infer({**X, "name": "a\nb"}), bytes(16), 9),
    "a long name": (infer({**X, "name": "x" * 513}), bytes(16), 9),
    "too few bytes": (infer(X), bytes(7), 9),
    "too many bytes": (infer(X), bytes(32), 9),
    "bytes and no tensor": (infer(), bytes(16), 9),
    "one name twice": (infer(X, X), bytes(32), 9),
    "a boolean of 2": (infer({"name": "b", "dtype": "BOOL", "shape": [1]}), b"\2" * 16, 9),
    "too many tensors": (
        infer(*({**X, "name": f"x{n}"} for n in range(257))),
        bytes(16 * 257),
        9,
    ),
    "a ticket that is text": (infer(X, ticket="t"), bytes(16), 9),
    "bytes after a drain": ({"type": "drain"}, b"x", None),
    "a drain with a number": ({"type": "drain", "id": 9}, b"", 9),
    "bytes after a challenge": (
        {"type": "attest", "id": 9, "nonce": "AAAA" * 10 + "AAA="},
        b"x",
        9,
    ),
    "a short nonce": ({"type": "attest", "id": 9, "nonce": "AAAA"}, b"", 9),
    "a nonce that is no base64": ({"type": "attest", "id": 9, "nonce": "!"}, b"", 9),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_frame_is_named_and_the_next_one_read(name: str) -> None:
    header, payload, number = HOSTILE[name]
    bad, good = fed("to-enclave", frame(header, payload) + raw(Drain()))
    assert isinstance(bad, Malformed)
    assert bad.id == number
    assert isinstance(good, Drain)


def test_an_error_quotes_nothing_of_what_was_sent() -> None:
    canary = "canary-4711"
    for header in (
        {"type": canary, "id": 1},
        infer({**X, "name": canary, "dtype": canary}),
        infer({**X, "name": canary}),
        infer(X, **{canary: canary}),
        {"type": "attest", "id": 1, "nonce": canary},
    ):
        (bad,) = fed("to-enclave", frame(header, b"7"))
        assert isinstance(bad, Malformed)
        assert canary not in str(bad.error.to_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"outputs": [{"name": "y", "dtype": "F32"}]},
        {"outputs": [{"name": "y", "dtype": "X", "shape": []}]},
        {"outputs": [{"name": "y", "dtype": "F32", "shape": [-1]}]},
        {"hpke_key": "?"},
        {"contract": "sha256:0"},
        {"max_batch": 0},
        {"max_payload": 2**60},
        {"extra": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_host_reads_the_enclave_as_hostile_too(change: dict[str, Any]) -> None:
    header, _ = FROM_ENCLAVE[0].frame()
    (bad,) = fed("from-enclave", frame({**header, **change}))
    assert isinstance(bad, Malformed)


@pytest.mark.parametrize(
    "change",
    [
        {"code": "own words"},
        {"error": {"what": "x"}},
        {"error": {"error": "X", "what": "x" * 2001}},
    ],
    ids=["code", "incomplete", "long"],
)
def test_a_failure_of_another_form_is_malformed(change: dict[str, Any]) -> None:
    header, _ = FROM_ENCLAVE[4].frame()
    (bad,) = fed("from-enclave", frame({**header, **change}))
    assert isinstance(bad, Malformed)


def test_memory_follows_what_arrives_and_not_what_is_promised() -> None:
    decoder = Decoder("to-enclave", 1 << 40)
    start = HEAD.pack(20, 1 << 39) + b'{"type":"infer"}    '
    assert list(decoder.feed(start)) == []
    with decoder.buffer() as room:
        assert len(room) <= 1 << 20
    list(decoder.feed(bytes(3 << 20)))
    with decoder.buffer() as room:
        assert len(room) <= 4 << 20


def test_a_message_too_large_for_its_header_is_not_sent() -> None:
    with pytest.raises(DataError, match="malformed"):
        encode(
            Infer(1, {"x" * 500 + str(n): np.zeros(1) for n in range(256)}, {"a": "b" * 200_000})
        )
    with pytest.raises(DataError, match="malformed"):
        encode(Infer(1, {str(n): np.zeros(1) for n in range(257)}))
    with pytest.raises(DataError, match="malformed"):
        encode(Infer(1, {"x": np.array(["text"])}))
    with pytest.raises(DataError, match="malformed"):
        encode(Infer(1, {}, {"nan": float("nan")}))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["to-enclave", "from-enclave"]))
def test_any_bytes_end_in_a_message_or_a_clean_error(data: bytes, direction: Direction) -> None:
    try:
        found = fed(direction, frame(data[: len(data) // 2], data[len(data) // 2 :]))
    except EnclaveError:
        return
    assert all(hasattr(message, "__dataclass_fields__") for message in found)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_byte_ends_in_a_message_or_a_clean_error(data: st.DataObject) -> None:
    good = bytearray(raw(data.draw(st.sampled_from(TO_ENCLAVE))))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    try:
        fed("to-enclave", bytes(good))
    except EnclaveError:
        assert at < HEAD.size


_KINDS = ("?", "u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8")
_ARRAYS = st.one_of(
    *(
        hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_dims=4, max_side=4))
        for kind in _KINDS
    )
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abcé .", min_size=1, max_size=8), _ARRAYS, max_size=5))
def test_all_tensors_go_there_and_back(tensors: dict[str, Any]) -> None:
    headers, parts = pack_tensors(tensors)
    found = unpack_tensors(headers, b"".join(parts))
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in tensors.items()
    }


def test_the_digest_of_an_input_is_of_all_that_is_in_it_and_of_no_order() -> None:
    digest = input_digest(TENSORS)
    assert digest == input_digest(dict(reversed(TENSORS.items())))
    others: list[dict[str, Any]] = [
        {**TENSORS, "x": TENSORS["x"].reshape(4, 3)},
        {**TENSORS, "x": TENSORS["x"].view(np.int32)},
        {**TENSORS, "x": TENSORS["x"] + np.float32(1)},
        {n: a for n, a in TENSORS.items() if n != "n"},
        {("z" if n == "x" else n): a for n, a in TENSORS.items()},
    ]
    assert len({digest, *map(input_digest, others)}) == 6
    # Written out, since clients in other languages sign it.
    described = b'{"tensors":[{"name":"x","dtype":"F32","shape":[1]}]}'
    written = len(described).to_bytes(8, "big") + described + struct.pack("<f", 1.5) + bytes(12)
    expected = "sha256:" + hashlib.sha256(written).hexdigest()
    assert input_digest({"x": np.array([1.5], np.float32)}) == expected
