"""Which weight of a model a tensor is, and whether its values are still the same.

A weight is known by the memory it lies in. So views are found too: ``w.t()``, a third of a
packed projection, a parameter that lies in a larger buffer; and a weight that two modules
share is one weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

import torch
from torch import nn

__all__ = ["Weight", "Weights"]


class Weight(NamedTuple):
    """A weight or a part of one.

    Attributes:
        name: the parameter's name without ``.weight``; with its rows if it is a part.
        key: equal only while nothing changed the values (see :class:`Weights`).
        learns: whether the parameter requires a gradient.
    """

    name: str
    key: tuple[int, int]
    learns: bool


class _Entry(NamedTuple):
    name: str
    parameter: torch.Tensor
    storage: torch.Tensor  # keeps the memory, so that its address is not given to others
    start: int
    end: int


class Weights:
    """The parameters of a model.

    A change is seen by torch's version counter, by the address of the memory (``p.data = t``),
    and by :meth:`changed`. Not seen: writing into ``p.data`` or into an array that shares its
    memory; call :meth:`changed` after that.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries: dict[int, list[_Entry]] = {}
        self._identities: dict[tuple[object, ...], int] = {}
        self._numbers = count(1)

    def refresh(self) -> None:
        """Look at the model's parameters again: some may have been replaced."""
        before = {id(e.parameter): e for entries in self._entries.values() for e in entries}
        entries: dict[int, list[_Entry]] = {}
        same = True
        for name, parameter in self._model.named_parameters():
            if (
                not parameter.is_floating_point()
                or parameter.numel() == 0
                or torch._C._functorch.is_functorch_wrapped_tensor(parameter)
            ):
                continue
            address = parameter.untyped_storage().data_ptr()
            start = int(parameter.storage_offset()) * parameter.element_size()
            entry = before.pop(id(parameter), None)
            if entry is None or entry.storage.untyped_storage().data_ptr() != address:
                same = False
                end = start + parameter.numel() * parameter.element_size()
                entry = _Entry(name, parameter, parameter.detach(), start, end)
                self._forget(id(parameter))
            entries.setdefault(address, []).append(entry)
        for gone in before:
            self._forget(gone)
        if not same or before:
            self._entries = entries

    def changed(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """The values of these parameters (of all without an argument) are others now."""
        if parameters is None:
            self._identities.clear()
        else:
            for parameter in parameters:
                self._forget(id(parameter))

    def find(self, tensor: torch.Tensor) -> Weight | None:
        """The weight that a tensor is, or is a view of; None if it is none."""
        entries = self._entries.get(tensor.untyped_storage().data_ptr())
        if entries is None:
            return None
        start = tensor.storage_offset() * tensor.element_size()
        for entry in entries:
            if entry.start <= start < entry.end and tensor.dtype == entry.parameter.dtype:
                break
        else:
            return None
        parameter = entry.parameter
        offset = int(tensor.storage_offset() - parameter.storage_offset())
        view = (id(parameter), offset, tuple(tensor.shape), tensor.stride())
        if parameter.is_inference():  # has no version counter: never taken for unchanged
            self._identities.pop(view, None)
            version = 0
        else:
            version = parameter._version
        identity = self._identities.get(view)
        if identity is None:
            identity = self._identities[view] = next(self._numbers)
        name = _name(entry.name, parameter, tensor, offset)
        return Weight(name, (identity, version), parameter.requires_grad)

    def _forget(self, parameter: int) -> None:
        for view in [view for view in self._identities if view[0] == parameter]:
            del self._identities[view]


def _name(name: str, parameter: torch.Tensor, view: torch.Tensor, offset: int) -> str:
    if view.numel() == parameter.numel():
        return name.removesuffix(".weight")
    width = parameter.numel() // parameter.shape[0]
    if offset % width == 0 and view.numel() % width == 0:
        return f"{name}[{offset // width}:{(offset + view.numel()) // width}]"
    return f"{name}[{offset}...]"
