"""What a model calls: ReLUs and pooling that can be fused, and functions that read nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.nn import functional

__all__ = ["Call", "looks_only", "tensors"]


_IN_PLACE: Final = (torch.relu_, torch.Tensor.relu_)
_PLAIN: Final = frozenset({"size", "dim", "ndimension", "numel", "nelement", "__len__"})
"""Functions that look at no element."""
_ATTRIBUTES: Final = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf"}
)
_POOLS: Final = (functional.max_pool2d, torch.max_pool2d)
_POOL_NAMES: Final = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class Call:
    """A call of the model's: what it is, if it is a ReLU or pooling that can be fused."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parts = func, args, kwargs
        self.relu, self.in_place = _relu(func, args, kwargs)
        self.pool = _pool(func, args, kwargs)

    def run(self) -> Any:
        func, args, kwargs = self._parts
        return func(*args, **kwargs)


def looks_only(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _ATTRIBUTES
    return name in _PLAIN


def _relu(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, bool]:
    """The tensor that a ReLU is asked of, and whether in place."""
    given = args[0] if args else kwargs.get("input")
    if func in _IN_PLACE:
        return given, True
    if func in (torch.relu, torch.Tensor.relu) and set(kwargs) <= {"input"}:
        return given, False
    if func is functional.relu:
        return given, bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
    return None, False


def _pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor whose images are to be pooled by windows of 2 x 2, side by side."""
    if func not in _POOLS or kwargs.get("return_indices"):
        return None
    given: Any = args[0] if args else kwargs.get("input")
    options = {**dict(zip(_POOL_NAMES, args[1:], strict=False)), **kwargs}
    two, none, one = ((k, [k, k], (k, k)) for k in (2, 0, 1))
    fits = (
        len(args) <= 1 + len(_POOL_NAMES)
        and isinstance(given, torch.Tensor)
        and given.dim() == 4
        and given.shape[2] % 2 == given.shape[3] % 2 == 0
        and options.get("kernel_size") in two
        and (options.get("stride") in (*two, None, [], ()))
        and options.get("padding", 0) in none
        and options.get("dilation", 1) in one
    )
    return given if fits else None


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
