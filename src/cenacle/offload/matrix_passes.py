"""One pass over memory for a matrix and the contractions that its products' checks need.

A check of Y = A B compares Y r with A (B r). Of two operands one is written first: it is
contracted with a secret, and the other one, when it is written, with what came of that. So when
a product is asked for, all that can be known of its result through the operands is known, and
nothing was read for it. The result is contracted while it is read.

============================  ==================  ======================  ====================
product, as checked           the first operand   the second one          the result
============================  ==================  ======================  ====================
A B (B written before A)      B r: ``right``      A (B r): ``along``      Y r
A B^T (B before A)            B^T r: ``left``     A (B^T r): ``along``    Y r
A^T B (B before A)            B r: ``right``      A^T (B r): ``across``   Y r
============================  ==================  ======================  ====================

So a dense layer's weight is contracted from both sides, for the forward product and for the input
gradient; its input with what came of the weight, and with a secret for the weight gradient; the
gradient of its output with what came of the weight, and of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch

from cenacle.errors import InputError
from cenacle.offload.kernels import TALL, Indices, Scales, check_planes

__all__ = [
    "COUNT",
    "Asked",
    "MatrixSketch",
    "MatrixTally",
    "Side",
    "blind_matrix",
    "compiled_matrices",
    "unblind_matrix",
]

COUNT: Final = 2
"""Vectors of each kind; verifiers with another number of repetitions read operands again."""

_SCRATCH: Final = 24_576
"""Numbers that are contracted and then moved: both must find them in the inner caches."""

Side = Literal["left", "right"]
Array = np.ndarray[Any, np.dtype[Any]]


@cache
def compiled_matrices() -> Any:
    """The module of compiled passes over matrices, or None where numba is not installed."""
    try:
        from cenacle.offload import compiled_matrices  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled_matrices


class Asked(NamedTuple):
    """What the checks of a matrix's products will ask for.

    Attributes:
        sides: contract with a secret, for products with operands that are written later.
        along: an operand written before, and the side from which it was contracted.
        across: an operand written before, contracted from its right.
    """

    sides: tuple[Side, ...] = ()
    along: tuple[torch.Tensor, Side] | None = None
    across: torch.Tensor | None = None


@dataclass
class MatrixSketch:
    """Matrices (batch, rows, columns) contracted while they were written; all in their order.

    Attributes:
        lefts, rights: the secrets (R, rows) and (R, columns), float64, if asked for.
        left, right: the transposed matrices times ``lefts``, (batch, columns, R); the matrices
            times ``rights``, (batch, rows, R).
        along: another operand, and its side; ``after``: the matrices times that, (batch, rows, R).
        across: another operand; ``over``: the transposed matrices times its ``right``,
            (batch, columns, R).
        row_squares, col_squares: (batch, rows) and (batch, columns), float64: sums of squares.
        energies: (2, batch, R): the same with the squares of ``lefts`` and ``rights``.
        extreme: numbers were too large or small for these.
    """

    batch: int
    rows: int
    cols: int
    lefts: torch.Tensor | None = None
    rights: torch.Tensor | None = None
    along: tuple[MatrixSketch, Side] | None = None
    across: MatrixSketch | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    after: torch.Tensor | None = None
    over: torch.Tensor | None = None
    row_squares: torch.Tensor = field(init=False)
    col_squares: torch.Tensor = field(init=False)
    energies: torch.Tensor = field(init=False)
    extreme: bool = False

    def secret(self, side: Side) -> torch.Tensor | None:
        return self.lefts if side == "left" else self.rights

    def contracted(self, side: Side) -> torch.Tensor | None:
        return self.left if side == "left" else self.right

    def meets(self, other: MatrixSketch, side: Side) -> bool:
        """Whether rows of ``other`` can be multiplied with what this is contracted to."""
        found = self.contracted(side)
        return (
            not self.extreme
            and found is not None
            and found.shape[1] == other.cols
            and self.batch in {1, other.batch}
        )

    def same_rows(self, other: MatrixSketch) -> bool:
        return not self.extreme and (self.batch, self.rows) == (other.batch, other.rows)

    def energy(self, side: Side) -> torch.Tensor:
        """Squared norm with the squares of a secret as weights: (batch, R), float64."""
        return self.energies[0 if side == "left" else 1]


@dataclass
class MatrixTally:
    """A result (batch, rows, columns) contracted while it is read.

    Attributes:
        r: the secret (R, columns), or (R, rows) if ``transposed``, float64.
        each: rows of one matrix.
        found: (batch, rows, R), or (batch, columns, R): what :func:`unblind_matrix` found.
    """

    r: torch.Tensor
    each: int
    transposed: bool
    found: torch.Tensor | None = None


def blind_matrix(
    src: torch.Tensor,
    dst: torch.Tensor,
    rows: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    sketch: MatrixSketch,
    sums: torch.Tensor | None = None,
) -> None:
    """As :func:`cenacle.offload.kernels.move_planes` for float32, and fill ``sketch``.

    Args:
        src, dst: the matrices of a batch below each other, contiguous.
        rows: each names a row once, those of one matrix of ``src`` one after the other.
        row_scale, col_scale: +1 or -1.

    Raises:
        InputError: shapes or types do not fit, or an index is outside.
    """
    count, width = dst.shape
    order = np.arange(count, dtype=np.int32)
    source, target = src.unsqueeze(2), dst.unsqueeze(2)
    check_planes(source, target, rows, cols, row_scale, col_scale, order, None, None, sums)
    _check(sketch.batch * sketch.rows == count and sketch.cols == width == src.shape[1], dst)
    along, across = _NONE, _NONE
    if sketch.along is not None:
        other, side = sketch.along
        along = _array(other.contracted(side))
    if sketch.across is not None:
        across = _array(sketch.across.right)
    batch, high = sketch.batch, sketch.rows
    lefts, rights = (_NO_SECRET if r is None else r.numpy() for r in (sketch.lefts, sketch.rights))
    _check(
        (sketch.along is None or along.shape in {(1, width, COUNT), (batch, width, COUNT)})
        and (sketch.across is None or across.shape == (batch, high, COUNT))
        and (sketch.lefts is None or lefts.shape == (COUNT, high))
        and (sketch.rights is None or rights.shape == (COUNT, width)),
        dst,
    )
    right = np.empty((batch, high, COUNT)) if sketch.rights is not None else _NONE
    after = np.empty((batch, high, COUNT)) if sketch.along is not None else _NONE
    left = np.empty((batch, width, COUNT)) if sketch.lefts is not None else _NONE
    over = np.empty((batch, width, COUNT)) if sketch.across is not None else _NONE
    row_squares, col_squares = np.empty((batch, high)), np.empty((batch, width))
    energies = np.zeros((2, batch, COUNT))
    kernel = compiled_matrices().blind_kernel(_height(width))
    sketch.extreme = kernel(
        src.detach().numpy(), dst.detach().numpy(), rows, cols, row_scale, col_scale,
        np.zeros(width) if sums is None else sums.numpy(), _some(width),
        rights, along, lefts, across, right, after, left, over, row_squares, col_squares, energies,
    )  # fmt: skip
    sketch.right, sketch.after, sketch.left, sketch.over = (
        torch.from_numpy(found) if len(found) else None for found in (right, after, left, over)
    )
    sketch.row_squares, sketch.col_squares, sketch.energies = (
        torch.from_numpy(found) for found in (row_squares, col_squares, energies)
    )


def unblind_matrix(
    src: torch.Tensor,
    dst: torch.Tensor,
    into: Indices,
    cols: Indices,
    row_scale: Scales,
    col_scale: Scales,
    tally: MatrixTally,
    bias: torch.Tensor | None = None,
) -> None:
    """As :func:`cenacle.offload.kernels.move_planes` for float32, contracting ``src``.

    Args:
        src: a result's matrices below each other, contiguous; each element is read once, so it
            may lie in memory that others can write.
        dst: rows that ``into`` does not name stay as they are.

    Raises:
        InputError: shapes or types do not fit, or an index is outside.
    """
    count, width = src.shape
    order = np.arange(count, dtype=np.int32)
    source, target = src.unsqueeze(2), dst.unsqueeze(2)
    check_planes(source, target, order, cols, row_scale, col_scale, into, bias, None, None)
    batch = count // tally.each
    length = tally.each if tally.transposed else width
    _check(batch * tally.each == count and tally.r.shape == (COUNT, length), src)
    found = np.empty((batch, width if tally.transposed else tally.each, COUNT))
    kernel = compiled_matrices().unblind_kernel(_height(width))
    kernel(
        src.detach().numpy(), dst.detach().numpy(), into, cols, row_scale, col_scale,
        np.zeros(len(cols), np.float32) if bias is None else bias.detach().numpy(),
        tally.each, _some(width), tally.r.contiguous().numpy(), tally.transposed, found,
    )  # fmt: skip
    tally.found = torch.from_numpy(found)


_NONE: Final = np.empty((0, 0, 0))
_NO_SECRET: Final = np.empty((0, 0))


def _array(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    found: Array = tensor.numpy()
    return found


def _height(width: int) -> int:
    return 8 if width <= TALL else 4


def _some(width: int) -> int:
    return max(8, min(256, _SCRATCH // max(1, width) // 8 * 8))


def _check(fits: bool, what: torch.Tensor) -> None:
    """Compiled passes believe all of this: a wrong length would be a wild pointer."""
    if not fits:
        raise InputError(
            "matrices cannot be contracted: a shape does not fit", found=tuple(what.shape)
        )
