"""Descriptions of tensors, which also come from others."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.cut.specs import NUMPY_DTYPES, TensorSpec
from cenacle.errors import DataError
from cenacle.sealing.safetensors_format import DTYPE_BYTES


@pytest.mark.parametrize(
    ("spec", "batched", "row_bytes"),
    [
        (TensorSpec("x", "F32", (None, 3, 2)), True, 24),
        (TensorSpec("x", "F32", (None,)), True, 4),
        (TensorSpec("x", "I64", (2, 3)), False, 48),
        (TensorSpec("x", "BOOL", (None, None, 2)), True, None),
        (TensorSpec("x", "F32", (4, None)), False, None),
        (TensorSpec("x", "F16", ()), False, 2),
    ],
)
def test_rows(spec: TensorSpec, batched: bool, row_bytes: int | None) -> None:
    assert spec.batched is batched
    assert spec.row_bytes == row_bytes
    assert TensorSpec.from_fields(spec.to_fields()) == spec


def test_numpy_types_have_the_sizes_that_safetensors_says() -> None:
    for name, dtype in NUMPY_DTYPES.items():
        assert dtype.itemsize == DTYPE_BYTES[name]
        assert TensorSpec("x", name, ()).numpy_dtype == dtype
        assert dtype == dtype.newbyteorder("<")
    with pytest.raises(DataError, match="does not have; found BF16"):
        _ = TensorSpec("x", "BF16", ()).numpy_dtype
    assert np.dtype("<f4") == NUMPY_DTYPES["F32"]


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"name": "x", "dtype": "F32"},
        {"name": "x", "dtype": "F32", "shape": [1], "more": 1},
        {"name": 1, "dtype": "F32", "shape": [1]},
        {"name": "x", "dtype": "float", "shape": [1]},
        {"name": "x", "dtype": "F32", "shape": "1"},
        {"name": "x", "dtype": "F32", "shape": [-1]},
        {"name": "x", "dtype": "F32", "shape": [1.0]},
        {"name": "x", "dtype": "F32", "shape": [True]},
        {"name": "x", "dtype": "F32", "shape": [1 << 40]},
        {"name": "x", "dtype": "F32", "shape": [1] * 65},
        {"name": "", "dtype": "F32", "shape": []},
        {"name": "a\nb", "dtype": "F32", "shape": []},
        {"name": "x" * 2000, "dtype": "F32", "shape": []},
    ],
)
def test_what_describes_no_tensor_is_refused(fields: Any) -> None:
    with pytest.raises(DataError):
        TensorSpec.from_fields(fields)


@settings(max_examples=30, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), st.lists) | st.binary())
def test_anything_is_an_error_or_a_spec(value: Any) -> None:
    with pytest.raises(DataError):
        TensorSpec.from_fields({"name": value, "dtype": "F32", "shape": value})


def test_the_enclave_needs_neither_onnx_nor_torch_for_it() -> None:
    script = "import sys, cenacle.cut.specs; assert not {'onnx', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
