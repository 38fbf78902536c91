"""Training under an offload plan: one session a model, all on the same accelerators."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final

from cenacle.accelerators.protocol import Accelerator, Operation, Pending
from cenacle.documents.offload import EnclavePlan, MeasuredPlan, OffloadPlan, PermutedPlan
from cenacle.documents.private_recipe import check_private_offload
from cenacle.documents.receipt import (
    AcceleratorRecord,
    DroppedAccelerator,
    LeakageRecord,
    OffloadRecord,
)
from cenacle.errors import AcceleratorError, DocumentError
from cenacle.offload.fleet import Fleet
from cenacle.offload.heap import keep_heap
from cenacle.offload.integrity import Verifier
from cenacle.offload.planned import planned_leakage, planned_scheme
from cenacle.offload.profile import Profile
from cenacle.offload.schemes.base import Scheme
from cenacle.offload.session import Offload
from cenacle.training._torch import nn, torch
from cenacle.training.optimizers import Optimizer
from cenacle.training.resident_steps import ResidentSteps

__all__ = ["Offloading"]

_TEXT: Final = 500
_EVENTS: Final = 20_000


class Offloading:
    """Where a job's models are computed, and the account of it.

    Args:
        plan: the contract's; not the one that keeps all in the enclave.
        secret: hexadecimal digits that the run's enclaves know alone, for initial weights that
            nobody else may know.
        accelerators: with names as the receipt shall have them; closed by :meth:`close`.
        kinds: of each accelerator, by name.
        timeout: seconds after which a worker counts as hanging.

    Attributes:
        profile: costs by layer, of all sessions together, and a timeline of the last ones.
    """

    def __init__(
        self,
        plan: OffloadPlan,
        accelerators: Sequence[Accelerator],
        kinds: Mapping[str, str],
        *,
        secret: str,
        timeout: float = 120.0,
    ) -> None:
        self.plan = plan
        self.accelerators = tuple(accelerators)
        self._kinds = dict(kinds)
        self._secret = secret
        self._timeout = timeout
        self.profile = Profile(events=_EVENTS)
        self._seconds = 0.0
        self._products = 0
        self._dropped: dict[str, DroppedAccelerator] = {}
        self._kept_inside: dict[str, None] = {}
        self._private = False

    def keep_private(self) -> None:
        """A privacy plan is kept too: all results are checked, whatever the scheme.

        Raises:
            DocumentError: it cannot be kept under this plan.
        """
        try:
            check_private_offload(self.plan)
        except ValueError as problem:
            raise DocumentError(str(problem)) from None
        self._private = True

    @property
    def leakage(self) -> LeakageRecord:
        """What accelerators learn under the plan."""
        return planned_leakage(self.plan, private=self._private)

    @property
    def weights_secret(self) -> str | None:
        """What initial weights are drawn from beside the recipe's seed, if anything.

        Under ``permuted`` whoever knows the first weights recovers the permutations, and the
        seed stands in the contract.
        """
        return self._secret if isinstance(self.plan, PermutedPlan) else None

    @property
    def program_secret(self) -> str:
        """What a program's own generator starts from: its first weights are not to be guessed."""
        return hashlib.sha256(f"program {self._secret}".encode()).hexdigest()

    @contextmanager
    def session(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Offload]:
        """Offload one model and, if the plan says so, what its optimizer does to its weights.

        Afterwards the accelerators hold nothing of it.
        """
        keep_heap()
        scheme = planned_scheme(self.plan)
        verified = scheme.verified or self._private  # some schemes check by themselves
        verifier = Verifier() if self._checks and verified else None
        lent = [_Lent(one) for one in self.accelerators]
        fleet = Fleet(lent, timeout=self._timeout, verifier=verifier, profile=self.profile)
        begin = time.perf_counter()
        resident = isinstance(self.plan, PermutedPlan) and self.plan.resident
        updates = ResidentSteps(optimizer) if resident else None
        with Offload(model, scheme, fleet, updates) as session:
            try:
                yield session
                session.bring_home()
            finally:
                self._seconds += time.perf_counter() - begin
                self._close_account(session.fleet, lent, session.kept_inside)

    @contextmanager
    def relayed(self) -> Iterator[tuple[Scheme, Fleet]]:
        """Scheme and workers for products that another process asks for, of a model of its own.

        Afterwards the accelerators hold nothing of it.
        """
        keep_heap()
        scheme = planned_scheme(self.plan)
        verifier = Verifier() if self._checks and scheme.verified else None
        lent = [_Lent(one) for one in self.accelerators]
        fleet = Fleet(lent, timeout=self._timeout, verifier=verifier, profile=self.profile)
        before = self._inside
        try:
            scheme.attach(fleet, nn.Module())
            try:
                yield scheme, fleet
            finally:
                scheme.detach()
        finally:
            self._seconds += self._inside - before
            self._close_account(fleet, lent, ())
            fleet.close()

    @property
    def _inside(self) -> float:
        """Seconds of all products so far, waiting included."""
        total = self.profile.total
        return total.enclave_seconds + total.wait_seconds

    @property
    def _checks(self) -> bool:
        if isinstance(self.plan, EnclavePlan | MeasuredPlan):
            return self._private
        return self.plan.check

    def _close_account(self, fleet: Fleet, lent: list[_Lent], kept_inside: Sequence[str]) -> None:
        for one in lent:
            self._products += one.taken
            one.ending = True
        self._kept_inside.update(dict.fromkeys(what[:_TEXT] for what in kept_inside))
        for loss in fleet.losses:
            # A worker that was lost under an earlier model is lost again at once under each.
            self._dropped.setdefault(
                loss.name,
                DroppedAccelerator(
                    name=loss.name, layer=loss.site[:_TEXT], reason=loss.reason[:_TEXT]
                ),
            )

    def record(self) -> OffloadRecord:
        """The account of all sessions so far."""
        cost = self.profile.total
        return OffloadRecord(
            accelerators=tuple(
                AcceleratorRecord.from_fields(
                    {
                        "name": one.name,
                        "kind": self._kinds[one.name],
                        "description": _description(one),
                    }
                )
                for one in self.accelerators
            ),
            dropped=tuple(self._dropped.values()),
            bytes_sent=cost.bytes_sent,
            bytes_received=cost.bytes_received,
            products=self._products,
            checked=self._products if self._checks else 0,
            seconds_inside=round(max(self._seconds - cost.wait_seconds, 0.0), 3),
            seconds_outside=round(min(cost.accelerator_seconds, 1e9), 3),
            kept_inside=tuple(self._kept_inside),
        )

    def close(self) -> None:
        """Let the accelerators go. Safe to call twice."""
        for one in self.accelerators:
            one.close()


