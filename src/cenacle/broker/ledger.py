"""What an asset's uses have cost, as pure arithmetic over reservations.

A decision *reserves* the whole planned loss before any key leaves. When the enclave reports
what it really spent, the reservation is *settled* and may come down to that, never up. A use
never comes back, and a run that never settles stays charged in full.

Losses add up by basic composition (Dwork and Roth 2014, theorem 3.16): epsilons and deltas
are summed. The design replaces this by Renyi/PLD composition with Google's ``dp-accounting``;
every reservation keeps its ``event`` for that, and the sum here is an upper bound of it.

Sums are exact: amounts are counted in whole units (1e-9 epsilon, 1e-18 delta), each charge
rounded up and each limit rounded down, so three charges of 0.1 fit a limit of 0.3 and no order
of concurrent charges can exceed a limit by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Final, Literal

from cenacle.errors import InputError, RefusedError

__all__ = [
    "MAX_UNITS",
    "Budget",
    "Charge",
    "LedgerView",
    "Reservation",
    "Shortfall",
    "delta_units",
    "epsilon_units",
    "settled_charge",
]

EPSILON_UNIT: Final = Decimal("1e-9")
DELTA_UNIT: Final = Decimal("1e-18")
MAX_UNITS: Final = 2**62
"""Sums of two amounts fit a signed 64-bit integer."""


def _units(value: float, unit: Decimal, rounding: str, name: str) -> int:
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise InputError(f"{name} is impossible", found=value, expected="a number of at least 0")
    if value == 0:
        return 0
    with localcontext() as context:
        context.prec = 60
        # repr gives the decimal number that was written, e.g. 0.1 and not 0.1000000000000000055.
        units = int((Decimal(repr(value)) / unit).to_integral_value(rounding=rounding))
    # A charge beyond counting fits no limit, however large.
    return min(units, MAX_UNITS if rounding == ROUND_CEILING else MAX_UNITS - 1)


def epsilon_units(value: float, *, limit: bool = False) -> int:
    """Epsilon in units of 1e-9: rounded up, or down when it is a ``limit``."""
    return _units(value, EPSILON_UNIT, ROUND_FLOOR if limit else ROUND_CEILING, "an epsilon")


def delta_units(value: float, *, limit: bool = False) -> int:
    """Delta in units of 1e-18: rounded up, or down when it is a ``limit``."""
    return _units(value, DELTA_UNIT, ROUND_FLOOR if limit else ROUND_CEILING, "a delta")


@dataclass(frozen=True, slots=True)
class Charge:
    """What one run takes from one asset. ``epsilon`` None: no privacy bound is promised."""

    uses: int = 1
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if type(self.uses) is not int or not 0 <= self.uses <= MAX_UNITS:
            raise InputError(
                "a number of uses is impossible", found=self.uses, expected="0 or more"
            )
        if (self.epsilon is None) != (self.delta is None):
            raise InputError(
                "a charge must state both epsilon and delta, or neither",
                found=f"epsilon {self.epsilon}, delta {self.delta}",
                expected="delta 0 for pure differential privacy",
            )
        if self.epsilon is not None and self.delta is not None:
            epsilon_units(self.epsilon)
            delta_units(self.delta)


@dataclass(frozen=True, slots=True)
class Budget:
    """What an owner allows in all. None: this quantity is not limited."""

    uses: int | None = None
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """One run's claim on one asset. ``event`` is the privacy event as canonical JSON text."""

    run: str
    asset: str
    uses: int
    epsilon: float | None
    delta: float | None
    event: str
    state: Literal["reserved", "settled"]

    @property
    def charge(self) -> Charge:
        return Charge(self.uses, self.epsilon, self.delta)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One quantity that does not suffice."""

    quantity: Literal["uses", "epsilon", "delta"]
    spent: float
    asked: float
    limit: float

    @property
    def left(self) -> float:
        """What was left before the charge; never negative, ``0.0`` if all is spent."""
        return max(0.0, self.limit - self.spent)


@dataclass(frozen=True, slots=True)
class LedgerView:
    """All charges on one asset. Epsilons in 1e-9 units, deltas in 1e-18 units.

    ``unbounded`` counts reservations without a privacy bound: with one of them, no finite
    limit on epsilon or delta holds any more.
    """

    uses_reserved: int = 0
    uses_settled: int = 0
    epsilon_reserved_units: int = 0
    epsilon_settled_units: int = 0
    delta_reserved_units: int = 0
    delta_settled_units: int = 0
    unbounded: int = 0

    @classmethod
    def of(cls, reservations: Iterable[Reservation]) -> LedgerView:
        """Add up reservations; the order does not matter."""
        view = cls()
        for reservation in reservations:
            view = view.charged(reservation.charge, settled=reservation.state == "settled")
        return view

    def charged(self, charge: Charge, *, settled: bool = False) -> LedgerView:
        """This ledger after one more charge."""
        bounded = charge.epsilon is not None and charge.delta is not None
        epsilon = epsilon_units(charge.epsilon or 0.0)
        delta = delta_units(charge.delta or 0.0)
        if settled:
            return replace(
                self,
                uses_settled=self.uses_settled + charge.uses,
                epsilon_settled_units=self.epsilon_settled_units + epsilon,
                delta_settled_units=self.delta_settled_units + delta,
                unbounded=self.unbounded + (not bounded),
            )
        return replace(
            self,
            uses_reserved=self.uses_reserved + charge.uses,
            epsilon_reserved_units=self.epsilon_reserved_units + epsilon,
            delta_reserved_units=self.delta_reserved_units + delta,
            unbounded=self.unbounded + (not bounded),
        )

    @property
    def uses(self) -> int:
        """Uses taken so far, settled or not."""
        return self.uses_reserved + self.uses_settled

    @property
    def epsilon(self) -> float:
        """Epsilon charged so far by basic composition; infinite if any charge is unbounded."""
        if self.unbounded:
            return math.inf
        return (self.epsilon_reserved_units + self.epsilon_settled_units) / 1e9

    @property
    def delta(self) -> float:
        """Delta charged so far by basic composition; infinite if any charge is unbounded."""
        if self.unbounded:
            return math.inf
        return (self.delta_reserved_units + self.delta_settled_units) / 1e18

    def shortfalls(self, budget: Budget, charge: Charge) -> tuple[Shortfall, ...]:
        """Every quantity that ``charge`` would exceed; empty when all of it fits.

        A budget with an epsilon or delta and a charge that promises none do not fit.
        """
        found = []
        after = self.charged(charge)
        if budget.uses is not None and after.uses > budget.uses:
            found.append(Shortfall("uses", self.uses, charge.uses, budget.uses))
        if budget.epsilon is not None:
            units = after.epsilon_reserved_units + after.epsilon_settled_units
            if after.unbounded or units > epsilon_units(budget.epsilon, limit=True):
                asked = math.inf if charge.epsilon is None else charge.epsilon
                found.append(Shortfall("epsilon", self.epsilon, asked, budget.epsilon))
        if budget.delta is not None:
            units = after.delta_reserved_units + after.delta_settled_units
            if after.unbounded or units > delta_units(budget.delta, limit=True):
                asked = math.inf if charge.delta is None else charge.delta
                found.append(Shortfall("delta", self.delta, asked, budget.delta))
        return tuple(found)

    def require(self, budget: Budget, charge: Charge) -> None:
        """Raise :class:`RefusedError`, naming every shortfall, unless the charge fits."""
        short = self.shortfalls(budget, charge)
        if short:
            raise RefusedError(
                "the asset's budget does not suffice",
                found="; ".join(f"{s.quantity} {s.asked:g} asked, {s.left:g} left" for s in short),
                expected="; ".join(f"{s.quantity} of at most {s.limit:g} in all" for s in short),
                remedy="plan fewer uses or less privacy loss, or ask the owner for a new asset",
                clauses=[
                    {"clause": s.quantity, "found": s.spent + s.asked, "demanded": s.limit}
                    for s in short
                ],
            )


def settled_charge(reserved: Charge, epsilon: float | None, delta: float | None) -> Charge:
    """What stays charged when a run reports what it really spent.

    Raises:
        RefusedError: it reports more than was reserved, or a loss where none was bounded.
    """
    spent = Charge(reserved.uses, epsilon, delta)
    if reserved.epsilon is None or reserved.delta is None:
        if spent.epsilon is not None:
            return reserved  # a bound claimed afterwards was never agreed to
        return spent
    if spent.epsilon is None or spent.delta is None:
        return reserved
    if spent.epsilon > reserved.epsilon or spent.delta > reserved.delta:
        raise RefusedError(
            "a run reports more privacy loss than it reserved",
            found=f"epsilon {spent.epsilon:g}, delta {spent.delta:g}",
            expected=f"at most epsilon {reserved.epsilon:g}, delta {reserved.delta:g}",
            remedy="the reservation stays charged in full; the run's output must not be used",
        )
    return spent
