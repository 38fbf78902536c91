"""Blinding and unblinding for ``permuted``: one pass over memory for each tensor.

Every tensor is moved as (rows, columns, plane), where a plane is what keeps its inner order,
e.g. an image, a filter, or a single number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import IntegrityError
from cenacle.offload.fleet import Fleet, Job, Parcel, Role
from cenacle.offload.integrity import Check
from cenacle.offload.kernels import Scales, move_planes
from cenacle.offload.matrix_passes import (
    COUNT,
    Asked,
    MatrixSketch,
    MatrixTally,
    blind_matrix,
    compiled_matrices,
    unblind_matrix,
)
from cenacle.offload.passes import Sketch, Tally, blind, compiled, marks_for, unblind
from cenacle.offload.schemes.permuted_keys import Frame, Key

__all__ = ["Gate", "Moves"]

_IMAGES: Final = 4
_MANY: Final = 64
"""Positions from which on an image is contracted while it is moved."""


class Gate:
    """What is remembered of a convolution's output that had a ReLU and perhaps was pooled.

    Attributes:
        pool: the width of the images that were pooled.
        marks: of :mod:`cenacle.offload.passes`; for images of one number the output itself.
    """

    def __init__(self, pool: int | None = None) -> None:
        self.pool = pool
        self.marks: torch.Tensor


class Moves:
    """Carries tensors across the border of the enclave, under keys.

    Args:
        signs: all coefficients are +1 or -1.
    """

    def __init__(self, fleet: Fleet, *, signs: bool = True) -> None:
        self._fleet = fleet
        self._signs = signs
        self._buffers = Buffers()

    def close(self) -> None:
        """Give the buffers back."""
        self._buffers.close()

    def send(
        self,
        value: torch.Tensor,
        frame: Frame,
        role: Role,
        site: str,
        sums: torch.Tensor | None = None,
        gate: Gate | None = None,
        *,
        trains: bool = True,
        asked: Asked | None = None,
    ) -> Parcel:
        """``trains``: whether a weight gradient may be asked for with it.

        ``asked``: of a matrix, what the checks of its products ask for.
        """
        value = value.detach().contiguous()
        width = None if gate is None else gate.pool
        shape = list(value.shape)
        if width is not None:
            shape[2:] = (2 * size for size in shape[2:])
        blinded = self._fleet.empty(*shape, dtype=value.dtype)
        rows, cols = frame
        source, target = frame.planes(value), frame.planes(blinded)
        keys = (rows.index, cols.index, rows.scale, cols.scale)
        marked = gate is not None and not gate.marks.is_floating_point()
        matrix = None if asked is None or gate is not None else self._matrix(blinded, frame, asked)
        sketch = self._sketch(blinded, target, role, trains=trains)
        if matrix is not None:
            blind_matrix(source[:, :, 0], target[:, :, 0], *keys, matrix, sums)
        elif marked or sketch is not None:
            blind(
                source, target, *keys, marks=gate.marks if gate is not None and marked else None,
                width=width, sums=sums, sketch=sketch,
            )  # fmt: skip
        else:
            marks = None if gate is None else frame.planes(gate.marks)
            move_planes(source, target, *keys, sums=sums, gate=marks)
        return self._fleet.send(blinded, role, site)

    def _sketch(
        self, blinded: torch.Tensor, target: torch.Tensor, role: Role, *, trains: bool
    ) -> Sketch | None:
        """Room to contract images while they are written, for the checks of their products."""
        verifier = self._fleet.verifier
        if (
            verifier is None
            or role == "weights"
            or blinded.dim() != _IMAGES
            or target.shape[:2] != blinded.shape[:2]
            or target.shape[2] < _MANY
            or len(self._fleet.bounds(len(blinded))) > 1
            or not compiled()
        ):
            return None
        return verifier.sketch(blinded, target.shape[2], self._buffers, folded=trains)

    def _matrix(self, blinded: torch.Tensor, frame: Frame, asked: Asked) -> MatrixSketch | None:
        """The same for a matrix, or a batch of them."""
        verifier = self._fleet.verifier
        if (
            verifier is None
            or not self._signs
            or len(frame.rows) * len(frame.cols) != blinded.numel()
            or len(self._fleet.members) > 1
        ):
            return None
        return verifier.sketch_matrix(blinded, asked)

    def open(
        self,
        job: Job,
        shape: Sequence[int],
        frame: Frame,
        bias: torch.Tensor | None = None,
        gate: Gate | None = None,
        scale: Scales | None = None,
    ) -> torch.Tensor:
        """Unblind each part as it arrives, straight from where the worker put it.

        Parts of a sum are whole and are added in order; others are rows. ``scale``, one for each
        column, multiplies the result before the bias is added. With a gate the result has a ReLU
        applied, is pooled if the gate says so, and is remembered there.
        """
        summed = job.product.reduce == "sum"
        found: list[torch.Tensor] = []
        each = len(frame.rows) // max(1, shape[0])  # of the frame's rows in one of the tensor
        back = frame.cols.inverse
        if scale is not None:
            back = Key(back.index, back.scale * scale)
        bias = None if bias is None else bias.detach().contiguous()
        pooled = list(shape)
        if gate is not None and gate.pool is not None:
            pooled[2:] = (size // 2 for size in shape[2:])

        def consume(rows: slice, part: torch.Tensor, check: Check | None) -> None:
            expected = shape if summed else (rows.stop - rows.start, *shape[1:])
            if part.shape != torch.Size(expected):
                raise IntegrityError(
                    "a result has the wrong shape",
                    found=tuple(part.shape),
                    expected=tuple(expected),
                )
            tally = self._tally(part, check)
            matrix = self._matrix_tally(part, check)
            if check is not None and tally is None and matrix is None:
                # Of a copy: what is checked must be what is used.
                part = check.verify(self._buffers.empty(part.shape, part.dtype).copy_(part))
            own = self._buffers.empty(pooled, part.dtype) if summed or not found else found[0]
            whole = frame.planes(own)
            chosen = slice(0, None) if summed else slice(rows.start * each, rows.stop * each)
            into = frame.rows.index[chosen]
            source = part.contiguous().view(len(into), len(frame.cols), -1)
            row_scale = np.reciprocal(frame.rows.scale[chosen])
            marked = gate is not None and (gate.pool is not None or source.shape[2] > 1)
            if check is not None and matrix is not None:
                unblind_matrix(
                    source[:, :, 0], whole[:, :, 0], into, back.index, row_scale, back.scale,
                    matrix, bias,
                )  # fmt: skip
                assert matrix.found is not None
                check.compare(matrix.found.view(*part.shape[:-2], *matrix.found.shape[1:]))
            elif marked or tally is not None:
                if gate is not None and marked and not found:
                    plane = source.shape[2]
                    high, columns = whole.shape[:2]
                    gate.marks = marks_for(high, columns, plane, gate.pool, self._buffers)
                unblind(
                    source, whole, into, back.index, row_scale, back.scale,
                    bias=bias, relu=gate is not None,
                    marks=gate.marks if gate is not None and marked else None,
                    width=None if gate is None else gate.pool, tally=tally,
                )  # fmt: skip
                if check is not None and tally is not None:
                    check.compare(tally.totals.unsqueeze(0))
            else:
                count = np.arange(len(into), dtype=np.int32)
                move_planes(
                    source, whole, count, back.index, row_scale, back.scale,
                    into=into, bias=bias, relu=gate is not None,
                )  # fmt: skip
            if not found:
                found.append(own)
            elif summed:
                found[0] += own

        job.collect_fused(consume)
        if gate is not None and not hasattr(gate, "marks"):
            gate.marks = found[0].detach()  # not what the graph is kept alive by
        return found[0]

    @staticmethod
    def _tally(part: torch.Tensor, check: Check | None) -> Tally | None:
        """What contracts images while they are read, if they are to be contracted once."""
        vectors = None if check is None else check.vectors
        if (
            vectors is None
            or vectors.s is None
            or len(vectors.r) != 1
            or part.dtype != torch.float32
            or not part.is_contiguous()
            or not compiled()
        ):
            return None
        bundles, plane = -(-len(part) // vectors.bundle), part[0, 0].numel()
        totals = torch.zeros(bundles, plane, dtype=torch.float64)
        r = vectors.r[0].float().numpy()
        return Tally(r, vectors.s.numpy(), vectors.bundle, totals)

    @staticmethod
    def _matrix_tally(part: torch.Tensor, check: Check | None) -> MatrixTally | None:
        """What contracts matrices while they are read."""
        if (
            check is None
            or check.vectors is None
            or not check.operation.name.startswith("matmul")
            or len(check.vectors.r) != COUNT
            or part.dtype != torch.float32
            or not part.is_contiguous()
            or not part.numel()
            or not compiled_matrices()
        ):
            return None
        transposed = check.operation.name == "matmul_weight"
        return MatrixTally(check.vectors.r, part.shape[-2], transposed)

    def unblind(self, value: torch.Tensor, frame: Frame, into: torch.Tensor) -> None:
        """Into memory of the enclave, which ``value`` lies in already; of the same shape."""
        back = frame.cols.inverse
        move_planes(
            frame.planes(value),
            frame.planes(into),
            np.arange(len(frame.rows), dtype=np.int32),
            back.index,
            np.reciprocal(frame.rows.scale),
            back.scale,
            into=frame.rows.index,
        )
