"""Frames between the agent and the process that runs a program: a JSON header and a payload.

``header length (4) | payload length (8) | header | payload``, big endian. The agent reads what
the program's process sends as hostile: lengths are bounded, and memory grows with what really
arrives, never with what a length promises.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Final

from cenacle.errors import EnclaveError

__all__ = ["HEAD", "MAX_PAYLOAD", "read_frame", "send_frame"]

HEAD: Final = struct.Struct(">IQ")
"""The lengths of header and payload, which a frame begins with."""
_MAX_HEADER: Final = 1 << 20
_STEP: Final = 1 << 24
MAX_PAYLOAD: Final = 1 << 36


def _gone(found: str) -> EnclaveError:
    return EnclaveError(
        "the program's process ended without a result",
        found=found,
        expected="an answer",
        remedy="run the program on made-up data outside the enclave to see why",
    )


def send_frame(
    connection: socket.socket, header: dict[str, Any], payload: bytes | memoryview = b""
) -> None:
    """Send one frame; blocks while the other side does not read.

    Raises:
        EnclaveError: the other side is gone.
    """
    encoded = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    try:
        connection.sendall(HEAD.pack(len(encoded), len(payload)) + encoded)
        if payload:  # sending nothing would fail if the reader is done with the frame and gone
            connection.sendall(payload)
    except OSError as error:
        raise _gone(error.strerror or type(error).__name__) from None


def _read(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray()
    done = 0
    while done < length:
        if done == len(buffer):
            buffer.extend(bytes(min(_STEP, length - done)))
        try:
            with memoryview(buffer) as view:
                count = connection.recv_into(view[done:])
        except OSError as error:
            raise _gone(error.strerror or type(error).__name__) from None
        if count == 0:
            raise _gone("a closed connection")
        done += count
    return buffer


def read_frame(
    connection: socket.socket, max_payload: int = MAX_PAYLOAD
) -> tuple[dict[str, Any], bytearray]:
    """Receive one frame.

    Raises:
        EnclaveError: the other side is gone, or sent what is no frame.
    """
    header_length, payload_length = HEAD.unpack(_read(connection, HEAD.size))
    # No number of theirs in it: a program could say something of its data by a length.
    malformed = EnclaveError(
        "the program's process broke the protocol",
        found="bytes that are no frame",
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
