"""What shape and type a result will have, found out without computing it.

A worker is not asked: the enclave knows which form each tensor has that it sent, and derives
the form of each result from those. So an answer of another form cannot even be said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.accelerators.wire import clean
from cenacle.errors import AcceleratorError, InputError

__all__ = ["DTYPES", "Form", "Forms"]

DTYPES: Final = {
    getattr(torch, name): name
    for name in (
        *("float16", "bfloat16", "float32", "float64", "bool"),
        *("uint8", "int8", "int16", "int32", "int64"),
    )
}
"""What can cross, and how it is called there."""

_MAX_KNOWN: Final = 4096


class Form(NamedTuple):
    """Of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Forms:
    """The forms of what one worker keeps, by handle.

    Args:
        name: the worker's, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kept: dict[int, Form] = {}
        self._inferred: dict[Any, Form] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, handle: int, value: torch.Tensor) -> Form:
        """Note a tensor that is sent; raises :class:`InputError` if it cannot be."""
        if value.dtype not in DTYPES or value.device.type != "cpu" or value.is_sparse:
            raise InputError(
                "a tensor of this kind cannot be sent to a worker",
                found=f"{value.dtype} on {value.device}",
                expected="a dense tensor of numbers on the CPU",
            )
        form = self._kept[handle] = Form(tuple(value.shape), value.dtype)
        return form

    def get(self, handle: int) -> Form:
        """Raises :class:`AcceleratorError` for a handle that the worker does not have."""
        form = self._kept.get(handle)
        if form is None:
            raise AcceleratorError(f"accelerator {self._name} was asked for what it does not have")
        return form

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        """Note a result; raises :class:`AcceleratorError` for what cannot be computed."""
        self._kept[result] = self._infer(operation, [self.get(one) for one in operands])

    def drop(self, handles: Sequence[int]) -> list[int]:
        """Those of the handles that were known."""
        return [handle for handle in handles if self._kept.pop(handle, None) is not None]

    def clear(self) -> None:
        self._kept.clear()

    def _infer(self, operation: Operation, operands: list[Form]) -> Form:
        try:
            attributes = json.dumps(dict(operation.attributes), sort_keys=True, allow_nan=False)
            key = (operation.name, attributes, *operands)
            form = self._inferred.get(key)
            if form is None:
                found = execute(
                    operation,
                    [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in operands],
                )
                form = Form(tuple(found.shape), found.dtype)
                if len(self._inferred) >= _MAX_KNOWN:
                    self._inferred.clear()
                self._inferred[key] = form
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise AcceleratorError(
                f"accelerator {self._name} was asked for an operation that cannot be",
                found=clean(f"{operation.name}: {type(error).__name__}: {error}"),
            ) from None
        return form
