"""Random contractions of bilinear products: the linear algebra behind Freivalds' check.

Every product that a worker computes, Y = B(a, b), is contracted with random vectors in two
ways: directly, and through its operands. The second way never forms Y. For R repetitions:

==============  ===================================================  ==========================
operation       the result                                           through the operands
==============  ===================================================  ==========================
matmul          Y r                                                  a (b r)
matmul_weight   Y^T r                                                a^T (b r)
conv            sum over b, o of s_b r_o Y[b, o, :]                  conv(sum_b s_b a_b, r b)
conv_input      sum over b, c of s_b r_c Y[b, c, :]                  the same, transposed
conv_weight     sum over o, c of r_o q_c Y[o, c, :]                  correlation of r a and q b
==============  ===================================================  ==========================

Each gives, beside the expected contraction, the scale of its rounding errors; see
:mod:`cenacle.offload.integrity` and ``docs/integrity.md``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from cenacle.accelerators.protocol import Operation
from cenacle.offload.matrices import multiply

__all__ = [
    "BUNDLE",
    "Contracted",
    "Expected",
    "ExpectedProduct",
    "Vectors",
    "bundled",
    "compiled_sums",
    "contract",
    "depth",
    "factors",
    "grouped",
    "lengths",
    "matrices",
    "result_shape",
    "secret_signs",
]

BUNDLE: Final = 8
"""Samples of a convolution that are contracted into one image."""

Entropy = Callable[[int], bytes]


@cache
def compiled_sums() -> Any:
    """The module of compiled sums, or None where numba is not installed."""
    try:
        from cenacle.offload import compiled_sums  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled_sums


def secret_signs(shape: Sequence[int], entropy: Entropy = os.urandom) -> torch.Tensor:
    """Random numbers, uniform in [-1.5, -0.5] and [0.5, 1.5], float64.

    Bounded away from zero: a wrong element cannot hide behind a small weight.
    """
    count = math.prod(shape)
    bits = np.frombuffer(entropy(4 * count), dtype="<u4")
    if (sums := compiled_sums()) is not None:
        found = np.empty(count)
        sums.signs_kernel()(bits, found)
        return torch.from_numpy(found.reshape(tuple(shape)))
    size = 0.5 + (bits >> np.uint32(1)).astype(np.float64) / 2.0**31
    signed = np.where(bits & 1, size, -size)
    return torch.from_numpy(signed.reshape(tuple(shape)))


@dataclass(frozen=True)
class Vectors:
    """The secret of one check.

    Attributes:
        r: (repetitions, features): over the features of the result (columns of a matrix
            product, rows of ``matmul_weight``, output channels of a convolution, input channels
            of its input gradient, output channels of its weight gradient).
        s: over the rows of a convolution; ones for everything else.
        q: (repetitions, input channels) of a weight gradient of a convolution.
        bundle: contracted row ``i`` holds the rows ``i * bundle`` up to ``(i + 1) * bundle``.
    """

    r: torch.Tensor
    s: torch.Tensor | None = None
    q: torch.Tensor | None = None
    bundle: int = 1

    @property
    def squared(self) -> Vectors:
        """Every weight squared: contracts squares to what a sum's roundings grow with."""
        return Vectors(
            self.r.square(),
            None if self.s is None else self.s.square(),
            None if self.q is None else self.q.square(),
            self.bundle,
        )


@dataclass(frozen=True)
class Contracted:
    """An operand that many products share, contracted once.

    Attributes:
        value: the contracted operand.
        energy: squared norm, weighted with the squares of ``r``.
    """

    value: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class Expected:
    """What :func:`contract` has to give.

    Attributes:
        value: the contraction through the operands.
        scale: broadcasts against ``value``: the root of the sum of |x|^2 |w|^2 over all that
            was contracted, with the weights of the contraction; errors are measured in it.
    """

    value: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class ExpectedProduct:
    """The same of a matrix product whose operands were contracted before.

    Attributes:
        value: (..., m, R).
        rows, energy: (batch, m) and (batch, R), float64: ``scale`` is the root of their products.
    """

    value: torch.Tensor
    rows: torch.Tensor
    energy: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        squares = self.rows.unsqueeze(-1) * self.energy.unsqueeze(-2)
        return squares.sqrt().reshape(self.value.shape)


# ---------------------------------------------------------------------- forms of operations


