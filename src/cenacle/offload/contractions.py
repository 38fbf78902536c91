"""Random contractions of bilinear products: the linear algebra behind Freivalds' check.

Every product that a worker computes, Y = B(a, b), is contracted with random vectors in two
ways: directly, and through its operands. The second way never forms Y. For R repetitions:

==============  ===================================================  ==========================
operation       the result                                           through the operands
==============  ===================================================  ==========================
matmul          Y r                                                  a (b r)
conv            sum over b, o of s_b r_o Y[b, o, :]                  conv(sum_b s_b a_b, r b)
conv_input      sum over b, c of s_b r_c Y[b, c, :]                  the same, transposed
conv_weight     sum over o, c of r_o q_c Y[o, c, :]                  correlation of r a and q b
==============  ===================================================  ==========================

Each gives, beside the expected contraction, the scale of its rounding errors; see
:mod:`cenacle.offload.integrity` and ``docs/integrity.md``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation

__all__ = [
    "BUNDLE",
    "Contracted",
    "Expected",
    "Vectors",
    "contract",
    "contract_operand",
    "depth",
    "expected",
    "lengths",
    "result_shape",
    "secret_signs",
]

BUNDLE: Final = 8
"""Samples of a convolution that are contracted into one image."""

_NEIGHBOURS: Final = 1 / 16
"""Share of an image's largest error scale that every position is allowed: Winograd and FFT
algorithms spread errors over tiles."""

_TINY: Final = 1e-30
"""Energies below are summed in float64: squares of float32 numbers may have vanished."""

_CACHED: Final = 1 << 16

_ALL: Final = slice(None)
_FEW: Final = 16

Entropy = Callable[[int], bytes]


def secret_signs(shape: Sequence[int], entropy: Entropy = os.urandom) -> torch.Tensor:
    """Random numbers, uniform in [-1.5, -0.5] and [0.5, 1.5], float64.

    Bounded away from zero: a wrong element cannot hide behind a small weight.
    """
    count = math.prod(shape)
    bits = np.frombuffer(entropy(4 * count), dtype="<u4")
    size = 0.5 + (bits >> np.uint32(1)).astype(np.float64) / 2.0**31
    signed = np.where(bits & 1, size, -size)
    return torch.from_numpy(signed.reshape(tuple(shape)))


@dataclass(frozen=True)
class Vectors:
    """The secret of one check.

    Attributes:
        r: (repetitions, features): over the features of the result (columns of a matrix
            product, output channels of a convolution, input channels of its input gradient,
            output channels of its weight gradient).
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


# ---------------------------------------------------------------------- forms of operations


