"""Which masks have been handed out, durably, and whether an old record of it came back.

The ledger is one small file, sealed with AES-256-GCM and replaced atomically. Each version has
a sequence number, one more than the last. With a counter outside, which only grows:

- a version counts once the counter has reached its number; only then are masks used that it
  reserves;
- a run that fails between the two leaves a version ahead of the counter, of which nothing was
  used. A run ends with its first failure, so it leaves one at most, and the one it wrote when
  it began: two numbers ahead at most;
- a run begins with a new version, two numbers past the counter, so that versions which an
  earlier run left ahead are behind from then on.

So a ledger whose number is below the counter is an old copy, and refused.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cenacle.crypto import SecretBytes, derive_key
from cenacle.errors import SealError
from cenacle.sealing.disk import AtomicFile, disk_errors, open_source, pwrite_all

__all__ = ["MaskLedger", "MonotonicCounter"]

_LABEL: Final = b"cenacle/v1 offload mask ledger"
_MAX_BYTES: Final = 1 << 24


class MonotonicCounter(Protocol):
    """A number outside the store that can only grow, e.g. kept by the broker."""

    def value(self) -> int: ...

    def advance(self, value: int) -> None:
        """Set it, durably; raises if ``value`` is not greater than it was."""
        ...


class MaskLedger:
    """The ledger of one store. Only one process at a time may have it.

    Args:
        path: the file.
        key: the store's.
        counter: notices an old copy.

    Attributes:
        sequence: of the last version written or read.
    """

    def __init__(self, path: Path, key: SecretBytes, counter: MonotonicCounter | None) -> None:
        self.sequence = 0
        self._path, self._counter = path, counter
        self._key = derive_key(key, "offload/mask-ledger")

    def load(self) -> dict[str, Any] | None:
        """The content; ``None`` if there is no ledger yet.

        Raises:
            SealError: damaged, forged, for another key, or an old copy.
        """
        outside = 0 if self._counter is None else self._counter.value()
        if not self._path.exists():
            if outside:
                raise _rolled_back("no ledger", outside)
            return None
        content = self._read()
        self.sequence = int(content.pop("sequence"))
        if self._counter is not None:
            if not outside <= self.sequence <= outside + 2:
                raise _rolled_back(self.sequence, outside)
            self.sequence = outside + 1
            self.write(content)
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Make a new version durable, and then count it.

        After an error nothing more may be written: the version may be on the disk.

        Raises:
            UnavailableError: the disk has no room or fails.
        """
        sequence = self.sequence + 1
        plain = json.dumps({**content, "sequence": sequence}).encode()
        nonce = secrets.token_bytes(12)
        with self._key.view() as view:
            sealed = AESGCM(view).encrypt(nonce, plain, _LABEL)
        with AtomicFile(self._path, 0o600) as file:
            with disk_errors("write the mask ledger"):
                pwrite_all(file.fd, nonce + sealed, 0)
            file.commit()
        if self._counter is not None:
            self._counter.advance(sequence)
        self.sequence = sequence

    def _read(self) -> dict[str, Any]:
        fd = open_source(self._path)
        try:
            with disk_errors("read the mask ledger"):
                raw = os.pread(fd, _MAX_BYTES, 0)
        finally:
            os.close(fd)
        try:
            with self._key.view() as view:
                plain = AESGCM(view).decrypt(raw[:12], raw[12:], _LABEL)
        except (InvalidTag, ValueError):
            raise SealError(
                "a mask ledger is damaged, forged or for another key",
                found=str(self._path),
                remedy="remove the store and prepare masks anew",
            ) from None
        found: dict[str, Any] = json.loads(plain)
        return found


def _rolled_back(found: object, outside: int) -> SealError:
    return SealError(
        "a mask store is an old copy: its masks may have been used",
        found=found,
        expected=f"number {outside}",
        remedy="remove the store and prepare masks anew, with a new counter",
    )
