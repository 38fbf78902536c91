"""One use of a map under ``permuted``: its three products, and the keys of all tensors in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cenacle.accelerators.protocol import Operation
from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct, Product
from cenacle.offload.matrix_passes import Asked, Side
from cenacle.offload.parcel import Parcel
from cenacle.offload.remote import Remote
from cenacle.offload.schemes.base import Needs
from cenacle.offload.schemes.permuted_keys import Frame, Key, Keys, nested, weight_frame

__all__ = [
    "Use",
    "asked_of_gradient",
    "asked_of_input",
    "asked_of_weight",
    "is_flipped",
    "plan_use",
    "y_shape",
]


@dataclass(frozen=True)
class Use:
    """One use of a map: its three products, and the frames of all tensors in them.

    ``flipped``: ``w`` is a transposed view, as in GPT-2's layers and in Q K^T. Its memory is
    blinded as it lies, and the product takes the transposition.
    """

    forward: Product
    input_gradient: Product
    weight_gradient: Product
    x: Frame
    w: Frame
    y: Frame
    flipped: bool
    x_shape: torch.Size
    w_shape: torch.Size

    @property
    def gy(self) -> Frame:
        """Of the gradient of y: reciprocal, so that rows cancel against those of x."""
        return Frame(self.y.rows.dual, self.y.cols.dual)

    @property
    def gx(self) -> Frame:
        return Frame(self.x.rows.dual, self.x.cols.dual)

    @property
    def gw(self) -> Frame:
        return Frame(self.w.rows.dual, self.w.cols.dual)


def asked_of_weight(
    map_: LinearMap, use: Use | None = None, *, trains: bool = True
) -> Asked | None:
    """How the second operand is contracted when it is written: for both of its products."""
    if isinstance(map_, Convolution):
        return None
    side = None if use is None or trains else _side(use.forward)
    return Asked(("left", "right") if side is None else (side,))


def asked_of_input(use: Use, w: Parcel | Remote | None, *, trains: bool) -> Asked | None:
    """The first one, sent after the second: for the forward product and the weight gradient."""
    side = _side(use.forward)
    if side is None or not isinstance(w, Parcel):
        return None
    return Asked(("right",) if trains else (), along=(w.value, side))


def asked_of_gradient(use: Use, w: Parcel | Remote, x: Parcel, needs: Needs) -> Asked | None:
    """The gradient of the result, for those of both operands."""
    side = _side(use.input_gradient)
    if side is None or not isinstance(w, Parcel):
        return None
    return Asked(along=(w.value, side) if needs.x else None, across=x.value if needs.w else None)


def _side(product: Product) -> Side | None:
    """From which side the second operand is contracted for the check; None: of images."""
    operation = product.operation
    if operation.name != "matmul":
        return None
    return "left" if operation.attributes.get("transpose_b") else "right"


def plan_use(
    keys: Keys,
    map_: LinearMap,
    x_shape: torch.Size,
    w_shape: torch.Size,
    inner: Key,
    outer: Key,
    *,
    flipped: bool,
) -> Use:
    """Frames for one use; samples are under keys that are drawn here.

    ``inner`` and ``outer`` belong to the input and the output features.
    """
    samples = keys.one(x_shape[0])
    forward, input_gradient = map_.forward(), map_.input_gradient(x_shape)
    weight_gradient = map_.weight_gradient(w_shape)
    if flipped:
        forward, input_gradient, weight_gradient = _flipped(map_)
    if not isinstance(map_, MatrixProduct):
        groups = map_.groups if isinstance(map_, Convolution) else 1
        x, y = Frame(samples, inner), Frame(samples, outer)
        w = weight_frame(inner, outer, groups, flipped)
    else:
        rows = nested(samples, keys.one(x_shape[1]))
        x, y = Frame(rows, inner), Frame(rows, outer)
        # Matrices of w are scaled by nothing: those of x are already.
        plain = Key(samples.index, np.ones_like(samples.scale))
        if flipped:
            w = Frame(nested(plain, outer), inner.dual)
        else:
            w = Frame(nested(plain, inner.dual), outer)
    return Use(forward, input_gradient, weight_gradient, x, w, y, flipped, x_shape, w_shape)


def is_flipped(map_: LinearMap, w: torch.Tensor) -> bool:
    return not isinstance(map_, Convolution) and not w.is_contiguous() and w.mT.is_contiguous()


def _flipped(map_: Dense | MatrixProduct | Any) -> tuple[Product, Product, Product]:
    """The three products where ``w`` is given with its last two dimensions exchanged."""
    rows = (True, not isinstance(map_, Dense))
    crossed, plain = Operation("matmul", {"transpose_b": True}), Operation("matmul")
    if isinstance(map_, Dense):
        return (
            Product(plain, rows),
            Product(crossed, rows),
            Product(Operation("matmul_weight"), (True, True), "sum"),
        )
    return (
        Product(crossed, rows),
        Product(plain, rows),
        Product(Operation("matmul", {"transpose_a": True}), (True, True)),
    )


def y_shape(map_: LinearMap, x_shape: torch.Size, w_shape: torch.Size) -> tuple[int, ...]:
    if isinstance(map_, Convolution):
        return (x_shape[0], w_shape[0], *map_.space(x_shape, w_shape))
    return (*x_shape[:-1], w_shape[-1 if isinstance(map_, MatrixProduct) else 0])
