"""Random words from AES-256 in counter mode, with a key that no other process has.

The key comes from the system's generator at first use. A child of ``fork`` would repeat
its parent's words: a process that finds itself another than the one that drew the key draws
a new one, and so does every child at once, before it can ask for a word. Nothing of the
generator is ever stored, so a restart cannot repeat it either.
"""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cenacle.training.privacy.refusals import PrivacyError

__all__ = ["Keystream", "Words"]

Words = npt.NDArray[np.uint64]


class _Room(threading.local):
    """Buffers of a thread."""

    def __init__(self) -> None:
        self.zeros = np.empty(0, dtype=np.uint64)
        self.words = np.empty(0, dtype=np.uint64)


_ROOM = _Room()
_LIVING: weakref.WeakSet[Keystream] = weakref.WeakSet()


class Keystream:
    """A stream of uniform 64-bit words; safe to share between threads and over forks.

    Args:
        key: 32 bytes that determine every word; by default fresh from the system.
        secret: the given key is known to nobody else and used for this stream alone. Without it
            a key is for tests, and the stream is not secure.
    """

    def __init__(self, key: bytes | None = None, *, secret: bool = False) -> None:
        if key is not None and len(key) != 32:
            raise PrivacyError("a key of the noise has the wrong length", found=len(key),
                               expected="32 bytes")  # fmt: skip
        self.secure = key is None or secret
        self._given = key
        self._lock = threading.Lock()
        self._owner = -1
        self._key = b""
        self._block = 0
        _LIVING.add(self)

    def __reduce__(self) -> str:
        raise TypeError("a keystream cannot be stored or sent: its words would come twice")

    def words(self, count: int) -> Words:
        """The next ``count`` words, in a buffer that this thread's next call overwrites."""
        blocks = -(-count // 2)
        with self._lock:
            if self._owner != os.getpid():
                self._draw()
            key, first = self._key, self._block
            self._block += blocks
        room = _ROOM
        if room.zeros.size < 2 * blocks:
            room.zeros = np.zeros(2 * blocks, dtype=np.uint64)
            room.words = np.empty(2 * blocks, dtype=np.uint64)
        encryptor = Cipher(algorithms.AES(key), modes.CTR(first.to_bytes(16, "big"))).encryptor()
        out = room.words[: 2 * blocks]
        encryptor.update_into(room.zeros[: 2 * blocks].view(np.uint8).data, out.view(np.uint8).data)
        return out[:count]

    def _draw(self) -> None:
        fresh = self._given is None or self._owner != -1  # a child never keeps a given key
        self._key = os.urandom(32) if fresh else self._given or b""
        self._block = 0
        self._owner = os.getpid()

    def _forked(self) -> None:
        self._lock = threading.Lock()  # whoever held it does not exist here
        if self._owner != -1:
            self._draw()


def _after_fork() -> None:
    for stream in list(_LIVING):
        stream._forked()


os.register_at_fork(after_in_child=_after_fork)
