"""Batch normalisation, a residual's addition and a ReLU in one pass; and their gradients.

For each channel, out = relu((y - mean) * scale + shift + residual) with scale = weight / sqrt(var
+ eps), as torch's ``batch_norm`` defines it. In training mean and variance are the batch's, and
its gradient with respect to y is

    scale * (g - mean(g) - (y - mean) * mean(g * (y - mean)) / (var + eps))

where g is the gradient of the result where the ReLU lets it pass (Ioffe and Szegedy, *Batch
normalization*, ICML 2015). torch needs six passes over memory for this, and six for the
gradients; here it is two or three of each, and nothing is kept but y and a bit for each number.

Needs numba, and float32: :func:`can_normalise` tells. Tensors are (samples, channels, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import InputError

__all__ = ["BatchNorm", "Norm", "can_normalise", "compiled_norms", "gradient", "normalise"]

_STREAM: Final = 8 << 20
"""Bytes from which a result does not stay in the cache anyway."""
_NO_MARKS: Final = np.zeros((1, 1, 1), np.int16)

Numbers = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


@cache
def compiled_norms() -> Any:
    """The module of compiled kernels, or None where numba is not installed."""
    try:
        from cenacle.offload import compiled_norms as found  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return found


def can_normalise(y: torch.Tensor) -> bool:
    """Whether a tensor can be normalised here."""
    return (
        type(y) in {torch.Tensor, torch.nn.Parameter}
        and y.dtype == torch.float32
        and y.device.type == "cpu"
        and y.layout is torch.strided
        and y.dim() > 2
        and y.numel() > 0
        and not y.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(y)
        and compiled_norms() is not None
    )


@dataclass(frozen=True)
class BatchNorm:
    """The arguments of ``torch.nn.functional.batch_norm`` but for the tensor itself."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    training: bool
    momentum: float
    eps: float

    def fits(self, shape: torch.Size) -> bool:
        """Whether it is computed here; what torch would refuse is not."""
        numbers = (self.running_mean, self.running_var, self.weight, self.bias)
        return (
            all(
                t is None
                or (
                    t.dtype == torch.float32
                    and t.device.type == "cpu"
                    and t.layout is torch.strided
                    and t.shape == shape[1:2]
                    and t.is_contiguous()
                )
                for t in numbers
            )
            and (self.training or (self.running_mean is not None and self.running_var is not None))
            and (not self.training or shape.numel() > shape[1])
            and isinstance(self.momentum, float | int)
            and isinstance(self.eps, float | int)
            and (self.eps > 0 or not self.training)
        )

    def measured(self, y: torch.Tensor) -> Norm:
        """What it does to ``y``; in training, running statistics are updated, as torch does."""
        channels = y.shape[1]
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean = _array(self.running_mean).astype(np.float64)
            return self._norm(mean, _array(self.running_var).astype(np.float64), 0)
        mean, squares = np.empty(channels), np.empty(channels)
        compiled_norms().moments_kernel()(_planes(y), mean, squares)
        np.maximum(squares, 0, out=squares)
        count = y.numel() // channels
        # Past the version counters, as torch's own function does.
        for running, found in (
            (self.running_mean, mean), (self.running_var, squares / (count - 1)),
        ):  # fmt: skip
            if running is not None:
                old = _array(running)
                old[:] = self.momentum * found + (1 - self.momentum) * old
        return self._norm(mean, squares / count, count)

    def _norm(self, mean: Wide, variance: Wide, count: int) -> Norm:
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / np.sqrt(variance + self.eps)
        if self.eps == 0:
            inverse[variance == 0] = 0  # as torch
        scale = inverse if self.weight is None else inverse * _array(self.weight)
        shift = np.zeros_like(mean) if self.bias is None else _array(self.bias)
        return Norm(
            mean.astype(np.float32), scale.astype(np.float32), shift.astype(np.float32).copy(),
            inverse, count,
        )  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A normalisation's numbers, one for each channel.

    Attributes:
        mean, scale, shift: (y - mean) * scale + shift, float32.
        inverse: one over the standard deviation, float64.
        count: numbers of a channel, if mean and deviation are those of the tensor itself; else 0.
    """

    mean: Numbers
    scale: Numbers
    shift: Numbers
    inverse: Wide
    count: int

    @property
    def affine(self) -> tuple[Numbers, torch.Tensor]:
        """The same as a factor and a summand."""
        summand = self.shift - self.mean.astype(np.float64) * self.scale
        return self.scale, torch.from_numpy(summand.astype(np.float32))


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().numpy()


def _planes(tensor: torch.Tensor) -> Any:
    if not (tensor.is_contiguous() and tensor.dtype == torch.float32):
        raise InputError(
            "a tensor cannot be normalised",
            found=f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}",
            expected="contiguous, float32",
        )
    return _array(tensor).reshape(*tensor.shape[:2], -1)


def _marks(marks: torch.Tensor | None, y: torch.Tensor) -> Any:
    if marks is None:
        return _NO_MARKS
    words = -(-(y.numel() // (y.shape[0] * y.shape[1])) // 16)
    if tuple(marks.shape) != (*y.shape[:2], words) or marks.dtype != torch.int16:
        raise InputError("marks do not fit", found=tuple(marks.shape), expected=tuple(y.shape))
    return marks.numpy()


def _alike(*tensors: torch.Tensor | None) -> None:
    """Kernels believe it: another shape would be a wild pointer."""
    shapes = {tuple(t.shape) for t in tensors if t is not None}
    if len(shapes) != 1:
        raise InputError("tensors to be normalised together differ", found=sorted(shapes))


def _streams(out: torch.Tensor) -> bool:
    plane = out.numel() // (out.shape[0] * out.shape[1])
    return out.nbytes >= _STREAM and out.data_ptr() % 64 == 0 and plane % 16 == 0


def normalise(
    y: torch.Tensor,
    norm: Norm,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    marks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = relu((y - mean) * scale + shift + residual)``.

    Args:
        y: (samples, channels, ...), contiguous, float32; ``out`` and ``residual`` likewise;
            ``out`` may be either of them.
        norm: for its channels.
        relu: replace what is below zero by zero. NaN stays NaN.
        marks: int16 (samples, channels, words): a bit for each number that is above zero or NaN.

    Raises:
        InputError: shapes or types do not fit.
    """
    _alike(y, out, residual)
    source = _planes(y)
    compiled_norms().normalise_kernel()(
        source, source if residual is None else _planes(residual), _planes(out), _marks(marks, y),
        norm.mean, norm.scale, norm.shift, 0.0 if relu else -math.inf, residual is not None,
        marks is not None, _streams(out),
    )  # fmt: skip
    return out


