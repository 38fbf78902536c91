"""Memory for keys: out of swap, out of core dumps, and where the kernel can, out of its own map.

``memfd_secret(2)`` pages are removed from the kernel's direct map, so not even another
root process can read them through ``/proc/PID/mem`` or ``/dev/mem``. Where the call is
missing, an anonymous ``mlock``-ed page with ``MADV_DONTDUMP`` is used, and
:attr:`SecretBytes.protection` says so.

Honest limit: OpenSSL keeps its own expanded copy of a key on the heap while a cipher
object lives, and short-lived ``bytes`` pass through Python's allocator when a key is
unwrapped. Both are covered by ``PR_SET_DUMPABLE=0`` and the sandbox, not by this class.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
from typing import NoReturn, Self

__all__ = ["SecretBytes"]

_SYS_MEMFD_SECRET = 447  # the same number on every architecture (since Linux 5.14)
_O_CLOEXEC = 0o2000000
_libc = ctypes.CDLL(None, use_errno=True)


def _secret_page(size: int) -> tuple[mmap.mmap, str]:
    fd = -1
    with contextlib.suppress(AttributeError):
        fd = _libc.syscall(_SYS_MEMFD_SECRET, _O_CLOEXEC)
    if fd >= 0:
        try:
            os.ftruncate(fd, size)
            return mmap.mmap(fd, size, flags=mmap.MAP_SHARED), "memfd_secret"
        except OSError:
            pass  # RLIMIT_MEMLOCK is used up: fall through to an ordinary page
        finally:
            os.close(fd)
    page = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTDUMP"):
        page.madvise(mmap.MADV_DONTDUMP)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    locked = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    return page, "mlock" if locked else "heap"


class SecretBytes:
    """A key of fixed length, wiped when closed or collected.

    Never printable, picklable or comparable with ``==`` (use
    :func:`hmac.compare_digest` on :meth:`view`).

    Args:
        data: the bytes to hold; a ``bytearray`` given here is wiped.

    Attributes:
        protection: ``memfd_secret``, ``mlock`` or ``heap``: what the system gave.
    """

    __slots__ = ("_length", "_page", "protection")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        if len(data) == 0:
            raise ValueError("a secret must have at least one byte")
        self._length = len(data)
        self._page, self.protection = _secret_page(-(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._page[: self._length] = bytes(data)
        if isinstance(data, bytearray):
            data[:] = bytes(len(data))

    @classmethod
    def random(cls, length: int = 32) -> Self:
        """A fresh secret from the operating system's generator."""
        return cls(bytearray(secrets.token_bytes(length)))

    def view(self) -> memoryview:
        """A read-only view; raises ``ValueError`` after :meth:`wipe`."""
        if self._page.closed:
            raise ValueError("this secret was wiped")
        return memoryview(self._page).toreadonly()[: self._length]

    def wipe(self) -> None:
        """Overwrite and unmap. Safe to call twice."""
        if self._page.closed:
            return
        self._page[: self._length] = bytes(self._length)
        # A live view keeps the (already zeroed) page mapped until it goes away.
        with contextlib.suppress(BufferError):
            self._page.close()

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):
            self.wipe()

    def __repr__(self) -> str:
        return f"<SecretBytes {self._length} bytes in {self.protection}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("compare secrets with hmac.compare_digest(a.view(), b.view())")
