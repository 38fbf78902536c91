"""Products whose rounding is known, whatever precision the training around them uses.

A norm from rounded products may be too small, and a sum taken with other roundings than its
norms may be too large; either lets an example pass its clipping norm. So the engine's own
products of float32 are of float32: autocast is off, and TF32 and bfloat16 modes (which are on by
default for convolutions on CUDA) are suspended.

Norms may be taken from bfloat16 products on request. They are then *upper bounds*: with
``u = 2^-8``, the unit roundoff of bfloat16 (Higham 2002, *Accuracy and Stability of Numerical
Algorithms*, chapter 3), and rounded factors x', d' of G = D^T X, T positions,

    |G| <= |D'^T X'| + (2u' + u'^2) sum_t |x'_t| |d'_t|,    u' = u / (1 - u),

and the Gram matrices' own rounding to bfloat16 is bounded by ``(2u + u^2) sum |P Q|``, that of
accumulation in float32 over k and o terms by ``(k + o) 2^-23 (sum_t |x'_t| |d'_t|)^2``. An
over-estimate clips a little more than need be; released sums are of float32 products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["exact_products", "has_bfloat16", "upper_ghost"]

_U = 2.0**-8
_INPUT = _U / (1 - _U)
_LONGEST = 1 << 13  # inner dimension up to which float32's share stays below bfloat16's


@functools.cache
def has_bfloat16(kind: str) -> bool:
    """Whether bfloat16 products of a kind of device are made in its arithmetic units.

    Elsewhere they are emulated, slowly and with another accumulation than the bound is for.
    """
    if kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


@contextlib.contextmanager
def exact_products(kind: str) -> Iterator[None]:
    """Float32 products of a kind of device (``cpu``, ``cuda``) are of float32 within."""
    backends: Any = torch.backends
    modes: list[tuple[object, str, object]]
    if kind == "cuda":
        modes = [
            (backends.cuda.matmul, "fp32_precision", "ieee"),
            (backends.cudnn.conv, "fp32_precision", "ieee"),
            (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        ]
    else:
        modes = [
            (backends.mkldnn.matmul, "fp32_precision", "ieee"),
            (backends.mkldnn.conv, "fp32_precision", "ieee"),
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in modes]
    cast = torch.is_autocast_enabled(kind)
    try:
        for owner, name, value in modes:
            setattr(owner, name, value)
        if cast:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        if cast:
            torch.set_autocast_enabled(kind, True)
        for owner, name, old in before:
            setattr(owner, name, old)


def upper_ghost(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor] | None:
    """Upper bounds of the squared norms of ``D_b^T X_b`` from bfloat16 products.

    Args:
        x: (B, T, k) float32.
        d: (B, T, o) float32.

    Returns:
        Bounds (B,) float64, and the largest squared norm (B,) of any row; ``None`` if the
        rows are too long for the bound.
    """
    k, o = x.shape[2], d.shape[2]
    if max(k, o) > _LONGEST:
        return None
    low_x, low_d = x.bfloat16(), d.bfloat16()
    gx, gd = low_x @ low_x.mT, low_d @ low_d.mT
    dx, dd = gx.diagonal(dim1=1, dim2=2).double(), gd.diagonal(dim1=1, dim2=2).double()
    products = gx.float().mul_(gd)  # exact: 16 of 24 bits
    total = products.sum((1, 2)).double()
    mass = products.abs_().sum((1, 2)).double()
    rows = (1 + _U) ** 2 * (dx * dd).sqrt().sum(1)
    # 2^-12 is more than float32's share of the two sums.
    inner = total + (2 * _U + _U * _U + 2.0**-12) * mass + 1.1 * (k + o) * 2.0**-23 * rows.square()
    bound = inner.clamp_min(0).sqrt() + (2 * _INPUT + _INPUT**2) * rows
    return bound.square(), torch.maximum(dx.amax(1), dd.amax(1))
