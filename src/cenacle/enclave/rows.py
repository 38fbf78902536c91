"""Tensors of queries as rows of a batch: joined, and split again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.specs import TensorSpec
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.errors import DataError

__all__ = ["answer_bytes", "can_join", "group_of", "join", "split"]

_ALIGNMENT = 16


def can_join(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether rows of several queries can be computed together."""
    return all(spec.batched for spec in (*inputs, *outputs))


def group_of(tensors: Tensors) -> Hashable:
    """Equal for queries whose rows have the same shape."""
    return tuple(sorted((name, array.shape[1:]) for name, array in tensors.items()))


def join(queries: Sequence[Tensors]) -> Mapping[str, NDArray[Any]]:
    """The rows of all queries, one after the other; a single query is not copied."""
    if len(queries) == 1:
        return queries[0]
    return {name: np.concatenate([one[name] for one in queries]) for name in queries[0]}


def split(outputs: Tensors, rows: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
    """The inverse of :func:`join`, for outputs.

    Raises:
        DataError: the model gave another number of rows.
    """
    if any(array.ndim == 0 or array.shape[0] != sum(rows) for array in outputs.values()):
        raise DataError("the model gave another number of rows than it was asked for")
    ends = np.cumsum(rows)
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for end, count in zip(ends, rows, strict=True)
    ]


def answer_bytes(outputs: Sequence[TensorSpec], rows: int) -> int:
    """Bytes of an answer to so many rows; 0 where outputs have sizes that vary."""
    total = 0
    for spec in outputs:
        one = spec.row_bytes
        if one is None:
            return 0
        size = one * rows if spec.batched else one
        total += size + -size % _ALIGNMENT
    return total
