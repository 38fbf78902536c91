"""Maximum pooling by windows of any shape, and its gradient, on one core.

torch's own takes one number at a time and keeps an index of eight bytes for each result; here a
byte is kept. Needs numba and float32. What is not computed here stays torch's: dilation,
rounding up, returned indices, images without a batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from cenacle.accelerators.buffers import Buffers
from cenacle.offload.norms import can_normalise

__all__ = ["max_pool"]

_POOLS: Final = (functional.max_pool2d, torch.max_pool2d)
_NAMES: Final = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MOST: Final = 200
"""Numbers of a window: its places are kept in a byte."""


@cache
def _compiled() -> Any:
    try:
        from cenacle.offload import compiled_pooling  # noqa: PLC0415 - needs numba
    except ImportError:
        return None
    return compiled_pooling


class _Windows(NamedTuple):
    """Height and width, distances, and how far the first one lies before the image."""

    high: int
    wide: int
    down: int
    along: int
    top: int
    left: int

    def results(self, height: int, width: int) -> tuple[int, int]:
        return (
            (height + 2 * self.top - self.high) // self.down + 1,
            (width + 2 * self.left - self.wide) // self.along + 1,
        )


def max_pool(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: Buffers
) -> torch.Tensor | None:
    """What a function of torch gives, if it pools images by maxima; None if it stays torch's.

    Args:
        buffers: where results lie.
    """
    if func not in _POOLS or len(args) > 1 + len(_NAMES):
        return None
    x: Any = args[0] if args else kwargs.get("input")
    options = {**dict(zip(_NAMES, args[1:], strict=False)), **kwargs}
    windows = _windows(options)
    if (
        windows is None
        or not isinstance(x, torch.Tensor)
        or not can_normalise(x)
        or x.dim() != 4
        or _compiled() is None
        or min(windows.results(*x.shape[2:])) < 1
    ):
        return None
    found: torch.Tensor = _MaxPool.apply(x, windows, buffers)  # type: ignore[no-untyped-call]
    return found


def _windows(options: dict[str, Any]) -> _Windows | None:
    size = _pair(options.get("kernel_size"))
    stride = options.get("stride")
    step = size if stride is None or stride in ([], ()) else _pair(stride)
    before = _pair(options.get("padding", 0))
    spread = options.get("dilation", 1)
    if (
        size is None
        or step is None
        or before is None
        or _pair(spread) != (1, 1)
        or options.get("ceil_mode", False)
        or options.get("return_indices", False)
        or min(*size, *step) < 1
        or size[0] * size[1] > _MOST
        or any(not 0 <= 2 * b <= s for b, s in zip(before, size, strict=True))
    ):
        return None
    return _Windows(*size, *step, *before)


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    if isinstance(value, tuple | list) and value and all(type(v) is int for v in value):
        found = tuple(value) * 2 if len(value) == 1 else tuple(value)
        return (found[0], found[1]) if len(found) == 2 else None
    return None


class _MaxPool(torch.autograd.Function):
    """Pooling as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, windows: _Windows, buffers: Buffers) -> torch.Tensor:
        shape = (*x.shape[:2], *windows.results(*x.shape[2:]))
        found = buffers.empty(shape)
        codes = torch.empty(shape, dtype=torch.uint8)
        source = x.detach().contiguous()
        _compiled().pool_kernel()(
            source.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), codes.flatten(0, 1).numpy(),
            *windows,
        )  # fmt: skip
        ctx.windows, ctx.shape, ctx.buffers = windows, x.shape, buffers
        ctx.save_for_backward(codes)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        found = ctx.buffers.empty(ctx.shape).zero_()
        _compiled().spread_kernel()(
            g.detach().contiguous().flatten(0, 1).numpy(), codes.flatten(0, 1).numpy(),
            found.flatten(0, 1).numpy(), *ctx.windows,
        )  # fmt: skip
        return found, None, None