def _description(accelerator: Accelerator) -> str:
    try:
        return accelerator.describe()[:_TEXT]
    except AcceleratorError:
        return "it never said"


class _Counted(Pending):
    """A result that counts when it has arrived."""

    def __init__(self, inner: Pending, owner: _Lent) -> None:
        self._inner = inner
        self._owner = owner

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        tensor = self._inner.wait(timeout)
        self.seconds = self._inner.seconds
        self._owner.taken += 1
        return tensor


class _Lent(Accelerator):
    """A worker for one session: at its end it forgets everything and serves the next.

    Closed before, because it failed, it stays lost.

    Attributes:
        taken: results that it gave.
    """

    kind: ClassVar[str] = "lent"

    def __init__(self, inner: Accelerator) -> None:
        self.inner = inner
        self.kind = inner.kind  # type: ignore[misc]
        self.name = inner.name
        self.staging = inner.staging
        self.taken = 0
        self.ending = False
        self._held: set[int] = set()

    def put(self, handle: int, value: torch.Tensor) -> None:
        self._held.add(handle)
        self.inner.put(handle, value)

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._held.add(result)
        self.inner.call(operation, result, operands)

    def get(self, handle: int) -> Pending:
        return _Counted(self.inner.get(handle), self)

    def drop(self, handles: Sequence[int]) -> None:
        self._held.difference_update(handles)
        self.inner.drop(handles)

    def close(self) -> None:
        if self.ending:
            self.drop(sorted(self._held))
        else:
            self.inner.close()

    def describe(self) -> str:
        return self.inner.describe()
