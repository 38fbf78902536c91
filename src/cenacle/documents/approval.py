"""Approval: nested k-of-n rules over parties, and vetoes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cenacle.documents.base import Frozen, Name

__all__ = ["AllOf", "AnyOf", "AtLeast", "Rule", "approves", "describe_rule", "parties_of"]


def _meaning(rule: Rule) -> tuple[int, frozenset[object]] | str:
    """Equal for rules that say the same in another order or with needless brackets."""
    match rule:
        case AllOf(all_of=parts):
            needed = len(parts)
        case AnyOf(any_of=parts):
            needed = 1
        case AtLeast(at_least=needed, of=parts):
            pass
        case str():
            return rule
    if len(parts) == 1:
        return _meaning(parts[0])
    return needed, frozenset(_meaning(part) for part in parts)


def _no_doubles(rules: tuple[Rule, ...]) -> None:
    if len({_meaning(rule) for rule in rules}) != len(rules):
        raise ValueError("a rule names the same party or rule twice; each counts once")


class AllOf(Frozen):
    """Everyone listed must approve."""

    all_of: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _no_doubles(self.all_of)
        return self


class AnyOf(Frozen):
    """One of those listed is enough."""

    any_of: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _no_doubles(self.any_of)
        return self


class AtLeast(Frozen):
    """At least ``k`` of those listed."""

    at_least: Annotated[int, Field(ge=1)]
    of: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _no_doubles(self.of)
        if self.at_least > len(self.of):
            raise ValueError(
                f"at_least: {self.at_least} of {len(self.of)} can never be met; "
                f"ask for {len(self.of)} or fewer"
            )
        return self


def _form(rule: Any) -> str | None:
    if isinstance(rule, str):
        return "party"
    names = rule if isinstance(rule, dict) else getattr(rule, "model_fields_set", ())
    return next((name for name in ("all_of", "any_of", "at_least") if name in names), None)


Rule = Annotated[
    Annotated[Name, Tag("party")]
    | Annotated[AllOf, Tag("all_of")]
    | Annotated[AnyOf, Tag("any_of")]
    | Annotated[AtLeast, Tag("at_least")],
    Discriminator(
        _form,
        custom_error_type="rule",
        custom_error_message="a rule is a party's name, all_of, any_of, or at_least with of",
    ),
]

for _model in (AllOf, AnyOf, AtLeast):
    _model.model_rebuild()


def approves(rule: Rule, signed: frozenset[str]) -> bool:
    """Whether the parties in ``signed`` satisfy the rule."""
    match rule:
        case AllOf():
            return all(approves(part, signed) for part in rule.all_of)
        case AnyOf():
            return any(approves(part, signed) for part in rule.any_of)
        case AtLeast():
            return sum(approves(part, signed) for part in rule.of) >= rule.at_least
        case str():
            return rule in signed


def parties_of(rule: Rule) -> Iterator[str]:
    """Every party that the rule names."""
    match rule:
        case AllOf():
            parts = rule.all_of
        case AnyOf():
            parts = rule.any_of
        case AtLeast():
            parts = rule.of
        case str():
            yield rule
            return
    for part in parts:
        yield from parties_of(part)


def describe_rule(rule: Rule) -> str:
    """The rule in words, e.g. ``hospital-a and 2 of (b, c, d)``."""
    match rule:
        case AllOf():
            return "(" + " and ".join(describe_rule(part) for part in rule.all_of) + ")"
        case AnyOf():
            return "(" + " or ".join(describe_rule(part) for part in rule.any_of) + ")"
        case AtLeast():
            parts = ", ".join(describe_rule(part) for part in rule.of)
            return f"{rule.at_least} of ({parts})"
        case str():
            return rule
