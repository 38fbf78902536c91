"""A worker at the end of a byte stream: on another machine, or behind any tunnel.

The same rules as for :mod:`~cenacle.accelerators.process`: JSON and raw bytes, nothing pickled,
and the enclave says which form a result has. What arrives lands in the enclave's own memory,
so nobody can change it afterwards. Two threads move the bytes, so that sending, computing and
receiving overlap with the enclave's own work.

The stream is neither encrypted nor authenticated here. Who listens on the wire sees what the
worker sees, and who alters it can do what a hostile worker can do.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import torch

from cenacle.accelerators.forms import DTYPES, Form, Forms
from cenacle.accelerators.protocol import Accelerator, HeapStaging, Operation, Pending
from cenacle.accelerators.wire import (
    MAX_ANSWER,
    clean,
    frame,
    greeting,
    is_duration,
    read_exactly,
    read_frame,
)
from cenacle.errors import AcceleratorError

__all__ = ["RemoteAccelerator"]

_END_S: Final = 10.0


class _Incoming(Pending):
    def __init__(self, owner: RemoteAccelerator, ticket: int, form: Form) -> None:
        self.ticket, self.form = ticket, form
        self.value: torch.Tensor | None = None
        self.failure: str | None = None
        self._owner = owner

    @property
    def done(self) -> bool:
        return self.value is not None or self.failure is not None

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        self._owner._await(self, timeout)
        if self.value is None:
            raise AcceleratorError(f"accelerator {self._owner.name} failed", found=self.failure)
        return self.value


def _bytes(value: torch.Tensor) -> memoryview:
    flat: Any = value.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class RemoteAccelerator(Accelerator):
    """Speaks to a :mod:`~cenacle.accelerators.remote_worker` over a connected stream.

    Args:
        name: unique in a fleet.
        connection: connected to the worker; closed with the accelerator.
        start_timeout: seconds until the worker must have greeted.
        ended: called once, when the accelerator is closed.
    """

    kind: ClassVar[str] = "remote"

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        *,
        start_timeout: float = 120.0,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.staging = HeapStaging()
        self._connection = connection
        connection.setblocking(True)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start_timeout = start_timeout
        self._begin = time.monotonic()
        self._ended = ended
        self._forms = Forms(name)
        self._changed = threading.Condition()
        self._told: str | None = None
        self._broken: str | None = None
        self._ticket = 0
        self._expected: deque[_Incoming] = deque()
        self._outgoing: queue.SimpleQueue[tuple[bytes, torch.Tensor | None] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=target, name=f"cenacle-{what}", daemon=True)
            for target, what in ((self._send, "sender"), (self._receive, "receiver"))
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ the protocol

    def put(self, handle: int, value: torch.Tensor) -> None:
        self._check()
        form = self._forms.put(handle, value)
        value = value.contiguous()
        phase = value.data_ptr() % 64
        request = ["put", handle, DTYPES[form.dtype], list(form.shape), phase]
        self._outgoing.put((frame(request), value))

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._check()
        self._forms.call(operation, result, operands)
        request = ["call", operation.name, dict(operation.attributes), result, list(operands)]
        self._outgoing.put((frame(request), None))

    def get(self, handle: int) -> Pending:
        self._check()
        form = self._forms.get(handle)
        self._ticket += 1
        pending = _Incoming(self, self._ticket, form)
        with self._changed:
            self._expected.append(pending)
        request = ["get", self._ticket, handle, DTYPES[form.dtype], list(form.shape)]
        self._outgoing.put((frame(request), None))
        return pending

    def drop(self, handles: Sequence[int]) -> None:
        if known := self._forms.drop(handles):
            self._outgoing.put((frame(["drop", known]), None))

    def close(self) -> None:
        self._break("it was closed")
        for thread in self._threads:
            thread.join(_END_S)
        self._connection.close()
        self._forms.clear()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    def describe(self) -> str:
        """What it runs on and what confines it, as it says itself."""
        if self._told is None and self._broken is None:
            self._await_greeting()
        return f"{self.kind}, {self._told or 'not known'}"

    # ------------------------------------------------------------------ waiting

    def _check(self) -> None:
        if self._broken is not None:
            raise AcceleratorError(f"accelerator {self.name} is gone", found=self._broken)

    def _await(self, pending: _Incoming, timeout: float | None) -> None:
        if pending.done:
            return
        self._await_greeting()
        self._wait_for(lambda: pending.done, timeout)

    def _await_greeting(self) -> None:
        left = max(0.0, self._begin + self._start_timeout - time.monotonic())
        self._wait_for(lambda: self._told is not None, left)

    def _wait_for(self, done: Callable[[], bool], timeout: float | None) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: done() or self._broken is not None, timeout)
        if not done():
            self._check()
        if not in_time:
            raise AcceleratorError(
                f"accelerator {self.name} does not answer",
                found=f"nothing for {timeout:.3g} seconds",
                remedy="allow it more time, or look after its machine and network",
            )

    def _break(self, reason: str) -> None:
        """End the connection for good; both threads then end by themselves."""
        with self._changed:
            if self._broken is None:
                self._broken = reason
            for pending in self._expected:
                pending.failure = self._broken
            self._expected.clear()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(None)

    # ------------------------------------------------------------------ the threads

    def _send(self) -> None:
        try:
            while (item := self._outgoing.get()) is not None:
                data, value = item
                self._connection.sendall(data)
                if value is not None and value.numel():
                    self._connection.sendall(_bytes(value))
                del item, value
        except OSError as error:
            self._break(f"its connection ended: {error.strerror}")

    def _receive(self) -> None:
        try:
            while (answer := read_frame(self._connection, MAX_ANSWER)) is not None:
                self._take(answer)
            self._break("it closed its connection")
        except (ValueError, EOFError) as error:
            what = clean(str(error)) or "its connection ended within it"
            self._break(f"a malformed answer: {what}")
        except OSError as error:
            self._break(f"its connection ended: {error.strerror}")

    def _take(self, answer: Any) -> None:
        if not isinstance(answer, dict):
            raise ValueError("no object")
        if self._told is None:
            if answer.keys() == {"error"} and isinstance(answer["error"], str):
                self._break(f"it could not start: {clean(answer['error'])}")
                raise ValueError("no greeting")
            told = greeting(answer)
            with self._changed:
                self._told = told
                self._changed.notify_all()
            return
        with self._changed:
            pending = self._expected[0] if self._expected else None
        if pending is None:
            raise ValueError("an answer that nobody asked for")
        if type(answer.get("ticket")) is not int or answer["ticket"] != pending.ticket:
            raise ValueError("a ticket out of order")
        value = failure = None
        if answer.keys() == {"ticket", "error"} and isinstance(answer["error"], str):
            failure = clean(answer["error"])
        elif answer.keys() == {"ticket", "seconds"} and is_duration(answer["seconds"]):
            value = torch.empty(pending.form.shape, dtype=pending.form.dtype)
            if value.numel():
                read_exactly(self._connection, _bytes(value))
        else:
            raise ValueError("unknown fields")
        with self._changed:
            if self._expected:  # else it was closed meanwhile
                self._expected.popleft()
                pending.seconds = float(answer.get("seconds", 0.0))
                pending.value, pending.failure = value, failure
            self._changed.notify_all()
