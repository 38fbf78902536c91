"""Memory that the enclave shares with workers, so that tensors cross without being copied.

A region is an anonymous file in memory (``memfd_create(2)``) whose size is sealed: nobody can
cut it off under a reader. There are two directions, and each has one writer:

- *to workers*: the enclave maps the region for writing and then seals it against any later
  writable mapping (``F_SEAL_FUTURE_WRITE``, Linux 5.1). Whoever gets the descriptor can read it
  and nothing else, so a worker cannot alter what it, or another one, was sent.
- *to the enclave*: the worker writes, and the enclave maps for reading only. A write there by
  the enclave itself would hand the worker plaintext; it ends in a fault instead.

Blocks come from free lists by size and go back when the last tensor in them dies: pages that
were used before cost a third of fresh ones.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import math
import mmap
import os
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from cenacle.errors import UnavailableError

__all__ = ["Arena", "Region", "SharedStaging"]

_F_SEAL_FUTURE_WRITE: Final = 0x0010
_MFD_NOEXEC_SEAL: Final = 0x0008
_ALIGN: Final = 64
_HUGE_PAGE: Final = 2 << 20
_MADV_HUGEPAGE: Final = 14
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_numbers = itertools.count(1)


def _memory_file(size: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("cenacle-tensors", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # before Linux 6.3
        fd = os.memfd_create("cenacle-tensors", flags)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def _release(fd: int, address: int, size: int) -> None:
    _libc.munmap(address, size)
    os.close(fd)


class Region:
    """One shared file and its mapping in this process; unmapped when nobody refers to it.

    Args:
        size: bytes, a multiple of the page size.
        writable: who writes: this process (True), or whoever gets :attr:`fd` (False).

    Attributes:
        number: unique in this process.
        fd: to be handed to workers.
        address: where it begins in this process.

    Raises:
        UnavailableError: this system cannot share memory so.
    """

    def __init__(self, size: int, *, writable: bool) -> None:
        if sys.platform != "linux":
            raise UnavailableError("sharing memory with a worker needs Linux", found=sys.platform)
        try:
            fd = _memory_file(size)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
            if address is None or address == _MAP_FAILED:
                number = ctypes.get_errno()
                os.close(fd)
                raise OSError(number, os.strerror(number))
        except OSError as error:
            raise _unavailable(error) from None
        self.number = next(_numbers)
        self.size, self.writable, self.fd, self.address = size, writable, fd, int(address)
        weakref.finalize(self, _release, fd, self.address, size).atexit = False
        _libc.madvise(address, size, _MADV_HUGEPAGE)  # where the kernel offers it
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | (_F_SEAL_FUTURE_WRITE if writable else 0))
        except OSError as error:
            raise _unavailable(error) from None


def _unavailable(error: OSError) -> UnavailableError:
    return UnavailableError(
        "memory cannot be shared with a worker",
        found=error.strerror,
        expected="Linux 5.1 or later, memory and file descriptors to spare",
    )


class _Block:
    """A piece of a region; numpy, and torch through it, keep it alive while they use it."""

    __slots__ = ("_place", "_returned", "address", "size")

    def __init__(
        self,
        place: tuple[Region, int, int],
        address: int,
        size: int,
        returned: deque[tuple[Region, int, int]],
    ) -> None:
        self._place = place
        self._returned = returned
        self.address = address
        self.size = size

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # Always "writable": torch warns of arrays that are not, for each tensor.
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.size,),
            "data": (self.address, False),
        }

    def __del__(self) -> None:
        # May run at any time, even within take(): appending to a deque needs no lock.
        self._returned.append(self._place)


class Arena:
    """Regions and the free lists over them. Not for use by two threads at once.

    Args:
        writable: see :class:`Region`.
        region_bytes: how large regions are; a larger tensor gets one of its own.
        limit: bytes in all; by default as many as the machine has.
    """

    def __init__(
        self, *, writable: bool, region_bytes: int = 256 << 20, limit: int | None = None
    ) -> None:
        self.writable = writable
        self.limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.closed = False
        self._region_bytes = region_bytes
        self._regions: list[Region] = []
        self._used = 0  # of the newest region
        self._free: defaultdict[int, list[tuple[Region, int, int]]] = defaultdict(list)
        self._returned: deque[tuple[Region, int, int]] = deque()
        self.bytes = 0
        """In blocks, free or not: what of the regions was ever touched."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, phase: int = 0) -> torch.Tensor:
        """A tensor in shared memory, undefined. ``phase``: its address modulo 64.

        Raises:
            UnavailableError: :attr:`limit` is reached, or the system has no more.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        size = count * dtype.itemsize
        region, offset, room = place = self._take(_class(size + phase))
        assert room >= size + phase
        block = _Block(place, region.address + offset + phase, size, self._returned)
        flat: torch.Tensor = torch.from_numpy(np.asarray(block))
        return flat.view(dtype).view(tuple(shape))

    def locate(self, value: torch.Tensor) -> tuple[Region, int] | None:
        """The region and offset of a contiguous tensor, if it lies here."""
        if not value.is_contiguous() or value.device.type != "cpu":
            return None
        begin, size = value.data_ptr(), value.nbytes
        for region in self._regions:
            offset = begin - region.address
            if size and offset >= 0 and offset + size <= region.size:
                return region, offset
        return None

    def close(self) -> None:
        """Share nothing more. Tensors that live keep their memory until they die."""
        self.closed = True
        self._regions.clear()
        self._free.clear()
        self._returned = deque()  # living blocks keep the old one, and it their regions

    def _take(self, size: int) -> tuple[Region, int, int]:
        while self._returned:
            place = self._returned.popleft()
            self._free[place[2]].append(place)
        if free := self._free.get(size):
            return free.pop()  # the latest: most likely still in the processor's cache
        if self.bytes + size > self.limit:
            return self._larger(size)
        if not self._regions or self._used + size > self._regions[-1].size:
            whole = max(self._region_bytes, size)
            whole += -whole % _HUGE_PAGE
            self._regions.append(Region(whole, writable=self.writable))
            self._used = 0
        place = self._regions[-1], self._used, size
        self._used += size
        self.bytes += size
        return place

    def _larger(self, size: int) -> tuple[Region, int, int]:
        fitting = [room for room, free in self._free.items() if free and room >= size]
        if not fitting:
            raise UnavailableError(
                "the memory that is shared with workers is used up",
                found=f"{self.bytes + size} bytes needed",
                expected=f"at most {self.limit}",
                remedy="take smaller batches, or allow more",
            )
        return self._free[min(fitting)].pop()


def _class(size: int) -> int:
    """Round up by at most an eighth, so that few lists serve all sizes."""
    step = max(256, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


class SharedStaging:
    """Memory for what is sent to process workers: written by the enclave, read by them.

    Everything that is written here is seen at once by every worker that shares it, sent or
    not. So blind on the way in and never in place (``addmm(out=)`` is in place), and give
    workers that must not know each other's tensors (``masked`` training) a staging each.

    Args:
        limit: bytes in all; by default as many as the machine has.
    """

    def __init__(self, *, region_bytes: int = 256 << 20, limit: int | None = None) -> None:
        self.arena = Arena(writable=True, region_bytes=region_bytes, limit=limit)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See :class:`~cenacle.accelerators.protocol.Staging`; ordinary memory once closed."""
        if self.arena.closed:
            return torch.empty(tuple(shape), dtype=dtype)
        return self.arena.empty(shape, dtype)

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """A contiguous copy that begins at the same place within a cache line.

        Some kernels take another order of summation for another alignment; so results do not
        depend on whether a tensor was copied.
        """
        phase = value.data_ptr() % _ALIGN if value.is_contiguous() else 0
        own = self.arena.empty(value.shape, value.dtype, phase=phase)
        return own.copy_(value.detach())

    def close(self) -> None:
        """Share nothing more; for when the last worker is gone. Safe to call twice."""
        self.arena.close()
