"""Memory that is used again.

A fresh large tensor costs three times a copy into memory that is mapped already: the kernel
has to find and zero every page. So what the enclave produces in each step again (unblinded
results and gradients) lies in regions that come back when nobody refers to the tensor any
more, whoever held it: autograd, the user, a ``.grad``.

Regions keep their old content, as freed memory of any allocator does; :meth:`Buffers.close`
lets go of them all.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

__all__ = ["Buffers"]

_SMALL: Final = 256 * 1024
"""Bytes below which the ordinary allocator reuses memory well."""
_STEPS: Final = 8
"""Sizes of regions between one power of two and the next: at most 1/8 is wasted."""


_NUMPY: Final[dict[torch.dtype, Any]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
}


class Buffers:
    """Tensors whose memory returns here by itself.

    Args:
        limit: bytes of unused regions that are kept at most.

    Attributes:
        spare: bytes that are kept unused now.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit = limit
        self._free: dict[int, list[mmap.mmap]] = {}
        self.spare = 0
        # Finalizers may run at any point, even within empty(): they only append.
        self._returned: deque[mmap.mmap] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor with undefined content, aligned to a page if it is large."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < _SMALL or dtype not in _NUMPY:
            return torch.empty(tuple(shape), dtype=dtype)
        self._collect()
        rounded = _rounded(size)
        kept = self._free.get(rounded)
        if kept:
            region = kept.pop()
            self.spare -= rounded
        else:
            region = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Shaped by numpy: a view made by torch could not be changed in place under autograd.
        array: np.ndarray[Any, Any] = np.ndarray(tuple(shape), _NUMPY[dtype], region)
        # torch keeps the array for as long as any tensor or view uses its memory.
        weakref.finalize(array, self._returned.append, region).atexit = False
        return torch.from_numpy(array)

    def close(self) -> None:
        """Unmap what is not in use; the rest is unmapped when it comes back to nobody."""
        self._collect()
        self._free.clear()
        self.spare = 0
        self.limit = 0

    def _collect(self) -> None:
        while self._returned:
            region = self._returned.popleft()
            if self.spare + len(region) <= self.limit:
                self._free.setdefault(len(region), []).append(region)
                self.spare += len(region)


def _rounded(size: int) -> int:
    step = max(mmap.PAGESIZE, (1 << (size - 1).bit_length()) // (2 * _STEPS))
    return -(-size // step) * step
