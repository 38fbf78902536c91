"""Keys of the scheme ``permuted``: signed permutations, and which of them a tensor is under."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cenacle.offload.keystream import Keystream

__all__ = ["Coefficients", "Frame", "Key", "Keys", "nested", "weight_frame"]

Coefficients = Literal["signs", "general"]
_EXPONENT: Final = 3
"""General coefficients lie between 1/8 and 8, so a product's condition grows 64-fold at most,
and as powers of two they round nothing."""


@dataclass(frozen=True)
class Key:
    """A permutation with coefficients of one dimension.

    Attributes:
        index: blinded position i holds the true element ``index[i]``, int32.
        scale: times ``scale[i]``, float32, powers of two with a sign.
    """

    index: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]

    @cached_property
    def inverse(self) -> Key:
        """Undoes this one."""
        back = np.empty_like(self.index)
        back[self.index] = np.arange(len(back), dtype=np.int32)
        return Key(back, np.reciprocal(self.scale)[back])

    @cached_property
    def dual(self) -> Key:
        """The same places, reciprocal coefficients: what meets this key in a product cancels.

        Signs are their own reciprocals, so then it is the key itself.
        """
        return Key(self.index, np.reciprocal(self.scale))

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def identity(cls) -> Key:
        """Of a dimension of one that stands for none."""
        return cls(np.zeros(1, np.int32), np.ones(1, np.float32))


class Frame(NamedTuple):
    """How a tensor is laid out for blinding, and with which keys."""

    rows: Key
    cols: Key

    def planes(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` (contiguous) as (rows, columns, plane); a view."""
        size = len(self.rows) * len(self.cols)
        plane = value.numel() // size if size else 1
        return value.view(len(self.rows), len(self.cols), plane)


class Keys:
    """Draws keys.

    Args:
        keystream: where they come from.
        coefficients: ``signs``, or ``general``: powers of two with signs.
    """

    def __init__(self, keystream: Keystream, coefficients: Coefficients) -> None:
        self._keystream = keystream
        self._general = coefficients == "general"

    def one(self, size: int) -> Key:
        """Of a dimension of ``size`` elements."""
        return Key(self._keystream.permutation(size), self._scale(size))

    def pair(self, inner: int, outer: int, groups: int) -> tuple[Key, Key]:
        """Of input and output features. Channels change places within their group, and groups
        as wholes, together in the input and the output."""
        if groups == 1:
            return self.one(inner), self.one(outer)
        order = self._keystream.permutation(groups)
        return self._grouped(order, inner), self._grouped(order, outer)

    def _grouped(self, order: npt.NDArray[np.int32], size: int) -> Key:
        each = size // len(order)
        within = self._keystream.permutations(len(order), each)
        return Key((order[:, None] * each + within).ravel(), self._scale(size))

    def _scale(self, size: int) -> npt.NDArray[np.float32]:
        signs = self._keystream.signs(size)
        if self._general:
            signs *= self._keystream.powers(size, _EXPONENT)
        return signs


def nested(outer: Key, inner: Key) -> Key:
    """The key of rows within matrices, counted through."""
    index = outer.index[:, None] * len(inner) + inner.index
    return Key(index.ravel(), (outer.scale[:, None] * inner.scale).ravel())


def weight_frame(inner: Key, outer: Key, groups: int, flipped: bool) -> Frame:
    """The frame of a weight (out, in / groups, ...), or ``flipped`` (in, out)."""
    if groups == 1:
        return Frame(inner.dual, outer) if flipped else Frame(outer, inner.dual)
    # Filters as one row: which input channel a column is depends on the row's group.
    each, out_each = len(inner) // groups, len(outer) // groups
    within = np.repeat(inner.index.reshape(groups, each) % each, out_each, axis=0)
    scale = np.repeat(inner.dual.scale.reshape(groups, each), out_each, axis=0)
    index = (outer.index[:, None] * each + within).astype(np.int32)
    return Frame(Key.identity(), Key(index.ravel(), (outer.scale[:, None] * scale).ravel()))
