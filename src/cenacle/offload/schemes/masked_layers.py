"""What the scheme ``masked`` knows of a layer: its integers, its check, the masks it needs."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from cenacle.accelerators.protocol import Operation
from cenacle.offload.field import FixedWeight
from cenacle.offload.fleet import Parcel
from cenacle.offload.maps import Product
from cenacle.offload.mask_store import MaskPlan
from cenacle.offload.schemes.base import Site

__all__ = ["Check", "Layer", "Traced", "digest_of", "plan_for", "product_of"]


@dataclass
class Check:
    """Freivalds' check of one sample's product: <Y, s x r> = <X, z> with z = W^T (s x r).

    The vectors are secret and uniform, so a wrong Y passes with probability 2 / p.
    """

    r: NDArray[np.uint32]
    s: NDArray[np.uint32]
    z: NDArray[np.uint32]
    shape: tuple[int, ...]  # of one row of y


@dataclass
class Layer:
    """One weight, at one version."""

    key: tuple[int, int]
    fixed: FixedWeight
    weight: Parcel
    checks: dict[tuple[int, ...], Check] = field(default_factory=dict)


@dataclass
class Traced:
    """What a layer was asked for while masks are being prepared."""

    site: Site
    shape: tuple[int, ...]
    layer: Layer
    rows: list[int] = field(default_factory=list)


def product_of(site: Site) -> Product:
    """The layer's forward map, in the field."""
    plain = site.map.forward()
    operation = Operation(f"{plain.operation.name}_mod", plain.operation.attributes)
    return Product(operation, plain.rows, plain.reduce)


def digest_of(fixed: FixedWeight, shape: tuple[int, ...]) -> str:
    return hashlib.sha256(fixed.digest + repr(tuple(shape)).encode()).hexdigest()


def plan_for(name: str, traced: Traced, samples: int) -> MaskPlan:
    """Masks for one sample: all rows that a sample makes of this layer, sealed call by call."""
    even = all(rows % samples == 0 for rows in traced.rows)
    rows = -(-sum(traced.rows) // samples)
    record = math.gcd(*(r // samples for r in traced.rows)) if even else 1
    one = torch.empty((1, *traced.shape), device="meta", dtype=torch.float64)
    weight = traced.layer.fixed.values.to("meta", torch.float64)
    size = traced.site.map.forward().compute(one, weight).numel()
    found = digest_of(traced.layer.fixed, traced.shape)
    return MaskPlan(name, math.prod(traced.shape), size, rows, record, found)
