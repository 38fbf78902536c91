"""Products of a program's model, as they cross to the agent and back.

A program has no way to an accelerator. Its products cross to the agent, which disguises operands,
sends them, checks what comes back and keeps the account. A request names a call and describes
tensors; their bytes follow as the frame's payload. What the program's process sends is hostile:
every size is checked here, before a kernel sees a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from cenacle.errors import InputError
from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct

__all__ = ["map_fields", "pack", "read_map", "require_fit", "result_shape", "unpack"]

_TYPES: Final = {"f4": torch.float32, "f8": torch.float64}
_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}
_LARGEST: Final = 1 << 31
"""Of any size of a tensor, or number of a convolution."""


def _wrong(what: str) -> InputError:
    # Nothing of theirs in it.
    return InputError("a program's request to accelerators is malformed", found=what)


def pack(tensors: Sequence[torch.Tensor | None]) -> tuple[list[Any], bytes]:
    """What describes tensors (float32 and float64), and their bytes in a row."""
    described: list[Any] = []
    parts = []
    for tensor in tensors:
        if tensor is None:
            described.append(None)
            continue
        whole = tensor.detach().contiguous()
        described.append([_NAMES[whole.dtype], *whole.shape])
        parts.append(whole.numpy().data.cast("B"))
    return described, b"".join(parts)


def unpack(described: object, payload: bytearray) -> list[torch.Tensor | None]:
    """The tensors of a frame, in its memory.

    Raises:
        InputError: they are not what the frame holds.
    """
    if not isinstance(described, list) or len(described) > 8:
        raise _wrong("tensors that are not described")
    found: list[torch.Tensor | None] = []
    begin = 0
    for one in described:
        if one is None:
            found.append(None)
            continue
        if not isinstance(one, list) or not 2 <= len(one) <= 6 or one[0] not in list(_TYPES):
            raise _wrong("a tensor of no known form")
        dtype, shape = _TYPES[one[0]], _numbers(one[1:], least=1)
        size = math.prod(shape)
        end = begin + size * dtype.itemsize
        if end > len(payload):
            raise _wrong("a tensor without its bytes")
        # Of the frame's own memory, which nobody else can write.
        part = torch.frombuffer(payload, dtype=torch.uint8, count=end - begin, offset=begin)
        if begin % dtype.itemsize:
            part = part.clone()
        found.append(part.view(dtype).view(shape))
        begin = end
    if begin != len(payload):
        raise _wrong("bytes of no tensor")
    return found


def _numbers(values: object, *, least: int) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int for v in values):
        raise _wrong("sizes that are no numbers")
    if any(not least <= v < _LARGEST for v in values):
        raise _wrong("sizes out of range")
    return tuple(values)


def map_fields(map_: LinearMap) -> dict[str, Any]:
    """A map as JSON."""
    if isinstance(map_, Dense):
        return {"kind": "dense"}
    if isinstance(map_, MatrixProduct):
        return {"kind": "product"}
    assert isinstance(map_, Convolution)
    return {
        "kind": "convolution",
        "stride": list(map_.stride),
        "padding": list(map_.padding),
        "dilation": list(map_.dilation),
        "groups": map_.groups,
    }


def read_map(fields: object) -> LinearMap:
    """The reverse of :func:`map_fields`. Raises InputError."""
    match fields:
        case {"kind": "dense"}:
            return Dense()
        case {"kind": "product"}:
            return MatrixProduct()
        case {"kind": "convolution", "groups": int(groups), **rest} if 0 < groups < _LARGEST:
            stride, padding, dilation = (
                _numbers(rest.get(name), least=least)
                for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
            )
            if len(stride) not in {1, 2} or len({len(stride), len(padding), len(dilation)}) > 1:
                raise _wrong("a convolution of no known form")
            return Convolution(stride, padding, dilation, groups)
    raise _wrong("a product of unknown kind")


def require_fit(
    map_: LinearMap, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise :class:`InputError` if a map cannot be computed of these operands."""
    fits = x.dim() == map_.rank == (w.dim() if isinstance(map_, Convolution) else x.dim())
    if fits and isinstance(map_, Dense):
        fits = w.dim() == 2 and x.shape[1] == w.shape[1]
    elif fits and isinstance(map_, MatrixProduct):
        fits = w.dim() == 3 and (x.shape[0], x.shape[2]) == (w.shape[0], w.shape[1])
        fits = fits and bias is None
    elif fits:
        assert isinstance(map_, Convolution)
        fits = x.shape[1] == w.shape[1] * map_.groups and w.shape[0] % map_.groups == 0
        fits = fits and min(map_.space(x.shape, w.shape)) >= 1
        padded = zip(x.shape[2:], map_.padding, strict=True)
        fits = fits and math.prod(size + 2 * pad for size, pad in padded) < _LARGEST
    if fits and bias is not None:
        fits = tuple(bias.shape) == (w.shape[0],) and bias.dtype == x.dtype
    if not fits or x.dtype != w.dtype:
        raise _wrong("operands that do not fit")


def result_shape(map_: LinearMap, x: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
    """Of the map's output."""
    if isinstance(map_, Convolution):
        return (x[0], w[0], *map_.space(x, w))
    return (*x[:-1], w[-1 if isinstance(map_, MatrixProduct) else 0])
