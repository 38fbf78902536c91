"""Convolutions of one, two and three dimensions, and their transposes.

Per-example gradients come from the library's weight-gradient kernel, with the examples of
the batch as groups (small kernels) or one by one (large ones), and wait for the clip
factors. Where an example has few positions, the ghost norm costs a fraction: the Gram
matrix of patches is a sum over kernel offsets of the shifted Gram matrix of pixels, so no
patch is ever copied; the weight gradient is then taken once, from scaled gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cenacle.training.privacy.gradients import (
    Formed,
    Use,
    mask_rows,
    repair_ghost,
    scale_rows,
)
from cenacle.training.privacy.outside import Waiting, weighted_sum
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import operation_name, rules

__all__ = ["ConvolutionUse", "Geometry", "Listed", "convolution", "transposed_convolution"]

# Measured on Zen 4 with oneDNN: up to so many weights the grouped kernel is as fast as the
# ungrouped one, beyond it loses its blocking.
_GROUPED_WEIGHTS = 20_000
_KEEP_BYTES = 1 << 26
_GRAM_ADD = 8.0  # an added element of a Gram matrix costs as much as so many multiplications
_GHOST_SHARE = 0.5  # of a weight gradient's cost, that a ghost norm may take
_CHUNK_BYTES = 1 << 24
_SOME = 4  # large gradients in work at a time: few enough for the cache


@dataclass(frozen=True)
class Geometry:
    """What a convolution does with positions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


