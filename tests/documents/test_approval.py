from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cenacle.documents.approval import (
    AllOf,
    AnyOf,
    AtLeast,
    Rule,
    approves,
    describe_rule,
    parties_of,
)
from cenacle.documents.base import Frozen
from cenacle.errors import DocumentError


class Holder(Frozen):
    approval: Rule


def rule(fields: Any) -> Rule:
    return Holder.from_fields({"approval": fields}).approval


PARTIES = ("a", "b", "c")
SUBSETS = ["", "a", "b", "c", "ab", "ac", "bc", "abc"]


@pytest.mark.parametrize(
    ("fields", "approving"),
    [
        ("a", "a ab ac abc"),
        ({"all_of": ["a"]}, "a ab ac abc"),
        ({"any_of": ["a"]}, "a ab ac abc"),
        ({"at_least": 1, "of": ["a"]}, "a ab ac abc"),
        ({"all_of": ["a", "b"]}, "ab abc"),
        ({"any_of": ["a", "b"]}, "a b ab ac bc abc"),
        ({"all_of": ["a", "b", "c"]}, "abc"),
        ({"any_of": ["a", "b", "c"]}, "a b c ab ac bc abc"),
        ({"at_least": 1, "of": ["a", "b", "c"]}, "a b c ab ac bc abc"),
        ({"at_least": 2, "of": ["a", "b", "c"]}, "ab ac bc abc"),
        ({"at_least": 3, "of": ["a", "b", "c"]}, "abc"),
        ({"all_of": ["a", {"any_of": ["b", "c"]}]}, "ab ac abc"),
        ({"any_of": ["a", {"all_of": ["b", "c"]}]}, "a ab ac bc abc"),
        ({"at_least": 2, "of": ["a", "b", {"all_of": ["b", "c"]}]}, "ab bc abc"),
        ({"all_of": [{"any_of": ["a", "b"]}, {"any_of": ["b", "c"]}]}, "b ab ac bc abc"),
        ({"at_least": 1, "of": [{"at_least": 2, "of": ["a", "b"]}, "c"]}, "c ab ac bc abc"),
    ],
)
def test_truth_tables(fields: Any, approving: str) -> None:
    parsed = rule(fields)
    found = {subset for subset in SUBSETS if approves(parsed, frozenset(subset))}
    assert found == set(approving.split())


