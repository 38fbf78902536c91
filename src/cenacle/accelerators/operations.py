"""The algebra itself, as any worker computes it, and the enclave too when it does its own.

Each operation takes tensors and JSON attributes and returns one tensor. Nothing here knows of
schemes, keys or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from cenacle.accelerators.protocol import Operation
from cenacle.accelerators.updates import UPDATES

__all__ = ["OPERATIONS", "PRIME", "execute", "modular"]

PRIME: Final = 2**31 - 1
"""The field of the ``*_mod`` operations: integers modulo this Mersenne prime."""

_CONVOLUTIONS: Final[dict[int, Callable[..., torch.Tensor]]] = {
    1: functional.conv1d,
    2: functional.conv2d,
}


def _matmul(
    a: torch.Tensor, b: torch.Tensor, *, transpose_a: bool = False, transpose_b: bool = False
) -> torch.Tensor:
    """(..., m, k) times (..., k, n); with transposes, of the last two dimensions."""
    return torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)


def _matmul_weight(gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x^T gy: the gradient of the right operand of ``x @ w``."""
    return torch.matmul(x.mT, gy)


def _conv(x: torch.Tensor, w: torch.Tensor, **geometry: Any) -> torch.Tensor:
    """x (batch, in, *space), w (out, in / groups, *kernel)."""
    return _CONVOLUTIONS[w.dim() - 2](x, w, None, **geometry)


def _conv_grad(
    gy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: list[bool], geometry: dict[str, Any]
) -> torch.Tensor:
    found = torch.ops.aten.convolution_backward(
        gy, x, w, None,
        geometry["stride"], geometry["padding"], geometry["dilation"],
        False, [0] * len(geometry["stride"]), geometry["groups"], mask,
    )  # fmt: skip
    result: torch.Tensor = found[0] if mask[0] else found[1]
    return result


def _conv_input(
    gy: torch.Tensor, w: torch.Tensor, *, shape: Sequence[int], **geometry: Any
) -> torch.Tensor:
    """Gradient of the input: ``shape`` is one sample's, (in, *space)."""
    x = gy.new_empty(1).expand((gy.shape[0], *shape))  # only its shape is looked at
    return _conv_grad(gy, x, w, [True, False, False], geometry)


def _conv_weight(
    gy: torch.Tensor, x: torch.Tensor, *, shape: Sequence[int], **geometry: Any
) -> torch.Tensor:
    """Gradient of the weight of the given shape (out, in / groups, *kernel)."""
    w = gy.new_empty(1).expand(tuple(shape))
    return _conv_grad(gy, x, w, [False, True, False], geometry)


_LIMB: Final = 16
_DOUBLES: Final[Any] = WeakTensorKeyDictionary()  # resident right operands, converted once


def _double(value: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor | None = _DOUBLES.get(value)
    if found is None:
        found = value.double()
        _DOUBLES[value] = found
    return found


def _reduce(value: torch.Tensor) -> torch.Tensor:
    """Integers of less than 2^62 to 0 .. PRIME - 1, using 2^31 = 1 modulo PRIME."""
    value = value.long()
    for _ in range(2):
        value = (value & PRIME) + (value >> 31)
    return value.masked_fill_(value == PRIME, 0)


def modular(
    base: Callable[..., torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    split: Sequence[bool] = (False, False),
    **attributes: Any,
) -> torch.Tensor:
    """A bilinear operation on integers modulo :data:`PRIME`, exactly; the result is int32.

    It is computed in float64, which is exact in any order of summation while the magnitudes
    that are summed stay below 2^53. An operand named in ``split`` is cut into limbs of 16 bits
    for that: with both split, sums of up to 2^21 products of any two elements are exact.
    """
    if not a.is_cuda:
        return _modular(base, a, b, split, attributes)
    with torch.backends.cudnn.flags(enabled=False):  # neither Winograd nor Fourier transforms
        return _modular(base, a, b, split, attributes)


def _limbs(value: torch.Tensor, split: bool, *, keep: bool = False) -> list[torch.Tensor]:
    """From the most significant one; the first has the sign."""
    if not split:
        return [_double(value) if keep else value.double()]
    return [(value >> _LIMB).double(), (value & ((1 << _LIMB) - 1)).double()]


def _modular(
    base: Callable[..., torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    split: Sequence[bool],
    attributes: Mapping[str, Any],
) -> torch.Tensor:
    right = _limbs(b, split[1], keep=True)
    total: torch.Tensor | None = None
    for limb in _limbs(a, split[0]):
        row: torch.Tensor | None = None
        for other in right:
            part = _reduce(base(limb, other, **attributes))
            row = part if row is None else _reduce((row << _LIMB) + part)
        assert row is not None
        total = row if total is None else _reduce((total << _LIMB) + row)
    assert total is not None
    return total.int()


OPERATIONS: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "matmul": _matmul,
    "matmul_weight": _matmul_weight,
    "conv": _conv,
    "conv_input": _conv_input,
    "conv_weight": _conv_weight,
    "matmul_mod": partial(modular, _matmul),
    "matmul_weight_mod": partial(modular, _matmul_weight),
    "conv_mod": partial(modular, _conv),
    "conv_input_mod": partial(modular, _conv_input),
    "conv_weight_mod": partial(modular, _conv_weight),
    **UPDATES,
}


@torch.no_grad()
def execute(operation: Operation, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute; raises ``KeyError`` for an unknown name, and whatever torch raises."""
    return OPERATIONS[operation.name](*operands, **operation.attributes)
