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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal

import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Accelerator, Pending
from cenacle.errors import AcceleratorError, InputError, IntegrityError
from cenacle.offload.integrity import Check, Doubt, Verifier
from cenacle.offload.maps import Product
from cenacle.offload.profile import Profile
from cenacle.offload.transcript import Transcript

__all__ = ["Fleet", "Job", "Loss", "Parcel", "Role"]

Role = Literal["inputs", "activations", "weights", "gradients"]
"""What of the model a tensor stands for; the terms of a leakage record."""

Consumer = Callable[[slice, torch.Tensor], None]
FusedConsumer = Callable[[slice, torch.Tensor, Check | None], None]


@dataclass(frozen=True)
class Loss:
    """A worker that was dropped, where, and why."""

    name: str
    site: str
    reason: str


class Parcel:
    """A tensor for workers. It is put where it is needed, when it is needed.

    Attributes:
        value: as workers see it; contiguous, and not to be changed any more.
        role: what it stands for; transcripts and leakage records speak of it.
    """

    __slots__ = ("__weakref__", "_held", "role", "site", "value")

    def __init__(self, value: torch.Tensor, role: Role, site: str) -> None:
        self.value = value
        self.role: Role = role
        self.site = site
        self._held: dict[tuple[str, int | None], int] = {}


class Job:
    """A product under way: one part for each worker that computes."""

    def __init__(
        self, fleet: Fleet, product: Product, operands: Sequence[Parcel], site: str
    ) -> None:
        self.product = product
        self.operands = tuple(operands)
        self.site = site
        self._fleet = fleet
        divided = [
            p.value.shape[0] for p, split in zip(operands, product.rows, strict=True) if split
        ]
        self.bounds = fleet.bounds(divided[0]) if divided else ((0, 0),)
        self._parts = [fleet._start(self, part) for part in range(len(self.bounds))]

    def collect(self, consume: Consumer) -> None:
        """Hand each part to ``consume`` as it arrives, in order.

        If the fleet has a verifier, ``consume(rows, tensor)`` gets a checked copy in the
        enclave's own memory. If it has none, ``consume`` reads every element of ``tensor``
        once (a worker may be able to write it still) and raises :class:`IntegrityError`,
        before it has any effect that counts, if it is wrong: then the worker is dropped and
        the part computed elsewhere.
        """

        def checked(rows: slice, tensor: torch.Tensor, check: Check | None) -> None:
            if check is None:
                consume(rows, tensor)
            else:
                consume(rows, check.verify(self._fleet.own(tensor)))

        self.collect_fused(checked)

    def collect_fused(self, consume: FusedConsumer) -> None:
        """As :meth:`collect`, for consumers that check by themselves while they read.

        ``consume(rows, tensor, check)`` reads every element of ``tensor`` once and calls
        ``check.compare`` with the contraction of what it has read. ``check`` is None if the
        fleet has no verifier or the enclave computed the part itself. If the contraction does
        not agree, and only rounding is to blame, ``consume`` is called again for the part,
        with a tensor in the enclave's own memory.
        """
        for part, (start, end) in enumerate(self.bounds):
            rows = slice(start, end)
            while True:
                accelerator, pending, issue = self._parts[part]
                try:
                    check = self._expect(accelerator, part)
                    tensor = self._fleet._wait(accelerator, pending, issue, self.site)
                    self._consume(consume, rows, tensor, check)
                except (AcceleratorError, IntegrityError) as error:
                    self._fleet.lose(accelerator, self.site, error)
                    self._parts[part] = self._fleet._start(self, part)
                else:
                    break

    def _expect(self, accelerator: Accelerator, part: int) -> Check | None:
        """What the part's result has to satisfy; computed while the worker computes."""
        verifier = self._fleet.verifier
        if verifier is None or accelerator is self._fleet._own:
            return None
        operands = [
            p.value[slice(*self.bounds[part])] if split and len(self.bounds) > 1 else p.value
            for p, split in zip(self.operands, self.product.rows, strict=True)
        ]
        owner = None if self.product.rows[-1] else self.operands[-1]
        return verifier.expect(self.product.operation, operands, owner=owner, site=self.site)

    def _consume(
        self, consume: FusedConsumer, rows: slice, tensor: torch.Tensor, check: Check | None
    ) -> None:
        if check is None:
            consume(rows, tensor, None)
            return
        check.form(tensor)
        try:
            consume(rows, tensor, check)
        except Doubt:
            consume(rows, check.verify(self._fleet.own(tensor)), check)

    def result(self, check: Consumer | None = None) -> torch.Tensor:
        """The whole result in the enclave's own memory, checked if the fleet has a verifier.

        ``check(rows, tensor)``, if given, sees each part too and raises
        :class:`IntegrityError` if it is wrong.
        """
        found: list[torch.Tensor] = []

        def consume(rows: slice, tensor: torch.Tensor, verification: Check | None) -> None:
            own = self._fleet.own(tensor)
            if verification is not None:
                own = verification.verify(own)
            if check is not None:
                check(rows, own)
            found.append(own)

        self.collect_fused(consume)
        if len(found) == 1:
            return found[0]
        if self.product.reduce == "concat":
            return torch.cat(found)
        total = found[0]
        for part in found[1:]:
            total += part
        return total


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
        self._garbage: deque[tuple[dict[tuple[str, int | None], int], torch.Tensor]] = deque()
        self._limbo: list[tuple[dict[str, int], torch.Tensor]] = []

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

    def product(self, product: Product, *operands: Parcel, site: str) -> Job:
        """Start a product on all workers that take part; returns at once."""
        self._sweep()
        return Job(self, product, operands, site)

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

    def _worker(self, part: int) -> Accelerator:
        if self._alive:
            return self._alive[part % len(self._alive)]
        if self._own is None:
            self._own = InlineAccelerator(self.ENCLAVE)
        return self._own

    def _start(self, job: Job, part: int) -> tuple[Accelerator, Pending, int]:
        while True:
            accelerator = self._worker(part)
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
        parcel: Parcel,
        part: int | None,
        bounds: tuple[tuple[int, int], ...],
    ) -> int:
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
