"""Messages from the enclave to its host: JSON lines over one inherited pipe.

Everything the host learns of a running job passes here, so the alphabet is small: the stages
of a job in their order, progress in at most 1000 steps a stage, and one last message. Progress
is a channel out of the enclave (a program chooses when and how far it reports), as is the time
at which any message arrives; quantising bounds the first to a thousand steps of any stage, and
nothing here bounds the second. The host parses what arrives as hostile.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import cenacle
from cenacle.errors import CenacleError, EnclaveError

__all__ = [
    "MAX_LINE",
    "MAX_OUTPUTS",
    "MAX_STEPS",
    "STAGES",
    "Channel",
    "Failed",
    "Finished",
    "Message",
    "OutputFile",
    "Progress",
    "Stage",
    "StageName",
    "public_error",
    "read_messages",
]

StageName = Literal[
    "starting", "attesting", "keys", "assets", "running", "outputs", "receipt", "closing"
]
STAGES: tuple[StageName, ...] = get_args(StageName)
MAX_LINE = 64 * 1024
MAX_STEPS = 1000
MAX_OUTPUTS = 256

_MAX_TEXT = 2000
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ERROR_FIELDS = ("error", "what", "found", "expected", "remedy")
_PACKAGE = str(Path(cenacle.__file__).parent) + os.sep
# Classes whose names say nothing of the data: those of our dependencies and of Python.
_KNOWN_PACKAGES = frozenset(
    ["cenacle", "cryptography", "httpx", "numpy", "pyarrow", "pydantic", "safetensors", "torch"]
)


@dataclass(frozen=True)
class Stage:
    """The job has entered this stage; stages come in order, each at most once."""

    name: StageName


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` steps of the current stage, ``total`` at most 1000."""

    done: int
    total: int


@dataclass(frozen=True)
class OutputFile:
    """A sealed file in the job's writable folder ``outputs``, and its SHA-256."""

    name: str
    digest: str


@dataclass(frozen=True)
class Finished:
    """The job is done. The host checks the files against their digests."""

    outputs: tuple[OutputFile, ...]
    receipt: OutputFile | None = None


@dataclass(frozen=True)
class Failed:
    """The job failed; ``error`` has the fields of :meth:`CenacleError.to_dict`."""

    error: dict[str, Any]

    def to_error(self) -> CenacleError:
        """The error to raise on the host."""
        return CenacleError.from_dict(self.error)


Message = Stage | Progress | Finished | Failed