def matrices(
    operation: Operation, operands: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of a matrix product as views, (..., m, k) and (..., k, n)."""
    a, b = operands
    if operation.name.startswith("matmul_weight"):
        return b.mT, a
    attributes = operation.attributes
    return (
        a.mT if attributes.get("transpose_a") else a,
        b.mT if attributes.get("transpose_b") else b,
    )


def factors(
    operation: Operation, operands: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`matrices`, of what is contracted: ``matmul_weight`` is checked transposed.

    So what its operand that is known first is contracted with can be a secret.
    """
    if operation.name == "matmul_weight":
        return operands[0].mT, operands[1]
    return matrices(operation, operands)


def result_shape(operation: Operation, operands: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of what the operation has to return."""
    a, b = operands
    attributes = operation.attributes
    if operation.name.startswith("matmul"):
        lead = (a if a.dim() > 2 else b).shape[:-2]
        if operation.name.startswith("matmul_weight"):
            return (*lead, b.shape[-1], a.shape[-1])
        rows = a.shape[-1 if attributes.get("transpose_a") else -2]
        return (*lead, rows, b.shape[-2 if attributes.get("transpose_b") else -1])
    if operation.name.startswith("conv_input"):
        return (a.shape[0], *attributes["shape"])
    if operation.name.startswith("conv_weight"):
        return tuple(attributes["shape"])
    space = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, pad, dilation, stride in zip(
            a.shape[2:],
            b.shape[2:],
            attributes["padding"],
            attributes["dilation"],
            attributes["stride"],
            strict=True,
        )
    )
    return (a.shape[0], b.shape[0], *space)


def depth(operation: Operation, operands: Sequence[torch.Tensor]) -> int:
    """How many products are summed in one element of the result, at most."""
    a, b = operands
    if operation.name.startswith("matmul"):
        weight = operation.name.startswith("matmul_weight")
        return a.shape[-2 if weight or operation.attributes.get("transpose_a") else -1]
    if operation.name.startswith("conv_weight"):
        return a.shape[0] * math.prod(a.shape[2:])
    if operation.name.startswith("conv_input"):
        groups: int = operation.attributes["groups"]
        return b.shape[0] // groups * math.prod(b.shape[2:])
    return math.prod(b.shape[1:])


def lengths(operation: Operation, operands: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """How long ``r``, ``s`` and ``q`` are; 0 for those that the operation has no use for."""
    shape = result_shape(operation, operands)
    if operation.name.startswith("matmul"):
        return shape[-2 if operation.name == "matmul_weight" else -1], 0, 0
    if operation.name.startswith("conv_weight"):
        return shape[0], 0, operands[1].shape[1]
    return shape[1], shape[0], 0


# ---------------------------------------------------------------------- the result


def contract(operation: Operation, y: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    """The result contracted: every element is read once.

    Returns:
        matmul: (..., m, R), or of ``matmul_weight`` (..., n, R). conv, conv_input: (R, bundles,
        positions). conv_weight: (groups, R, taps).
    """
    r = vectors.r.to(y.dtype)
    if operation.name.startswith("matmul"):
        return multiply(y.mT if operation.name == "matmul_weight" else y, r).value
    if operation.name.startswith("conv_weight"):
        assert vectors.q is not None
        groups = operation.attributes["groups"]
        out, repetitions = y.shape[0], r.shape[0]
        folded = torch.matmul(grouped(r, groups), y.reshape(groups, out // groups, -1))
        folded = folded.view(groups, repetitions, y.shape[1], -1)
        q = grouped(vectors.q, groups).unsqueeze(-1)
        return (folded.double() * q).sum(2)
    assert vectors.s is not None
    planes = torch.matmul(r, y.reshape(*y.shape[:2], -1))
    return bundled(planes.double(), vectors.s, vectors.bundle).transpose(0, 1)


def grouped(vectors: torch.Tensor, groups: int) -> torch.Tensor:
    """(R, channels) to (groups, R, channels of a group)."""
    return vectors.view(vectors.shape[0], groups, -1).transpose(0, 1)


def bundled(x: torch.Tensor, s: torch.Tensor, bundle: int) -> torch.Tensor:
    """sum of s_b x_b over each ``bundle`` rows: (rows, ...) to (bundles, ...)."""
    if bundle == 1:
        return x
    rows, rest = x.shape[0], x.shape[1:]
    flat, s = x.reshape(rows, -1), s.to(x.dtype)
    whole = rows // bundle
    found = x.new_empty((-(-rows // bundle), flat.shape[1]))
    if whole:
        end = whole * bundle
        torch.bmm(
            s[:end].view(whole, 1, bundle),
            flat[:end].view(whole, bundle, -1),
            out=found[:whole].unsqueeze(1),
        )
    if whole * bundle < rows:
        torch.mm(s[whole * bundle :].view(1, -1), flat[whole * bundle :], out=found[whole:])
    return found.view(-1, *rest)
