"""Where rows come from: what the trainer needs of an opened asset, and the same in memory.

:class:`cenacle.sealing.TableReader` and ``TensorReader`` are sources as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["MemoryTable", "MemoryTensors", "Source", "TableSource", "TensorSource"]


@runtime_checkable
class TableSource(Protocol):
    """A table that can be read by columns."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def num_rows(self) -> int: ...

    def read(self, columns: Sequence[str] | None = None) -> pa.Table: ...


@runtime_checkable
class TensorSource(Protocol):
    """Tensors that can be read by name."""

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, name: str) -> NDArray[Any]: ...


Source = TableSource | TensorSource


class MemoryTable:
    """An Arrow table, or columns by name, as a source."""

    def __init__(self, table: pa.Table | Mapping[str, Any]) -> None:
        self._table = table if isinstance(table, pa.Table) else pa.table(dict(table))

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @property
    def num_rows(self) -> int:
        return int(self._table.num_rows)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self._table if columns is None else self._table.select(list(columns))


class MemoryTensors:
    """Arrays by name as a source."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def read(self, name: str) -> NDArray[Any]:
        return np.asarray(self._tensors[name])
