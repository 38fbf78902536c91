"""What the contraction of a result has to be: through the operands, without the result.

The right half of the table in :mod:`cenacle.offload.contractions`, and the scale of its errors.
An operand that was contracted when it was written (a sketch) is not read again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.offload.contractions import (
    Contracted,
    Expected,
    ExpectedProduct,
    Vectors,
    bundled,
    compiled_sums,
    factors,
    grouped,
    result_shape,
)
from cenacle.offload.matrices import multiply
from cenacle.offload.matrix_passes import MatrixSketch, Side
from cenacle.offload.passes import Sketch

__all__ = ["contract_operand", "expected", "sketched"]

_NEIGHBOURS: Final = 1 / 16
"""Share of an image's largest error scale that every position is allowed: Winograd and FFT
algorithms spread errors over tiles."""

_TINY: Final = 1e-30
"""Energies below are summed in float64: squares of float32 numbers may have vanished."""

_CACHED: Final = 1 << 16

_HUGE: Final = 1e30
_IMAGES: Final = 2
"""Dimensions of space for which sums are compiled."""

_ALL: Final = slice(None)
_FEW: Final = 16


def contract_operand(
    operation: Operation, operands: Sequence[torch.Tensor], vectors: Vectors
) -> Contracted:
    """The second operand contracted with ``r``: once for all products that share it."""
    if operation.name.startswith("matmul"):
        right = factors(operation, operands)[1]
        found = multiply(right, vectors.r)
        return Contracted(found.value, torch.matmul(found.columns, vectors.r.square().mT))
    w, groups = operands[1], operation.attributes["groups"]
    kernel = w.shape[2:]
    r = grouped(vectors.r, groups)  # (groups, R, channels)
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
    sketches: Sequence[Sketch | None] = (None, None),
) -> Expected:
    """What :func:`contract` of the result has to be, and the scale of its errors.

    ``sketches``: of operands that were contracted with ``vectors`` when they were written.
    """
    if operation.name.startswith("conv_weight"):
        return _expected_weight(operation.attributes, operands, vectors, sketches)
    if shared is None:
        shared = contract_operand(operation, operands, vectors)
    if operation.name.startswith("matmul"):
        left = factors(operation, operands)[0]
        found = multiply(left, shared.value.mT)
        scale = found.rows.sqrt().unsqueeze(-1) * shared.energy.sqrt().unsqueeze(-2)
        return Expected(found.value, scale)
    return _expected_planes(operation, operands[0], vectors, shared, sketches[0])


def sketched(
    operation: Operation,
    operands: Sequence[torch.Tensor],
    sketches: Sequence[MatrixSketch | None],
) -> tuple[torch.Tensor, ExpectedProduct] | None:
    """The secret and what is expected of a matrix product whose operands need not be read.

    None: they were not contracted for each other.
    """
    first, second = sketches[1], sketches[0]
    attributes = operation.attributes
    if first is None or second is None or first.extreme or second.extreme:
        return None
    turned = operation.name == "matmul_weight" or attributes.get("transpose_a", False)
    side: Side = "left" if attributes.get("transpose_b") else "right"
    secret = first.secret(side)
    if turned:
        fits, value, squares = second.across is first, second.over, second.col_squares
        fits = fits and side == "right"
    else:
        fits = second.along is not None and second.along[0] is first and second.along[1] == side
        value, squares = second.after, second.row_squares
    if not fits or secret is None or value is None:
        return None
    shape = (*operands[0].shape[:-2], *value.shape[1:])
    return secret, ExpectedProduct(value.view(shape), squares, first.energy(side))


def _expected_planes(
    operation: Operation,
    x: torch.Tensor,
    vectors: Vectors,
    shared: Contracted,
    sketch: Sketch | None,
) -> Expected:
    """Of a convolution or its input gradient: one image for each bundle of samples."""
    assert vectors.s is not None
    # Signs are random, so the contracted image has the bundle's energy in expectation.
    if sketch is None:
        images = bundled(x, vectors.s, vectors.bundle)
        energy = _plane_energy(images)
    else:
        images = sketch.image.view(-1, *x.shape[1:])
        energy = sketch.energy.view(-1, *x.shape[2:])
        if not (_TINY < energy.amax() < math.inf):
            energy = _plane_energy(images)
    kernel = shared.value.shape[2:]
    if operation.name.startswith("conv_input"):
        space = operation.attributes["shape"][1:]
        stack = shared.value.flatten(2).permute(1, 2, 0)  # (R, taps, channels)
    else:
        space = result_shape(operation, [x, shared.value])[2:]
        stack = shared.value.flatten(2).transpose(1, 2)
    # One matrix product for all taps, then sums of shifted planes: a convolution with one
    # output channel is five times slower.
    stack, flat = stack.reshape(-1, stack.shape[-1]), images.flatten(2)
    # A batch of one would be spread and multiplied as a batch, at half the speed.
    taps = torch.mm(stack, flat[0]) if len(flat) == 1 else torch.matmul(stack, flat)
    taps = taps.view(len(images), len(vectors.r), -1, *x.shape[2:])
    value, nearby = _spread(operation, taps, energy, kernel, space)
    nearby += nearby.amax(-1, keepdim=True) * _NEIGHBOURS
    scale = nearby.transpose(0, 1).sqrt() * shared.energy.sqrt().view(-1, 1, 1)
    return Expected(value.flatten(2).transpose(0, 1), scale)


def _spread(
    operation: Operation,
    taps: torch.Tensor,
    energy: torch.Tensor,
    kernel: Sequence[int],
    space: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contractions (images, R, *space), and their energies (images, 1, positions)."""
    sums = compiled_sums() if taps.dtype == torch.float32 and len(kernel) == _IMAGES else None
    if sums is None or taps.shape[1] != 1:
        value = _shifted(operation, taps, kernel, space)
        ones = energy[:, None, None].expand(-1, 1, math.prod(kernel), *energy.shape[1:])
        return value, _shifted(operation, ones, kernel, space).flatten(2)
    value, nearby = (torch.zeros(len(taps), *space, dtype=torch.float64) for _ in range(2))
    back = operation.name.startswith("conv_input")
    # Numbers that squares of float32 cannot hold are rare, and made smaller here.
    large = energy.amax()
    scale = 1.0 if _TINY < large < _HUGE or not large > 0 else float(large)
    sums.shift_kernel()(
        taps.reshape(len(taps), *kernel, *taps.shape[3:]).numpy(),
        (energy / scale).float().numpy(),
        _geometry(operation.attributes),
        back,
        value.numpy(),
        nearby.numpy(),
    )
    return value.unsqueeze(1), (nearby * scale).flatten(1).unsqueeze(1)


