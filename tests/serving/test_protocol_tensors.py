"""Datatypes and tensors of the Open Inference Protocol, as strangers send them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cenacle.errors import InputError
from cenacle.serving.tensors import (
    DATATYPES,
    array_from_bytes,
    array_from_json,
    array_to_bytes,
    array_to_json,
    check_name,
    check_shape,
    datatype_of,
)

ARRAYS = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda name: hnp.arrays(
        DATATYPES[name],
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)


@settings(max_examples=80)
@given(ARRAYS)
def test_binary_data_comes_back_to_the_bit(array: np.ndarray[Any, Any]) -> None:
    data = bytes(array_to_bytes(array))
    again = array_from_bytes(memoryview(data), datatype_of(array), array.shape, "x")
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()
    assert not again.flags.writeable


@settings(max_examples=80)
@given(ARRAYS, st.booleans())
def test_json_data_comes_back_flat_or_nested(array: np.ndarray[Any, Any], nested: bool) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        with pytest.raises(InputError, match="JSON cannot say"):
            array_to_json(array, "x")
        return
    data = array.tolist() if nested and array.ndim else array_to_json(array, "x")
    again = array_from_json(data, datatype_of(array), array.shape, "x")
    assert again.tobytes() == array.tobytes()
    assert again.shape == array.shape


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("UINT8", (1,), [256]),
        ("UINT8", (1,), [-1]),
        ("INT8", (1,), [128]),
        ("UINT64", (1,), [2**64]),
        ("INT64", (1,), [2**63]),
        ("INT32", (1,), [1.0]),
        ("INT32", (1,), [True]),
        ("INT32", (1,), ["1"]),
        ("INT32", (1,), [None]),
        ("INT32", (1,), [[[1]]]),
        ("BOOL", (1,), [1]),
        ("FP32", (1,), [True]),
        ("FP32", (1,), ["1.0"]),
        ("FP32", (1,), [1e39]),
        ("FP16", (1,), [65520.0]),
        ("FP64", (1,), [float("inf")]),
        ("FP64", (1,), [float("nan")]),
        ("FP64", (1,), [10**400]),
        ("FP32", (2,), [1.0]),
        ("FP32", (2, 2), [[1.0, 2.0], [3.0]]),
        ("FP32", (2, 2), [[1.0, 2.0], 3.0]),
        ("FP32", (4,), [[1.0, 2.0], [3.0, 4.0]]),
        ("FP32", (1,), 1.0),
        ("FP32", (1,), {"0": 1.0}),
        ("FP32", (2**40,), [1.0]),
        ("BYTES", (1,), ["text"]),
        ("BF16", (1,), [1.0]),
        ("fp32", (1,), [1.0]),
    ],
)
def test_data_of_another_kind_is_refused(datatype: str, shape: tuple[int, ...], data: Any) -> None:
    with pytest.raises(InputError, match="tensor x"):
        array_from_json(data, datatype, shape, "x")


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("UINT64", (2,), [0, 2**64 - 1]),
        ("INT64", (2,), [-(2**63), 2**63 - 1]),
        ("BOOL", (2,), [True, False]),
        ("FP32", (2,), [1, 2.5]),
        ("FP32", (0, 3), []),
        ("FP32", (), [2.0]),
    ],
)
def test_data_at_the_edges_is_taken(datatype: str, shape: tuple[int, ...], data: Any) -> None:
    found = array_from_json(data, datatype, shape, "x")
    assert found.ravel().tolist() == data
    assert found.shape == shape


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP32", (1,), bytes(3)),
        ("FP32", (1,), bytes(5)),
        ("FP32", (2**40, 2**40), b""),
        ("BOOL", (3,), b"\x00\x01\x02"),
        ("BYTES", (1,), struct.pack("<I", 1) + b"a"),
    ],
)
def test_binary_data_of_another_kind_is_refused(
    datatype: str, shape: tuple[int, ...], data: bytes
) -> None:
    with pytest.raises(InputError, match="tensor x"):
        array_from_bytes(memoryview(data), datatype, shape, "x")


def test_binary_data_may_hold_nan() -> None:
    data = struct.pack("<2f", float("nan"), float("inf"))
    assert not np.isfinite(array_from_bytes(memoryview(data), "FP32", (2,), "x")).any()


@pytest.mark.parametrize(
    "shape", [None, 3, "3", [-1], [1.0], [True], [None], [2**63], [1] * 9, {"0": 1}, [[1]]]
)
def test_an_impossible_shape_is_refused(shape: Any) -> None:
    with pytest.raises(InputError, match="shape of tensor x"):
        check_shape(shape, "x")


@pytest.mark.parametrize("name", [None, 7, "", "a\nb", "a\x00", "\x7f", "n" * 257])
def test_an_impossible_name_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match="a name cannot be used"):
        check_name(name, "a name")


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]", "object"])
def test_other_arrays_have_no_datatype(dtype: str) -> None:
    with pytest.raises(InputError, match="datatype that the protocol does not know"):
        datatype_of(np.zeros(1, dtype))
