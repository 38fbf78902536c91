"""Bilinear maps: what a dense layer, a convolution and attention's products have in common.

Each map y = B(x, w) is linear in both operands, and so are its two gradients. A scheme sees
maps only: it blinds operands, has one of the three products computed, and unblinds.

Shapes: ``x`` and ``y`` have samples (rows) first. A dense map's rows are (batch, features);
a convolution's (batch, channels, *space); a matrix product's (batch, m, k) and (batch, k, n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation

__all__ = ["Convolution", "Dense", "LinearMap", "MatrixProduct", "Product"]


@dataclass(frozen=True)
class Product:
    """One computation for accelerators, and how it divides over several of them.

    Attributes:
        operation: what each accelerator computes.
        rows: for each operand, whether its first dimension is divided; the others are needed
            whole by everyone.
        reduce: ``concat``: the parts are rows of the result. ``sum``: they are added up.
        unchecked: whoever asks for it checks the result.
    """

    operation: Operation
    rows: tuple[bool, ...]
    reduce: Literal["concat", "sum"] = "concat"
    unchecked: bool = False

    def compute(self, *operands: torch.Tensor) -> torch.Tensor:
        """The result, computed here and now."""
        return execute(self.operation, operands)


class LinearMap(ABC):
    """A bilinear map with its geometry; immutable and hashable."""

    rank: int
    """Dimensions of ``x``."""

    @abstractmethod
    def forward(self) -> Product:
        """y from (x, w)."""

    @abstractmethod
    def input_gradient(self, x_shape: Sequence[int]) -> Product:
        """dx from (dy, w)."""

    @abstractmethod
    def weight_gradient(self, w_shape: Sequence[int]) -> Product:
        """dw from (dy, x)."""

    @abstractmethod
    def flops(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
        """Multiplications and additions of one of the three products."""


@dataclass(frozen=True)
class Dense(LinearMap):
    """y = x w^T with x (rows, in), w (out, in), y (rows, out)."""

    rank = 2

    def forward(self) -> Product:
        return Product(Operation("matmul", {"transpose_b": True}), (True, False))

    def input_gradient(self, x_shape: Sequence[int]) -> Product:  # noqa: ARG002
        return Product(Operation("matmul"), (True, False))

    def weight_gradient(self, w_shape: Sequence[int]) -> Product:  # noqa: ARG002
        return Product(Operation("matmul", {"transpose_a": True}), (True, True), "sum")

    def flops(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
        return 2 * x_shape[0] * w_shape[0] * w_shape[1]


@dataclass(frozen=True)
class Convolution(LinearMap):
    """Cross-correlation over one or two dimensions, with x (batch, in, *space).

    Attributes:
        stride, padding, dilation: one number for each dimension of space.
        groups: as in torch; equal to the number of channels: depthwise.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rank(self) -> int:  # type: ignore[override]
        return 2 + len(self.stride)

    @property
    def _geometry(self) -> dict[str, object]:
        return {
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
        }

    def forward(self) -> Product:
        return Product(Operation("conv", self._geometry), (True, False))

    def input_gradient(self, x_shape: Sequence[int]) -> Product:
        attributes = {**self._geometry, "shape": list(x_shape[1:])}
        return Product(Operation("conv_input", attributes), (True, False))

    def weight_gradient(self, w_shape: Sequence[int]) -> Product:
        attributes = {**self._geometry, "shape": list(w_shape)}
        return Product(Operation("conv_weight", attributes), (True, True), "sum")

    def space(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> tuple[int, ...]:
        """The output's dimensions of space."""
        return tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x_shape[2:], self.padding, self.dilation, w_shape[2:], self.stride, strict=True
            )
        )

    def flops(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
        positions = torch.Size(self.space(x_shape, w_shape)).numel()
        return 2 * x_shape[0] * positions * torch.Size(w_shape).numel()


@dataclass(frozen=True)
class MatrixProduct(LinearMap):
    """y = x w for each matrix of a batch: x (batch, m, k), w (batch, k, n).

    Both operands come from the sample: there is no weight, and all three products divide
    along the batch.
    """

    rank = 3

    def forward(self) -> Product:
        return Product(Operation("matmul"), (True, True))

    def input_gradient(self, x_shape: Sequence[int]) -> Product:  # noqa: ARG002
        return Product(Operation("matmul", {"transpose_b": True}), (True, True))

    def weight_gradient(self, w_shape: Sequence[int]) -> Product:  # noqa: ARG002
        """dw = x^T dy: note the operands' order, (dy, x) as in every map."""
        return Product(Operation("matmul_weight"), (True, True))

    def flops(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> int:
        return 2 * x_shape[0] * x_shape[1] * x_shape[2] * w_shape[2]
