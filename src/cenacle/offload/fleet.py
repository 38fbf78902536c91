"""The workers of one session: who has which tensor, who computes which part, who was lost.

A product's rows are divided into as many parts as there were workers at the start, whoever is
left later. Each part is computed by one worker; a worker that dies, hangs or lies is dropped
by name and its part is computed by the next. Parts of a concatenated result do not depend on
each other, and partial sums are added in the order of the parts. So, between workers that
compute alike (the same hardware, the same number of threads), results are the same to the bit
whoever computed them.

When no worker is left, the enclave computes for itself: slower, and leaking nothing.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Accelerator, Operation, Pending
from cenacle.errors import AcceleratorError, InputError
from cenacle.offload.integrity import Verifier
from cenacle.offload.job import Job
from cenacle.offload.maps import Product
from cenacle.offload.parcel import Held, Parcel, Role
from cenacle.offload.profile import Profile
from cenacle.offload.remote import Remote, making
from cenacle.offload.tracking import Tracked
from cenacle.offload.transcript import Transcript

__all__ = ["Fleet", "Job", "Loss", "Parcel", "Remote", "Role"]

_CLONE: Final = Operation("clone")


@dataclass(frozen=True)
class Loss:
    """A worker that was dropped, where, and why."""

    name: str
    site: str
    reason: str


class Fleet:
    """Several workers used as one.

    Args:
        accelerators: with distinct names; at least one.
        timeout: seconds that a part may take before its worker counts as hanging.
        verifier: checks every product; None if the workers are trusted.
        transcript: what is written down of everything that leaves.
        profile: where time and bytes are counted.

    Attributes:
        losses: workers that were dropped.
        staging: where to write what is to be sent; the first living worker's.
    """

    ENCLAVE: Final = "enclave"

    def __init__(
        self,
        accelerators: Sequence[Accelerator],
        *,
        timeout: float = 120.0,
        verifier: Verifier | None = None,
        transcript: Transcript | None = None,
        profile: Profile | None = None,
    ) -> None:
        names = [accelerator.name for accelerator in accelerators]
        if not names or len(set(names)) != len(names) or self.ENCLAVE in names:
            raise InputError(
                "a fleet needs accelerators with distinct names",
                found=", ".join(names) or "none",
                expected=f"one or more, none of them called {self.ENCLAVE}",
            )
        self.members = tuple(accelerators)
        self.timeout = timeout
        self.verifier = verifier
        self.transcript = transcript
        self.profile = Profile() if profile is None else profile
        self.losses: list[Loss] = []
        self.staging = accelerators[0].staging
        self._buffers = Buffers()
        self._alive: list[Accelerator] = list(accelerators)
        self._own: InlineAccelerator | None = None
        self._handles = count(1)
        self._issued: dict[str, int] = dict.fromkeys((*names, self.ENCLAVE), 0)
        self._completed = dict(self._issued)
        self._garbage: deque[tuple[Held, torch.Tensor | None]] = deque()
        self._limbo: list[tuple[dict[str, int], torch.Tensor | None]] = []

    # ------------------------------------------------------------------ for schemes

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory to write into and then :meth:`send`."""
        self._sweep()
        return self.staging.empty(shape, dtype)

    def send(self, value: torch.Tensor, role: Role, site: str) -> Parcel:
        """Make a tensor available to workers, for as long as the parcel is referred to."""
        parcel = Parcel(value.contiguous(), role, site)
        weakref.finalize(parcel, self._garbage.append, (parcel._held, parcel.value))
        return parcel

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in the enclave's memory."""
        return self._buffers.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def product(
        self, product: Product, *operands: Parcel | Remote, site: str, slot: int | None = None
    ) -> Job:
        """Start a product on all workers that take part; returns at once.

        With a ``slot`` it is not divided: a single worker computes it, the one that keeps its
        :class:`Remote` operands or would be asked to make them.
        """
        self._sweep()
        return Job(self, product, operands, site, slot)

    def compute(
        self,
        operation: Operation,
        *operands: Parcel | Remote,
        shape: Sequence[int],
        dtype: torch.dtype,
        role: Role,
        site: str,
        slot: int,
        tracked: Tracked | None = None,
    ) -> Remote:
        """Have a worker compute something and keep it; returns at once."""
        self._sweep()
        remote = Remote(
            operation, operands, shape=shape, dtype=dtype, role=role, site=site, slot=slot,
            tracked=tracked,
        )  # fmt: skip
        weakref.finalize(remote, self._garbage.append, (remote._held, None))
        while True:
            accelerator = self._holder(operands, slot)
            try:
                with self.profile.calling(accelerator):
                    self._make(accelerator, remote)
            except AcceleratorError as error:
                self.lose(accelerator, site, error)
            else:
                return remote

    def release(self, remote: Remote) -> None:
        """Nobody asks for it any more; workers may forget it, its recipe stays."""
        remote.released = True
        self._garbage.append((dict(remote._held), None))
        remote._held.clear()

    def bounds(self, rows: int) -> tuple[tuple[int, int], ...]:
        """How ``rows`` divide: the same whoever is left."""
        parts = max(1, min(len(self.members), rows))
        return tuple((i * rows // parts, (i + 1) * rows // parts) for i in range(parts))

    # ------------------------------------------------------------------ workers

    @property
    def alive(self) -> tuple[str, ...]:
        return tuple(accelerator.name for accelerator in self._alive)

    def lose(self, accelerator: Accelerator, site: str, error: Exception) -> None:
        """Drop a worker for good. The enclave's own arithmetic cannot be dropped."""
        if accelerator is self._own:
            raise error
        if accelerator in self._alive:
            self._alive.remove(accelerator)
            self.losses.append(Loss(accelerator.name, site, str(error)))
            accelerator.close()
            self._completed[accelerator.name] = self._issued[accelerator.name]
            if self._alive:
                self.staging = self._alive[0].staging

    def close(self) -> None:
        """Let all workers go."""
        for accelerator in (*self._alive, *([self._own] if self._own else [])):
            accelerator.close()
        self._alive.clear()
        self._limbo.clear()
        self._garbage.clear()

    def _holder(self, operands: Sequence[Parcel | Remote], slot: int) -> Accelerator:
        """Who keeps what only workers have, or will have to make it."""
        remotes = [one for one in operands if isinstance(one, Remote)]
        for accelerator in self._members():
            if remotes and all(one.at(accelerator.name) is not None for one in remotes):
                return accelerator
        return self._worker(slot)

    def _make(self, accelerator: Accelerator, target: Remote) -> None:
        """Bring a tensor about at a worker, and what it is made of."""
        for remote, done in making(target, accelerator.name):
            key = (accelerator.name, None)
            if remote.source is not None:
                if remote.parcel is None:
                    remote.parcel = remote.source()
                self._place(accelerator, remote.parcel, None, ((0, 0),))
                # The parcel's own handle, so it goes when the parcel does.
                remote._held[key] = self._call(accelerator, remote, [remote.parcel])
                remote.parcel = None
                continue
            remote._held[key] = self._call(accelerator, remote, remote.operands)
            for one in done:
                accelerator.drop([one._held.pop(key)] if key in one._held else [])

    def _call(
        self, accelerator: Accelerator, remote: Remote, operands: Sequence[Parcel | Remote]
    ) -> int:
        handles = [self._place(accelerator, one, None, ((0, 0),)) for one in operands]
        operation = remote.operation if remote.source is None else _CLONE
        result = next(self._handles)
        if self.transcript is not None and accelerator is not self._own:
            self.transcript.call(accelerator.name, remote.site, operation, result, handles)
        accelerator.call(operation, result, handles)
        self._issued[accelerator.name] += 1
        return result

    def _recall(self, accelerator: Accelerator, remote: Remote) -> torch.Tensor:
        """What a worker says that it keeps, verified; in the enclave's memory."""
        handle = remote.at(accelerator.name)
        assert handle is not None
        assert remote.tracked is not None
        pending = accelerator.get(handle)
        self._issued[accelerator.name] += 1
        found = self.own(
            self._wait(accelerator, pending, self._issued[accelerator.name], remote.site)
        )
        remote.tracked.verify(found, remote.site)
        return found

    def _worker(self, part: int) -> Accelerator:
        if self._alive:
            return self._alive[part % len(self._alive)]
        if self._own is None:
            self._own = InlineAccelerator(self.ENCLAVE)
        return self._own

    def _start(self, job: Job, part: int) -> tuple[Accelerator, Pending, int]:
        while True:
            accelerator = (
                self._worker(part) if job.slot is None else self._holder(job.operands, job.slot)
            )
            try:
                with self.profile.calling(accelerator):
                    return self._ask(accelerator, job, part)
            except AcceleratorError as error:
                self.lose(accelerator, job.site, error)

    def _ask(
        self, accelerator: Accelerator, job: Job, part: int
    ) -> tuple[Accelerator, Pending, int]:
        operands = [
            self._place(accelerator, parcel, part if split else None, job.bounds)
            for parcel, split in zip(job.operands, job.product.rows, strict=True)
        ]
        result = next(self._handles)
        operation = job.product.operation
        if self.transcript is not None and accelerator is not self._own:
            self.transcript.call(accelerator.name, job.site, operation, result, operands)
        accelerator.call(operation, result, operands)
        pending = accelerator.get(result)
        accelerator.drop([result])
        self._issued[accelerator.name] += 1
        return accelerator, pending, self._issued[accelerator.name]

    def _place(
        self,
        accelerator: Accelerator,
        parcel: Parcel | Remote,
        part: int | None,
        bounds: tuple[tuple[int, int], ...],
    ) -> int:
        if isinstance(parcel, Remote):
            self._make(accelerator, parcel)
            return parcel._held[accelerator.name, None]
        if part is not None and len(bounds) == 1:
            part = None
        key = (accelerator.name, part)
        handle = parcel._held.get(key)
        if handle is None:
            value = parcel.value if part is None else parcel.value[slice(*bounds[part])]
            handle = next(self._handles)
            if accelerator is not self._own:
                # Recorded first: what cannot be written down is not sent.
                if self.transcript is not None:
                    self.transcript.put(accelerator.name, parcel.site, parcel.role, handle, value)
                self.profile.sent(parcel.site, value.nbytes)
            accelerator.put(handle, value)
            parcel._held[key] = handle
        return handle

    def _wait(
        self, accelerator: Accelerator, pending: Pending, issue: int, site: str
    ) -> torch.Tensor:
        begin = time.perf_counter()
        tensor = pending.wait(self.timeout)
        if tensor.layout is not torch.strided:
            raise AcceleratorError(
                f"accelerator {accelerator.name} answered with something that is no result",
                found=f"a tensor of layout {tensor.layout}",
            )
        own = accelerator is self._own
        self.profile.waited(site, accelerator, begin, pending.seconds, 0 if own else tensor.nbytes)
        self._completed[accelerator.name] = max(self._completed[accelerator.name], issue)
        return tensor

    # ------------------------------------------------------------------ forgetting

    def _sweep(self) -> None:
        """Drop what nobody refers to; its memory is kept until no worker can be reading it."""
        while self._garbage:
            held, value = self._garbage.popleft()
            reading: dict[str, int] = {}
            for accelerator in self._members():
                handles = [h for (name, _), h in held.items() if name == accelerator.name]
                if handles:
                    accelerator.drop(handles)
                    self._issued[accelerator.name] += 1
                    reading[accelerator.name] = self._issued[accelerator.name]
            if reading:
                self._limbo.append((reading, value))
        self._limbo = [entry for entry in self._limbo if self._being_read(entry[0])]

    def _being_read(self, reading: dict[str, int]) -> bool:
        """Whether a worker may still be reading: it has not completed what was asked by then."""
        return any(self._completed[name] < issue for name, issue in reading.items())

    def _members(self) -> Iterator[Accelerator]:
        yield from self._alive
        if self._own is not None:
            yield self._own
