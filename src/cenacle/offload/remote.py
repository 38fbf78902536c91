"""Tensors that only a worker has: computed there, kept there, and made again where need be.

A :class:`Remote` remembers how it was made. If its worker is lost, another one (in the end the
enclave itself) repeats what led to it, from tensors that the enclave still has, and comes to the
same numbers. So nothing that a worker keeps can be lost with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import torch

from cenacle.accelerators.protocol import Operation
from cenacle.offload.parcel import Held, Parcel, Role
from cenacle.offload.tracking import Tracked

__all__ = ["Remote", "making"]

_SERIALS = count()


class Remote:
    """One such tensor.

    Attributes:
        operation, operands: how it is made. After :meth:`anchor` it is the parcel that
            ``source`` gives instead.
        shape, dtype: of the tensor.
        slot: which member of the fleet it prefers.
        key: what it is blinded under, by identity; ``None`` if nobody has to compare it.
        tracked: secret contractions of what it has to be; ``None`` if nothing is checked.
        released: nobody asks for it any more; it may be needed to make others again.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "dtype",
        "key",
        "operands",
        "operation",
        "parcel",
        "released",
        "role",
        "serial",
        "shape",
        "site",
        "slot",
        "source",
        "tracked",
    )

    def __init__(
        self,
        operation: Operation,
        operands: Sequence[Parcel | Remote],
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        role: Role,
        site: str,
        slot: int,
        tracked: Tracked | None = None,
    ) -> None:
        self.operation = operation
        self.operands = tuple(operands)
        self.shape = tuple(shape)
        self.dtype = dtype
        self.role: Role = role
        self.site = site
        self.slot = slot
        self.tracked = tracked
        self.released = False
        self.key: object | None = None
        self.source: Callable[[], Parcel] | None = None
        self.parcel: Parcel | None = None
        self.serial = next(_SERIALS)
        self._held: Held = {}

    def anchor(self, source: Callable[[], Parcel]) -> None:
        """From now on it can be had from the enclave: forget how it was made."""
        self.source = source
        self.operands = ()

    def at(self, worker: str) -> int | None:
        """Its handle there."""
        return self._held.get((worker, None))


def making(target: Remote, worker: str) -> list[tuple[Remote, list[Remote]]]:
    """What has to be made at a worker to have ``target`` there, in order.

    With each what may be forgotten after it.
    """
    needed: dict[int, Remote] = {}
    open_ = [target]
    while open_:
        node = open_.pop()
        if node.serial in needed or node.at(worker) is not None:
            continue
        needed[node.serial] = node
        open_ += [one for one in node.operands if isinstance(one, Remote)]
    order = [needed[serial] for serial in sorted(needed)]
    uses = Counter(one.serial for node in order for one in node.operands if isinstance(one, Remote))
    steps = []
    for node in order:
        done = []
        for one in dict.fromkeys(o for o in node.operands if isinstance(o, Remote)):
            uses[one.serial] -= sum(one is other for other in node.operands)
            if not uses[one.serial] and one.released:
                done.append(one)
        steps.append((node, done))
    return steps
