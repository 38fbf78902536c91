"""What a tensor between parts of a model looks like: name, type, shape.

Part of what the enclave imports: numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cenacle.errors import DataError
from cenacle.sealing.safetensors_format import DTYPE_BYTES, check_name

__all__ = ["NUMPY_DTYPES", "TensorSpec"]

_MAX_DIMENSIONS: Final = 64
_MAX_SIZE: Final = (1 << 31) - 1

# Of the types that safetensors names, those that numpy has.
NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(kind)
    for name, kind in (
        ("BOOL", "?"),
        ("U8", "u1"),
        ("I8", "i1"),
        ("U16", "<u2"),
        ("I16", "<i2"),
        ("F16", "<f2"),
        ("U32", "<u4"),
        ("I32", "<i4"),
        ("F32", "<f4"),
        ("U64", "<u8"),
        ("I64", "<i8"),
        ("F64", "<f8"),
        ("C64", "<c8"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that enters or leaves a model.

    Attributes:
        name: of the tensor in the graph.
        dtype: as safetensors writes it: ``F32``, ``I64``, ``BOOL``, ...
        shape: sizes; ``None`` where each query decides. The first axis is ``None`` exactly if
            it counts the rows of a batch, so that queries can be joined along it.

    Raises:
        DataError: a name, type or size that no tensor can have.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.dtype not in DTYPE_BYTES:
            raise DataError(
                f"tensor {self.name[:80]!r} is of a type that cannot be handed over",
                found=self.dtype[:40],
                expected=", ".join(DTYPE_BYTES),
            )
        sizes = [size for size in self.shape if size is not None]
        if len(self.shape) > _MAX_DIMENSIONS or not all(0 <= size <= _MAX_SIZE for size in sizes):
            raise DataError(
                f"tensor {self.name[:80]!r} has an unusable shape",
                found=str(self.shape)[:80],
                expected=f"at most {_MAX_DIMENSIONS} sizes of 0 to {_MAX_SIZE}",
            )

    @property
    def batched(self) -> bool:
        """Whether the first axis counts rows."""
        return bool(self.shape) and self.shape[0] is None

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one row; ``None`` if an axis besides the first varies."""
        rest = self.shape[1:] if self.batched else self.shape
        sizes = [size for size in rest if size is not None]
        return None if len(sizes) < len(rest) else DTYPE_BYTES[self.dtype] * math.prod(sizes)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy type, little-endian.

        Raises:
            DataError: numpy has none for it (``BF16`` and the 8-bit floats).
        """
        found = NUMPY_DTYPES.get(self.dtype)
        if found is None:
            raise DataError(
                f"tensor {self.name[:80]!r} is of a type that numpy does not have",
                found=self.dtype,
                expected=", ".join(NUMPY_DTYPES),
            )
        return found

    def to_fields(self) -> dict[str, Any]:
        """As JSON; the inverse of :meth:`from_fields`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_fields(cls, fields: object) -> TensorSpec:
        """From JSON that somebody else wrote.

        Raises:
            DataError: other fields, other types, or values that no tensor can have.
        """
        if not isinstance(fields, dict) or set(fields) != {"name", "dtype", "shape"}:
            raise _malformed("other fields")
        name, dtype, shape = fields["name"], fields["dtype"], fields["shape"]
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            raise _malformed("values of other types")
        if not all(size is None or type(size) is int for size in shape):
            raise _malformed("sizes that are no integers")
        return cls(name, dtype, tuple(shape))


def _malformed(found: str) -> DataError:
    return DataError(
        "the description of a tensor is malformed",
        found=found,
        expected="name, dtype, and a list of sizes",
    )
