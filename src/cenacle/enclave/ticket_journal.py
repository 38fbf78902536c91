"""The journal of used tickets: a file of the host's that the host can neither read nor turn back.

::

    header   magic | contract | 16 random bytes | base number | base head
    batch    kind | number | records | length | nonce | AES-256-GCM of the records
    batch    ...

A batch is bound to its place: its associated data are its own first fields, the contract and the
*head* before it, and the head after it is ``SHA-256(head before || batch)``. The first head is the
header's digest. Number and head are kept outside, by a counter that only grows (see
:class:`~cenacle.enclave.tickets.StateCounter`), which is told of a batch after it is on the disk.
So whatever the folder holds, at opening it is one of these:

- it ends at the counter's number, with its head: nothing happened since;
- one batch more: it was written and the counter not told, or its answer lost. The counter is told
  (again), and nothing is lost or done twice;
- anything else is an old copy, cut short, altered, of another contract, or of another history.

Bytes behind the last whole batch were being written when the process or the machine died. The
counter was not told of them, so nothing left the enclave for them: they are removed.

The key is the enclave's. Without it a host can add no batch, and sees sizes and times alone.

When a journal is opened whose batches are small, or mostly of tickets that have expired, it is
written anew as one *snapshot* batch that goes on from the head before (:meth:`Journal.replace`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, ConflictError, SealError
from cenacle.sealing.disk import AtomicFile, disk_errors, open_source, pwrite_all

__all__ = ["BURNS", "NOTHING", "SNAPSHOT", "Batch", "Journal", "State"]

BURNS: Final = 1
SNAPSHOT: Final = 2

_MAGIC: Final = b"cenacle.tickets1"
_HEADER: Final = struct.Struct(">16s32s16sQ32s")
_BATCH: Final = struct.Struct(">IQIQ")  # kind, number, records, length of the ciphertext
_NONCE: Final = 12
_TAG: Final = 16
_DOMAIN: Final = b"cenacle/ticket-journal/v1"
_BUFFER: Final = 1 << 20
_MAX_PLAIN: Final = 1 << 30


@dataclass(frozen=True)
class State:
    """Number and digest of the newest batch; ``digest`` is ``None`` before the first."""

    number: int
    digest: str | None


NOTHING: Final = State(0, None)


@dataclass(frozen=True)
class Batch:
    """What one batch says, verified."""

    kind: int
    records: int
    plain: bytes


def _digest(head: bytes) -> str:
    return "sha256:" + head.hex()


class Journal:
    """An open journal. One process at a time has it; not for use by two threads at once.

    Attributes:
        size: bytes of the file up to the end of the last batch.
    """

    def __init__(self, folder: Path, contract: str, key: SecretBytes) -> None:
        self.size = 0
        self._number = 0
        self._before = b""
        self._path = folder / "journal"
        self._contract_bytes = bytes.fromhex(contract.removeprefix("sha256:"))
        self._head = b""
        self._fd = -1
        with key.view() as view:
            self._aead = AESGCM(bytes(view))
        with disk_errors(f"open the ticket journal in {folder}"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConflictError(
                "a ticket journal is in use by another process",
                found=str(folder),
                expected="one enclave for one folder",
                remedy="stop the other one",
            ) from None

    @property
    def state(self) -> State:
        """Of the last batch."""
        return State(self._number, _digest(self._head)) if self._number else NOTHING

    @property
    def previous(self) -> State:
        """Of the batch before the last one."""
        return State(self._number - 1, _digest(self._before)) if self._number > 1 else NOTHING

    # ------------------------------------------------------------------ opening

    def replay(self, known: State) -> Iterator[Batch]:
        """Open the file, or make it, and give every batch, oldest first.

        What was given counts once the iterator is exhausted; then the journal can be appended to.

        Args:
            known: the counter's newest.

        Raises:
            SealError: the file is not what the counter knows of, or one batch ahead of that.
            UnavailableError: the disk cannot be read.
        """
        if not self._path.exists():
            if known.number:
                raise self._refusal("the ticket journal is missing", "no file", known)
            self._create(0, bytes(32))
        fd = open_source(self._path)
        with os.fdopen(fd, "rb", _BUFFER) as file, disk_errors(f"read {self._path}"):
            length = os.fstat(fd).st_size
            self._begin(file.read(_HEADER.size), known)
            while (batch := self._next(file, length, known)) is not None:
                yield batch
        with disk_errors(f"open {self._path}"):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.ftruncate(self._fd, self.size)

    def _begin(self, header: bytes, known: State) -> None:
        foreign = self._refusal("a ticket journal is not this contract's", "another file", known)
        if len(header) != _HEADER.size:
            raise foreign
        magic, contract, _, self._number, head = _HEADER.unpack(header)
        if magic != _MAGIC or contract != self._contract_bytes:
            raise foreign
        self._head = head if self._number else hashlib.sha256(header).digest()
        self.size = _HEADER.size
        self._check(known)

    def _next(self, file: BinaryIO, end: int, known: State) -> Batch | None:
        """The next whole batch; ``None`` at the end of what counts."""
        prefix = file.read(_BATCH.size)
        problem = "the end" if not prefix else "a batch was cut off"
        if len(prefix) == _BATCH.size:
            kind, number, records, length = _BATCH.unpack(prefix)
            left = end - self.size - _BATCH.size - _NONCE
            if number == self._number + 1 and _TAG <= length <= left:
                sealed = file.read(_NONCE + length)
                plain = self._decrypt(prefix, sealed)
                if plain is not None:
                    if (kind == SNAPSHOT) != self._lacks_snapshot:
                        raise self._without_beginning(known)
                    self._move(prefix, sealed)
                    if self._number >= known.number:
                        self._check(known)
                    return Batch(kind, records, plain)
                problem = "a batch does not decrypt"
        if self._lacks_snapshot:
            raise self._without_beginning(known)
        if self._number < known.number:
            raise self._refusal(
                "the ticket journal is an old copy, was cut short, or was altered",
                f"{problem} after batch {self._number}",
                known,
            )
        return None

    def _decrypt(self, prefix: bytes, sealed: bytes) -> bytes | None:
        try:
            return self._aead.decrypt(sealed[:_NONCE], sealed[_NONCE:], self._bound(prefix))
        except InvalidTag:
            return None

    @property
    def _lacks_snapshot(self) -> bool:
        """Right behind a header that goes on from an earlier file, which a snapshot sums up."""
        return self.size == _HEADER.size and self._number > 0

    def _without_beginning(self, known: State) -> SealError:
        return self._refusal(
            "the ticket journal was altered", f"no beginning before batch {self._number}", known
        )

    def _check(self, known: State) -> None:
        if self._number == known.number and self.state != known:
            raise self._refusal(
                "the ticket journal has another history than was recorded",
                f"batch {self._number} with another digest",
                known,
            )
        if self._number > known.number + (0 if self._lacks_snapshot else 1):
            raise self._refusal(
                "the ticket journal is ahead of what was recorded",
                f"batch {self._number}",
                known,
                remedy="the broker's store is an old copy, or another contract's journal was "
                "put here; ask the broker's operator",
            )

    def _refusal(self, what: str, found: str, known: State, remedy: str | None = None) -> SealError:
        return SealError(
            what,
            found=f"{found} in {self._path.parent}",
            expected=f"batch {known.number} with {known.digest}"
            if known.number
            else "a new journal",
            remedy=remedy
            or "give the folder that the last enclave of this contract wrote; if it "
            "is lost, the contract's tickets are lost with it",
        )

    # ------------------------------------------------------------------ writing

    def append(self, records: int, plain: bytes) -> None:
        """Put a batch at the end; it is on the disk when this returns.

        Raises:
            UnavailableError: the disk has no room or fails; the journal is as it was before.
        """
        prefix, sealed = self._seal(BURNS, records, plain)
        try:
            with disk_errors("write the ticket journal"):
                pwrite_all(self._fd, prefix + sealed, self.size)
                os.fdatasync(self._fd)  # the file's length included
        except CenacleError:
            # If this fails too, the next batch is written over what is there.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        self._move(prefix, sealed)

    def replace(self, records: int, plain: bytes) -> None:
        """Begin a new file with a snapshot of everything, which counts as one more batch.

        Raises:
            UnavailableError: the disk has no room or fails; the journal is as it was before.
        """
        prefix, sealed = self._seal(SNAPSHOT, records, plain)
        self._create(self._number, self._head, prefix, sealed)
        with disk_errors(f"open {self._path}"):
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.close(self._fd)
        self._fd, self.size = fd, _HEADER.size
        self._move(prefix, sealed)

    def can_hold(self, size: int) -> bool:
        """Whether a snapshot of ``size`` bytes fits into one batch."""
        return size <= _MAX_PLAIN

    def _create(self, number: int, head: bytes, *parts: bytes) -> None:
        identity = secrets.token_bytes(16)
        header = _HEADER.pack(_MAGIC, self._contract_bytes, identity, number, head)
        with AtomicFile(self._path, 0o600) as file:
            with disk_errors("write the ticket journal"):
                offset = 0
                for part in (header, *parts):
                    pwrite_all(file.fd, part, offset)
                    offset += len(part)
            file.commit()

    def _seal(self, kind: int, records: int, plain: bytes) -> tuple[bytes, bytes]:
        prefix = _BATCH.pack(kind, self._number + 1, records, len(plain) + _TAG)
        nonce = secrets.token_bytes(_NONCE)
        return prefix, nonce + self._aead.encrypt(nonce, plain, self._bound(prefix))

    def _bound(self, prefix: bytes) -> bytes:
        """All of it of a fixed length."""
        return _DOMAIN + self._contract_bytes + self._head + prefix

    def _move(self, prefix: bytes, sealed: bytes) -> None:
        head = hashlib.sha256(self._head)
        head.update(prefix)
        head.update(sealed)
        self._before, self._head = self._head, head.digest()
        self._number += 1
        self.size += len(prefix) + len(sealed)

    def close(self) -> None:
        """Let the file and the lock go. Safe to call twice."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
