"""Files that appear whole or not at all, and errors of the disk in words."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from cenacle.errors import CenacleError, InputError, UnavailableError

__all__ = [
    "AtomicFile",
    "begin_writeback",
    "disk_errors",
    "open_source",
    "pread_into",
    "pwrite_all",
]

_COPY: Final = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _in_words(error: OSError, action: str) -> CenacleError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _FULL:
        return UnavailableError(
            f"cannot {action}: the disk has no room",
            found=reason,
            expected="room for the whole file",
            remedy="free some space or choose another folder; nothing was left behind",
        )
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}:
        return InputError(f"cannot {action}", found=reason, remedy="check the path")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return InputError(f"cannot {action}", found=reason, remedy="check the permissions")
    return UnavailableError(f"cannot {action}", found=reason, remedy="check the disk and try again")


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an :class:`OSError` into one sentence: ``cannot <action>: ...``."""
    try:
        yield
    except OSError as error:
        raise _in_words(error, action) from None


def open_source(path: Path) -> int:
    """Open an ordinary file for reading; returns the descriptor.

    Raises:
        InputError: there is no such file, it cannot be read, or it is no ordinary file.
    """
    with disk_errors(f"read {path}"):
        # O_NONBLOCK: opening a FIFO must not hang before its type is known.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise InputError(f"cannot read {path}", found="not a file", expected="an ordinary file")
    return fd


def pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset``; returns the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing a range to the disk without waiting, so that the last ``fsync`` is short."""
    if hasattr(os, "posix_fadvise"):
        # On dirty pages Linux starts the writeback; it drops only what is on disk already.
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


class AtomicFile:
    """A new file that gets its name only on :meth:`commit`, after ``fsync``.

    Where the file system has ``O_TMPFILE`` the file has no name until then, so that even
    ``SIGKILL`` leaves nothing behind; elsewhere it is a hidden random name in the same folder.

    Args:
        target: where the file shall appear; replaced atomically if it exists.
        mode: permission bits before the umask.
    """

    def __init__(self, target: Path, mode: int = 0o666) -> None:
        self.target = target
        self._temp: Path | None = None
        with disk_errors(f"write {target}"):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                self.fd = os.open(target.parent, flags, mode)
                if not Path(f"/proc/self/fd/{self.fd}").exists():
                    os.close(self.fd)
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            except (AttributeError, OSError) as error:
                unsupported = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
                if isinstance(error, OSError) and error.errno not in unsupported:
                    raise
                self._temp = self._hidden()
                create = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
                self.fd = os.open(self._temp, create, mode)
        self._open = True

    def _hidden(self) -> Path:
        return self.target.parent / f".cenacle-{secrets.token_hex(8)}.partial"

    def commit(self) -> None:
        """Make the content durable, then give it its name."""
        try:
            with disk_errors(f"write {self.target}"):
                os.fsync(self.fd)
                if self._temp is None:
                    self._link()
                if self._temp is not None:
                    self._temp.replace(self.target)
                    self._temp = None
                folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            self.abort()

    def _link(self) -> None:
        # src_dir_fd is ignored for an absolute path, but makes CPython call linkat(2) with
        # AT_SYMLINK_FOLLOW instead of link(2), which would link the symlink itself.
        source = f"/proc/self/fd/{self.fd}"
        try:
            os.link(source, self.target, src_dir_fd=self.fd, follow_symlinks=True)
        except FileExistsError:
            temp = self._hidden()
            os.link(source, temp, src_dir_fd=self.fd, follow_symlinks=True)
            self._temp = temp
        except OSError as error:
            # A sandbox may forbid giving a name to an open file; then only a copy is left.
            if error.errno not in {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOENT}:
                raise
            self._copy()

    def _copy(self) -> None:
        mode = stat.S_IMODE(os.fstat(self.fd).st_mode)
        self._temp = self._hidden()
        copy = os.open(self._temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
        try:
            offset = 0
            while block := os.pread(self.fd, _COPY, offset):
                pwrite_all(copy, block, offset)
                offset += len(block)
            os.fsync(copy)
        finally:
            os.close(copy)

    def abort(self) -> None:
        """Close, and remove what was not committed. Safe to call twice."""
        if self._open:
            self._open = False
            os.close(self.fd)
        if self._temp is not None:
            self._temp.unlink(missing_ok=True)
            self._temp = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
