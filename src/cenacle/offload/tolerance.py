"""By how much an honest worker's contraction may differ: stage 1 of ``docs/integrity.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from cenacle.offload.contractions import Expected, ExpectedProduct, compiled_sums

__all__ = ["SLACK", "Tolerance"]

SLACK: Final = 16.0
"""Statistical bound of stage 1, in standard deviations of the model's rounding error."""


class Tolerance:
    """Of one product's contractions.

    Args:
        shape, dtype: the result's.
        depth: products that are summed in one element of it.
        roundoff: unit roundoff of the worker's arithmetic.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, depth: int, roundoff: float
    ) -> None:
        elements = math.prod(shape)
        self._depth, self._elements, self._roundoff = depth, elements, roundoff
        self._wide = max(1.0, roundoff / torch.finfo(dtype).eps * 2)
        self._tiny = torch.finfo(dtype).tiny * math.sqrt(elements) * (depth + 1)

    def _summed(self, contractions: int) -> float:
        """n additions whose terms are as large as the result, and the contraction's own."""
        return (self._depth + self._elements / max(1, contractions)) / 9

    def agrees(self, found: torch.Tensor, want: Expected | ExpectedProduct) -> bool:
        """Whether every contraction is within what its own size allows; nearly always so."""
        summed = self._summed(want.value.numel())
        sums = compiled_sums()
        if sums is None:
            error = (found.double() - want.value.double()).abs()
            least = self._bound(want.scale.square(), want.value.double().square(), summed)
            return bool(((error <= least) & torch.isfinite(least)).all())
        limits = (self._roundoff, self._wide, summed, self._tiny, SLACK)
        if isinstance(want, ExpectedProduct):
            batch, m = want.rows.shape
            values = [
                t.detach().double().contiguous().view(batch, m, -1).numpy()
                for t in (found, want.value)
            ]
            factors = (want.rows.numpy(), want.energy.numpy())
            return bool(sums.beyond_product_kernel()(*values, *factors, *limits) == 0)
        if found.shape != want.value.shape:
            found = found.expand_as(want.value)
        arrays = [
            t.detach().double().contiguous().view(-1).numpy()
            for t in (found, want.value, want.scale.expand_as(want.value))
        ]
        return bool(sums.beyond_kernel()(*arrays, *limits) == 0)

    def beyond(
        self,
        found: torch.Tensor,
        want: Expected | ExpectedProduct,
        along: int,
        energy: torch.Tensor | None,
    ) -> int:
        """How many contractions are too far off, if those beside them count too.

        A single contraction may be small by chance where its summands are not; those beside it
        (in dimension ``along``), from the same secret, tell how large they are in proportion to
        their scale. ``energy``: the squares of the result, contracted with squared vectors.
        """
        value = want.value.double()
        scale, squares = want.scale.square(), value.square()
        scales = scale.expand_as(value)
        share = squares.sum(along, keepdim=True) / scales.sum(along, keepdim=True)
        summands = torch.maximum(squares, torch.nan_to_num(share, 0.0) * scales)
        if energy is not None:
            summands = torch.maximum(summands, energy.double())
        limit = self._bound(scale, summands, self._summed(value.numel()))
        wrong = ~((found.double() - value).abs() <= limit)  # NaN is wrong
        wrong |= ~torch.isfinite(limit)
        return int(wrong.sum())

    def _bound(self, scale: torch.Tensor, summands: torch.Tensor, summed: float) -> torch.Tensor:
        return SLACK * (
            self._roundoff * (scale * self._wide + summands * summed).sqrt() + self._tiny
        )