def _quantise(done: int, total: int) -> Progress:
    done = min(max(done, 0), total)
    if total <= MAX_STEPS:
        return Progress(done, total)
    return Progress(done * MAX_STEPS // total, MAX_STEPS)


class _Order:
    """The order in which messages may come; the same on both ends."""

    def __init__(self) -> None:
        self._stage = -1
        self._progress: Progress | None = None
        self.ended = False

    def admit(self, message: Message) -> bool:
        """Whether this message may come now; if so, it is remembered."""
        if self.ended:
            return False
        match message:
            case Stage(name):
                index = STAGES.index(name)
                if index <= self._stage:
                    return False
                self._stage, self._progress = index, None
            case Progress(done, total):
                last = self._progress
                if last is not None and (total != last.total or done <= last.done):
                    return False
                self._progress = message
            case Finished() | Failed():
                self.ended = True
        return True


def _public_class(kind: type[BaseException]) -> str:
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _KNOWN_PACKAGES or package in sys.stdlib_module_names:
            return base.__name__
    return "Exception"


def _raised_by_cenacle(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback is code of this package."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def public_error(error: BaseException) -> dict[str, Any]:
    """What may leave the enclave of an exception.

    Of a CenacleError raised in this package: its fields, which hold no plaintext. Of anything
    else: the name of its class, or of the nearest base that Python or a dependency defines,
    and never its message, which may quote a patient's record.
    """
    if isinstance(error, CenacleError) and _raised_by_cenacle(error):
        fields = {
            name: value if value is None else str(value)[:_MAX_TEXT]
            for name, value in error.to_dict().items()
            if name in _ERROR_FIELDS
        }
        clauses = getattr(error, "clauses", None)
        if clauses and len(json.dumps(clauses)) <= MAX_LINE // 2:
            fields["clauses"] = clauses
        return fields
    if isinstance(error, MemoryError):
        return EnclaveError(
            "the enclave ran out of memory", remedy="use smaller batches or a larger machine"
        ).to_dict()
    return EnclaveError(
        "the job failed inside the enclave",
        found=_public_class(type(error)),
        remedy="run the program on made-up data outside the enclave to see the whole message",
    ).to_dict()


class Channel:
    """The enclave's end.

    Args:
        fd: the write end of the pipe; the channel owns it from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._order = _Order()
        self._sending = threading.Lock()  # two threads may have something to say

    @property
    def ended(self) -> bool:
        """Whether the last message was sent."""
        return self._order.ended

    def stage(self, name: StageName) -> None:
        """Enter a stage; raises EnclaveError if it is not after the current one."""
        fields = {"kind": "stage", "name": name}
        if name not in STAGES or not self._send(Stage(name), fields):
            raise EnclaveError("the stages of a job come in order, each once", found=name)

    def progress(self, done: int, total: int) -> None:
        """Report ``done`` of ``total``; sent only when it is a new step of the thousand."""
        if total < 1:
            raise EnclaveError("progress needs a total of at least 1", found=total)
        message = _quantise(int(done), int(total))
        self._send(message, {"kind": "progress", "done": message.done, "total": message.total})

    def finished(
        self, outputs: Iterable[OutputFile] = (), receipt: OutputFile | None = None
    ) -> None:
        """Send the last message of a job that is done."""
        listed = tuple(outputs)
        message = Finished(listed, receipt)
        for file in (*listed, *((receipt,) if receipt else ())):
            if not _FILE_NAME.fullmatch(file.name) or not _DIGEST.fullmatch(file.digest):
                raise EnclaveError("an output has no usable name or digest", found=file.name)
        fields = {
            "kind": "finished",
            "outputs": [[file.name, file.digest] for file in listed],
            "receipt": [receipt.name, receipt.digest] if receipt else None,
        }
        if len(listed) > MAX_OUTPUTS or not self._send(message, fields):
            raise EnclaveError("a job finishes once, with at most 256 outputs")

    def failed(self, error: BaseException) -> None:
        """Send the last message of a job that failed: see :func:`public_error`."""
        fields = public_error(error)
        # A host that is gone cannot be told.
        with contextlib.suppress(OSError):
            self._send(Failed(fields), {"kind": "failed", "error": fields})

    def close(self) -> None:
        """Close the pipe. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Message, fields: dict[str, Any]) -> bool:
        """Whether the message may come now; if so, it is sent."""
        line = memoryview(json.dumps(fields, separators=(",", ":")).encode() + b"\n")
        with self._sending:
            if not self._order.admit(message):
                return False
            while line:
                line = line[os.write(self._fd, line) :]
        return True


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with a line, in words of ours."""


def _parse_file(value: object) -> OutputFile:
    match value:
        case [str(name), str(digest)]:
            if _FILE_NAME.fullmatch(name) and _DIGEST.fullmatch(digest):
                return OutputFile(name, digest)
    raise _Malformed("an output without a proper name and digest")


def _parse_error(fields: dict[str, Any]) -> Failed:
    if not set(fields) <= {*_ERROR_FIELDS, "clauses"} or not isinstance(fields.get("what"), str):
        raise _Malformed("an error of another form")
    for name in _ERROR_FIELDS:
        value = fields.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= _MAX_TEXT):
            raise _Malformed("an error of another form")
    # Control characters could rewrite the terminal of whoever reads the error.
    clean = {n: _printable(v) if isinstance(v, str) else v for n, v in fields.items()}
    clauses = fields.get("clauses", [])
    if not isinstance(clauses, list):
        raise _Malformed("an error of another form")
    if clauses:
        clean["clauses"] = [_clause(clause) for clause in clauses]
    return Failed(clean)


def _clause(clause: object) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    if not isinstance(clause, dict) or not all(isinstance(v, plain) for v in clause.values()):
        raise _Malformed("a clause of another form")
    return {
        _printable(str(name)): _printable(value) if isinstance(value, str) else value
        for name, value in clause.items()
    }


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)


def _parse(line: bytes) -> Message:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise _Malformed("a line that is not JSON") from None
    if not isinstance(fields, dict):
        raise _Malformed("a line that is not an object")
    match fields:
        case {"kind": "stage", "name": str(name), **rest} if not rest and name in STAGES:
            return Stage(name)
        case {"kind": "progress", "done": int(done), "total": int(total), **rest} if not rest:
            # type(): True and False are integers to isinstance.
            if type(done) is type(total) is int and 1 <= total <= MAX_STEPS and 0 <= done <= total:
                return Progress(done, total)
            raise _Malformed("progress out of range")
        case {"kind": "finished", "outputs": list(files), "receipt": receipt, **rest} if not rest:
            if len(files) > MAX_OUTPUTS:
                raise _Malformed("too many outputs")
            outputs = tuple(_parse_file(file) for file in files)
            return Finished(outputs, None if receipt is None else _parse_file(receipt))
        case {"kind": "failed", "error": dict(error), **rest} if not rest:
            return _parse_error(error)
    raise _Malformed("a message of unknown kind")


def _violation(found: str) -> EnclaveError:
    return EnclaveError(
        "the enclave broke the protocol and cannot be believed",
        found=found,
        remedy="run the same version of cenacle inside and outside, and approve the program anew",
    )


def read_messages(fd: int) -> Iterator[Message]:
    """The host's end: messages until the enclave closes the pipe.

    Raises EnclaveError for anything that the protocol does not allow: a line over 64 KiB or
    without an end, unknown kinds or fields, values out of range, a wrong order, anything after
    the last message. Does not close ``fd``.
    """
    order = _Order()
    buffer = bytearray()
    while chunk := os.read(fd, MAX_LINE):
        buffer += chunk
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if len(line) > MAX_LINE:
                raise _violation("a line that is too long")
            try:
                message = _parse(line)
            except _Malformed as error:
                raise _violation(str(error)) from None
            if not order.admit(message):
                raise _violation("a message out of order")
            yield message
        if len(buffer) > MAX_LINE:
            raise _violation("a line that is too long")
    if buffer:
        raise _violation("a line without an end")
