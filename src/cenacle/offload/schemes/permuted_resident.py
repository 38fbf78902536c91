"""Weights that stay with a worker under ``permuted``: it keeps W', and trains it.

Signed permutations commute with everything that SGD does, and with Adam's elementwise steps once
signs are taken from its second moment. So W' = P W N^T is sent once, its gradient
G'^T X' = P dW N^T never comes back, and the worker applies the optimizer's rule to both. The
enclave's own copy is old until :meth:`ResidentWeights.settle` fetches, verifies and unblinds the
weight and the optimizer's state.

Until then that copy is what everything can be made from again, with the blinded operands of
each gradient since (:mod:`cenacle.offload.remote`): a worker that is lost takes nothing with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from cenacle.accelerators.protocol import Operation
from cenacle.errors import InputError
from cenacle.offload.fleet import Fleet, Parcel, Remote, Role
from cenacle.offload.maps import Convolution, Dense, Product
from cenacle.offload.schemes.base import Site
from cenacle.offload.schemes.permuted_keys import Frame, Key, Keys, weight_frame
from cenacle.offload.schemes.permuted_moves import Moves
from cenacle.offload.schemes.permuted_uses import Use, y_shape
from cenacle.offload.tracking import Tracked, begin, gradient, known
from cenacle.offload.updates import Rule, add, update, zeros

__all__ = ["Resident", "ResidentWeights"]

_LONGEST: Final = 256
"""Updates after which a weight comes home: what an honest worker's roundings may amount to then,
should they all fall the same way, is within the tolerance of its check."""

_LOG: Final = 256 << 20
"""Bytes of operands that are kept to make weights again; beyond, all come home."""

Tensors = dict[str, torch.Tensor]


@dataclass
class Resident:
    """One weight.

    Attributes:
        inner, outer: keys of its input and output features.
        key: identifies the values of the enclave's copy; see :class:`Site`.
        w: what the worker keeps.
        slots: the optimizer's state there, by torch's names.
        before: the state in the enclave, as old as the enclave's weight, and its versions.
        lent: the optimizer has no state for it: all is here.
        updates: since the enclave's copies were the same.
        logged: bytes of operands kept since.
        uses: since it has these keys.
        pending: a gradient under these keys may be waiting for a step.
    """

    parameter: torch.Tensor
    site: str
    map: Dense | Convolution
    inner: Key
    outer: Key
    key: tuple[int, int]
    w: Remote
    slots: dict[str, Remote] = field(default_factory=dict)
    before: Tensors = field(default_factory=dict)
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)
    lent: bool = False
    updates: int = 0
    logged: int = 0
    uses: int = 0
    pending: bool = False

    @property
    def frame(self) -> Frame:
        return weight_frame(self.inner, self.outer, 1, flipped=False)


class ResidentWeights:
    """All weights of a session that workers keep."""

    def __init__(self, fleet: Fleet, moves: Moves, keys: Keys, rekey: int) -> None:
        self._fleet = fleet
        self._moves = moves
        self._keys = keys
        self.rekey = rekey
        self._loads = [0] * len(fleet.members)
        self._kept: dict[int, Resident | None] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(one.site for one in self._kept.values() if one is not None)

    def find(self, parameter: torch.Tensor) -> Resident | None:
        return self._kept.get(id(parameter))

    def use(self, site: Site, x_shape: Sequence[int], w: torch.Tensor) -> Resident | None:
        """The weight, up to date at its worker, if it is one that stays there.

        A weight stays if that pays: if it has more numbers than what goes into its layer and
        comes out. That is decided when it is first trained.
        """
        parameter = site.parameter
        if parameter is None:
            return None
        known = self._kept.get(id(parameter))
        if known is None:
            if not site.trains or id(parameter) in self._kept:
                return None
            self._kept[id(parameter)] = known = self._adopt(site, parameter, x_shape, w)
            if known is None:
                return None
        elif known.key != site.key:
            self._send(known, site.key)
        elif known.uses >= self.rekey and not site.trains and not known.pending:
            self._new_keys(known)
        known.uses += 1
        return known

    def _adopt(
        self, site: Site, parameter: torch.Tensor, x_shape: Sequence[int], w: torch.Tensor
    ) -> Resident | None:
        map_ = site.map
        if not isinstance(map_, Dense | Convolution) or getattr(map_, "groups", 1) != 1:
            return None
        moved = math.prod(x_shape) + math.prod(y_shape(map_, torch.Size(x_shape), w.shape))
        if w.numel() < moved:
            return None
        slot = self._loads.index(min(self._loads))
        self._loads[slot] += w.nbytes
        inner, outer = self._keys.pair(w.shape[1], w.shape[0], 1)
        empty = Remote(
            Operation("clone"), (), shape=w.shape, dtype=w.dtype, role="weights",
            site=site.name, slot=slot,
        )  # fmt: skip
        made = Resident(parameter, site.name, map_, inner, outer, site.key, empty)
        self._send(made, site.key)
        return made

    def _send(self, weight: Resident, key: tuple[int, int]) -> None:
        """The enclave's copy is the right one: from now on the worker's is too."""
        blind = self._blind(weight, weight.parameter.data, weight.frame, "weights")
        parcel = blind()
        tracked = None
        if (verifier := self._fleet.verifier) is not None:
            if weight.slots and weight.w.tracked is not None:  # whose contractions must add up
                tracked = known(weight.w.tracked.vectors, parcel.value)
            else:
                tracked = begin(weight.map, parcel.value, verifier.repetitions, verifier.signs)
        weight.w = self._keep(parcel, blind, weight, tracked)
        weight.key = key

    def _new_keys(self, weight: Resident) -> None:
        self.settle(weight)
        weight.inner, weight.outer = self._keys.pair(len(weight.inner), len(weight.outer), 1)
        weight.uses = 0
        weight.slots = {}
        self._send(weight, weight.key)
        weight.slots = self._send_slots(weight, weight.before)

    def gradient(self, weight: Resident, use: Use, gy: Parcel, x: Parcel) -> Remote:
        """Have the weight's gradient computed where the weight is, and kept there."""
        tracked = None
        if weight.w.tracked is not None:
            vectors, shape = weight.w.tracked.vectors, weight.w.shape
            tracked = gradient(vectors, gy.value, x.value, shape)
        weight.logged += gy.value.nbytes + x.value.nbytes
        weight.pending = True
        found = self._fleet.compute(
            use.weight_gradient.operation,
            gy,
            x,
            shape=weight.w.shape,
            dtype=weight.w.dtype,
            role="gradients",
            site=weight.site,
            slot=weight.w.slot,
            tracked=tracked,
        )
        found.key = weight.inner
        return found

    def add(self, one: Remote, other: Remote) -> Remote:
        """The sum of two gradients. Raises :class:`InputError` if their keys differ."""
        _same_keys(one, other.key)
        found = add(self._fleet, one, other)
        found.key = one.key
        return found

    def update(self, weight: Resident, g: Remote | None, rule: Rule, state: Tensors) -> None:
        """One step of the optimizer. ``g``: the gradient, or zero.

        ``state``: the optimizer's own, unless the weight is ``lent``; sent if the worker has
        none, or another.
        """
        if g is not None:
            _same_keys(g, weight.inner)
        weight.pending = False
        if not weight.lent and _versions(state) != weight.versions:
            weight.before, weight.versions = dict(state), _versions(state)
            weight.slots = self._send_slots(weight, state)
        g = zeros(self._fleet, weight.w) if g is None else g
        old = [weight.w, *weight.slots.values()]
        weight.w, weight.slots = update(self._fleet, rule, weight.w, g, weight.slots)
        for one in (*old, g):
            if all(one is not slot for slot in weight.slots.values()):
                self._fleet.release(one)
        weight.lent = True
        weight.updates += 1
        if weight.uses >= self.rekey:
            self._new_keys(weight)
        elif weight.updates >= _LONGEST:
            self.settle(weight)
        else:
            kept = [each for each in self._kept.values() if each is not None]
            if sum(each.logged for each in kept) > _LOG:
                for each in kept:
                    self.settle(each)

    def settle(self, weight: Resident) -> None:
        """Fetch, verify and unblind a weight and the optimizer's state for it.

        Raises:
            AcceleratorError: no worker could be asked, and the enclave could not make it again.
        """
        if not weight.updates:
            return
        found = {name: self._fetch(weight, slot) for name, slot in weight.slots.items()}
        value = self._fetch(weight, weight.w)
        # From here on nothing fails: the weight and its state are of the same step.
        self._moves.unblind(value, weight.frame, weight.parameter.data)
        weight.before = {}
        for name, one in found.items():
            weight.before[name] = torch.empty_like(one)
            self._moves.unblind(one, _frame(name, weight.frame), weight.before[name])
        weight.versions = _versions(weight.before)
        weight.updates = weight.logged = 0
        weight.w.anchor(self._blind(weight, weight.parameter.data, weight.frame, "weights"))
        for name, slot in weight.slots.items():
            frame = _frame(name, weight.frame)
            slot.anchor(self._blind(weight, weight.before[name], frame, "gradients"))

    def home(self, weight: Resident) -> Tensors:
        """:meth:`settle`; returns the optimizer's state, which is the optimizer's again."""
        self.settle(weight)
        weight.lent = False
        return dict(weight.before)

    # ------------------------------------------------------------------ to and fro

    def _blind(
        self, weight: Resident, value: torch.Tensor, frame: Frame, role: Role
    ) -> Callable[[], Parcel]:
        return lambda: self._moves.send(value, frame, role, weight.site)

    def _send_slots(self, weight: Resident, state: Tensors) -> dict[str, Remote]:
        sent = {}
        for name, value in state.items():
            blind = self._blind(weight, value, _frame(name, weight.frame), "gradients")
            parcel = blind()
            tracked = None
            if weight.w.tracked is not None:
                tracked = known(weight.w.tracked.vectors, parcel.value)
            sent[name] = self._keep(parcel, blind, weight, tracked)
        return sent

    def _keep(
        self,
        parcel: Parcel,
        blind: Callable[[], Parcel],
        weight: Resident,
        tracked: Tracked | None,
    ) -> Remote:
        remote = self._fleet.compute(
            Operation("clone"),
            parcel,
            shape=parcel.shape,
            dtype=parcel.value.dtype,
            role=parcel.role,
            site=weight.site,
            slot=weight.w.slot,
            tracked=tracked,
        )
        remote.anchor(blind)
        return remote

    def _fetch(self, weight: Resident, remote: Remote) -> torch.Tensor:
        def verify(_: slice, found: torch.Tensor) -> None:
            if remote.tracked is not None:
                remote.tracked.verify(found, weight.site)

        product = Product(Operation("identity"), (False,), unchecked=True)
        job = self._fleet.product(product, remote, site=weight.site, slot=remote.slot)
        return job.result(verify)


def _same_keys(g: Remote, key: object) -> None:
    if g.key is not key:
        raise InputError(
            f"a gradient of {g.site} was kept over a change of its weight's keys",
            expected="gradients that are forgotten after each step",
            remedy="call zero_grad() after optimizer.step(), or raise rekey",
        )


def _versions(state: Tensors) -> dict[str, tuple[int, int]]:
    """Changes when somebody else puts or writes a tensor there."""
    return {name: (id(value), value._version) for name, value in state.items()}


def _frame(name: str, frame: Frame) -> Frame:
    """Second moments are squares: they have their places from the key, and no signs."""
    if name != "exp_avg_sq":
        return frame
    rows, cols = frame
    return Frame(Key(rows.index, abs(rows.scale)), Key(cols.index, abs(cols.scale)))
