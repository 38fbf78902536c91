"""Clause: one demand, what was found, and whether it is met. Every decision is a list of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import ConfigDict, TypeAdapter

from cenacle.documents.base import Frozen, validate_fields

__all__ = ["Clause", "Verdict", "all_met", "check", "failed"]

Verdict = Literal["met", "failed", "pending"]


@dataclass(frozen=True, slots=True)
class Clause:
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

    # What pydantic reads from a wire is as strict as any model. What the rules build is not
    # validated again: a decision has dozens of clauses.
    __pydantic_config__: ClassVar[ConfigDict] = Frozen.model_config

    @classmethod
    def from_fields(cls, given: Any) -> Self:
        """See :meth:`cenacle.documents.base.Frozen.from_fields`."""
        return validate_fields(cls, _READER.validate_json, _NAMES, given)

    def to_fields(self) -> dict[str, Any]:
        """Plain JSON values; the remedy is left out where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_READER: Final[TypeAdapter[Any]] = TypeAdapter(Clause)
_NAMES: Final = tuple(field.name for field in fields(Clause))


def check(
    subject: str, name: str, met: bool, found: object, demanded: object, remedy: str | None = None
) -> Clause:
    """A clause from a condition; the remedy is kept only where it failed."""
    if met:
        return Clause(subject, name, str(found), str(demanded), "met")
    return Clause(subject, name, str(found), str(demanded), "failed", remedy)


def failed(clauses: Iterable[Clause]) -> list[Clause]:
    """Those that are not met; a pending clause is not met."""
    return [clause for clause in clauses if clause.verdict != "met"]


def all_met(clauses: Iterable[Clause]) -> bool:
    """Whether there is at least one clause and every one is met."""
    listed = list(clauses)
    return bool(listed) and not failed(listed)
