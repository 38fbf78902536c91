"""Fresh secrets for runs, many of them on one locked page.

A page of secret memory is dear: the kernel takes it out of its own map, so every processor has
to forget what it knew of addresses. A run's secret lives there for milliseconds, from the moment
when it is made to the one when it is sealed to the enclave, and is never used again.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final, Self

from cenacle.crypto import SecretBytes

__all__ = ["LENGTH", "JobSecret", "JobSecrets"]

LENGTH: Final = 32
_ON_A_PAGE: Final = mmap.PAGESIZE // LENGTH


class JobSecret:
    """32 random bytes, wiped when the block ends; if it is forgotten, when its page goes.

    Not when it is collected: a view of it may still be read, and would show a key of zeros.
    """

    __slots__ = ("_page", "_start")

    def __init__(self, page: SecretBytes, start: int) -> None:
        self._page: SecretBytes | None = page
        self._start = start

    def view(self) -> memoryview:
        """A read-only view, which shows zeros once the secret is wiped; then ``ValueError``."""
        if self._page is None:
            raise ValueError("this secret was wiped")
        return self._page.view()[self._start : self._start + LENGTH]

    def wipe(self) -> None:
        """Overwrite. Safe to call twice."""
        page, self._page = self._page, None
        if page is not None:
            page.erase(self._start, self._start + LENGTH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()


class JobSecrets:
    """Makes them; safe for use by many threads. No place on a page is used twice.

    A page is unmapped when all its secrets are gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._left: list[JobSecret] = []

    def take(self) -> JobSecret:
        """A secret that nobody else has."""
        with self._lock:
            if not self._left or self._owner != os.getpid():
                page = SecretBytes.random(_ON_A_PAGE * LENGTH)
                self._left = [JobSecret(page, place * LENGTH) for place in range(_ON_A_PAGE)]
                self._owner = os.getpid()
            return self._left.pop()