class Listed(Use):
    """Gradients that exist, one tensor each: large ones are not copied together."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self.gradients = gradients
        self.examples, self.device = len(gradients), gradients[0].device
        norms = torch._foreach_norm(gradients)  # of float32, as all norms of what exists
        self._squares = torch.stack(list(norms)).double().square()

    def square_norms(self) -> Tensor:
        return self._squares

    def per_example(self) -> Tensor:
        return torch.stack(self.gradients)

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:  # noqa: ARG002
        return self.add_to(torch.zeros_like(self.gradients[0]), factors)

    def add_to(self, total: Tensor, factors: Tensor) -> Tensor:
        """Add the weighted sum to ``total``."""
        for gradient, factor in zip(self.gradients, factors.tolist(), strict=True):
            if factor:
                total.add_(gradient, alpha=factor)
        return total


class ConvolutionUse(Use):
    """The weight of a convolution: X (B, c, ...), D (B, o, ...)."""

    def __init__(
        self,
        x: Tensor,
        d: Tensor,
        weight: Tensor,
        geometry: Geometry,
        waiting: Waiting | None = None,
    ) -> None:
        kind = torch.float64 if d.dtype == torch.float64 else torch.float32
        self.x, self.d = x.to(kind), d.to(kind)
        self.shape, self.geometry = weight.shape, geometry
        self.examples, self.device = x.shape[0], x.device
        self.waiting = waiting  # if workers have X
        self._formed: Formed | Listed | None = None
        self._squares: Tensor | None = None

    # The kernel needs a weight for its shape alone.
    def _weight(self, copies: int = 1) -> Tensor:
        shape = (self.shape[0] * copies, *self.shape[1:])
        return self.x.new_empty(1).expand(shape)

    def _backward(self, x: Tensor, d: Tensor, copies: int = 1) -> Tensor:
        g = self.geometry
        dims = x.dim() - 2
        found = torch.ops.aten.convolution_backward(
            d, x, self._weight(copies), None, g.stride, g.padding, g.dilation, g.transposed,
            g.output_padding or [0] * dims, g.groups * copies, (False, True, False),
        )  # fmt: skip
        return found[1]  # type: ignore[no-any-return]

    def _grouped(self, x: Tensor, d: Tensor) -> Tensor:
        """Gradients of some examples, as the groups of one convolution."""
        n = x.shape[0]
        wide_x = x.reshape(1, -1, *x.shape[2:])
        wide_d = d.reshape(1, -1, *d.shape[2:])
        return self._backward(wide_x, wide_d, n).view(n, *self.shape)

    def _groups_pay(self) -> bool:
        return math.prod(self.shape) <= _GROUPED_WEIGHTS or self.x.is_cuda

    def per_example(self) -> Tensor:
        if self._formed is not None:
            return self._formed.per_example()
        if self._groups_pay():
            return self._grouped(self.x, self.d)
        return torch.stack([self._one(i) for i in range(self.examples)])

    def _one(self, i: int) -> Tensor:
        return self._backward(self.x[i : i + 1], self.d[i : i + 1])

    def _positions(self) -> tuple[int, int]:
        return math.prod(self.x.shape[2:]), math.prod(self.d.shape[2:])

    def _ghost_pays(self) -> bool:
        g = self.geometry
        if g.transposed or g.groups > 1 or not self.x.numel() or not self.d.numel():
            return False
        pixels, positions = self._positions()
        taps = math.prod(self.shape[2:])
        o, c = self.shape[:2]
        ghost = pixels**2 * c + positions**2 * (o + _GRAM_ADD * taps)
        # Where the sum is taken elsewhere, it is only the forming that a ghost norm must beat.
        share = _GHOST_SHARE if self.waiting is None else 1.0
        return ghost < share * positions * taps * c * o

    def square_norms(self) -> Tensor:
        self._squares = self._square_norms()
        return self._squares

    def _square_norms(self) -> Tensor:
        if self._formed is not None:
            return self._formed.square_norms()
        if self._ghost_pays():
            pixels, positions = self._positions()
            each = 4 * (pixels**2 + 3 * positions**2)
            chunk = max(1, _CHUNK_BYTES // each)
            return torch.cat(
                [
                    self._ghost(i, min(i + chunk, self.examples))
                    for i in range(0, self.examples, chunk)
                ]
            )
        each = math.prod(self.shape) * self.d.element_size()
        keep = self.examples * each <= _KEEP_BYTES
        if self._groups_pay():
            chunk = self.examples if keep else max(1, _KEEP_BYTES // each)
            parts = [
                Formed(self._grouped(self.x[i : i + chunk], self.d[i : i + chunk]))
                for i in range(0, self.examples, chunk)
            ]
            if keep:
                (self._formed,) = parts
                self._forget()
            return torch.cat([part.square_norms() for part in parts])
        if not keep:
            return torch.cat([self._some(i).square_norms() for i in range(0, self.examples, _SOME)])
        self._formed = Listed([self._one(i) for i in range(self.examples)])
        self._forget()
        return self._formed.square_norms()

    def prepare(self) -> None:
        each = math.prod(self.shape) * self.d.element_size()
        held = self.x.numel() * self.x.element_size() + self.d.numel() * self.d.element_size()
        if (
            not self._ghost_pays()
            and self.examples
            and self.examples * each <= min(held, _KEEP_BYTES)
        ):
            self.square_norms()

    def _forget(self) -> None:
        self.x = self.d = self.d.new_empty(0)
        self.waiting = None

    def _some(self, first: int) -> Listed:
        return Listed([self._one(i) for i in range(first, min(first + _SOME, self.examples))])

    @property
    def streams(self) -> bool:
        """Large gradients are clipped while they are in the cache."""
        formed = self._formed is not None or self._groups_pay() or not self.examples
        return not formed and not self._ghost_pays()

    def clipped(
        self, others: Tensor, factors_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not self.streams:
            return super().clipped(others, factors_of)
        total, factors = self.x.new_zeros(self.shape), []
        for first in range(0, self.examples, _SOME):
            part = self._some(first)
            factors.append(factors_of(others[first : first + _SOME] + part.square_norms()))
            part.add_to(total, factors[-1])
        return total, torch.cat(factors)

    def _ghost(self, first: int, last: int) -> Tensor:
        x, d = self.x[first:last].flatten(2), self.d[first:last].flatten(2)
        n = last - first
        size, reach = self.x.shape[2:], self.d.shape[2:]
        pixels = x.mT @ x
        if size == reach and set(self.geometry.stride) == {1}:
            patches = self._shifted(pixels)
        else:
            patches = self._strided(pixels.view(n, *size, *size))
        t = math.prod(reach)
        gx, gd = patches.view(n, t, t), d.mT @ d
        dx, dd = gx.diagonal(dim1=1, dim2=2), gd.diagonal(dim1=1, dim2=2)
        trace, largest = (dx * dd).sum(1), torch.maximum(dx.amax(1), dd.amax(1))
        squares = gx.mul_(gd).sum((1, 2))
        return repair_ghost(squares, trace, largest, lambda i: self._exact(first + i))

    def _spans(self, offset: tuple[int, ...]) -> list[tuple[slice, slice]] | None:
        g, size, reach = self.geometry, self.x.shape[2:], self.d.shape[2:]
        found = [
            _span(o * dilation - padding, stride, into, out)
            for o, dilation, padding, stride, into, out in zip(
                offset, g.dilation, g.padding, g.stride, size, reach, strict=True
            )
        ]
        return None if None in found else [span for span in found if span]

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(k) for k in self.shape[2:]))

    def _strided(self, pixels: Tensor) -> Tensor:
        """Gram matrices of patches (n, *reach, *reach) from those of pixels."""
        n, reach = pixels.shape[0], self.d.shape[2:]
        patches = pixels.new_zeros(n, *reach, *reach)
        for offset in self._offsets():
            spans = self._spans(offset)
            if spans is not None:
                to, source = tuple(s[0] for s in spans), tuple(s[1] for s in spans)
                patches[(slice(None), *to, *to)] += pixels[(slice(None), *source, *source)]
        return patches

    def _shifted(self, pixels: Tensor) -> Tensor:
        """The same where input and output have equal positions: a shift of both positions is a
        shift of the flat matrix along its diagonal, and masks cut what wraps around. One
        dimension after the other: the sum over offsets is a product of sums over one's."""
        n, t, _ = pixels.shape
        flat = pixels.view(n, t * t)
        g, reach = self.geometry, tuple(self.d.shape[2:])
        for dim, (kernel, dilation, padding) in enumerate(
            zip(self.shape[2:], g.dilation, g.padding, strict=True)
        ):
            if kernel == 1 and padding == 0:
                continue
            into = torch.zeros_like(flat)
            for o in range(kernel):
                offset = o * dilation - padding
                if abs(offset) >= reach[dim]:
                    continue
                delta = offset * math.prod(reach[dim + 1 :]) * (t + 1)
                to = slice(max(0, -delta), t * t - max(0, delta))
                source = slice(max(0, delta), t * t + min(0, delta))
                if offset:
                    mask = _inside(reach, dim, offset, flat.dtype, flat.device)
                    into[:, to].addcmul_(flat[:, source], mask[to])
                else:
                    into += flat
            flat = into
        return flat

    def _exact(self, i: int) -> Tensor:
        gradient = self._backward(self.x[i : i + 1].double(), self.d[i : i + 1].double())
        return gradient.square().sum()

    def weighted(self, factors: Tensor, *, masked: bool) -> Tensor:
        if self._formed is not None:
            return self._formed.weighted(factors, masked=masked)
        if self.waiting is not None and not masked:
            found = weighted_sum(self.waiting, self.d, factors, self._squares)
            if found is not None:
                return found
        x, d = self.x, self.d
        if masked:
            x, d = mask_rows(x, factors), mask_rows(d, factors)
        if x.numel() < d.numel():
            x = scale_rows(x, factors, masked=False)
        else:
            d = scale_rows(d, factors, masked=False)
        return self._backward(x, d)


