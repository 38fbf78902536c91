"""The link between host and guest: one virtio port, frames in order, both ends of it.

A frame is its kind (one letter), a number (of a connection, or 0) and a payload of at most
64 KiB. One ordered link and not several is what makes files safe: a file that the agent wrote
is sent before the bytes by which it tells the broker of it, and the host has it on its disk
before it forwards those bytes.

Both ends take what arrives as hostile: the guest's machine belongs to the host, and the host
must not be harmed by what an enclave runs.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final, NamedTuple

from cenacle.errors import EnclaveError

__all__ = [
    "CHUNK",
    "MAX_FILE",
    "PORT",
    "SERVING",
    "VERSION",
    "Frame",
    "FrameReader",
    "Kind",
    "check_path",
    "frame",
    "json_frame",
]

PORT: Final = "cenacle.link"
"""Name of the virtio port."""

SERVING: Final = b"serving"
"""Payload of an OPEN that means the host's server."""

VERSION: Final = 1
CHUNK: Final = 64 * 1024
MAX_FILE: Final = 1 << 40
_MAX_DEPTH: Final = 8
_HEAD: Final = struct.Struct("<cII")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


class Kind(Enum):
    """What a frame is for. H: host to guest, G: guest to host."""

    HELLO = b"H"
    """G: the guest is ready; JSON with its version."""
    CONFIG = b"J"
    """H: a piece of the JSON that says what to run; an empty one ends it."""
    FILE = b"F"
    """Both: a file begins; JSON with ``mount``, ``path`` (empty for a mount that is one) and
    ``size``. Its bytes follow as DATA."""
    DATA = b"D"
    """Both: bytes of the file that began last."""
    REMOVED = b"R"
    """G: a file is gone; JSON with ``mount`` and ``path``."""
    START = b"S"
    """H: every file is there; run."""
    MESSAGE = b"M"
    """G: bytes of the agent's channel."""
    OPEN = b"O"
    """G: the agent connects to the broker, or where the payload is :data:`SERVING` to the host's
    server; the number is the connection's from now on."""
    BYTES = b"B"
    """Both: bytes of a connection."""
    CLOSED = b"C"
    """Both: this side sends no more on a connection."""
    ABORTED = b"X"
    """Both: a connection is broken."""
    ENDED = b"E"
    """G: the agent has ended; JSON with its exit ``status``."""


class Frame(NamedTuple):
    """One frame."""

    kind: Kind
    number: int
    payload: bytes

    def fields(self) -> dict[str, Any]:
        """The payload as a JSON object; raises EnclaveError."""
        try:
            found = json.loads(self.payload)
        except (ValueError, RecursionError):
            raise _broken("a frame that is not JSON") from None
        if not isinstance(found, dict):
            raise _broken("a frame that is no object")
        return found


def frame(kind: Kind, payload: bytes | memoryview = b"", number: int = 0) -> bytes:
    """The bytes of a frame; the payload is at most :data:`CHUNK` bytes."""
    if len(payload) > CHUNK:
        raise EnclaveError("a frame is too long", found=len(payload), expected=CHUNK)
    return _HEAD.pack(kind.value, number, len(payload)) + bytes(payload)


def json_frame(kind: Kind, fields: dict[str, Any]) -> bytes:
    """The bytes of a frame that carries a JSON object."""
    return frame(kind, json.dumps(fields, separators=(",", ":")).encode())


class FrameReader:
    """Frames from bytes as they come.

    Args:
        expected: the kinds that the other side may send.
    """

    def __init__(self, expected: frozenset[Kind]) -> None:
        self._expected = expected
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now.

        Raises:
            EnclaveError: the other side does not speak this protocol.
        """
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            letter, number, length = _HEAD.unpack_from(self._buffer)
            try:
                kind = Kind(letter)
            except ValueError:
                raise _broken("a frame of unknown kind") from None
            if kind not in self._expected:
                raise _broken(f"a frame that is not for this side: {kind.name}")
            if length > CHUNK:
                raise _broken("a frame that is too long")
            if len(self._buffer) < _HEAD.size + length:
                return
            payload = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            yield Frame(kind, number, payload)


def check_path(path: object, *, may_be_empty: bool = False) -> str:
    """A path that stays below its mount, as it was given; raises EnclaveError."""
    if path == "" and may_be_empty:
        return ""
    if isinstance(path, str):
        parts = path.split("/")
        if len(parts) <= _MAX_DEPTH and all(_PART.fullmatch(part) for part in parts):
            return path
    raise _broken("a file with an unusable name")


def _broken(found: str) -> EnclaveError:
    return EnclaveError(
        "the link between an enclave's machine and its host broke the protocol",
        found=found,
        remedy="run an image that this version of cenacle has built",
    )
