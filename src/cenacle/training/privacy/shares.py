"""The gradient of a step in orthogonal parts, and the parts that are clipped together.

Squared norms of the parts add. What waits for clip factors is kept apart from what need not:
with per-layer clipping a part is formed, clipped and summed a few examples at a time, and
the small parts of all layers (biases, normalization) go through in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cenacle.training.privacy.clipping import clip_factors
from cenacle.training.privacy.gradients import Formed, Use
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Derived

__all__ = [
    "Share",
    "Sums",
    "are_small",
    "clip_groups",
    "clip_together",
    "join_small",
    "shares_of",
    "square_norms",
]

_SMALL = 1 << 13  # elements of a gradient of one example that may be copied to join others
_BEYOND = 1e38  # squared norms that float32 cannot hold: the factor would be subnormal

Sums = dict[str, Tensor]
Back = Callable[[list[Tensor]], list[Tensor]]


class Share:
    """Part of the gradient whose squared norm adds to the others'."""

    def __init__(self, names: Sequence[str], uses: Sequence[Use], back: Back | None = None) -> None:
        self.names, self.uses, self.back = names, list(uses), back

    def square_norms(self) -> Tensor:
        """Squared norms, float64 (B,)."""
        squares = [use.square_norms() for use in self.uses]
        return squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)

    def weighted(self, factors: Tensor, *, masked: bool) -> Sums:
        """The sum over examples, by parameter; the uses are given up."""
        totals = [use.weighted(factors, masked=masked) for use in self.uses]
        return self._named(totals)

    def clipped(self, others: Tensor, clip: float) -> tuple[Sums, Tensor]:
        """The same where ``others`` are the squared norms of all the rest, and the factors."""
        (use,) = self.uses
        total, factors = use.clipped(others, lambda squares: clip_factors(squares, clip))
        return self._named([total]), factors

    def _named(self, totals: list[Tensor]) -> Sums:
        self.uses = []
        if self.back is not None:
            totals = self.back(totals)
        return dict(zip(self.names, totals, strict=True))


class _Joined(Share):
    """Small gradients of several parameters as the columns of one matrix (B, n)."""

    def __init__(self, shares: Sequence[Share]) -> None:
        each = [use.per_example() for share in shares for use in share.uses]
        self._shapes = [g.shape[1:] for g in each]
        joined = torch.cat([g.reshape(g.shape[0], -1) for g in each], 1)
        super().__init__([name for share in shares for name in share.names], [Formed(joined)])

    def _named(self, totals: list[Tensor]) -> Sums:
        self.uses = []
        parts = torch.split(totals[0], [shape.numel() for shape in self._shapes])
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self._shapes, strict=True)
        }


def are_small(shares: Sequence[Share]) -> bool:
    """Whether the shares are small gradients of one type that exist already."""
    return all(map(_small, shares)) and len(set(map(_kind, shares))) <= 1


def _small(share: Share) -> bool:
    return share.back is None and all(
        isinstance(use, Formed) and use.gradients[0].numel() <= _SMALL for use in share.uses
    )


def _kind(share: Share) -> tuple[torch.dtype, torch.device]:
    gradient = share.uses[0].per_example()
    return gradient.dtype, gradient.device


def join_small(shares: Sequence[Share]) -> list[Share]:
    """The same shares, with small ones of a type joined: one operation instead of many."""
    kinds: dict[Any, list[Share]] = {}
    out = []
    for share in shares:
        if _small(share):
            kinds.setdefault(_kind(share), []).append(share)
        else:
            out.append(share)
    out.extend(found[0] if len(found) == 1 else _Joined(found) for found in kinds.values())
    return out


def square_norms(shares: Iterable[Share], examples: int) -> Tensor:
    """Squared norms over all shares, float64 (B,)."""
    total = torch.zeros(examples, dtype=torch.float64)
    for share in shares:
        total = total.to(share.uses[0].device) + share.square_norms()
    return total


def clip_together(shares: Sequence[Share], examples: int, clip: float) -> Sums:
    """Clipped sums of one group of parameters."""
    sums: Sums = {}
    if not shares:
        return sums
    *rest, last = sorted(shares, key=lambda share: len(share.uses) == 1 and share.uses[0].streams)
    others = square_norms(rest, examples).to(last.uses[0].device)
    if len(last.uses) == 1:
        sums, factors = last.clipped(others, clip)
    else:
        factors = clip_factors(others + last.square_norms(), clip)
        rest.append(last)
    masked = bool((factors == 0).any()) if rest else False
    for share in rest:
        sums.update(share.weighted(factors, masked=masked))
    return sums


def clip_groups(groups: Sequence[Sequence[Share]], examples: int, clip: float) -> Sums:
    """Clipped sums of several groups of small shares, each group by itself, all at once."""
    kinds: dict[Any, list[Sequence[Share]]] = {}
    for group in groups:
        if group:
            kinds.setdefault(_kind(group[0]), []).append(group)
    sums: Sums = {}
    for same in kinds.values():
        sums.update(_clip_alike(same, examples, clip))
    return sums


def _clip_alike(groups: Sequence[Sequence[Share]], examples: int, clip: float) -> Sums:
    names, shapes, columns, owners = [], [], [], []
    for place, group in enumerate(groups):
        for share in group:
            gradient = share.uses[0].per_example()
            names.append(share.names[0])
            shapes.append(gradient.shape[1:])
            columns.append(gradient.reshape(examples, -1))
            owners += [place] * columns[-1].shape[1]
    joined = torch.cat(columns, 1)
    which = torch.tensor(owners, device=joined.device)
    squares = torch.zeros(examples, len(groups), dtype=torch.float64, device=joined.device)
    squares.index_add_(1, which, joined.double().square())
    squares.masked_fill_(squares > _BEYOND, torch.inf)
    factors = clip_factors(squares, clip)[:, which]
    if bool((factors == 0).any()):
        joined = torch.where(factors == 0, 0, joined)
    total = (joined * factors.to(joined.dtype)).sum(0)
    parts = torch.split(total, [shape.numel() for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def shares_of(tape: Tape, names: Sequence[str]) -> list[Share]:
    """The gradient of some parameters in parts that are orthogonal."""
    wanted = set(names)
    chosen = [d for d in tape.derived if d.sources & wanted and (d.uses or d.merged)]
    counts: dict[str, int] = {}
    for d in chosen:
        for source in d.sources:
            counts[source] = counts.get(source, 0) + 1
    shares = []
    for name in names:
        target = tape.targets[name]
        if name in counts:
            continue
        use = target.combined()
        if use is not None:
            shares.append(Share([name], [use]))
            target.merged = None  # the share alone decides how long the gradient stays
    tangled = []
    for d in chosen:
        (first, *more) = d.sources
        alone = not more and counts[first] == 1 and not tape.targets[first].uses
        if alone and d.isometric:
            use = d.combined()
            assert use is not None
            shares.append(Share([first], [use], _back(tape, d, first)))
        else:
            tangled.append(d)
    if tangled:
        sources = sorted({s for d in tangled for s in d.sources})
        each = tape.pull_back_each(tangled, sources)
        for name, gradients in each.items():
            direct = tape.targets[name].combined()
            total = gradients if direct is None else gradients + direct.per_example()
            if name in wanted:
                shares.append(Share([name], [Formed(total)]))
    return shares


def _back(tape: Tape, derived: Derived, name: str) -> Back:
    return lambda totals: [tape.pull_back(totals, [derived], name)]
