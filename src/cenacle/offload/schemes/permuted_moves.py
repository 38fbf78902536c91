"""Blinding and unblinding for ``permuted``: one pass over memory for each tensor.

Every tensor is moved as (rows, columns, plane), where a plane is what keeps its inner order,
e.g. an image, a filter, or a single number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import IntegrityError
from cenacle.offload.fleet import Fleet, Job, Parcel, Role
from cenacle.offload.integrity import Check
from cenacle.offload.kernels import move_planes
from cenacle.offload.schemes.permuted_keys import Frame

__all__ = ["Moves"]


class Moves:
    """Carries tensors across the border of the enclave, under keys."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
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
        gate: torch.Tensor | None = None,
    ) -> Parcel:
        value = value.detach().contiguous()
        blinded = self._fleet.empty(*value.shape, dtype=value.dtype)
        rows, cols = frame
        move_planes(
            frame.planes(value),
            frame.planes(blinded),
            rows.index,
            cols.index,
            rows.scale,
            cols.scale,
            sums=sums,
            gate=None if gate is None else frame.planes(gate.detach().contiguous()),
        )
        return self._fleet.send(blinded, role, site)

    def open(
        self,
        job: Job,
        shape: Sequence[int],
        frame: Frame,
        bias: torch.Tensor | None = None,
        *,
        relu: bool = False,
    ) -> torch.Tensor:
        """Unblind each part as it arrives, straight from where the worker put it.

        Parts of a sum are whole and are added in order; others are rows.
        """
        summed = job.product.reduce == "sum"
        found: list[torch.Tensor] = []
        each = len(frame.rows) // max(1, shape[0])  # of the frame's rows in one of the tensor
        back = frame.cols.inverse

        def consume(rows: slice, part: torch.Tensor, check: Check | None) -> None:
            expected = shape if summed else (rows.stop - rows.start, *shape[1:])
            if part.shape != torch.Size(expected):
                raise IntegrityError(
                    "a result has the wrong shape",
                    found=tuple(part.shape),
                    expected=tuple(expected),
                )
            if check is not None:  # of a copy: what is checked must be what is used
                part = check.verify(self._buffers.empty(part.shape, part.dtype).copy_(part))
            own = self._buffers.empty(shape, part.dtype) if summed or not found else found[0]
            whole = frame.planes(own)
            chosen = slice(0, None) if summed else slice(rows.start * each, rows.stop * each)
            into = frame.rows.index[chosen]
            move_planes(
                part.contiguous().view(len(into), *whole.shape[1:]),
                whole,
                np.arange(len(into), dtype=np.int32),
                back.index,
                np.reciprocal(frame.rows.scale[chosen]),
                back.scale,
                into=into,
                bias=None if bias is None else bias.detach().contiguous(),
                relu=relu,
            )
            if not found:
                found.append(own)
            elif summed:
                found[0] += own

        job.collect_fused(consume)
        return found[0]