def _geometry(attributes: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([
        *attributes["stride"], *attributes["padding"], *attributes["dilation"]
    ], np.int64)  # fmt: skip


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
    attributes: Mapping[str, Any],
    operands: Sequence[torch.Tensor],
    vectors: Vectors,
    sketches: Sequence[Sketch | None],
) -> Expected:
    assert vectors.q is not None
    groups, repetitions = attributes["groups"], len(vectors.r)
    found = _correlated(attributes, operands, vectors, sketches)
    if found is not None:
        return found
    folded = [
        torch.matmul(
            grouped(v.to(t.dtype), groups),
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


def _correlated(
    attributes: Mapping[str, Any],
    operands: Sequence[torch.Tensor],
    vectors: Vectors,
    sketches: Sequence[Sketch | None],
) -> Expected | None:
    """The same for images, from operands that were folded already or are now."""
    sums = compiled_sums()
    kernel = attributes["shape"][2:]
    if (
        sums is None
        or attributes["groups"] != 1
        or len(kernel) != _IMAGES
        or any(t.dtype != torch.float32 for t in operands)
    ):
        return None
    assert vectors.q is not None
    folds, norms = [], []
    for t, v, sketch in zip(operands, (vectors.r, vectors.q), sketches, strict=True):
        if sketch is not None and sketch.folds is not None:
            fold = sketch.folds[: len(v)]
        else:
            fold = torch.matmul(v.to(t.dtype), t.flatten(2)).transpose(0, 1).contiguous()
        folds.append(fold.view(len(v), t.shape[0], *t.shape[2:]))
        norms.append(_norms(t, folds[-1].transpose(0, 1), v, 1))
    value = torch.zeros(len(vectors.r), *kernel, dtype=torch.float64)
    arrays = [fold.numpy() for fold in folds]
    sums.correlate_kernel()(*arrays, _geometry(attributes), value.numpy())
    scale = (norms[0] * norms[1]).unsqueeze(-1)
    return Expected(value.reshape(1, len(vectors.r), -1), scale)


def _norms(
    x: torch.Tensor, folded: torch.Tensor, vectors: torch.Tensor, groups: int
) -> torch.Tensor:
    """The norms of ``x`` with weighted channels: (groups, R), or (groups, 1) if estimated.

    Signs are random, so what they are folded into has the channels' energy in expectation;
    where channels are few, they may cancel, and are summed one by one.
    """
    if x.shape[1] < _FEW * groups:
        energy = x.double().square().flatten(2).sum((0, 2)).view(groups, 1, -1)
        return (energy * grouped(vectors, groups).square()).sum(-1).sqrt()
    if x.dtype == torch.float32 and groups == 1:
        each = [float(torch.dot(fold, fold)) for fold in folded.transpose(0, 1).flatten(1)]
        if all(_TINY < energy < _HUGE for energy in each):
            return torch.tensor([[max(each)]], dtype=torch.float64).sqrt()
    energy = folded.double().square().flatten(2).sum((0, 2)).view(groups, -1)
    return energy.amax(1, keepdim=True).sqrt()
