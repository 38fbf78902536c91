"""Frames between the agent and the process that runs a program: a JSON header and a payload.

``header length (4) | payload length (8) | header | payload``, big endian. The agent reads what
the program's process sends as hostile: lengths are bounded before anything is allocated.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Final

from cenacle.errors import EnclaveError

__all__ = ["MAX_PAYLOAD", "read_frame", "send_frame"]

_HEAD: Final = struct.Struct(">IQ")
_MAX_HEADER: Final = 1 << 20
MAX_PAYLOAD: Final = 1 << 36


def send_frame(
    connection: socket.socket, header: dict[str, Any], payload: bytes | memoryview = b""
) -> None:
    """Send one frame; blocks while the other side does not read."""
    encoded = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    connection.sendall(_HEAD.pack(len(encoded), len(payload)) + encoded)
    connection.sendall(payload)


def _read(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EnclaveError(
                "the program's process ended without a result",
                found="a closed connection",
                expected="an answer",
                remedy="run the program on made-up data outside the enclave to see why",
            )
        view = view[count:]
    return buffer


def read_frame(
    connection: socket.socket, max_payload: int = MAX_PAYLOAD
) -> tuple[dict[str, Any], bytearray]:
    """Receive one frame.

    Raises:
        EnclaveError: the other side is gone, or sent what is no frame.
    """
    header_length, payload_length = _HEAD.unpack(_read(connection, _HEAD.size))
    malformed = EnclaveError(
        "the program's process broke the protocol",
        found=f"a frame of {header_length} and {payload_length} bytes",
        expected="a JSON object and a bounded payload",
    )
    if header_length > _MAX_HEADER or payload_length > max_payload:
        raise malformed
    try:
        header = json.loads(_read(connection, header_length))
    except (ValueError, RecursionError):
        raise malformed from None
    if not isinstance(header, dict):
        raise malformed
    return header, _read(connection, payload_length)
