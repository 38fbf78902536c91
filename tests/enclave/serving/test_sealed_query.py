"""Sealed queries and answers: for one enclave, one contract and one query, and of few sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import HpkePrivateKey, SecretBytes
from cenacle.enclave.sealed_query import (
    OVERHEAD_BYTES,
    AnswerKey,
    open_answer,
    open_query,
    padded_size,
    read_query,
    seal_answer,
    seal_query,
)
from cenacle.errors import CenacleError, DataError, RefusedError, SealError

CONTRACT = "sha256:" + "5a" * 32
OTHER = "sha256:" + "5b" * 32
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
Y = {"y.label": np.array([3, 1])}


@pytest.fixture(scope="module")
def key() -> HpkePrivateKey:
    return HpkePrivateKey.generate()


def test_a_query_and_its_answer(key: HpkePrivateKey) -> None:
    sealed, ours = seal_query(key.public_key, CONTRACT, X, {"serial": "s", "rows": 2})
    plaintext, theirs = open_query(key, CONTRACT, sealed)
    query = read_query(plaintext)
    np.testing.assert_array_equal(query.tensors["x"], X["x"])
    assert query.tensors["x"].flags.aligned
    assert query.ticket == {"serial": "s", "rows": 2}
    found = open_answer(ours, seal_answer(theirs, Y))
    np.testing.assert_array_equal(found["y.label"], Y["y.label"])
    assert (
        read_query(open_query(key, CONTRACT, seal_query(key.public_key, CONTRACT, X)[0])[0]).ticket
        is None
    )


def test_nothing_of_a_query_or_an_answer_stands_in_the_open(key: HpkePrivateKey) -> None:
    canary = np.frombuffer(b"canary-4711-4711", np.uint8)
    sealed, _ = seal_query(key.public_key, CONTRACT, {"canary-name": canary}, {"canary": "t"})
    _, theirs = open_query(key, CONTRACT, sealed)
    answer = seal_answer(theirs, {"canary-name": canary})
    error = seal_answer(theirs, RefusedError("canary", found="canary"))
    for data in (sealed, answer, error):
        assert b"canary" not in data


def test_every_byte_of_a_query_counts(key: HpkePrivateKey) -> None:
    sealed, _ = seal_query(key.public_key, CONTRACT, {"x": np.zeros(1, np.uint8)})
    for at in range(len(sealed)):
        bad = bytearray(sealed)
        bad[at] ^= 1
        with pytest.raises(SealError, match="a sealed query does not open"):
            open_query(key, CONTRACT, bad)
    for cut in (0, 1, 1167, 1168, OVERHEAD_BYTES, len(sealed) - 1):
        with pytest.raises(SealError, match="does not open"):
            open_query(key, CONTRACT, sealed[:cut])
    with pytest.raises(SealError, match="does not open"):
        open_query(key, CONTRACT, sealed + b"\0")


def test_a_query_is_for_one_enclave_and_one_contract(key: HpkePrivateKey) -> None:
    sealed, _ = seal_query(key.public_key, CONTRACT, X)
    for other, contract in ((HpkePrivateKey.generate(), CONTRACT), (key, OTHER)):
        with pytest.raises(SealError, match="does not open"):
            open_query(other, contract, sealed)


def test_every_byte_of_an_answer_counts(key: HpkePrivateKey) -> None:
    sealed, ours = seal_query(key.public_key, CONTRACT, X)
    answer = seal_answer(open_query(key, CONTRACT, sealed)[1], Y)
    for at in range(len(answer)):
        bad = bytearray(answer)
        bad[at] ^= 1
        with pytest.raises(SealError, match="a sealed answer does not open"):
            open_answer(ours, bad)
    for cut in (0, 11, 12, 27, 28, len(answer) - 1):
        with pytest.raises(SealError, match="does not open"):
            open_answer(ours, answer[:cut])


def test_an_answer_is_to_one_query(key: HpkePrivateKey) -> None:
    first, ours = seal_query(key.public_key, CONTRACT, X)
    second, _ = seal_query(key.public_key, CONTRACT, X)
    assert first != second
    with pytest.raises(SealError, match="this very query"):
        open_answer(ours, seal_answer(open_query(key, CONTRACT, second)[1], Y))
    # Bound to the sealed bytes and the contract, not to the secret in them alone.
    with SecretBytes(bytes(32)) as secret:
        here = AnswerKey(secret, CONTRACT, first)
        for there in (AnswerKey(secret, CONTRACT, second), AnswerKey(secret, OTHER, first)):
            with pytest.raises(SealError, match="this very query"):
                open_answer(here, seal_answer(there, Y))


def test_a_repeated_query_tells_its_repeater_nothing(key: HpkePrivateKey) -> None:
    sealed, ours = seal_query(key.public_key, CONTRACT, X)
    answers = [seal_answer(open_query(key, CONTRACT, sealed)[1], Y) for _ in range(3)]
    assert len(set(answers)) == 3  # not even whether the answer was the same
    for answer in answers:
        np.testing.assert_array_equal(open_answer(ours, answer)["y.label"], Y["y.label"])


def test_errors_travel_sealed_and_are_raised_for_the_client(key: HpkePrivateKey) -> None:
    sealed, ours = seal_query(key.public_key, CONTRACT, X)
    _, theirs = open_query(key, CONTRACT, sealed)
    error = RefusedError("spent", found="0 left", expected="1", remedy="buy more")
    with pytest.raises(RefusedError) as caught:
        open_answer(ours, seal_answer(theirs, error))
    assert caught.value.to_dict() == error.to_dict()
    with pytest.raises(CenacleError, match=r"^x{2000}$"):
        open_answer(ours, seal_answer(theirs, CenacleError("x" * 3000)))


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("rows", [0, 1, 2, 10, 1000])
def test_an_error_looks_like_the_answer_in_whose_place_it_is(
    key: HpkePrivateKey, rows: int
) -> None:
    _, theirs = open_query(key, CONTRACT, seal_query(key.public_key, CONTRACT, X)[0])
    good = {"y": np.zeros((max(rows, 1), 4), np.float32)}
    size = good["y"].nbytes
    errors = (
        RefusedError("spent"),
        DataError("the query's tensors are not those", expected="x " * 100, remedy="z" * 200),
    )
    lengths = {len(seal_answer(theirs, one, at_least=size)) for one in (good, *errors)}
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("size", "padded"),
    # Padmé's own table, and our floor of 1024.
    [(0, 1024), (1, 1024), (1024, 1024), (1025, 1088), (1100, 1152), (9000, 9216), (65537, 67584)],
)
def test_padme(size: int, padded: int) -> None:
    assert padded_size(size) == padded


@given(st.integers(1, 2**40))
def test_padding_costs_at_most_an_eighth_and_leaves_few_sizes(size: int) -> None:
    padded = padded_size(size)
    assert padded >= size
    assert padded <= max(1024, size * 1.12)
    assert padded_size(padded) == padded
    # log log: of a length of E+1 bits all but floor(log2 E) + 1 leading bits are zero
    exponent = padded.bit_length() - 1
    assert padded % (1 << (exponent - int(math.log2(exponent)) - 1)) == 0


def test_nearby_sizes_look_alike(key: HpkePrivateKey) -> None:
    lengths = {
        len(seal_query(key.public_key, CONTRACT, {"x": np.zeros(n, np.uint8)})[0])
        for n in range(1, 900, 40)
    }
    assert len(lengths) <= 17


# ---------------------------------------------------------------------- hostile clients


def sealed_by_hand(key: HpkePrivateKey, plaintext: bytes) -> bytes:
    """A query that opens and holds ``plaintext``, as only a hostile client makes one."""
    import cenacle.enclave.sealed_query as module  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_lay_out", lambda *_: bytearray(plaintext))
        return seal_query(key.public_key, CONTRACT, {})[0]


def lay(header: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    count = len(payload) if size is None else size
    return len(header).to_bytes(4, "big") + count.to_bytes(8, "big") + header + payload


@pytest.mark.parametrize(
    "plaintext",
    [
        b"\0",
        b"\0" * 11,
        b"\xff" * 12,
        lay(b"{]"),
        lay(b"[]"),
        lay(b"[" * 10_000),
        lay(b"{}"),
        lay(b'{"ticket":{}}'),
        lay(b'{"tensors":{}}'),
        lay(b'{"tensors":[],"more":1}'),
        lay(b'{"tensors":[],"ticket":"t"}'),
        lay(b'{"tensors":[1]}'),
        lay(b'{"tensors":["x"]}'),
        lay(b'{"tensors":[{"name":"x"}]}'),
        lay(b'{"tensors":[{"name":"x","dtype":"F32","shape":[2]}]}', bytes(4)),
        lay(b'{"tensors":[]}', b"", 2**63),
        lay(b'{"tensors":[]}', b"x"),
    ],
    ids=range(17),
)
def test_a_query_that_opens_and_is_none_is_refused_in_words_of_ours(
    key: HpkePrivateKey, plaintext: bytes
) -> None:
    opened, _ = open_query(key, CONTRACT, sealed_by_hand(key, plaintext))
    assert opened == plaintext
    with pytest.raises(DataError, match=r"malformed|holds something else"):
        read_query(opened)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_plaintext_is_a_query_or_a_clean_error(data: bytes) -> None:
    for form in (data, lay(data), lay(b'{"tensors":[]}', data)):
        try:
            read_query(form)
        except DataError:
            continue
        assert form[12:26] == b'{"tensors":[]}'


@pytest.mark.parametrize(
    "told", [{"error": 1}, {"error": {"what": 1}}, {"tensors": 1}, {}], ids=str
)
def test_an_answer_of_another_form_is_refused(key: HpkePrivateKey, told: dict[str, Any]) -> None:
    from cenacle.enclave.tensor_bytes import to_json  # noqa: PLC0415

    sealed, ours = seal_query(key.public_key, CONTRACT, X)
    _, theirs = open_query(key, CONTRACT, sealed)
    with pytest.raises(DataError, match="holds something else"):
        open_answer(ours, theirs.encrypt(lay(to_json(told))))
