"""Tensors of the Open Inference Protocol as NumPy arrays: datatypes, JSON and binary forms.

Everything here is pure and reads what strangers sent: a tensor is refused unless its data is
exactly what its datatype and shape say. Binary data is little-endian, row by row, without
padding (the protocol's binary tensor data extension).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.errors import InputError

__all__ = [
    "DATATYPES",
    "MAX_DIMENSIONS",
    "SAFETENSORS_NAMES",
    "array_from_bytes",
    "array_from_json",
    "array_to_bytes",
    "array_to_json",
    "check_name",
    "check_shape",
    "datatype_of",
]

DATATYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The protocol's datatypes of fixed size. BYTES, texts of any length, is not among them."""

SAFETENSORS_NAMES: Final[dict[str, str]] = {
    "BOOL": "BOOL",
    **{f"U{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
"""The protocol's datatype for each type name of safetensors, which a model's specs use."""

MAX_DIMENSIONS: Final = 8
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_OF: Final = {dtype: name for name, dtype in DATATYPES.items()}


def check_name(name: object, what: str) -> str:
    """A text of 1 to 256 characters, none of them a control character; else raises InputError."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InputError(
            f"{what} cannot be used",
            found=f"{len(name)} characters" if isinstance(name, str) else type(name).__name__,
            expected="a text of 1 to 256 characters without control characters",
        )
    return name


def check_shape(shape: object, name: str) -> tuple[int, ...]:
    """A list of at most eight sizes; anything else raises InputError."""
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
    ):
        raise InputError(
            f"the shape of tensor {name} cannot be used",
            expected=f"a list of at most {MAX_DIMENSIONS} whole numbers, none of them negative",
        )
    return tuple(shape)


def datatype_of(array: NDArray[Any]) -> str:
    """The protocol's name of an array's datatype.

    Raises:
        InputError: it has none, e.g. for complex numbers or texts.
    """
    name = _OF.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InputError(
            "an array has a datatype that the protocol does not know",
            found=str(array.dtype),
            expected=", ".join(DATATYPES),
            remedy="convert it, e.g. with astype",
        )
    return name


def _dtype(datatype: str, name: str) -> np.dtype[Any]:
    found = DATATYPES.get(datatype)
    if found is None:
        raise InputError(
            f"the datatype of tensor {name} is not served",
            found=repr(datatype[:40]),
            expected=", ".join(DATATYPES),
            remedy="send numbers or truth values; text is tokenized before it is sent",
        )
    return found


def _levels(data: list[Any], shape: tuple[int, ...], name: str) -> list[Any]:
    """The elements of nested lists in row-major order; a flat list is its own."""
    if not data or not isinstance(data[0], list):
        return data
    level: Sequence[Any] = [data]
    for size in shape:
        if not all(type(part) is list and len(part) == size for part in level):
            raise InputError(
                f"the data of tensor {name} does not have its shape",
                found="nested lists of other lengths",
                expected=f"lists nested as {list(shape)}, or one flat list",
            )
        level = list(chain.from_iterable(level))
    return list(level)


def _fits(kinds: Iterable[type], allowed: frozenset[type]) -> bool:
    return set(kinds) <= allowed


_ALLOWED: Final = {
    "b": frozenset({bool}),
    "u": frozenset({int}),
    "i": frozenset({int}),
    "f": frozenset({int, float}),
}


def array_from_json(data: object, datatype: str, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """What a tensor's ``data`` holds, flat or nested; array of ``shape``.

    Numbers must fit the datatype: an integer out of range, a fraction in an integer tensor, a
    truth value for a number and a number that overflows a float are refused, never converted.
    JSON has no NaN and no infinity.

    Raises:
        InputError: naming the tensor.
    """
    dtype = _dtype(datatype, name)
    if not isinstance(data, list):
        raise InputError(f"the data of tensor {name} is no list")
    flat = _levels(data, shape, name)
    count = math.prod(shape)
    if len(flat) != count:
        raise InputError(
            f"the data of tensor {name} does not have its shape",
            found=f"{len(flat)} elements",
            expected=f"{count} for shape {list(shape)}",
        )
    wrong = InputError(
        f"the data of tensor {name} does not have its datatype",
        found="an element of another kind, or out of range",
        expected=f"elements of {datatype}",
    )
    if not _fits(map(type, flat), _ALLOWED[dtype.kind]):
        raise wrong
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=dtype)
    except (OverflowError, ValueError, TypeError):
        raise wrong from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise wrong
    return array.reshape(shape)


def array_from_bytes(
    data: memoryview, datatype: str, shape: tuple[int, ...], name: str
) -> NDArray[Any]:
    """What a tensor's binary data holds; a read-only view of it, of ``shape``.

    NaN and infinities are values like others here: the datatype has them.

    Raises:
        InputError: the length is not that of the shape, or a truth value is neither 0 nor 1.
    """
    dtype = _dtype(datatype, name)
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise InputError(
            f"the binary data of tensor {name} does not have its shape",
            found=f"{len(data)} bytes",
            expected=f"{size} bytes for shape {list(shape)} of {datatype}",
        )
    if dtype.kind == "b" and (np.frombuffer(data, np.uint8) > 1).any():
        raise InputError(
            f"the binary data of tensor {name} does not have its datatype",
            found="a byte other than 0 and 1",
            expected="truth values",
        )
    return np.frombuffer(data, dtype).reshape(shape)


def array_to_json(array: NDArray[Any], name: str) -> list[Any]:
    """The elements in row-major order, as one flat list.

    Raises:
        InputError: a value is NaN or infinite, which JSON cannot say.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"tensor {name} has values that JSON cannot say",
            found="NaN or an infinity",
            expected="finite numbers",
            remedy="ask for it with the parameter binary_data: true",
        )
    values: list[Any] = array.ravel().tolist()
    return values


def array_to_bytes(array: NDArray[Any]) -> memoryview:
    """The elements in row-major order, little-endian; a view where they lie so already."""
    straight = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return straight.reshape(-1).view(np.uint8).data
