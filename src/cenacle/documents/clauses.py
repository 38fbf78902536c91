"""Clause: one demand, what was found, and whether it is met. Every decision is a list of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cenacle.documents.base import Frozen

__all__ = ["Clause", "Verdict", "all_met", "check", "failed"]

Verdict = Literal["met", "failed", "pending"]


class Clause(Frozen):
    """One line of a decision.

    Attributes:
        subject: whose demand it is: ``contract``, or ``asset NAME of OWNER``.
        name: what is demanded, e.g. ``protection``.
        found: what the contract, evidence or ledger shows.
        demanded: what the subject demands.
        verdict: ``pending`` only in a review, for what is known when the enclave asks.
        remedy: what to do when it failed.
    """

    subject: str
    name: str
    found: str
    demanded: str
    verdict: Verdict
    remedy: str | None = None


def check(
    subject: str, name: str, met: bool, found: object, demanded: object, remedy: str | None = None
) -> Clause:
    """A clause from a condition; the remedy is kept only where it failed."""
    return Clause(
        subject=subject,
        name=name,
        found=str(found),
        demanded=str(demanded),
        verdict="met" if met else "failed",
        remedy=None if met else remedy,
    )


def failed(clauses: Iterable[Clause]) -> list[Clause]:
    """Those that are not met; a pending clause is not met."""
    return [clause for clause in clauses if clause.verdict != "met"]


def all_met(clauses: Iterable[Clause]) -> bool:
    """Whether there is at least one clause and every one is met."""
    listed = list(clauses)
    return bool(listed) and not failed(listed)
