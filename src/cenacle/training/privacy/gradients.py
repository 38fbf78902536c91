"""Per-example gradients of one parameter, in whatever form costs least.

A *use* is one consumption of a parameter by an operation. It knows the squared norms of
the B per-example gradients and their weighted sum; it forms the gradients themselves only
if that is cheapest or somebody needs them. Shapes: B examples, T positions of an example,
k inputs, o outputs.

Two ways to the squared norm of ``G_b = D_b^T X_b``, with X (B, T, k) and D (B, T, o): form
``G_b`` (T k o multiplications), or take the *ghost norm* ``<X_b X_b^T, D_b D_b^T>``
(T^2 (k + o); Goodfellow 2015, arXiv:1510.01799, for T = 1; Li et al. 2022,
arXiv:2110.05679, for T > 1).

A ghost norm is a difference of large numbers where positions cancel. Examples for which it
lost digits (:data:`CANCELLATION`) or left the range of float32 are computed again,
directly and in float64, so that rounding cannot hide an influence from clipping.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cenacle.training.privacy.outside import Waiting, weighted_sum
from cenacle.training.privacy.precision import upper_ghost

__all__ = [
    "CANCELLATION",
    "EmbeddingUse",
    "Formed",
    "Outer",
    "Tied",
    "Use",
    "mask_rows",
    "merge",
    "repair_ghost",
    "scale_rows",
]

CANCELLATION = 0.02
"""A ghost norm below this share of the sum of its positions' squared norms is not trusted."""

_RANGE = 1e16  # squared norms beyond it may have partners that underflowed float32
_KEEP_BYTES = 1 << 26  # per-example gradients of one use that may wait for the clip factors
_SOME = 4  # gradients formed at a time to be clipped at once: few enough for the cache
_STREAM = 24  # multiplications that cost as much as reading an element of those twice
_STREAM_SIZE = 1 << 20  # elements of a gradient that the cache can hold
_GHOST_CHUNK = 1 << 22  # elements of a Gram matrix in work at a time


