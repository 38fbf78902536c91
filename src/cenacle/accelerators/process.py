"""A worker in an operating-system process of its own, on the CPU or on a CUDA device.

Tensors cross in shared memory (:mod:`~cenacle.accelerators.shared_memory`), requests as JSON
(:mod:`~cenacle.accelerators.wire`); nothing is pickled. The worker is taken to be hostile: it
cannot write what it was sent, it does not say what shape a result has or where it lies, and an
answer that is not exactly what the protocol allows ends it.
"""

from __future__ import annotations

import math
import re
import select
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import torch

from cenacle.accelerators.child import WORKER, Attached, Child, worker_environment
from cenacle.accelerators.forms import DTYPES, Form, Forms
from cenacle.accelerators.protocol import Accelerator, Operation, Pending
from cenacle.accelerators.shared_memory import Arena, Region, SharedStaging
from cenacle.accelerators.wire import MAX_ANSWER, Frames, clean, frame, greeting, is_duration
from cenacle.errors import AcceleratorError, InputError

__all__ = ["ProcessAccelerator"]

_MAX_BATCH: Final = 64  # requests in one frame
_MAX_REGIONS: Final = 8  # descriptors with one frame
_MAX_DROPS: Final = 4096  # handles in one request
_MAX_WAITING_BYTES: Final = 64 << 20  # of requests that a worker does not take
_CHUNK: Final = 1 << 16


class _Arriving(Pending):
    """A result that the worker will write into memory chosen here."""

    def __init__(self, owner: ProcessAccelerator, ticket: int, target: torch.Tensor) -> None:
        self.ticket = ticket
        self.target = target
        self.done = False
        self.failure: str | None = None
        self._owner = owner

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        self._owner._await(self, timeout)
        if self.failure is not None:
            raise AcceleratorError(f"accelerator {self._owner.name} failed", found=self.failure)
        return self.target