def test_nobody_else_s_signature_counts() -> None:
    parsed = rule({"at_least": 1, "of": ["a", "b"]})
    assert not approves(parsed, frozenset({"c", "A", "a ", "", "ab"}))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"all_of": []}, "all_of"),
        ({"any_of": []}, "any_of"),
        ({"at_least": 1, "of": []}, "of"),
        ({"at_least": 0, "of": ["a"]}, "at_least"),
        ({"at_least": -1, "of": ["a"]}, "at_least"),
        ({"at_least": True, "of": ["a"]}, "at_least"),
        ({"at_least": 1.0, "of": ["a"]}, "at_least"),
        ({"at_least": "1", "of": ["a"]}, "at_least"),
        ({"at_least": 2, "of": ["a"]}, "can never be met; ask for 1 or fewer"),
        ({"at_least": 10**30, "of": ["a", "b"]}, "at_least"),
        ({"at_least": 1}, "approval.at_least.of: missing"),
        ({"of": ["a"]}, "a rule is a party's name"),
        ({"all_of": ["a"], "any_of": ["b"]}, "unknown field"),
        ({"all_of": ["a"], "unless": "b"}, "unless"),
        ({"none_of": ["a"]}, "a rule is"),
        ({}, "a rule is"),
        ([], "approval"),
        (["a", "b"], "a rule is"),
        (None, "approval"),
        ("", "approval"),
        ("A", "approval"),
        ({"all_of": "a"}, "all_of"),
        ({"all_of": [None]}, "all_of"),
        ({"all_of": [[]]}, "all_of"),
        ({"all_of": [f"p{i}" for i in range(101)]}, "all_of"),
        (
            {"any_of": ["a", {"all_of": ["b", {"at_least": 3, "of": ["c"]}]}]},
            "approval.any_of.1.all_of.1.at_least: at_least: 3 of 1 can never be met",
        ),
    ],
)
def test_refuses(fields: Any, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        rule(fields)


@pytest.mark.parametrize(
    "parts",
    [
        ["a", "a"],
        ["a", "b", "a"],
        ["a", {"all_of": ["a"]}],
        ["a", {"any_of": ["a"]}],
        ["a", {"at_least": 1, "of": ["a"]}],
        ["a", {"all_of": [{"any_of": ["a"]}]}],
        [{"all_of": ["a", "b"]}, {"all_of": ["a", "b"]}],
        [{"all_of": ["a", "b"]}, {"all_of": ["b", "a"]}],
        [{"all_of": ["a", "b"]}, {"at_least": 2, "of": ["b", "a"]}],
        [{"any_of": ["a", "b"]}, {"at_least": 1, "of": ["b", "a"]}],
        [{"any_of": ["a", {"all_of": ["b", "c"]}]}, {"any_of": [{"all_of": ["c", "b"]}, "a"]}],
    ],
)
def test_one_voice_counts_once(parts: list[Any]) -> None:
    """``2 of (a, (a))`` would let ``a`` alone approve what asks for two."""
    for fields in ({"at_least": 2, "of": parts}, {"all_of": parts}, {"any_of": parts}):
        with pytest.raises(DocumentError, match="each counts once"):
            rule(fields)


@pytest.mark.parametrize(
    "parts",
    [
        [{"all_of": ["a", "b"]}, {"all_of": ["a", "c"]}],
        [{"all_of": ["a", "b"]}, {"any_of": ["a", "b"]}],
        ["a", {"all_of": ["a", "b"]}],
    ],
)
def test_a_party_may_stand_in_several_branches(parts: list[Any]) -> None:
    assert rule({"at_least": 2, "of": parts})


def test_names_its_parties_and_reads_as_words() -> None:
    parsed = rule(
        {"all_of": ["a", {"at_least": 2, "of": ["b", "c", {"any_of": ["d", "a"]}]}]},
    )
    assert sorted(parties_of(parsed)) == ["a", "a", "b", "c", "d"]
    assert describe_rule(parsed) == "(a and 2 of (b, c, (d or a)))"
    assert list(parties_of(rule("a"))) == ["a"]


# --- against brute force ---------------------------------------------------------------------

rules = st.recursive(
    st.sampled_from(PARTIES),
    lambda inner: st.lists(inner, min_size=1, max_size=4).flatmap(
        lambda parts: st.sampled_from(
            [{"all_of": parts}, {"any_of": parts}]
            + [{"at_least": k, "of": parts} for k in range(1, len(parts) + 1)]
        )
    ),
    max_leaves=8,
)


def satisfied(fields: Any, signed: frozenset[str]) -> bool:
    """By trying every choice of enough parts."""
    if isinstance(fields, str):
        return fields in signed
    parts = fields.get("all_of") or fields.get("any_of") or fields["of"]
    needed = len(parts) if "all_of" in fields else fields.get("at_least", 1)
    return any(
        all(satisfied(part, signed) for part in chosen) for chosen in combinations(parts, needed)
    )


@given(rules)
@settings(max_examples=200)
def test_approves_exactly_what_brute_force_does(fields: Any) -> None:
    try:
        parsed = rule(fields)
    except DocumentError:
        return  # a doubled part
    for subset in SUBSETS:
        assert approves(parsed, frozenset(subset)) == satisfied(fields, frozenset(subset))


@given(rules, st.frozensets(st.sampled_from(PARTIES)), st.sampled_from(PARTIES))
@settings(max_examples=150)
def test_one_more_signature_never_withdraws_approval(
    fields: Any, signed: frozenset[str], more: str
) -> None:
    try:
        parsed = rule(fields)
    except DocumentError:
        return
    assert approves(parsed, signed | {more}) >= approves(parsed, signed)
    assert not approves(parsed, frozenset())


@given(rules)
@settings(max_examples=100)
def test_survives_being_written(fields: Any) -> None:
    adapter: TypeAdapter[Rule] = TypeAdapter(Rule)
    try:
        parsed = rule(fields)
    except DocumentError:
        return
    assert rule(adapter.dump_python(parsed, mode="json")) == parsed
    assert isinstance(parsed, str | AllOf | AnyOf | AtLeast)
