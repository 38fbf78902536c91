"""What is known of operands that were contracted while they were written."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Final

import torch

from cenacle.offload.matrix_passes import COUNT, Asked, MatrixSketch, compiled_matrices
from cenacle.offload.plain_passes import Sketch

__all__ = ["Sketches"]

_FEW: Final = 64
_BATCH: Final = 3
"""Dimensions of a batch of matrices."""


class Sketches:
    """Sketches by the very tensors that they are of, for as long as these live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Sketch | MatrixSketch]] = {}
        self._most = _FEW

    def keep(self, operand: torch.Tensor, sketch: Sketch | MatrixSketch) -> None:
        if len(self._known) >= self._most:
            for key in [key for key, (ref, _) in self._known.items() if ref() is None]:
                del self._known[key]
            self._most = max(_FEW, 2 * len(self._known))
        self._known[operand.data_ptr()] = weakref.ref(operand), sketch

    def find(self, operand: torch.Tensor) -> Sketch | MatrixSketch | None:
        """None: it is another tensor, in the same memory or not."""
        if operand.device.type != "cpu":
            return None
        ref, found = self._known.get(operand.data_ptr(), (None, None))
        known = None if ref is None else ref()
        if known is None or known.shape != operand.shape or known.dtype != operand.dtype:
            return None
        return found

    def new_matrix(
        self, operand: torch.Tensor, asked: Asked, signs: Callable[..., torch.Tensor]
    ) -> MatrixSketch | None:
        """For what can be contracted of ``operand`` while it is written; None: nothing."""
        if (
            operand.dtype != torch.float32
            or operand.dim() > _BATCH
            or not operand.numel()
            or not compiled_matrices()
        ):
            return None
        *lead, rows, cols = operand.shape
        found = MatrixSketch(math.prod(lead), rows, cols)
        if "left" in asked.sides:
            found.lefts = signs(COUNT, rows)
        if "right" in asked.sides:
            found.rights = signs(COUNT, cols)
        if asked.along is not None:
            first = self.matrix(asked.along[0])
            if first is not None and first.meets(found, asked.along[1]):
                found.along = first, asked.along[1]
        if asked.across is not None:
            first = self.matrix(asked.across)
            if first is not None and first.right is not None and first.same_rows(found):
                found.across = first
        if not (asked.sides or found.along or found.across):
            return None
        self.keep(operand, found)
        return found

    def image(self, operand: torch.Tensor) -> Sketch | None:
        found = self.find(operand)
        return found if isinstance(found, Sketch) else None

    def matrix(self, operand: torch.Tensor) -> MatrixSketch | None:
        found = self.find(operand)
        return found if isinstance(found, MatrixSketch) else None
