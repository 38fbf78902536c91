"""Keeping the heap: a freed megabyte is used again instead of going back to the system.

glibc gives large blocks back at once, and the kernel has to find and zero their pages when the
next step asks for them: a fresh page costs three times a copy into one that is there. A step
allocates the same blocks as the one before, so the process keeps them.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

__all__ = ["keep_heap"]

_TRIM_THRESHOLD: Final = -1
_MMAP_MAX: Final = -4  # malloc.h


def keep_heap() -> bool:
    """For the whole process, and for good: call it in programs that train, not in libraries.

    Returns:
        Whether the C library could be told so; it is an optimization, nothing depends on it.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False
