"""What a private forward pass is made of: targets, their derivations, and the rules' registry."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cenacle.training.privacy.gradients import Outer, Use, merge

__all__ = [
    "DATA",
    "RULES",
    "TAG",
    "TO_BATCH",
    "Derived",
    "Rule",
    "Sight",
    "Source",
    "Target",
    "fold_transposes",
    "is_transpose",
    "moves_only",
    "opened",
    "operation_name",
    "rules",
]

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
TAG = "_cenacle_private"
DATA = "data"

# Derivations whose adjoint keeps the norm: the gradient is only moved, or padded with zeros.
_ISOMETRIES = {
    "t", "T", "mT", "transpose", "permute", "view", "reshape", "contiguous", "unsqueeze",
    "squeeze", "flatten", "unflatten", "narrow", "select", "clone", "alias", "movedim",
    "swapaxes", "view_as", "reshape_as",
}  # fmt: skip
TO_BATCH = {"expand", "expand_as", "repeat", "broadcast_to", "tile"}


def rules(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations: ``rule(tape, func, *args, **kwargs)`` runs one.

    A rule's signature follows the operation's. It runs with the tape inactive and must
    hand every trainable parameter's output gradient to :meth:`Tape.expect`.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def operation_name(func: Any) -> str:
    """A short name of a torch function, for messages and signatures."""
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name)


@dataclass(eq=False)
class Target:
    """A trainable parameter, or a tensor derived from some, and its uses in this pass."""

    name: str
    value: Tensor
    expected: int = 0
    uses: list[Use] = field(default_factory=list)
    merged: Use | None = None

    def combined(self) -> Use | None:
        """All uses as one, or ``None`` if no gradient came back."""
        if self.merged is None and self.uses:
            self.merged = merge(self.uses)
            self.uses = []
        return self.merged


@dataclass(eq=False)
class Derived(Target):
    """A target computed from parameters; ``sources`` are their indices in the tape.

    ``graph`` is the tensor with its autograd history. ``isometric`` tells that the
    gradient of the one source has the same norm as this target's, ``transposed`` that this
    is a parameter's transpose and nothing else.
    """

    graph: Tensor = field(default_factory=lambda: torch.empty(0))
    sources: frozenset[str] = frozenset()
    isometric: bool = False
    transposed: bool = False


@dataclass
class Sight:
    """What a rule saw, for the probe that examples do not mix: name, tensor, is it data."""

    where: str
    tensor: Tensor
    data: bool


class Source(torch.autograd.Function):
    """The output of an operation whose data needs no gradient, so that its own can be had."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, run: Callable[[], Tensor], take: Any) -> Tensor:
        ctx.take = take
        return run()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.take(gradient)
        return None, None, None


_FALSE = {
    name: lambda *_: False
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
}
_OPENED: dict[Any, Callable[..., Any]] = {}


def opened(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch as one that the mode sees inside of, not as a whole."""
    python = isinstance(func, types.FunctionType) and func.__closure__ is None
    if not python or not func.__module__.startswith("torch."):
        return None
    if func not in _OPENED:
        inner = types.FunctionType(
            func.__code__, {**func.__globals__, **_FALSE}, func.__name__, func.__defaults__
        )
        inner.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = inner
    return _OPENED[func]


def is_transpose(out: Tensor, matrix: Tensor) -> bool:
    """Whether ``out`` is a view of the whole matrix with its two dimensions exchanged."""
    if out.dim() != 2 or matrix.dim() != 2 or out.data_ptr() != matrix.data_ptr():
        return False
    (rows, columns), strides = matrix.shape, matrix.stride()
    exchanged = tuple(out.shape) == (columns, rows) and out.stride() == strides[::-1]
    return exchanged and strides[0] != strides[1]


def fold_transposes(targets: Mapping[str, Target], derived: Iterable[Derived]) -> None:
    """Count what reached a transpose as uses of its parameter, where that needs no forming.

    ``embedding(ids, w)`` with ``h @ w.T`` is then a tied table like any other.
    """
    for d in derived:
        outers = [u for u in d.uses if isinstance(u, Outer)]
        if d.transposed and len(outers) == len(d.uses):
            (name,) = d.sources
            targets[name].uses.extend(u.flipped() for u in outers)
            d.uses = []


def moves_only(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation uses every element of its parameter at most once, unscaled."""
    if name in _ISOMETRIES or name == "to":
        return True
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    if name == "embedding":
        ids = kwargs.get("input", args[0] if args else None)
        plain = len(args) < 3 and kwargs.get("padding_idx") is None
        return plain and isinstance(ids, Tensor) and ids.numel() == ids.unique().numel()  # type: ignore[no-untyped-call]
    return name in {"chunk", "split", "unbind", "tensor_split"}
