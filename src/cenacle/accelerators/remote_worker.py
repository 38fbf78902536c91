"""A worker at the end of a stream: ``python -m cenacle.accelerators.remote_worker ...``.

As :mod:`~cenacle.accelerators.worker`, with the same arguments, layers and greeting; but
tensors cross in the stream itself, since another machine shares no memory. The bytes of a
``put`` follow its frame, and the bytes of a result follow its answer.
"""

from __future__ import annotations

import math
import socket
import sys
import time
from typing import Any, Final

from cenacle.accelerators.wire import MAX_REQUEST, clean, frame, read_exactly, read_frame
from cenacle.accelerators.worker import Failure, Store, run

__all__: list[str] = []

_PAGE: Final = 4096


class _StreamServer(Store):
    """Requests and tensors from one stream, one after the other."""

    def serve(self, connection: socket.socket) -> None:
        seconds = 0.0
        while (request := read_frame(connection, MAX_REQUEST)) is not None:
            name, *arguments = request
            if name == "put":
                self._put(connection, *arguments)
                continue
            begin = time.perf_counter()
            if name == "get":
                self._get(connection, seconds, *arguments)
                seconds = 0.0
                continue
            if name == "call":
                self.call(*arguments)
            else:
                self.drop(*arguments)
            seconds += time.perf_counter() - begin

    def _put(
        self, connection: socket.socket, handle: int, dtype: str, shape: list[int], phase: int
    ) -> None:
        kind = getattr(self.torch, dtype)
        size = math.prod(shape) * kind.itemsize
        whole = self.torch.empty(size + _PAGE, dtype=self.torch.uint8)
        begin = (phase - whole.data_ptr()) % 64  # see SharedStaging.copy
        flat = whole[begin : begin + size]
        read_exactly(connection, memoryview(flat.numpy()))
        value = flat.view(kind).view(shape)
        self.kept[handle] = value.to(self.device) if self.cuda else value

    def _get(
        self,
        connection: socket.socket,
        seconds: float,
        ticket: int,
        handle: int,
        dtype: str,
        shape: list[int],
    ) -> None:
        begin = time.perf_counter()
        value: Any = self.kept.get(handle, Failure("a tensor is not there"))
        try:
            if isinstance(value, Failure):
                raise RuntimeError(value.reason)
            value = value.cpu().contiguous()
            if list(value.shape) != shape or value.dtype != getattr(self.torch, dtype):
                raise ValueError(f"a result of the form {tuple(value.shape)}, {value.dtype}")
        except Exception as error:
            connection.sendall(frame({"ticket": ticket, "error": clean(str(error))}))
            return
        seconds += time.perf_counter() - begin
        connection.sendall(frame({"ticket": ticket, "seconds": seconds}))
        if value.numel():
            connection.sendall(memoryview(value.reshape(-1).view(self.torch.uint8).numpy()))


if __name__ == "__main__":
    run(sys.argv[1:], _StreamServer)
