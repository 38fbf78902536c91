"""Operations that broadcast: each example gets its own copy of the parameter, at no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import operation_name, rules
from cenacle.training.privacy.trees import tensors_in

__all__ = ["broadcast", "concatenate", "prelu"]

_NAMES = ("add", "sub", "mul", "div", "true_divide", "subtract", "multiply", "divide", "pow",
          "maximum", "minimum", "rsub")  # fmt: skip
_METHODS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
    "__rtruediv__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "add_", "sub_", "mul_",
    "div_", "__pow__", "__rpow__",
)  # fmt: skip
_BINARY = {
    found
    for owner, names in ((torch, _NAMES), (Tensor, _NAMES + _METHODS))
    for name in names
    if (found := getattr(owner, name, None)) is not None
}


@rules(*_BINARY, torch.where, Tensor.where, torch.addcmul, torch.lerp)
def broadcast(tape: Tape, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Arithmetic between data and parameters."""
    name = operation_name(func)
    tensors = tensors_in(args)
    data = [t for t in tensors if tape.is_data(t)]
    targets = [t for t in map(tape.target, tensors) if t is not None]
    dims = max(t.dim() for t in data)
    if tensors_in(kwargs) or max(t.dim() for t in tensors) > dims:
        tape.refuse(func, targets[0])
    rows = {tape.rows(name, t) for t in data if t.dim() == dims}
    if len(rows) != 1:
        tape.refuse(func, targets[0])
    n = rows.pop()
    where = f"{name} of '{targets[0].name}'"
    return func(
        *(
            tape.expanded(where, t, dims, n)
            if isinstance(t, Tensor) and tape.target(t) is not None
            else t
            for t in args
        ),
        **kwargs,
    )


@rules(torch.cat, torch.concat, torch.concatenate, torch.stack)
def concatenate(tape: Tape, func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Parameters joined to data along a dimension other than the first."""
    dims = next(t.dim() for t in tensors if tape.is_data(t))
    target = next(t for t in map(tape.target, tensors) if t is not None)
    if kwargs or dim % dims == 0:
        tape.refuse(func, target)
    name = f"{operation_name(func)} of '{target.name}'"
    rows = tape.rows(name, next(t for t in tensors if tape.is_data(t)))
    return func([tape.expanded(name, t, dims, rows) for t in tensors], dim)


@rules(torch.prelu, functional.prelu, torch.Tensor.prelu)
def prelu(tape: Tape, func: Any, input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002, ARG001
    """PReLU, of one slope or one for each channel."""
    target = tape.target(weight)
    assert target is not None
    where = f"prelu of '{target.name}'"
    rows = tape.rows(where, input)
    slope = tape.expanded(where, weight, 2, rows)
    slope = slope.reshape(*slope.shape, *(1,) * (input.dim() - 2))
    return torch.where(input >= 0, input, input * slope)
