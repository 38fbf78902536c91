"""Tensors as bytes between processes that do not trust each other: pure.

A list of names, types and shapes in JSON, and the tensors as they lie in memory, little endian,
row after row, each at a multiple of 16 bytes. What is read is hostile: names, types, shapes and
their sum are bounded and checked against the bytes before anything is made of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints

from cenacle.cut.specs import NUMPY_DTYPES
from cenacle.documents.base import Frozen
from cenacle.errors import DataError, DocumentError

__all__ = [
    "MAX_RANK",
    "MAX_TENSORS",
    "Dtype",
    "Parts",
    "TensorHeader",
    "TensorName",
    "Tensors",
    "byte_count",
    "input_digest",
    "pack_tensors",
    "to_json",
    "unpack_tensors",
]

Tensors: TypeAlias = Mapping[str, NDArray[Any]]
Parts: TypeAlias = list[bytes | memoryview]
"""Buffers that follow each other on the wire; for ``socket.sendmsg`` or ``writelines``."""

MAX_TENSORS: Final = 256
MAX_RANK: Final = 8
_ALIGNMENT: Final = 16

Dtype = Literal["BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64"]
"""The types that cross, by their names in safetensors."""

_NAMES: Final = {NUMPY_DTYPES[name]: name for name in get_args(Dtype)}

TensorName = Annotated[
    str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")
]


class TensorHeader(Frozen):
    """One tensor of a payload. An empty shape is a single number; no dimension is zero."""

    name: TensorName
    dtype: Dtype
    shape: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...], Field(max_length=MAX_RANK)
    ]


def _bad(what: str, expected: str) -> DataError:
    return DataError("tensors in a message are malformed", found=what, expected=expected)


def to_json(fields: Mapping[str, Any]) -> bytes:
    """Compact JSON; raises DataError for what JSON cannot hold."""
    try:
        return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise _bad("fields that JSON cannot hold", "text, numbers, lists and mappings") from None


def byte_count(parts: Parts) -> int:
    """The bytes of these buffers together."""
    return sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)


def pack_tensors(tensors: Tensors) -> tuple[list[dict[str, Any]], Parts]:
    """The headers of these tensors and their bytes; contiguous arrays are not copied.

    Raises:
        DataError: more than 256, or of a type that does not cross.
    """
    if len(tensors) > MAX_TENSORS:
        raise _bad(f"{len(tensors)} tensors", f"at most {MAX_TENSORS}")
    headers: list[dict[str, Any]] = []
    parts: Parts = []
    for name, given in tensors.items():
        array = np.asarray(given, order="C")
        dtype = _NAMES.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise _bad(f"a tensor of {array.dtype}", ", ".join(get_args(Dtype)))
        if 0 in array.shape:
            raise _bad("a tensor without elements", "at least one along each axis")
        array = array.astype(NUMPY_DTYPES[dtype], copy=False)
        headers.append({"name": name, "dtype": dtype, "shape": list(array.shape)})
        parts.append(array.reshape(-1).view(np.uint8).data)
        if gap := -array.nbytes % _ALIGNMENT:
            parts.append(bytes(gap))
    return headers, parts


def unpack_tensors(
    headers: Sequence[Mapping[str, Any] | TensorHeader], payload: bytes | bytearray | memoryview
) -> dict[str, NDArray[Any]]:
    """The tensors in a payload, as views of it; the inverse of :func:`pack_tensors`.

    Raises:
        DataError: fields, names or sizes that do not hold.
    """
    if len(headers) > MAX_TENSORS:
        raise _bad("too many tensors", f"at most {MAX_TENSORS}")
    data = memoryview(payload)
    tensors: dict[str, NDArray[Any]] = {}
    start = 0
    try:
        checked = [
            one if isinstance(one, TensorHeader) else TensorHeader.from_fields(dict(one))
            for one in headers
        ]
    except (DocumentError, TypeError, ValueError):
        raise _bad("the header of a tensor", "its name, type and shape") from None
    for one in checked:
        dtype, count = NUMPY_DTYPES[one.dtype], math.prod(one.shape)
        size = count * dtype.itemsize
        if one.name in tensors:
            raise _bad("two tensors of one name", "each once")
        if size > data.nbytes - start:
            raise _bad("tensors that are larger than the payload", "their bytes and no other")
        array = np.frombuffer(data, dtype, count, start)
        # Anything but 0 and 1 is no boolean to the code that will compute with it.
        if one.dtype == "BOOL" and np.frombuffer(data, np.uint8, count, start).max() > 1:
            raise _bad("a boolean that is neither 0 nor 1", "0 or 1")
        tensors[one.name] = array.reshape(one.shape)
        start += size + -size % _ALIGNMENT
    if start != data.nbytes:
        raise _bad("a payload that is larger than its tensors", "their bytes and no other")
    return tensors


def input_digest(tensors: Tensors) -> str:
    """``sha256:`` and the digest of names, types, shapes and bytes, whatever their order.

    What the use of a ticket names as its input.
    """
    headers, parts = pack_tensors({name: tensors[name] for name in sorted(tensors)})
    described = to_json({"tensors": headers})
    total = hashlib.sha256(len(described).to_bytes(8, "big") + described)
    for part in parts:
        total.update(part)
    return "sha256:" + total.hexdigest()
