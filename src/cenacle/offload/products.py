"""Matrix products in all their spellings, as dense layers and batched products.

A product with a weight becomes a :class:`~cenacle.offload.maps.Dense` map, whichever side the
weight is on; a product of two activations a :class:`~cenacle.offload.maps.MatrixProduct`.
Functions return ``None`` for what they cannot express; that stays in the enclave.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import torch

from cenacle.offload.maps import Dense, LinearMap, MatrixProduct

__all__ = ["Engine", "addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "rmatmul"]

_MOST_MATRICES: Final = 64
"""A stack of weights (experts) is offloaded weight by weight up to this number."""


class Engine(Protocol):
    """Who computes a map."""

    def apply(
        self, map_: LinearMap, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """B(x, w) + bias, differentiable. ``bias``: one number for each output feature."""
        ...

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether it is a parameter of the model, or a view of one."""
        ...

    def hinders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why these operands must stay inside; None: they need not."""
        ...

    def stays(self, what: str) -> None:
        """Linear algebra that is not offloaded runs in the enclave: to be noticed once."""
        ...

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """A function is called; its result, if that is known without calling it."""
        ...

    def settle(self) -> None:
        """The model has run."""
        ...

    def eyes_shut(self) -> AbstractContextManager[None]:
        """While operands are handled: nobody looks at a weight that a worker keeps."""
        ...


def _dense(
    engine: Engine, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (..., in), w (out, in), bias (out)."""
    y = engine.apply(Dense(), x.reshape(-1, x.shape[-1]), w, bias)
    return y.reshape(*x.shape[:-1], w.shape[0])


def linear(
    engine: Engine, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The second operand is a weight by its place, even if it was computed (weight norm)."""
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        return None
    if bias is None or bias.shape == (w.shape[0],):
        return _dense(engine, x, w, bias)
    return _dense(engine, x, w, None) + bias


def matmul(engine: Engine, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """``x @ w``, with all that torch broadcasts."""
    if x.dim() == 1 and w.dim() > 1:
        y = _matrices(engine, x.unsqueeze(0), w)
        return None if y is None else y.squeeze(-2)
    if w.dim() == 1 and x.dim() > 1:
        y = _matrices(engine, x, w.unsqueeze(1))
        return None if y is None else y.squeeze(-1)
    return _matrices(engine, x, w)


def _matrices(engine: Engine, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """x (..., m, k), w (..., k, n)."""
    if min(x.dim(), w.dim()) < 2 or x.shape[-1] != w.shape[-2]:
        return None
    lead = _broadcast(x.shape[:-2], w.shape[:-2])
    if lead is None:
        return None
    if engine.is_weight(w) and (flat := _one_matrix(w)) is not None:
        return _dense(engine, x.expand(*lead, *x.shape[-2:]), flat.t(), None)
    if engine.is_weight(x) and (flat := _one_matrix(x)) is not None:
        return _dense(engine, w.expand(*lead, *w.shape[-2:]).mT, flat, None).mT
    # One right operand for all is one tall product.
    batch = (1, -1) if w.dim() == 2 else (lead.numel(), x.shape[-2])
    y = bmm(
        engine,
        x.expand(*lead, *x.shape[-2:]).reshape(*batch, x.shape[-1]),
        w.expand(*(lead if w.dim() > 2 else (1,)), *w.shape[-2:]).reshape(-1, *w.shape[-2:]),
    )
    return None if y is None else y.reshape(*lead, x.shape[-2], w.shape[-1])


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(a, b)  # type: ignore[no-untyped-call, no-any-return]
    except RuntimeError:
        return None


def rmatmul(engine: Engine, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """``Tensor.__rmatmul__``."""
    return matmul(engine, x, w)


def _one_matrix(w: torch.Tensor) -> torch.Tensor | None:
    """The matrix of which ``w`` is a stack of views; None if they differ."""
    while w.dim() > 2:
        if w.shape[0] != 1 and w.stride(0) != 0:
            return None
        w = w[0]
    return w


def bmm(engine: Engine, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """x (batch, m, k), w (batch, k, n)."""
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0] or x.shape[2] != w.shape[1]:
        return None
    if engine.is_weight(w) and len(w) <= _MOST_MATRICES:
        return torch.stack([_dense(engine, a, b.t(), None) for a, b in zip(x, w, strict=True)])
    if engine.is_weight(x) and len(x) <= _MOST_MATRICES:
        both = zip(x, w, strict=True)
        return torch.stack([_dense(engine, b.t(), a, None).t() for a, b in both])
    return engine.apply(MatrixProduct(), x, w, None)


def addmm(
    engine: Engine,
    bias: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor | None:
    """beta bias + alpha x w: GPT-2's dense layers, whose weight is (in, out)."""
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
        return None
    if (beta, alpha) == (1, 1) and bias.shape == (w.shape[1],) and engine.is_weight(w):
        return engine.apply(Dense(), x, w.t(), bias)
    return _added(bias, matmul(engine, x, w), beta, alpha)


def baddbmm(
    engine: Engine,
    bias: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor | None:
    """beta bias + alpha x w for each matrix of a batch."""
    return _added(bias, bmm(engine, x, w), beta, alpha)


def _added(
    bias: torch.Tensor, y: torch.Tensor | None, beta: float, alpha: float
) -> torch.Tensor | None:
    if y is None:
        return None
    if alpha != 1:
        y = alpha * y
    if beta == 0:  # torch ignores the summand then, NaN and all
        return y
    return y + (bias if beta == 1 else beta * bias)


def einsum(engine: Engine, equation: str, *operands: Any) -> torch.Tensor | None:
    """Two operands whose shared indices are summed or are a batch, as in attention.

    Each index of an operand is in the other operand or in the result, at most once in each.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    terms = _terms(equation)
    if terms is None or [len(terms[0]), len(terms[1])] != [o.dim() for o in operands]:
        return None
    (left, right, out), (x, w) = terms, operands
    sizes = {**dict(zip(left, x.shape, strict=True)), **dict(zip(right, w.shape, strict=True))}
    batch = [i for i in left if i in right and i in out]
    inner = [i for i in left if i in right and i not in out]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    if any(x.shape[left.index(i)] != sizes[i] for i in batch + inner):
        return None  # an error, or an index of size 1 that is stretched

    def matrices(term: str, value: torch.Tensor, *order: list[str]) -> torch.Tensor:
        turned = value.permute([term.index(i) for part in (batch, *order) for i in part])
        shape = [torch.Size(sizes[i] for i in part).numel() for part in order]
        return turned.reshape(*(sizes[i] for i in batch), *shape)

    y = matmul(engine, matrices(left, x, rows, inner), matrices(right, w, inner, columns))
    if y is None:
        return None
    found = batch + rows + columns
    return y.reshape([sizes[i] for i in found]).permute([found.index(i) for i in out])


def _terms(equation: object) -> tuple[str, str, str] | None:
    """Both operands' indices and the result's, if it is a matrix product."""
    if not isinstance(equation, str):
        return None
    sides, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = sides.partition(",")
    terms = (left, right, out)
    if not arrow or not comma or not (left.isalpha() and right.isalpha() and out.isalpha()):
        return None
    a, b, c = (set(term) for term in terms)
    if any(len(set(term)) != len(term) for term in terms) or c - (a | b):
        return None
    return terms if (a & b) - c and not (a ^ b) - c else None
