"""How the enclave and a worker speak: frames of JSON over a Unix socket.

A frame is its length (4 bytes, big-endian) and that many bytes of JSON. The enclave sends
arrays of requests::

    ["map", region, size, writable]                       with the region's descriptor
    ["put", handle, region, offset, dtype, shape]
    ["call", operation, attributes, result, operands]
    ["get", ticket, handle, region, offset, dtype, shape]
    ["drop", handles]

and the worker answers with one greeting, ``{"hello": 1, "layers": [...], "device": "..."}``,
and then one object for each ``get``, in order: ``{"ticket": n, "seconds": s}`` or
``{"ticket": n, "error": "..."}``. It says nothing about shapes or places: the enclave knows
the one and chooses the other. This module imports no torch.

To a worker on another machine (:mod:`~cenacle.accelerators.remote_worker`) requests cross one
by one, without regions: ``["put", handle, dtype, shape, phase]`` followed by the tensor's
bytes, and ``["get", ticket, handle, dtype, shape]``, whose answer is followed by the result's.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

__all__ = [
    "LAYERS",
    "MAX_ANSWER",
    "MAX_REQUEST",
    "Frames",
    "clean",
    "frame",
    "greeting",
    "is_duration",
    "read_exactly",
    "read_frame",
]

MAX_REQUEST: Final = 1 << 20
MAX_ANSWER: Final = 4096
LAYERS: Final = ("process", "landlock", "seccomp")
"""What may confine a worker; a greeting names those that do."""

_LENGTH: Final = struct.Struct(">I")
_MAX_TEXT: Final = 300


def frame(message: Any) -> bytes:
    """A message as it crosses."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come and gives whole messages.

    Args:
        limit: bytes that a frame's JSON may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes.

        Raises:
            ValueError: a frame is too long, or no JSON. Nothing after it can be read.
        """
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > self._limit:
                raise ValueError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield _parse(body)

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._bytes)


def clean(text: str) -> str:
    """At most 300 printable ASCII characters: what others wrote may go to a terminal."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:_MAX_TEXT])


def greeting(answer: dict[str, Any]) -> str:
    """A worker's greeting for people: its device, and what confines it.

    Raises:
        ValueError: it is no greeting.
    """
    device, layers = answer.get("device"), answer.get("layers")
    if (
        answer.keys() != {"hello", "layers", "device"}
        or answer["hello"] != 1
        or not isinstance(device, str)
        or not isinstance(layers, list)
        or len(layers) > len(LAYERS)
        or any(layer not in LAYERS for layer in layers)
    ):
        raise ValueError("no greeting")
    return f"{clean(device)[:100]}, confined by {', '.join(layers) or 'nothing'}"


def is_duration(value: object) -> bool:
    """Whether it is a number of seconds that can be added up."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_exactly(connection: socket.socket, target: memoryview) -> None:
    """Fill ``target``; raises :class:`EOFError` if the stream ends before."""
    while target:
        count = connection.recv_into(target, 0, socket.MSG_WAITALL)
        if count == 0:
            raise EOFError
        target = target[count:]


def read_frame(connection: socket.socket, limit: int, begun: bytes | None = None) -> Any:
    """The next message of a stream that blocks; None at its end.

    Args:
        connection: the stream.
        limit: bytes that the frame's JSON may have.
        begun: up to 4 bytes of it that were received already.

    Raises:
        ValueError: a frame is too long, or no JSON.
        EOFError: the stream ends within a frame.
    """
    head = bytearray(_LENGTH.size)
    count = connection.recv_into(head) if begun is None else len(begun)
    if count == 0:
        return None
    head[:count] = begun or head[:count]
    read_exactly(connection, memoryview(head)[count:])
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    body = bytearray(length)
    read_exactly(connection, memoryview(body))
    return _parse(bytes(body))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError("a message that is no JSON") from None
