"""The worker's side: ``python -m cenacle.accelerators.worker SOCKET PARENT DEVICE THREADS``.

It confines itself, imports torch, greets, and then does what it is told until its socket is
closed. It holds no key and imports nothing that could: tensors in, tensors out. A request that
fails makes its result a failure, which the next ``get`` of it reports.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from cenacle.accelerators.confine import confine
from cenacle.accelerators.wire import MAX_REQUEST, Frames, clean, frame

__all__ = ["Failure", "Store", "run"]

_CHUNK: Final = 1 << 16
_MAX_DESCRIPTORS: Final = 16


class Failure:
    """Kept in the place of a result that could not be computed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Store(ABC):
    """Keeps tensors by handle, and computes new ones from them.

    Attributes:
        kept: tensors on the device, or a :class:`Failure`.
    """

    def __init__(self, device: str) -> None:
        import torch  # noqa: PLC0415 - after the process has confined itself

        from cenacle.accelerators.operations import execute  # noqa: PLC0415
        from cenacle.accelerators.protocol import Operation  # noqa: PLC0415

        self.torch, self._execute, self._operation = torch, execute, Operation
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.zeros(1, device=self.device)  # fails here and now if there is no device
            # As exact as the enclave's own arithmetic, and the same every time.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        self.kept: dict[int, Any] = {}

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Do what is asked for until the connection ends."""

    def describe(self) -> str:
        if self.cuda:
            return self.torch.cuda.get_device_name(self.device)
        return "cpu"

    def call(self, name: str, attributes: dict[str, Any], result: int, operands: list[int]) -> None:
        values = [self.kept.get(one, Failure("an operand is not there")) for one in operands]
        failed = [value for value in values if isinstance(value, Failure)]
        if failed:
            self.kept[result] = failed[0]
            return
        try:
            self.kept[result] = self._execute(self._operation(name, attributes), values)
        except Exception as error:
            self.kept[result] = Failure(f"{type(error).__name__}: {error}")

    def drop(self, handles: list[int]) -> None:
        for handle in handles:
            self.kept.pop(handle, None)


class _Server(Store):
    """Finds tensors in shared memory, and carries out requests in their order."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._regions: dict[int, mmap.mmap] = {}
        self._seconds = 0.0  # spent on requests since the last answer
        self._requests: dict[str, Callable[..., bytes | None]] = {
            "put": self._put,
            "call": self.call,
            "get": self._get,
            "drop": self.drop,
        }

    def serve(self, connection: socket.socket) -> None:
        frames = Frames(MAX_REQUEST)
        descriptors: list[int] = []
        while True:
            data, received, _, _ = socket.recv_fds(connection, _CHUNK, _MAX_DESCRIPTORS)
            descriptors += received
            if not data:
                return
            for requests in frames.feed(data):
                for name, *arguments in requests:
                    if name == "map":
                        fd = descriptors.pop(0)
                        self.map(fd, *arguments)
                        os.close(fd)
                    elif (answer := self.handle(name, arguments)) is not None:
                        connection.sendall(answer)

    def map(self, fd: int, region: int, size: int, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
        with contextlib.suppress(OSError):  # where the kernel offers it
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self._regions[region] = mapped

    def handle(self, name: str, arguments: list[Any]) -> bytes | None:
        begin = time.perf_counter()
        answer = self._requests[name](*arguments)
        self._seconds += time.perf_counter() - begin
        return answer

    def _tensor(self, region: int, offset: int, dtype: str, shape: list[int]) -> Any:
        kind = getattr(self.torch, dtype)
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return self.torch.empty(shape, dtype=kind)
        mapped = self._regions[region]
        return self.torch.frombuffer(mapped, dtype=kind, count=count, offset=offset).view(shape)

    def _put(self, handle: int, *place: Any) -> None:
        value = self._tensor(*place)
        self.kept[handle] = value.to(self.device, non_blocking=True) if self.cuda else value

    def _get(self, ticket: int, handle: int, *place: Any) -> bytes:
        begin = time.perf_counter()
        value = self.kept.get(handle, Failure("a tensor is not there"))
        if isinstance(value, Failure):
            return frame({"ticket": ticket, "error": clean(value.reason)})
        try:
            target = self._tensor(*place)
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise ValueError(f"a result of the form {tuple(value.shape)}, {value.dtype}")
            target.copy_(value, non_blocking=True)
            if self.cuda:
                self.torch.cuda.synchronize(self.device)
        except Exception as error:
            return frame({"ticket": ticket, "error": clean(f"{type(error).__name__}: {error}")})
        seconds = self._seconds + time.perf_counter() - begin
        self._seconds = begin - time.perf_counter()  # handle() adds this request once more
        return frame({"ticket": ticket, "seconds": seconds})


def run(arguments: Sequence[str], kind: Callable[[str], Store]) -> NoReturn:
    """The life of a worker's process: confine it, greet, serve, and end."""
    try:
        status = _main(arguments, kind)
    except (BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:
        status = 70
    # Nothing is left to save, and a device's libraries take their time to unload.
    os._exit(status)


def _main(arguments: Sequence[str], kind: Callable[[str], Store]) -> int:
    connection = socket.socket(fileno=int(arguments[0]))
    parent, device, threads = int(arguments[1]), arguments[2], int(arguments[3])
    try:
        layers = confine(parent, cuda=device.startswith("cuda"))
        warnings.simplefilter("ignore")  # of tensors over memory that cannot be written
        store = kind(device)
        store.torch.set_num_threads(threads)
        greeting = {"hello": 1, "layers": layers, "device": clean(store.describe())}
    except Exception as error:
        connection.sendall(frame({"error": clean(f"{type(error).__name__}: {error}")}))
        return 1
    connection.sendall(frame(greeting))
    store.serve(connection)
    return 0


if __name__ == "__main__":
    run(sys.argv[1:], _Server)