class ProcessAccelerator(Accelerator):
    """Computes in a process that has nothing but its interpreter and what it is sent.

    It is started at once, in the background; the first :meth:`Pending.wait` waits until it
    has imported torch (seconds). To be used by one thread at a time, and closed.

    Results lie in memory that this process can read only: an operation in place on one is a
    fault that ends the program. Read them once, into memory of your own.

    Args:
        name: unique in a fleet.
        staging: where tensors for it are written, to be shared with other workers that may
            see the same; by default its own. Shared ones are closed by whoever made them.
        threads: that it computes with; by default as many as this process, so that sums are
            taken in the same order here and there.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        command: starts another worker that speaks the protocol of
            :mod:`~cenacle.accelerators.worker`.
        start_timeout: seconds that it may take to import torch and greet.
        attached: a worker that runs already, instead of one to start.

    Raises:
        InputError: the device or the number of threads makes no sense.
        AcceleratorError: the process cannot be started.
        UnavailableError: this system cannot share memory with it.
    """

    kind: ClassVar[str] = "process"

    def __init__(
        self,
        name: str,
        staging: SharedStaging | None = None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        command: Sequence[str] = WORKER,
        start_timeout: float = 120.0,
        attached: Attached | None = None,
    ) -> None:
        if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device) is None:
            raise InputError(
                "an accelerator's device is not known", found=device, expected="cpu, cuda or cuda:N"
            )
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise InputError("a worker needs threads", found=self.threads, expected="one or more")
        self.name = name
        self.device = device
        self.staging: SharedStaging = SharedStaging() if staging is None else staging
        self._owns_staging = staging is None
        self._results = Arena(writable=False)
        self._start_timeout = start_timeout
        self._begin = time.monotonic()
        self._broken: str | None = None
        self._told: str | None = None

        self._forms = Forms(name)
        self._kept: dict[int, torch.Tensor] = {}  # what the worker may be reading
        self._leaving: deque[tuple[int, torch.Tensor]] = deque()
        self._arriving: deque[_Arriving] = deque()
        self._ticket = 0

        self._mapped: set[int] = set()
        self._batch: list[list[Any]] = []
        self._regions: list[Region] = []  # to go with the batch
        self._outgoing: deque[tuple[memoryview, list[Region]]] = deque()
        self._waiting_bytes = 0
        self._frames = Frames(MAX_ANSWER)
        arguments = [device, str(self.threads)]
        self._child: Attached | Child = (
            Child(command, arguments, worker_environment(self.threads, device))
            if attached is None
            else attached
        )
        self._finalizer = weakref.finalize(self, self._child.kill)

    # ------------------------------------------------------------------ the protocol

    @property
    def pid(self) -> int:
        """The worker's process; it leads a process group of its own."""
        return self._child.pid

    def put(self, handle: int, value: torch.Tensor) -> None:
        self._check()
        form = self._forms.put(handle, value)
        place = self.staging.arena.locate(value)
        if place is None and value.numel():
            value = self.staging.copy(value)
            place = self.staging.arena.locate(value)
        self._forget(handle)
        self._kept[handle] = value
        self._request("put", handle, *self._place(place, form))

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._check()
        self._forms.call(operation, result, operands)
        self._forget(result)
        attributes = dict(operation.attributes)
        self._request("call", operation.name, attributes, result, list(operands))

    def get(self, handle: int) -> Pending:
        self._check()
        form = self._forms.get(handle)
        target = self._results.empty(form.shape, form.dtype)
        self._ticket += 1
        pending = _Arriving(self, self._ticket, target)
        self._arriving.append(pending)
        place = self._results.locate(target)
        self._request("get", self._ticket, handle, *self._place(place, form))
        self._seal_batch()
        self._flush()
        return pending

    def drop(self, handles: Sequence[int]) -> None:
        known = self._forms.drop(handles)
        for handle in known:
            self._forget(handle)
        if self._broken is None:
            for start in range(0, len(known), _MAX_DROPS):
                self._request("drop", known[start : start + _MAX_DROPS])

    def close(self) -> None:
        if self._broken is None:
            self._broken = "it was closed"
        self._finalizer()
        if self._owns_staging:
            self.staging.close()
        self._results.close()
        for pending in self._arriving:
            pending.done, pending.failure = True, self._broken
        self._arriving.clear()
        self._forms.clear()
        self._kept.clear()
        self._leaving.clear()
        self._batch.clear()
        self._regions.clear()
        self._outgoing.clear()

    def describe(self) -> str:
        """What it runs on and which layers confine it, as it said before its first tensor."""
        if self._told is None and self._broken is None:
            self._await_greeting()
        many = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"process, {self._told or self.device}, {many}"

    # ------------------------------------------------------------------ requests

    def _check(self) -> None:
        if self._broken is not None:
            raise AcceleratorError(f"accelerator {self.name} is gone", found=self._broken)

    def _place(self, place: tuple[Region, int] | None, form: Form) -> tuple[Any, ...]:
        if place is None:  # nothing to read or write
            return 0, 0, DTYPES[form.dtype], list(form.shape)
        region, offset = place
        if region.number not in self._mapped:
            self._mapped.add(region.number)
            self._regions.append(region)
            self._request("map", region.number, region.size, not region.writable)
            if len(self._regions) >= _MAX_REGIONS:
                self._seal_batch()
        return region.number, offset, DTYPES[form.dtype], list(form.shape)

    def _forget(self, handle: int) -> None:
        value = self._kept.pop(handle, None)
        if value is not None:
            # The worker may be reading it until it has answered a later request.
            self._leaving.append((self._ticket + 1, value))

    def _request(self, *request: Any) -> None:
        self._batch.append(list(request))
        if len(self._batch) >= _MAX_BATCH:
            self._seal_batch()

    def _seal_batch(self) -> None:
        if self._batch:
            data = memoryview(frame(self._batch))
            self._outgoing.append((data, self._regions))
            self._waiting_bytes += len(data)
            self._batch, self._regions = [], []

    def _flush(self) -> None:
        """Send what the worker takes without waiting for it."""
        while self._outgoing:
            data, regions = self._outgoing[0]
            try:
                if regions:
                    descriptors = [region.fd for region in regions]
                    sent = socket.send_fds(self._child.socket, [data], descriptors)
                else:
                    sent = self._child.socket.send(data)
            except BlockingIOError:
                if self._waiting_bytes > _MAX_WAITING_BYTES:
                    self._fail("it takes no more requests")
                return
            except OSError:
                self._fail(self._child.end())
            self._waiting_bytes -= sent
            if sent == len(data):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = (data[sent:], [])

    # ------------------------------------------------------------------ answers

    def _await(self, pending: _Arriving, timeout: float | None) -> None:
        if pending.done:
            return
        self._await_greeting()
        self._pump(lambda: pending.done, timeout)

    def _await_greeting(self) -> None:
        if self._told is None:
            left = self._begin + self._start_timeout - time.monotonic()
            self._pump(lambda: self._told is not None, max(left, 0.0))

    def _pump(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Send and receive until ``done``; whatever goes wrong ends the worker."""
        end = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        while not done():
            self._check()
            self._flush()
            events = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
            poller.register(self._child.socket, events)
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = poller.poll(None if left is None else math.ceil(left * 1000))
            if not ready and left is not None and time.monotonic() >= (end or 0.0):
                raise AcceleratorError(
                    f"accelerator {self.name} does not answer",
                    found=f"nothing for {timeout:.3g} seconds",
                    remedy="allow it more time, or look after its machine",
                )
            if any(event & ~select.POLLOUT for _, event in ready):
                self._receive()

    def _receive(self) -> None:
        try:
            data = self._child.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            cut = " in the middle of an answer" if self._frames.partial else ""
            self._fail(self._child.end() + cut)
        try:
            for answer in self._frames.feed(data):
                self._take(answer)
        except ValueError as error:
            self._fail(f"a malformed answer: {clean(str(error))}")

    def _take(self, answer: Any) -> None:
        if not isinstance(answer, dict):
            raise ValueError("no object")
        if self._told is None:
            self._told = self._greeting(answer)
            return
        if not self._arriving:
            raise ValueError("an answer that nobody asked for")
        pending = self._arriving[0]
        if type(answer.get("ticket")) is not int or answer["ticket"] != pending.ticket:
            raise ValueError("a ticket out of order")
        if answer.keys() == {"ticket", "error"} and isinstance(answer["error"], str):
            pending.failure = clean(answer["error"])
        elif answer.keys() == {"ticket", "seconds"} and is_duration(answer["seconds"]):
            pending.seconds = float(answer["seconds"])
        else:
            raise ValueError("unknown fields")
        pending.done = True
        self._arriving.popleft()
        while self._leaving and self._leaving[0][0] <= pending.ticket:
            self._leaving.popleft()

    def _greeting(self, answer: dict[str, Any]) -> str:
        if answer.keys() == {"error"} and isinstance(answer["error"], str):
            self._fail(f"it could not start: {clean(answer['error'])}")
        return greeting(answer)

    def _fail(self, reason: str) -> Any:
        """End the worker for good."""
        self._broken = reason
        self._finalizer()
        for pending in self._arriving:
            pending.done, pending.failure = True, reason
        self._arriving.clear()
        raise AcceleratorError(f"accelerator {self.name} is gone", found=reason)
