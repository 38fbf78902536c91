"""Memory for keys: out of swap, out of core dumps, and where the kernel can, out of its own map.

``memfd_secret(2)`` pages are removed from the kernel's direct map, so not even another
root process can read them through ``/proc/PID/mem`` or ``/dev/mem``. Where the call is
missing, an anonymous ``mlock``-ed page with ``MADV_DONTDUMP`` is used, and
:attr:`SecretBytes.protection` says so.

A secret belongs to the process that made it. A forked child shares secret pages with its
parent, so it can neither read a secret nor, by dropping its copy, wipe the parent's.

Honest limit: OpenSSL keeps its own expanded copy of a key on the heap while a cipher
object lives, and short-lived ``bytes`` pass through Python's allocator when a key is
unwrapped. Both are covered by ``PR_SET_DUMPABLE=0`` and the sandbox, not by this class.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
from typing import NoReturn, Self

__all__ = ["SecretBytes"]

_SYS_MEMFD_SECRET = 447  # the same number on every architecture (since Linux 5.14)
_O_CLOEXEC = 0o2000000
_libc = ctypes.CDLL(None, use_errno=True)


class _Page(mmap.mmap):
    """A page that is overwritten when the last reference to it, a view perhaps, goes away."""

    owner: int
    shared: bool
    wiped = False

    def mine(self) -> bool:
        return self.owner == os.getpid()

    def erase(self, start: int, stop: int) -> None:
        # What a forked child overwrites in a shared page is gone for its parent too.
        if self.mine() or not self.shared:
            self[start:stop] = bytes(stop - start)

    def wipe(self) -> None:
        if not self.closed:
            self.erase(0, len(self))
        self.wiped = True

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            self.wipe()


def _map(fd: int, size: int, flags: int) -> _Page:
    page = _Page(fd, size, flags=flags)
    page.owner, page.shared = os.getpid(), flags == mmap.MAP_SHARED
    return page


def _secret_page(size: int) -> tuple[_Page, str]:
    fd = -1
    with contextlib.suppress(AttributeError):
        fd = _libc.syscall(_SYS_MEMFD_SECRET, _O_CLOEXEC)
    if fd >= 0:
        try:
            os.ftruncate(fd, size)
            return _map(fd, size, mmap.MAP_SHARED), "memfd_secret"
        except OSError:
            pass  # RLIMIT_MEMLOCK is used up: fall through to an ordinary page
        finally:
            os.close(fd)
    page = _map(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTDUMP"):
        page.madvise(mmap.MADV_DONTDUMP)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    locked = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    return page, "mlock" if locked else "heap"


def _fill(page: _Page, length: int) -> None:
    """Random bytes from the operating system, which writes them where they stay."""
    try:
        generate = _libc.getrandom
    except AttributeError:
        page[:length] = secrets.token_bytes(length)
        return
    address, done = ctypes.addressof(ctypes.c_char.from_buffer(page)), 0
    while done < length:
        got = generate(ctypes.c_void_p(address + done), ctypes.c_size_t(length - done), 0)
        if got < 0 and ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), "the system gave no random bytes")
        done += max(got, 0)


class SecretBytes:
    """A key of fixed length, wiped when closed, or when it and all its views are collected.

    Never printable, picklable or comparable with ``==`` (use
    :func:`hmac.compare_digest` on :meth:`view`).

    Args:
        data: the bytes to hold; a ``bytearray`` given here is wiped.

    Attributes:
        protection: ``memfd_secret``, ``mlock`` or ``heap``: what the system gave.
    """

    __slots__ = ("_length", "_page", "protection")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data) as view:
            self._length = view.nbytes
            if self._length == 0:
                raise ValueError("a secret must have at least one byte")
            pages = -(-self._length // mmap.PAGESIZE)
            self._page, self.protection = _secret_page(pages * mmap.PAGESIZE)
            with view.cast("B") as octets:
                self._page[: self._length] = octets
        if isinstance(data, bytearray):
            data[:] = bytes(len(data))

    @classmethod
    def random(cls, length: int = 32) -> Self:
        """A fresh secret from the operating system's generator."""
        made = cls(bytes(length))
        _fill(made._page, length)
        return made

    def view(self) -> memoryview:
        """A read-only view; ``ValueError`` after :meth:`wipe` and in a forked child."""
        if self._page.wiped:
            raise ValueError("this secret was wiped")
        if not self._page.mine():
            raise ValueError("this secret belongs to the process that this one was forked from")
        return memoryview(self._page).toreadonly()[: self._length]

    def erase(self, start: int, stop: int) -> None:
        """Overwrite the bytes of ``[start, stop)`` with zeros, for every view too."""
        if not 0 <= start <= stop <= self._length:
            raise ValueError("a secret does not reach that far")
        if not self._page.wiped:
            self._page.erase(start, stop)

    def wipe(self) -> None:
        """Overwrite and unmap. Safe to call twice."""
        self._page.wipe()
        # A live view keeps the (already zeroed) page mapped until it goes away.
        with contextlib.suppress(BufferError):
            self._page.close()

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"<SecretBytes {self._length} bytes in {self.protection}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("compare secrets with hmac.compare_digest(a.view(), b.view())")