def _matrices(
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


def result_shape(operation: Operation, operands: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of what the operation has to return."""
    a, b = operands
    attributes = operation.attributes
    if operation.name.startswith("matmul"):
        left, right = _matrices(operation, operands)
        return (*(a if a.dim() > 2 else b).shape[:-2], left.shape[-2], right.shape[-1])
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
        return _matrices(operation, operands)[0].shape[-1]
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
        return shape[-1], 0, 0
    if operation.name.startswith("conv_weight"):
        return shape[0], 0, operands[1].shape[1]
    return shape[1], shape[0], 0


# ---------------------------------------------------------------------- the result


def contract(operation: Operation, y: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    """The result contracted: every element is read once.

    Returns:
        matmul: (..., m, R). conv, conv_input: (R, bundles, positions). conv_weight:
        (groups, R, taps).
    """
    r = vectors.r.to(y.dtype)
    if operation.name.startswith("matmul"):
        return _times(y, r)
    if operation.name.startswith("conv_weight"):
        assert vectors.q is not None
        groups = operation.attributes["groups"]
        out, repetitions = y.shape[0], r.shape[0]
        folded = torch.matmul(_grouped(r, groups), y.reshape(groups, out // groups, -1))
        folded = folded.view(groups, repetitions, y.shape[1], -1)
        q = _grouped(vectors.q, groups).unsqueeze(-1)
        return (folded.double() * q).sum(2)
    assert vectors.s is not None
    planes = torch.matmul(r, y.reshape(*y.shape[:2], -1))
    return _bundled(planes.double(), vectors.s, vectors.bundle).transpose(0, 1)


def _grouped(vectors: torch.Tensor, groups: int) -> torch.Tensor:
    """(R, channels) to (groups, R, channels of a group)."""
    return vectors.view(vectors.shape[0], groups, -1).transpose(0, 1)


def _bundled(x: torch.Tensor, s: torch.Tensor, bundle: int) -> torch.Tensor:
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


# ---------------------------------------------------------------------- through the operands


def contract_operand(
    operation: Operation, operands: Sequence[torch.Tensor], vectors: Vectors
) -> Contracted:
    """The second operand contracted with ``r``: once for all products that share it."""
    if operation.name.startswith("matmul"):
        right = _matrices(operation, operands)[1]
        value = _times(right, vectors.r.to(right.dtype))
        columns = _energy(right, -2)
        return Contracted(value, torch.matmul(columns, vectors.r.square().mT))
    w, groups = operands[1], operation.attributes["groups"]
    kernel = w.shape[2:]
    r = _grouped(vectors.r, groups)  # (groups, R, channels)
    split = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    back = operation.name.startswith("conv_input")
    if back:
        value = torch.matmul(r.to(w.dtype).unsqueeze(1), split)  # (groups, out, R, taps)
        energy = value.double().square().sum((1, 3))
        value = value.reshape(w.shape[0], -1, *kernel)
    else:
        value = torch.matmul(r.to(w.dtype), split.flatten(2))  # (groups, R, in * taps)
        energy = value.double().square().sum(2)
        value = value.transpose(0, 1).reshape(len(vectors.r), -1, *kernel)
    if r.shape[2] < _FEW:  # the signs of few may cancel
        each = split.double().square().sum((1, 3) if back else (2, 3))
        energy = (r.square() * each.unsqueeze(1)).sum(2)
    return Contracted(value, energy.amax(0))


def expected(
    operation: Operation,
    operands: Sequence[torch.Tensor],
    vectors: Vectors,
    shared: Contracted | None = None,
) -> Expected:
    """What :func:`contract` of the result has to be, and the scale of its errors."""
    if operation.name.startswith("conv_weight"):
        return _expected_weight(operation.attributes, operands, vectors)
    if shared is None:
        shared = contract_operand(operation, operands, vectors)
    if operation.name.startswith("matmul"):
        left = _matrices(operation, operands)[0]
        scale = _energy(left, -1).sqrt().unsqueeze(-1) * shared.energy.sqrt().unsqueeze(-2)
        return Expected(torch.matmul(left, shared.value), scale)
    return _expected_planes(operation, operands[0], vectors, shared)


def _expected_planes(
    operation: Operation, x: torch.Tensor, vectors: Vectors, shared: Contracted
) -> Expected:
    """Of a convolution or its input gradient: one image for each bundle of samples."""
    assert vectors.s is not None
    images = _bundled(x, vectors.s, vectors.bundle)
    # Signs are random, so the contracted image has the bundle's energy in expectation.
    energy = _plane_energy(images).unsqueeze(1)
    kernel = shared.value.shape[2:]
    if operation.name.startswith("conv_input"):
        space = operation.attributes["shape"][1:]
        stack = shared.value.flatten(2).permute(1, 2, 0)  # (R, taps, channels)
    else:
        space = result_shape(operation, [x, shared.value])[2:]
        stack = shared.value.flatten(2).transpose(1, 2)
    # One matrix product for all taps, then sums of shifted planes: a convolution with one
    # output channel is five times slower.
    taps = torch.matmul(stack.reshape(-1, stack.shape[-1]), images.flatten(2))
    taps = taps.view(len(images), len(stack), -1, *x.shape[2:])
    value = _shifted(operation, taps, kernel, space)
    ones = energy.unsqueeze(2).expand(-1, -1, math.prod(kernel), *energy.shape[2:])
    nearby = _shifted(operation, ones, kernel, space).flatten(2)
    nearby += nearby.amax(-1, keepdim=True) * _NEIGHBOURS
    scale = nearby.transpose(0, 1).sqrt() * shared.energy.sqrt().view(-1, 1, 1)
    return Expected(value.flatten(2).transpose(0, 1), scale)


def _times(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """x (..., m, n) times each of (R, n): (..., m, R).

    For one matrix vector by vector: a product with so few columns runs at a tenth of the
    memory's speed.
    """
    if x.dim() > 2:
        return torch.matmul(x, vectors.mT)
    return torch.stack([torch.mv(x, one) for one in vectors], -1)


def _energy(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of squares along a dimension, float64; of extreme numbers too."""
    found = _squares(x, dim)
    if x.dtype == torch.float32 and not (_TINY < found.amax() < math.inf):
        found = x.double().square().sum(dim)
    return found.double()


def _squares(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A large matrix a few rows at a time, so that their squares stay in the cache."""
    if x.dim() != 2 or x.numel() <= _CACHED:
        return (x * x).sum(dim)
    if x.stride(0) < x.stride(1):
        return _squares(x.mT, -1 if dim == -2 else -2)
    parts = x.split(max(1, 4 * _CACHED // x.shape[1]))  # type: ignore[no-untyped-call]
    if dim == -1:
        return torch.cat([(part * part).sum(-1) for part in parts])
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part in parts:
        total += (part * part).sum(0)
    return total


def _plane_energy(images: torch.Tensor) -> torch.Tensor:
    """Sum of squares over channels, a few at a time: their squares stay in the cache."""
    some = max(1, _CACHED // max(1, images[0, 0].numel()))
    parts = images.split(some, 1)  # type: ignore[no-untyped-call]
    total = _energy(parts[0], 1)
    for part in parts[1:]:
        total += _energy(part, 1)
    return total


def _shifted(
    operation: Operation, taps: torch.Tensor, kernel: Sequence[int], space: Sequence[int]
) -> torch.Tensor:
    """Sum of each tap's plane, moved to where the tap acts: (..., taps, *in) to (..., *out).

    For a convolution out[p] += plane[p * stride + tap * dilation - padding]; for its input
    gradient the other way round.
    """
    back = operation.name.startswith("conv_input")
    found = taps.new_zeros((*taps.shape[:2], *space), dtype=torch.float64)
    attributes = operation.attributes
    large, small = (space, taps.shape[3:]) if back else (taps.shape[3:], space)
    for number, tap in enumerate(itertools.product(*map(range, kernel))):
        wide: list[slice] = []
        narrow: list[slice] = []
        for at, dilation, padding, stride, big, little in zip(
            tap,
            attributes["dilation"],
            attributes["padding"],
            attributes["stride"],
            large,
            small,
            strict=True,
        ):
            offset = at * dilation - padding
            first = max(0, -(offset // stride))  # ceil(-offset / stride)
            last = min(little, (big - 1 - offset) // stride + 1)
            if last <= first:
                break
            narrow.append(slice(first, last))
            begin = first * stride + offset
            wide.append(slice(begin, begin + (last - first - 1) * stride + 1, stride))
        else:
            to, of = (wide, narrow) if back else (narrow, wide)
            found[(_ALL, _ALL, *to)] += taps[:, :, number][(_ALL, _ALL, *of)]
    return found


def _expected_weight(
    attributes: Mapping[str, Any], operands: Sequence[torch.Tensor], vectors: Vectors
) -> Expected:
    assert vectors.q is not None
    groups, repetitions = attributes["groups"], len(vectors.r)
    folded = [
        torch.matmul(
            _grouped(v.to(t.dtype), groups),
            t.reshape(t.shape[0], groups, t.shape[1] // groups, -1),
        ).reshape(t.shape[0], groups * repetitions, *t.shape[2:])
        for t, v in zip(operands, (vectors.r, vectors.q), strict=True)
    ]
    if groups == 1:
        folded = [t.double() for t in folded]
    kernel = list(attributes["shape"][2:])
    each = {
        **attributes,
        "groups": groups * repetitions,
        "shape": [groups * repetitions, 1, *kernel],
    }
    value = execute(Operation("conv_weight", each), folded)
    norms = [
        _norms(t, f, v, groups)
        for t, f, v in zip(operands, folded, (vectors.r, vectors.q), strict=True)
    ]
    return Expected(value.reshape(groups, repetitions, -1), (norms[0] * norms[1]).unsqueeze(-1))


def _norms(
    x: torch.Tensor, folded: torch.Tensor, vectors: torch.Tensor, groups: int
) -> torch.Tensor:
    """The norms of ``x`` with weighted channels: (groups, R), or (groups, 1) if estimated.

    Signs are random, so what they are folded into has the channels' energy in expectation;
    where channels are few, they may cancel, and are summed one by one.
    """
    if x.shape[1] < _FEW * groups:
        energy = x.double().square().flatten(2).sum((0, 2)).view(groups, 1, -1)
        return (energy * _grouped(vectors, groups).square()).sum(-1).sqrt()
    energy = folded.double().square().flatten(2).sum((0, 2)).view(groups, -1)
    return energy.amax(1, keepdim=True).sqrt()
