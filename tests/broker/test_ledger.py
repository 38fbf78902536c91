"""Budgets only shrink, and sums are exact."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.broker.ledger import (
    MAX_UNITS,
    Budget,
    Charge,
    LedgerView,
    Reservation,
    delta_units,
    epsilon_units,
    settled_charge,
)
from cenacle.errors import InputError, RefusedError

ASSET = "sha256:" + "1" * 64
LOSS = st.floats(0, 100, allow_nan=False).filter(lambda x: x == 0 or x > 1e-12)


def reservation(run: int, charge: Charge, state: Any = "reserved") -> Reservation:
    return Reservation(f"run-{run}", ASSET, charge.uses, charge.epsilon, charge.delta, "{}", state)


CHARGES = st.one_of(
    st.builds(Charge, st.integers(0, 5)),
    st.builds(Charge, st.integers(0, 5), LOSS, st.floats(0, 1)),
)


@pytest.mark.parametrize(
    ("value", "charged", "limit"),
    [
        (0.0, 0, 0),
        (0.1, 100_000_000, 100_000_000),
        (1, 1_000_000_000, 1_000_000_000),
        (1e-9, 1, 1),
        (1.5e-9, 2, 1),
        (1e-30, 1, 0),
        (5e-324, 1, 0),
        (1e300, MAX_UNITS, MAX_UNITS - 1),
    ],
)
def test_charges_round_up_and_limits_down(value: float, charged: int, limit: int) -> None:
    assert epsilon_units(value) == charged
    assert epsilon_units(value, limit=True) == limit


@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf, True])
def test_impossible_losses_are_refused(value: float) -> None:
    for convert in (epsilon_units, delta_units):
        with pytest.raises(InputError):
            convert(value)
    with pytest.raises(InputError):
        Charge(1, value, 0.0)
    with pytest.raises(InputError):
        Charge(1, 0.0, value)


@pytest.mark.parametrize("uses", [-1, True, 1.0, "1", 2**63])
def test_impossible_uses_are_refused(uses: Any) -> None:
    with pytest.raises(InputError):
        Charge(uses)


def test_a_charge_states_both_or_neither() -> None:
    for loss in ({"epsilon": 1.0}, {"delta": 1e-5}):
        with pytest.raises(InputError, match="both epsilon and delta"):
            Charge(1, **loss)


def test_three_tenths_fit_a_limit_of_three_tenths() -> None:
    view, budget, charge = LedgerView(), Budget(epsilon=0.3), Charge(1, 0.1, 0.0)
    for _ in range(3):
        view.require(budget, charge)
        view = view.charged(charge)
    assert view.epsilon == 0.3
    with pytest.raises(RefusedError, match="0 left"):
        view.require(budget, charge)


@pytest.mark.parametrize(
    ("budget", "charge", "short"),
    [
        (Budget(), Charge(10**6), []),
        (Budget(), Charge(1, 1e6, 1.0), []),
        (Budget(uses=3), Charge(1), []),
        (Budget(uses=2), Charge(1), ["uses"]),
        (Budget(uses=0), Charge(0), ["uses"]),
        (Budget(epsilon=2.0, delta=2e-5), Charge(1, 1.0, 1e-5), []),
        (Budget(epsilon=1.9999999990, delta=2e-5), Charge(1, 1.0, 1e-5), ["epsilon"]),
        (Budget(epsilon=2.0, delta=1.9e-5), Charge(1, 1.0, 1e-5), ["delta"]),
        (
            Budget(uses=2, epsilon=1.0, delta=0.0),
            Charge(1, 1.0, 1e-5),
            ["uses", "epsilon", "delta"],
        ),
        (Budget(epsilon=1e9), Charge(1), ["epsilon"]),
        (Budget(delta=1.0), Charge(1), ["delta"]),
        (Budget(epsilon=1e308), Charge(1, 1e300, 0.0), ["epsilon"]),
    ],
)
def test_shortfalls(budget: Budget, charge: Charge, short: list[str]) -> None:
    view = LedgerView.of(
        [reservation(1, Charge(1, 0.5, 5e-6)), reservation(2, Charge(1, 0.5, 5e-6), "settled")]
    )
    found = view.shortfalls(budget, charge)
    assert [s.quantity for s in found] == short
    assert all(s.left >= 0 for s in found)
    if short:
        with pytest.raises(RefusedError) as caught:
            view.require(budget, charge)
        assert [c["clause"] for c in caught.value.clauses] == short
    else:
        view.require(budget, charge)


def test_an_unbounded_use_ends_every_privacy_budget() -> None:
    view = LedgerView().charged(Charge(1))
    assert view.epsilon == math.inf
    assert view.delta == math.inf
    assert view.shortfalls(Budget(epsilon=1e6), Charge(0, 0.0, 0.0))
    view.require(Budget(uses=2), Charge(1))


@settings(max_examples=100, deadline=None)
@given(st.lists(CHARGES, max_size=20), st.integers())
def test_the_order_of_charges_does_not_matter(charges: list[Charge], seed: int) -> None:
    items = [reservation(i, charge) for i, charge in enumerate(charges)]
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    assert LedgerView.of(items) == LedgerView.of(shuffled)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(LOSS, st.floats(0, 0.01)), max_size=30), LOSS, st.floats(0, 0.05))
def test_what_is_admitted_never_exceeds_the_limit(
    losses: list[tuple[float, float]], epsilon: float, delta: float
) -> None:
    view, budget = LedgerView(), Budget(epsilon=epsilon, delta=delta)
    admitted = []
    for loss in losses:
        charge = Charge(1, *loss)
        if not view.shortfalls(budget, charge):
            view = view.charged(charge)
            admitted.append(loss)
    # Exact, in the decimal numbers that were written.
    assert sum(Fraction(repr(e)) for e, _ in admitted) <= Fraction(repr(epsilon))
    assert sum(Fraction(repr(d)) for _, d in admitted) <= Fraction(repr(delta))


@settings(max_examples=100, deadline=None)
@given(CHARGES, CHARGES)
def test_a_charge_never_makes_room(before: Charge, charge: Charge) -> None:
    view = LedgerView().charged(before)
    after = view.charged(charge)
    assert after.uses >= view.uses
    assert after.epsilon >= view.epsilon
    assert after.delta >= view.delta


RESERVED = Charge(2, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("reserved", "spent", "stays"),
    [
        (RESERVED, (0.25, 1e-6), Charge(2, 0.25, 1e-6)),
        (RESERVED, (1.0, 1e-5), RESERVED),
        (RESERVED, (0.0, 0.0), Charge(2, 0.0, 0.0)),
        (RESERVED, (None, None), RESERVED),
        (Charge(2), (None, None), Charge(2)),
        (Charge(2), (0.1, 0.0), Charge(2)),
    ],
)
def test_settling_lowers_the_loss_and_keeps_the_uses(
    reserved: Charge, spent: tuple[float | None, float | None], stays: Charge
) -> None:
    assert settled_charge(reserved, *spent) == stays


@pytest.mark.parametrize("spent", [(1.0000001, 1e-5), (1.0, 1.1e-5), (1e300, 0.0)])
def test_more_than_was_reserved_is_refused(spent: tuple[float, float]) -> None:
    with pytest.raises(RefusedError, match="more privacy loss than it reserved"):
        settled_charge(RESERVED, *spent)


@pytest.mark.parametrize("spent", [(math.nan, 0.0), (-1.0, 0.0), (0.5, None), (None, 0.0)])
def test_impossible_settlements_are_refused(spent: tuple[Any, Any]) -> None:
    with pytest.raises(InputError):
        settled_charge(RESERVED, *spent)