@functools.lru_cache(maxsize=16)
def _inside(
    reach: tuple[int, ...], dim: int, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """For pairs of positions, whether both stay inside when moved along one dimension."""
    one = torch.zeros(reach, dtype=dtype, device=device)
    length = reach[dim]
    one.narrow(dim, max(0, -offset), length - abs(offset)).fill_(1)
    return torch.outer(one.flatten(), one.flatten()).flatten()


def _span(offset: int, stride: int, size: int, reach: int) -> tuple[slice, slice] | None:
    """Output positions whose tap at ``offset`` lies within the input, and those inputs."""
    first = max(0, -(offset // stride)) if offset < 0 else 0
    last = min(reach - 1, (size - 1 - offset) // stride)
    if last < first:
        return None
    begin = first * stride + offset
    return slice(first, last + 1), slice(begin, last * stride + offset + 1, stride)


def _many(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _run(
    tape: Tape,
    func: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    w, b = tape.target(weight), tape.target(bias)
    target = w or b
    where = f"{operation_name(func)} of '{target.name if target else '?'}'"
    if x.dim() != weight.dim() or tape.target(x) is not None:
        tape.refuse(func, target)
    rows = tape.rows(where, x)
    g, plain_w, plain_b = geometry, tape.plain(weight), tape.plain(bias)
    if torch.is_grad_enabled():
        tape.expect(w, b)
    kept = x.detach()
    waiting: list[Waiting] = []

    def forward() -> Tensor:
        return torch.convolution(
            x, plain_w, plain_b, g.stride, g.padding, g.dilation, g.transposed,
            g.output_padding or [0] * (x.dim() - 2), g.groups,
        )  # fmt: skip

    def take(gradient: Tensor) -> None:
        theirs = waiting.pop() if waiting else None

        def use() -> Use:
            if rows == 1:
                return ConvolutionUse(kept, gradient, plain_w, g, theirs)
            found = ConvolutionUse(kept, gradient, plain_w, g)
            return Formed(found.per_example().unflatten(0, (tape.examples, rows)).sum(1))  # type: ignore[no-untyped-call]

        tape.use(w, use)
        if b is not None:
            summed = gradient.flatten(2).sum(2)
            tape.use(b, lambda: Formed(summed.view(tape.examples, rows, -1).sum(1)))

    return tape.run(where, [x], tape.product(forward, waiting), take)


@rules(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``conv1d``, ``conv2d``, ``conv3d``; ``padding="same"`` pads more behind than before."""
    dims = weight.dim() - 2
    strides, dilations = _many(stride, dims), _many(dilation, dims)
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0
            for d, k in zip(dilations, weight.shape[2:], strict=True)
        ]
        if any(t % 2 for t in total):
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            input = torch.nn.functional.pad(input, sides)  # noqa: A001
            total = [0] * dims
        padding = [t // 2 for t in total]
    geometry = Geometry(strides, _many(padding, dims), dilations, groups)
    return _run(tape, func, input, weight, bias, geometry)


@rules(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``conv_transpose1d``, ``conv_transpose2d``, ``conv_transpose3d``."""
    dims = weight.dim() - 2
    geometry = Geometry(
        _many(stride, dims),
        _many(padding, dims),
        _many(dilation, dims),
        groups,
        transposed=True,
        output_padding=_many(output_padding, dims),
    )
    return _run(tape, func, input, weight, bias, geometry)
