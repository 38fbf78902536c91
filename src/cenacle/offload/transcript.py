"""What each worker received, written down for audits; ``docs/transcript.md`` has the format.

``transcript.jsonl`` has one JSON object a line: tensors that were put (``put``: worker, layer,
role, handle, shape, dtype, and the file and name under which its bytes lie) and operations
that were asked for (``call``: worker, layer, operation, attributes, result, operands). The
tensors lie in ``tensors-NNNN.safetensors``, named by the number of their event.
:func:`cenacle.offload.transcript_reader.read_transcript` reads them.

Nothing is recorded that was not sent: a tensor's elements alone are written, not the storage
that it is a view of. A tensor file is complete before a line speaks of it, and lines are
appended; so after a crash or with a full disk the folder holds a shorter transcript, and a
true one.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cenacle.accelerators.protocol import Operation
from cenacle.errors import ConflictError, InputError, UnavailableError

__all__ = ["FORMAT", "LINES_FILE", "Transcript"]

FORMAT: Final = "cenacle-transcript/1"
LINES_FILE: Final = "transcript.jsonl"
_FILE_BYTES: Final = 256 * 1024 * 1024
_WAITING_LINES: Final = 4096

_log = logging.getLogger(__name__)


class Transcript:
    """Records into a folder, or (without one) into memory.

    Args:
        folder: a new or empty one; nobody but its owner gets access.
        file_bytes: how much may wait in memory to be written, and so about the size of files.

    Attributes:
        lines: events in their order, if there is no folder; ``tensors``: by event number.

    Raises:
        ConflictError: the folder holds something already.
        UnavailableError: it cannot be made.
    """

    def __init__(self, folder: Path | None = None, *, file_bytes: int = _FILE_BYTES) -> None:
        self.lines: list[dict[str, Any]] = []
        self.tensors: dict[int, torch.Tensor] = {}
        self._number = 0
        self._writer: _Writer | None = None
        if folder is not None:
            self._writer = _Writer(folder, file_bytes)
            # When it is forgotten, and at exit: what was sent is to be on record.
            self._finalizer = weakref.finalize(self, self._writer.give_up)

    def put(self, worker: str, site: str, role: str, handle: int, value: torch.Tensor) -> None:
        """A tensor goes to a worker.

        Raises:
            UnavailableError: the record cannot be written; nothing more may be sent.
        """
        own = value.detach().clone(memory_format=torch.contiguous_format)
        line: dict[str, Any] = {
            "event": "put",
            "worker": worker,
            "layer": site,
            "role": role,
            "handle": handle,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        if self._writer is None:
            self.tensors[self._number] = own
        self._add(line, own)

    def call(
        self, worker: str, site: str, operation: Operation, result: int, operands: Sequence[int]
    ) -> None:
        """A worker is asked to compute.

        Raises:
            UnavailableError: as :meth:`put`.
        """
        line = {
            "event": "call",
            "worker": worker,
            "layer": site,
            "operation": operation.name,
            "attributes": dict(operation.attributes),
            "result": result,
            "operands": list(operands),
        }
        self._add(line, None)

    def flush(self) -> None:
        """Write what waits; a no-op in memory. Raises :class:`UnavailableError`."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what waits and the end mark. Safe to call twice."""
        if self._writer is not None and self._finalizer.alive:
            self._writer.end()
            self._finalizer.detach()

    def _add(self, line: dict[str, Any], tensor: torch.Tensor | None) -> None:
        if self._writer is None:
            self.lines.append(line)
        else:
            if not self._finalizer.alive:
                raise InputError(
                    "a transcript was closed already", remedy="record into another folder"
                )
            self._writer.add(self._number, line, tensor)
        self._number += 1


class _Writer:
    """Apart from the transcript, so that it can outlive it."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._lines: list[bytes] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._file = 0
        self._written = 0  # bytes of complete lines in the file
        self._counts = {"put": 0, "call": 0}
        self._failure: str | None = None
        self._process = os.getpid()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            occupied = any(folder.iterdir())
        except OSError as error:
            raise UnavailableError(
                "a transcript's folder cannot be made", found=f"{folder}: {error.strerror}"
            ) from None
        if occupied:
            raise ConflictError(
                "a transcript is there already, or something else",
                found=str(folder),
                expected="a new or empty folder",
                remedy="record into another folder",
            )
        self._lines.append(_encoded({"event": "begin", "format": FORMAT}))
        self.flush()

    def add(self, number: int, line: dict[str, Any], tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            line |= {"file": _tensor_file(self._file), "tensor": str(number)}
            self._tensors[str(number)] = tensor
            self._bytes += tensor.nbytes
        self._counts[line["event"]] += 1
        self._lines.append(_encoded(line))
        if self._bytes >= self._file_bytes or len(self._lines) >= _WAITING_LINES:
            self.flush()

    def end(self) -> None:
        self._lines.append(_encoded({"event": "end", **self._counts}))
        self.flush()

    def give_up(self) -> None:
        """Without an end mark: the session did not end in good order."""
        if os.getpid() != self._process:
            return  # a fork's copy; the original writes
        try:
            self.flush()
        except UnavailableError as error:
            _log.error("%s", error)

    def flush(self) -> None:
        if self._failure is not None:
            self._fail(self._failure)
        try:
            if self._tensors:
                self._write_tensors(self._folder / _tensor_file(self._file))
                self._tensors, self._bytes, self._file = {}, 0, self._file + 1
            self._append(b"".join(self._lines))
            self._lines.clear()
        except (OSError, SafetensorError) as error:
            # Once something is missing, nothing may follow: the record would not be true.
            self._failure = getattr(error, "strerror", None) or str(error)
            self._tensors, self._bytes = {}, 0
            self._lines.clear()
            self._fail(self._failure)

    def _fail(self, reason: str) -> None:
        raise UnavailableError(
            "a transcript cannot be written, so nothing more is sent",
            found=f"{self._folder}: {reason}",
            remedy="make room there; what was recorded before is complete",
        )

    def _write_tensors(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        try:
            save_file(self._tensors, partial)
            partial.chmod(0o600)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def _append(self, text: bytes) -> None:
        path = self._folder / LINES_FILE
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.lseek(fd, self._written, os.SEEK_SET)
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, self._written)
            raise
        finally:
            os.close(fd)
        self._written += len(text)


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _tensor_file(number: int) -> str:
    return f"tensors-{number:04d}.safetensors"
