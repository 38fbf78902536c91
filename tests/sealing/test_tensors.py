"""Tensors in, tensors out; one tensor or some rows without the rest."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError, SealError
from cenacle.sealing import (
    RawTensor,
    SealedReader,
    TensorReader,
    open_tensors,
    seal_bytes,
    seal_tensors,
    seal_tensors_into,
    sealed_tensors_size,
    unseal_path,
)

KEY = bytes(range(32))
DTYPES = ["?", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<f8", "<i8", "<u8", "<c8"]
TENSORS: dict[str, Any] = {
    "weights": np.arange(2000 * 33, dtype=np.float32).reshape(2000, 33),
    "bias": np.linspace(0, 1, 33),
    "empty": np.empty((0, 7), np.int16),
    "scalar": np.float32(2.5),
    "flags": np.array([[True, False], [False, True]]),
    "big endian": np.arange(7, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "strided": np.arange(100, dtype=np.int64)[::3],
    "ü": np.arange(3, dtype=np.uint8),
}


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        expected = np.asarray(two[name])
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype.newbyteorder("<")
        assert np.array_equal(value, expected, equal_nan=value.dtype.kind in "fc"), name


@pytest.mark.parametrize("chunk_log2", [6, 12, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_round_trips(tmp_path: Path, key: SecretBytes, chunk_log2: int, threads: int) -> None:
    path = tmp_path / "sealed"
    info = seal_tensors(TENSORS, path, key, chunk_log2=chunk_log2, threads=threads)
    same(open_tensors(path, key, expected_digest=info.digest, threads=threads), TENSORS)
    with TensorReader(path, key, expected_header=info.header_digest) as reader:
        same(dict(reader.items()), TENSORS)
        assert reader.schema() == info.schema
        assert reader.info.digest == info.digest
    assert info.schema["tensors"]["weights"] == {"dtype": "F32", "shape": [2000, 33]}
    buffer = bytearray(sealed_tensors_size(TENSORS, chunk_log2=chunk_log2))
    sealed = seal_tensors_into(buffer, TENSORS, key, chunk_log2=chunk_log2, threads=threads)
    assert sealed.size == len(buffer)
    same(open_tensors(buffer, key, expected_header=sealed.header_digest), TENSORS)


@settings(max_examples=50)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=6))
        ),
        max_size=5,
    ),
    chunk_log2=st.integers(6, 8),
)
def test_any_tensors_round_trip(tensors: dict[str, Any], chunk_log2: int) -> None:
    key = SecretBytes(KEY)
    buffer = bytearray(sealed_tensors_size(tensors, chunk_log2=chunk_log2))
    seal_tensors_into(buffer, tensors, key, chunk_log2=chunk_log2, threads=1)
    same(open_tensors(buffer, key), tensors)
    reader = TensorReader(buffer, key)
    for name, tensor in tensors.items():
        assert reader.read_raw(name) == np.asarray(tensor).tobytes()


def test_the_plaintext_is_a_safetensors_file(tmp_path: Path, key: SecretBytes) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key)
    unseal_path(tmp_path / "sealed", tmp_path / "opened.safetensors", key)
    same(safetensors.numpy.load_file(tmp_path / "opened.safetensors"), TENSORS)


def test_the_first_tensor_is_aligned(tmp_path: Path, key: SecretBytes) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key)
    reader = TensorReader(tmp_path / "sealed", key)
    starts = [reader.spec(name).start for name in reader.names]
    assert starts[0] % 64 == 0
    for name in reader.names:
        assert reader.spec(name).start % np.asarray(TENSORS[name]).itemsize == 0


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (7, 9), (1999, 2000), (0, 2000)])
def test_rows(tmp_path: Path, key: SecretBytes, start: int, stop: int) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key, chunk_log2=10)
    reader = TensorReader(tmp_path / "sealed", key)
    assert np.array_equal(reader.rows("weights", start, stop), TENSORS["weights"][start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("weights", -1, 1), ("weights", 3, 2), ("weights", 0, 2001), ("scalar", 0, 1)],
)
def test_rows_that_do_not_exist(
    tmp_path: Path, key: SecretBytes, name: str, start: int, stop: int
) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key)
    with pytest.raises(InputError, match="no such rows"):
        TensorReader(tmp_path / "sealed", key).rows(name, start, stop)


def test_one_tensor_is_read_without_the_rest(
    tmp_path: Path, key: SecretBytes, opened_chunks: list[int]
) -> None:
    tensors = {f"t{i}": np.full(1 << 14, i, np.uint8) for i in range(20)}
    seal_tensors(tensors, tmp_path / "sealed", key, chunk_log2=12)
    reader = TensorReader(tmp_path / "sealed", key)
    opened_chunks.clear()
    reader.read("t7")
    assert len(set(opened_chunks)) <= 5
    opened_chunks.clear()
    reader.rows("t9", 100, 110)
    assert len(set(opened_chunks)) <= 2


def test_a_missing_tensor_names_the_others(tmp_path: Path, key: SecretBytes) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key)
    with pytest.raises(DataError, match=r"no such tensor; found 'nein'; expected .*bias"):
        TensorReader(tmp_path / "sealed", key).read("nein")


def test_bfloat16_is_widened_exactly(key: SecretBytes) -> None:
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], "<u2")
    tensors = {"b": RawTensor("BF16", (2, 2), bits.tobytes())}
    buffer = bytearray(sealed_tensors_size(tensors))
    seal_tensors_into(buffer, tensors, key)
    expected = (bits.astype(np.uint32) << 16).view(np.float32).reshape(2, 2)
    assert np.array_equal(open_tensors(buffer, key)["b"], expected)
    reader = TensorReader(buffer, key)
    assert np.array_equal(reader.read("b"), expected)
    assert np.array_equal(reader.rows("b", 1, 2), expected[1:])
    assert reader.read_raw("b") == bits.tobytes()


def test_types_numpy_lacks_are_read_raw(key: SecretBytes) -> None:
    tensors = {"f8": RawTensor("F8_E4M3", (3,), b"abc")}
    buffer = bytearray(sealed_tensors_size(tensors))
    seal_tensors_into(buffer, tensors, key)
    reader = TensorReader(buffer, key)
    with pytest.raises(DataError, match="read_raw"):
        reader.read("f8")
    with pytest.raises(DataError, match="read_raw"):
        open_tensors(buffer, key)
    assert reader.read_raw("f8") == b"abc"


def test_booleans_of_other_bytes_become_true(tmp_path: Path, key: SecretBytes) -> None:
    tensors = {"b": RawTensor("BOOL", (4,), b"\x00\x01\x02\xff")}
    seal_tensors(tensors, tmp_path / "sealed", key)
    for array in (
        TensorReader(tmp_path / "sealed", key).read("b"),
        open_tensors(tmp_path / "sealed", key)["b"],
    ):
        assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "tensor",
    [
        np.array(["text"]),
        np.array([None], dtype=object),
        np.array([b"bytes"]),
        np.zeros(2, "f4,i4"),
        np.zeros(2, "c16"),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, np.longdouble),
        RawTensor("BF16", (3,), b"12345"),
        RawTensor("XX", (1,), b"1"),
    ],
    ids=str,
)
def test_types_that_cannot_be_sealed(tmp_path: Path, key: SecretBytes, tensor: Any) -> None:
    with pytest.raises(DataError):
        seal_tensors({"t": tensor}, tmp_path / "sealed", key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb", "x" * 1025, "\x00"])
def test_names_that_cannot_be_sealed(tmp_path: Path, key: SecretBytes, name: str) -> None:
    with pytest.raises(DataError, match="name"):
        seal_tensors({name: np.zeros(1)}, tmp_path / "sealed", key)


def test_buffers_that_are_too_small(key: SecretBytes) -> None:
    size = sealed_tensors_size(TENSORS)
    with pytest.raises(InputError, match="too small"):
        seal_tensors_into(bytearray(size - 1), TENSORS, key)
    buffer = bytearray(size)
    seal_tensors_into(buffer, TENSORS, key)
    plain = SealedReader(buffer, key).size
    with pytest.raises(InputError, match="too small"):
        open_tensors(buffer, key, out=bytearray(plain - 1))
    out = np.empty(plain + 5, np.uint8)
    opened = open_tensors(buffer, key, out=out)
    same(opened, TENSORS)
    assert all(np.shares_memory(array, out) for array in opened.values() if array.size)


def test_a_larger_buffer_is_left_alone(key: SecretBytes) -> None:
    buffer = bytearray(b"\xaa" * (sealed_tensors_size(TENSORS) + 100))
    sealed = seal_tensors_into(buffer, TENSORS, key)
    assert buffer[sealed.size :] == b"\xaa" * 100
    same(open_tensors(memoryview(buffer)[: sealed.size], key), TENSORS)
    with pytest.raises(SealError):
        open_tensors(buffer, key)


def test_the_in_memory_writer_gives_the_documented_bytes(
    key: SecretBytes, reference_seal: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seal_tensors(TENSORS, tmp_path / "sealed", key)
    plain = SealedReader(tmp_path / "sealed", key).read_range
    whole = plain(0, SealedReader(tmp_path / "sealed", key).size)
    salt = bytes(range(32))
    monkeypatch.setattr(secrets, "token_bytes", lambda _: salt)
    buffer = bytearray(sealed_tensors_size(TENSORS, chunk_log2=8))
    seal_tensors_into(buffer, TENSORS, key, chunk_log2=8)
    expected = reference_seal(KEY, salt, whole, kind="tensors", chunk_log2=8, table=False)
    assert bytes(buffer) == expected.container


@pytest.mark.parametrize("threads", [1, 2])
def test_a_flipped_bit_anywhere_in_memory(key: SecretBytes, threads: int) -> None:
    tensors = {"a": np.arange(100, dtype=np.float32)}
    buffer = bytearray(sealed_tensors_size(tensors, chunk_log2=7))
    seal_tensors_into(buffer, tensors, key, chunk_log2=7, threads=threads)
    for position in range(len(buffer)):
        buffer[position] ^= 4
        with pytest.raises(SealError):
            open_tensors(buffer, key, threads=threads)
        buffer[position] ^= 4
    same(open_tensors(buffer, key), tensors)


def test_content_that_is_no_safetensors_file(tmp_path: Path, key: SecretBytes) -> None:
    for content in (b"", b"1234567", b"\xff" * 100, (2).to_bytes(8, "little") + b"{}x"):
        seal_bytes(content, tmp_path / "sealed", key, kind="tensors")
        with pytest.raises(DataError, match="safetensors"):
            TensorReader(tmp_path / "sealed", key)
        with pytest.raises(DataError, match="safetensors"):
            open_tensors(tmp_path / "sealed", key)


def test_another_kind_is_refused(tmp_path: Path, key: SecretBytes) -> None:
    seal_bytes(b"x", tmp_path / "sealed", key)
    with pytest.raises(InputError, match="wrong kind"):
        TensorReader(tmp_path / "sealed", key)
    with pytest.raises(InputError, match="wrong kind"):
        open_tensors(tmp_path / "sealed", key)
    with pytest.raises(InputError, match="no key"):
        TensorReader(tmp_path / "sealed")