def gradient(
    g: torch.Tensor,
    y: torch.Tensor,
    norm: Norm,
    buffers: Buffers,
    *,
    relu: bool,
    marks: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients for the gradient ``g`` of what :func:`normalise` made of ``y``.

    Args:
        g: as ``y``.
        buffers: where results lie.
        relu: whether there was one; then ``marks`` are those of :func:`normalise`, or None if
            there was no residual.
        needs: whether gradients of y, of the residual, and of weight or bias are asked for.

    Returns:
        Those of y, of the residual, of the weight and of the bias; the last two (channels), and
        meaningless if not asked for.

    Raises:
        InputError: shapes or types do not fit.
    """
    for_y, for_residual, for_numbers = needs
    module, total, product = compiled_norms(), np.zeros(y.shape[1]), np.zeros(y.shape[1])
    _alike(g, y)
    source, bits = _planes(y), _marks(marks, y)
    numbers = (norm.mean, norm.scale, norm.shift)
    # Without a ReLU all of it passes, and with marks what is marked: all is above NaN.
    gate = (0.0 if relu and marks is None else math.nan, marks is not None)
    residual = buffers.empty(g.shape) if for_residual and relu else None
    if for_numbers or residual is not None or (for_y and norm.count):
        target = source if residual is None else _planes(residual)
        module.sums_kernel()(
            _planes(g), source, bits, target, *numbers, *gate, residual is not None, total, product
        )
    if residual is not None:
        g, gate = residual, (math.nan, False)
    found = None
    if for_y:
        found = buffers.empty(g.shape)
        share = norm.scale / norm.count if norm.count else np.zeros_like(total)
        slope = (-share * product * norm.inverse**2).astype(np.float32)
        offset = (-share * total).astype(np.float32)
        module.gradient_kernel()(
            _planes(g), source, bits, _planes(found), *numbers, *gate, slope, offset,
            _streams(found),
        )  # fmt: skip
    weight, bias = torch.from_numpy(product * norm.inverse), torch.from_numpy(total)
    return found, g if for_residual else None, weight.to(y.dtype), bias.to(y.dtype)
