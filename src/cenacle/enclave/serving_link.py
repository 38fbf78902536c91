"""The enclave's end of the connection to its host's server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from cenacle.enclave.serving_messages import Malformed, Message
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.errors import EnclaveError

__all__ = ["ServingLink"]

_BUFFERS = 512  # that one sendmsg takes; IOV_MAX is 1024


class ServingLink:
    """One connection; one thread receives, any may send.

    Args:
        connection: to the host; the link owns it from now on.
        max_payload: bytes that may follow the header of a frame from the host.
    """

    def __init__(self, connection: socket.socket, max_payload: int) -> None:
        self._socket = connection
        self._decoder = Decoder("to-enclave", max_payload)
        self._sending = threading.Lock()
        self.gone = False

    @classmethod
    def connect(cls, path: Path, max_payload: int) -> Self:
        """Connect to the host's server.

        Raises:
            EnclaveError: nobody listens there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise EnclaveError(
                "the host's server cannot be reached from the enclave",
                found=error.strerror or type(error).__name__,
                remedy="start the job with `cenacle serve`",
            ) from None
        return cls(connection, max_payload)

    def messages(self) -> Iterator[Message | Malformed]:
        """What the host sends, until it closes the connection or breaks the protocol.

        Either way nothing more can come, so both end the same.
        """
        while True:
            try:
                with self._decoder.buffer() as room:
                    count = self._socket.recv_into(room)
                message = self._decoder.received(count) if count else None
            except (OSError, EnclaveError):
                return
            if count == 0:
                return
            if message is not None:
                yield message

    def send(self, message: Message) -> None:
        """Send; blocks while the host does not read. A host that is gone is told nothing."""
        views = [memoryview(part).cast("B") for part in encode(message) if len(part)]
        with self._sending:
            try:
                while views:
                    sent = self._socket.sendmsg(views[:_BUFFERS])
                    while views and sent >= len(views[0]):
                        sent -= len(views.pop(0))
                    if sent:
                        views[0] = views[0][sent:]
            except OSError:
                self.gone = True

    def end(self) -> None:
        """End the connection, which wakes the thread that receives."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.gone = True

    def close(self) -> None:
        """Close the socket; only once no thread uses it."""
        self._socket.close()