class Use(ABC):
    """B per-example gradients of one parameter, from one place in the model."""

    examples: int
    device: torch.device
    low = False  # norms may be upper bounds from bfloat16 products

    @property
    def streams(self) -> bool:
        """Whether :meth:`clipped` never holds the gradients of all examples, as norms would."""
        return False

    def prepare(self) -> None:
        """Do now what is cheaper while the output's gradient is in the cache."""
        return

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Squared norms, float64 (B,). Never below the truth by more than rounding."""

    @abstractmethod
    def per_example(self) -> Tensor:
        """The gradients themselves, (B, *shape) in the parameter's precision."""

    @abstractmethod
    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        """``sum_b factors[b] G_b``, of the parameter's shape.

        Args:
            factors: (B,) float32 or float64.
            masked: some factors are zero because their gradients may be NaN or infinite;
                such examples contribute exactly nothing.
        """

    def clipped(
        self, others: Tensor, factors_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum, and its factors (B,), where they depend on these norms too.

        Args:
            others: (B,) squared norms of what is clipped together with this.
            factors_of: from squared norms (n,) of n examples to their factors.
        """
        factors = factors_of(others + self.square_norms())
        return self.weighted(factors, masked=bool((factors == 0).any())), factors


def scale_rows(rows: Tensor, factors: Tensor, *, masked: bool) -> Tensor:
    """``factors[b] * rows[b]``, with exact zeros where a factor is zero."""
    shaped = factors.to(rows.dtype).view(-1, *(1,) * (rows.dim() - 1))
    scaled = rows * shaped
    return torch.where(shaped == 0, 0, scaled) if masked else scaled


def mask_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Zeros in the rows whose factor is zero, whatever stood there."""
    return torch.where(factors.view(-1, *(1,) * (rows.dim() - 1)) == 0, 0, rows)


def repair_ghost(
    squares: Tensor, trace: Tensor, largest: Tensor, exact: Callable[[int], Tensor]
) -> Tensor:
    """Replace ghost norms that rounding may have spoilt.

    Args:
        squares: (B,) ghost norms.
        trace: (B,) sums over positions of |x|^2 |d|^2.
        largest: (B,) the largest squared norm of any row of either factor.
        exact: gives the squared norm of one example, directly and in float64.
    """
    squares = squares.double()
    doubtful = ~((squares >= CANCELLATION * trace.double()) & (largest < _RANGE))
    if bool(doubtful.any()):
        for example in doubtful.nonzero().flatten().tolist():
            squares[example] = exact(example)
    return squares


class Formed(Use):
    """Gradients that exist: (B, *shape)."""

    def __init__(self, gradients: Tensor) -> None:
        if gradients.dtype in (torch.bfloat16, torch.float16):
            gradients = gradients.float()  # factors and sums are not to be rounded to their type
        self.gradients = gradients
        self.examples = gradients.shape[0]
        self.device = gradients.device

    def square_norms(self) -> Tensor:
        flat = self.gradients.reshape(self.examples, -1)
        return torch.linalg.vector_norm(flat, dim=1).double().square()  # type: ignore[no-any-return]

    def per_example(self) -> Tensor:
        return self.gradients

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        flat = self.gradients.reshape(self.examples, -1)
        if masked:
            flat = mask_rows(flat, factors)
        return (factors.to(flat.dtype) @ flat).view(self.gradients.shape[1:])


class Outer(Use):
    """``G_b = D_b^T X_b`` (o, k), or its transpose where the parameter is stored so."""

    def __init__(
        self, x: Tensor, d: Tensor, *, transposed: bool = False, waiting: Waiting | None = None
    ) -> None:
        """Take X (B, T, k) and D (B, T, o); ``waiting``, if workers have X."""
        kind = torch.float64 if d.dtype == torch.float64 else torch.float32
        self.x = x.to(kind)
        self.d = d.to(kind)
        self.transposed = transposed
        self.waiting = waiting
        self.examples = x.shape[0]
        self.device = x.device
        self._formed: Formed | None = None
        self._squares: Tensor | None = None

    def flipped(self) -> Outer:
        """The same gradients, transposed."""
        other = Outer(self.x, self.d, transposed=not self.transposed, waiting=self.waiting)
        other.low = self.low
        return other

    def _cheaper_formed(self) -> bool:
        (_, t, k), o = self.x.shape, self.d.shape[2]
        return t * k * o <= t * t * (k + o)

    @property
    def streams(self) -> bool:
        """Formed in the cache, clipped and added, where a ghost norm would cost more."""
        (_, t, k), o = self.x.shape, self.d.shape[2]
        cheaper = _STREAM * k * o < t * t * (k + o) and k * o <= _STREAM_SIZE
        return cheaper and self.examples > 0 and t > 1

    def clipped(
        self, others: Tensor, factors_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not self.streams:
            return super().clipped(others, factors_of)
        left, right = (self.x, self.d) if self.transposed else (self.d, self.x)
        total: Tensor | None = None
        factors = []
        for i in range(0, self.examples, _SOME):
            part = Formed(left[i : i + _SOME].mT @ right[i : i + _SOME])
            factors.append(factors_of(others[i : i + _SOME] + part.square_norms()))
            added = part.weighted(factors[-1], masked=bool((factors[-1] == 0).any()))
            total = added if total is None else total.add_(added)
        assert total is not None
        return total, torch.cat(factors)

    def square_norms(self) -> Tensor:
        self._squares = self._square_norms()
        return self._squares

    def _square_norms(self) -> Tensor:
        b, t, _ = self.x.shape
        if t == 0:
            return torch.zeros(b, dtype=torch.float64, device=self.device)
        if t == 1:
            x2 = torch.linalg.vector_norm(self.x[:, 0], dim=1, dtype=torch.float64)
            d2 = torch.linalg.vector_norm(self.d[:, 0], dim=1, dtype=torch.float64)
            return (x2 * d2).square()  # type: ignore[no-any-return]
        if self._cheaper_formed():
            formed = Formed(self.per_example())
            squares = formed.square_norms()
            if formed.gradients.numel() * formed.gradients.element_size() <= _KEEP_BYTES:
                self._formed, self.waiting = formed, None
            return squares
        chunk = max(1, _GHOST_CHUNK // (t * t))
        parts = [
            self._ghost(self.x[i : i + chunk], self.d[i : i + chunk], i) for i in range(0, b, chunk)
        ]
        return torch.cat(parts)

    def _ghost(self, x: Tensor, d: Tensor, first: int) -> Tensor:
        if self.low and x.dtype == torch.float32:
            found = upper_ghost(x, d)
            if found is not None:
                bounds, largest = found
                return repair_ghost(bounds, 0 * bounds, largest, lambda i: self._exact(first + i))
        gx, gd = x @ x.mT, d @ d.mT
        dx, dd = gx.diagonal(dim1=1, dim2=2), gd.diagonal(dim1=1, dim2=2)
        trace = (dx * dd).sum(1)
        largest = torch.maximum(dx.amax(1), dd.amax(1))
        squares = gx.mul_(gd).sum((1, 2))
        return repair_ghost(squares, trace, largest, lambda i: self._exact(first + i))

    def _exact(self, example: int) -> Tensor:
        return (self.d[example].double().mT @ self.x[example].double()).square().sum()

    def per_example(self) -> Tensor:
        if self._formed is not None:
            return self._formed.gradients
        left, right = (self.x, self.d) if self.transposed else (self.d, self.x)
        return left.mT @ right

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        if self._formed is not None:
            return self._formed.weighted(factors, masked=masked)
        if self.waiting is not None and not masked:
            found = weighted_sum(self.waiting, self.d.flatten(0, 1), factors, self._squares)
            if found is not None:
                return found.t() if self.transposed else found
        x, d = self.x, self.d
        if masked:
            x = mask_rows(x, factors)
        if x.shape[2] < d.shape[2]:
            x, d = (
                scale_rows(x, factors, masked=False),
                mask_rows(d, factors) if masked else d,
            )
        else:
            d = scale_rows(d, factors, masked=masked)
        x, d = x.reshape(-1, x.shape[2]), d.reshape(-1, d.shape[2])
        return x.mT @ d if self.transposed else d.mT @ x


class EmbeddingUse(Use):
    """Rows ``ids`` (B, T) of a table (V, e), with output gradients D (B, T, e)."""

    def __init__(self, ids: Tensor, d: Tensor, rows: int, padding: int | None) -> None:
        kind = torch.float64 if d.dtype == torch.float64 else torch.float32
        d = d.to(kind)
        if padding is not None:
            d = d.masked_fill((ids == padding).unsqueeze(2), 0)
        self.ids, self.d, self.rows = ids, d, rows
        self.examples = ids.shape[0]
        self.device = d.device

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Gradients summed over equal ids of an example: (B, T, e), and which row they are of."""
        ordered, order = self.ids.sort(dim=1)
        fresh = torch.ones_like(ordered)
        fresh[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(fresh.dtype)
        place = fresh.cumsum(1) - 1
        source = self.d.gather(1, order.unsqueeze(2).expand_as(self.d))
        summed = torch.zeros_like(self.d)
        summed.scatter_add_(1, place.unsqueeze(2).expand_as(self.d), source)
        return summed, ordered

    def square_norms(self) -> Tensor:
        if self.ids.shape[1] == 0:
            return torch.zeros(self.examples, dtype=torch.float64, device=self.device)
        return Formed(self._gathered()[0]).square_norms()

    def per_example(self) -> Tensor:
        b, _, e = self.d.shape
        out = torch.zeros(b, self.rows, e, dtype=self.d.dtype, device=self.device)
        return out.scatter_add_(1, self.ids.unsqueeze(2).expand_as(self.d), self.d)

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        scaled = scale_rows(self.d, factors, masked=masked)
        out = torch.zeros(self.rows, self.d.shape[2], dtype=self.d.dtype, device=self.device)
        return out.index_add_(0, self.ids.flatten(), scaled.flatten(0, 1))


class Tied(Use):
    """A table that is both embedding and output layer: the norm of the sum of both gradients.

    ``|E + L|^2 = |E|^2 + |L|^2 + 2 <E, L>``, and with ``L = D^T X`` the inner product is
    ``sum_{s,t} D[s, id_t] <X_s, e_t>``: no gradient of the table's size is formed.
    """

    def __init__(self, table: EmbeddingUse, output: Outer) -> None:
        self.table, self.output = table, output
        self.examples = table.examples
        self.device = table.device

    def square_norms(self) -> Tensor:
        table, output = self.table, self.output
        own = table.square_norms() + output.square_norms()
        ids = table.ids.unsqueeze(1).expand(-1, output.d.shape[1], -1)
        cross = (output.d.gather(2, ids) * (output.x @ table.d.mT)).sum((1, 2)).double()
        squares = own + 2 * cross
        doubtful = ~(squares >= CANCELLATION * own)
        if bool(doubtful.any()):
            for i in doubtful.nonzero().flatten().tolist():
                full = output.d[i].double().mT @ output.x[i].double()
                full.index_add_(0, table.ids[i], table.d[i].double())
                squares[i] = full.square().sum()
        return squares

    def per_example(self) -> Tensor:
        return self.table.per_example() + self.output.per_example()

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        return self.table.weighted(factors, masked=masked) + self.output.weighted(
            factors, masked=masked
        )


def merge(uses: Sequence[Use]) -> Use:
    """One use for a parameter that is used at several places: gradients add before the norm."""
    if len(uses) == 1:
        return uses[0]
    outers = [u for u in uses if isinstance(u, Outer)]
    tables = [u for u in uses if isinstance(u, EmbeddingUse)]
    if len({u.transposed for u in outers}) <= 1 and len(outers) + len(tables) == len(uses):
        outer = table = None
        if outers:
            outer = Outer(
                torch.cat([u.x for u in outers], 1),
                torch.cat([u.d for u in outers], 1),
                transposed=outers[0].transposed,
                waiting=outers[0].waiting if len(outers) == 1 else None,
            )
            outer.low = outers[0].low
        if tables:
            table = EmbeddingUse(
                torch.cat([u.ids for u in tables], 1),
                torch.cat([u.d for u in tables], 1),
                tables[0].rows,
                None,
            )
        if outer is None or table is None:
            found = outer or table
            assert found is not None
            return found
        if not outer.transposed:
            return Tied(table, outer)
    total = uses[0].per_example().clone()
    for use in uses[1:]:
        total += use.per_example()
    return Formed(total)
