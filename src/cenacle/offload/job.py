"""A product under way on a fleet's workers, and how its parts come home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from cenacle.accelerators.protocol import Accelerator
from cenacle.errors import AcceleratorError, IntegrityError
from cenacle.offload.integrity import Check, Doubt
from cenacle.offload.maps import Product
from cenacle.offload.parcel import Parcel
from cenacle.offload.remote import Remote

if TYPE_CHECKING:
    from cenacle.offload.fleet import Fleet

__all__ = ["Consumer", "FusedConsumer", "Job"]

Consumer = Callable[[slice, torch.Tensor], None]
FusedConsumer = Callable[[slice, torch.Tensor, Check | None], None]


class Job:
    """A product under way: one part for each worker that computes."""

    def __init__(
        self,
        fleet: Fleet,
        product: Product,
        operands: Sequence[Parcel | Remote],
        site: str,
        slot: int | None = None,
    ) -> None:
        self.product = product
        self.operands = tuple(operands)
        self.site = site
        self.slot = slot
        self._fleet = fleet
        divided = [p.shape[0] for p, split in zip(operands, product.rows, strict=True) if split]
        if slot is not None:
            self.bounds: tuple[tuple[int, int], ...] = ((0, divided[0] if divided else 0),)
        else:
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
        if verifier is None or accelerator is self._fleet._own or self.product.unchecked:
            return None
        operands = [
            torch.empty(p.shape, dtype=p.dtype, device="meta")
            if isinstance(p, Remote)
            else p.value[slice(*self.bounds[part])]
            if split and len(self.bounds) > 1
            else p.value
            for p, split in zip(self.operands, self.product.rows, strict=True)
        ]
        last = self.operands[-1]
        if isinstance(last, Remote):
            recall = partial(self._fleet._recall, accelerator, last)
            assert last.tracked is not None
            return verifier.expect_tracked(
                self.product.operation, operands, last.tracked, recall, site=self.site
            )
        owner = None if self.product.rows[-1] else last
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
