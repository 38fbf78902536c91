"""Whatever is asked, ``decide`` allows exactly what no clause forbids.

The rules are compared with a second reading of the same demands, written on plain values and
by brute force: both must agree on every drawn case, in both directions.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cenacle.attestation.claims import Claims
from cenacle.broker.rules import Facts, Lineage, decide, require, superseded_by
from cenacle.documents.approval import Rule
from cenacle.documents.asset import Asset
from cenacle.documents.base import format_time
from cenacle.documents.clauses import Clause
from cenacle.documents.contract import Contract, RecipeJob
from cenacle.documents.terms import Terms
from cenacle.errors import RefusedError

NOW = datetime(2027, 1, 31, 12, tzinfo=UTC)
BEFORE, AFTER = format_time(NOW - timedelta(seconds=1)), format_time(NOW)
HERE, ELSEWHERE = "sha256:" + "a" * 64, "sha256:" + "b" * 64
PARTIES = {name: "sha256:" + name * 64 for name in ("1", "2", "3")}
PACKAGE, OTHER = "sha256:" + "c" * 64, "sha256:" + "d" * 64
CODE, FOREIGN = "sha256:" + "e" * 64, "sha256:" + "f" * 64
STRENGTH = {"simulated": 0, "measured": 1, "tee": 2}
KINDS = {"simulated": "simulated", "tpm": "measured", "nitro": "tee"}
# Clauses of the kind's own policy: what is built here has no TPM's properties.
UNPROVEN = {"tpm": {"contract TPM root", "contract TPM registers"}}

names = st.sampled_from(sorted(PARTIES))


def subsets(*values: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), unique=True, max_size=len(values))


def _wider(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(children, min_size=1, max_size=3, unique_by=repr)
    return st.one_of(
        parts.map(lambda of: {"all_of": of}),
        parts.map(lambda of: {"any_of": of}),
        parts.flatmap(lambda of: st.integers(1, len(of)).map(lambda k: {"at_least": k, "of": of})),
    )


def _valid(rule: Any) -> bool:
    # A rule that names the same party or rule twice is no rule.
    try:
        TypeAdapter[Any](Rule).validate_python(rule)
    except ValidationError:
        return False
    return True


rules = st.recursive(names, _wider, max_leaves=4).filter(_valid)
signers = st.sampled_from([["1", "2", "3"], [], ["1"], ["1", "2"], ["3"]])
chains = st.lists(st.tuples(rules, signers), max_size=3)


def holds(rule: Any, signed: list[str]) -> bool:
    """A rule, read once more."""
    if isinstance(rule, str):
        return rule in signed
    if "at_least" in rule:
        needed: int = rule["at_least"]
        return [holds(part, signed) for part in rule["of"]].count(True) >= needed
    every = rule.get("all_of")
    parts = [holds(part, signed) for part in (every or rule["any_of"])]
    return False not in parts if every else True in parts


# Everything good, and what each part may be instead. A drawn case changes a few parts at once,
# so that as many are allowed as are refused for one reason or for several.

GOOD_TERMS: dict[str, Any] = {
    "protection": "simulated",
    "recipes": ["mlp"],
    "programs": [PACKAGE],
    "offload": ["enclave"],
    "privacy": "unbounded",
    "recipients": ["3", "2"],
    "outputs": ["model", "metrics"],
    "purposes": ["care"],
    "uses": 3,
    "serving": None,
    "expires": AFTER,
    "price": None,
    "approval": "terms",
}
TERMS: dict[str, st.SearchStrategy[Any]] = {
    "protection": st.sampled_from(sorted(STRENGTH)),
    "recipes": st.sampled_from([[], ["logistic"], ["logistic", "mlp"]]),
    "programs": st.sampled_from([[], [OTHER], [OTHER, PACKAGE]]),
    "offload": st.sampled_from([[], ["masked"], ["masked", "enclave"]]),
    "privacy": st.just({"epsilon": 9.0, "delta": 0.0}),
    "recipients": st.sampled_from(
        [None, [], ["3"], [f"3@{PARTIES['3']}", "2"], [f"3@{OTHER}", "2"]]
    ),
    "outputs": st.sampled_from([[], ["model"], ["table"], ["metrics", "table"]]),
    "purposes": st.sampled_from([[], ["profit"], ["profit", "care"]]),
    "uses": st.integers(0, 3),
    # No demand of a job that trains or runs a program.
    "serving": st.sampled_from([None, {"outputs": {"form": "label"}, "tickets": True}]),
    "expires": st.just(BEFORE),
    "price": st.just({"amount": 100, "currency": "EUR"}),
    "approval": st.just("owner"),
}
GOOD: dict[str, Any] = {
    "program": False,
    "program_type": "program",
    "terms": [GOOD_TERMS, GOOD_TERMS],
    "asset_broker": [HERE, HERE],
    "named_digest": True,
    "named_owner": True,
    "broker": HERE,
    "signed": ["1", "2"],
    "rule": {"all_of": ["1", "2"]},
    "may_veto": ["3"],
    "vetoed": [],
    "expires": AFTER,
    "outputs": [("model", "3")],
    "payments": [],
    "kind": "simulated",
    "listed": ["simulated"],
    "demanded_layers": ["x"],
    "layers": ["x", "y"],
    "code": CODE,
    "measured_program": True,
    "surplus": False,
    "missing": False,
    "no_claims": False,
    "review": False,
    "uses": [0, 2],
    "replaced": False,
    "ancestors": [],
    "descendants": [],
}
CASE: dict[str, st.SearchStrategy[Any]] = {
    "program": st.just(True),
    "program_type": st.just("dataset"),
    "asset_broker": st.sampled_from([[HERE, ELSEWHERE], [ELSEWHERE, HERE]]),
    "named_digest": st.just(False),
    "named_owner": st.just(False),
    "broker": st.just(ELSEWHERE),
    "signed": signers,
    "rule": rules,
    "may_veto": subsets(*PARTIES),
    "vetoed": subsets(*PARTIES),
    "expires": st.just(BEFORE),
    "outputs": st.lists(
        st.tuples(st.sampled_from(["model", "metrics"]), names), min_size=1, max_size=2
    ),
    "payments": st.lists(
        st.tuples(names, names, st.integers(0, 120), st.sampled_from(["EUR", "USD"])), max_size=3
    ),
    "kind": st.sampled_from(sorted(KINDS)),
    "listed": subsets(*KINDS).filter(bool),
    "demanded_layers": subsets("x", "y", "z"),
    "layers": subsets("x", "y", "z"),
    "code": st.just(FOREIGN),
    "measured_program": st.just(False),
    "surplus": st.just(True),
    "missing": st.just(True),
    "no_claims": st.just(True),
    "review": st.just(True),
    "uses": st.lists(st.integers(0, 3), min_size=2, max_size=2),
    "replaced": st.just(True),
    "ancestors": chains,
    "descendants": chains,
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A whole decision as plain values."""

    def changed(good: dict[str, Any], how: dict[str, Any], most: int) -> dict[str, Any]:
        parts = draw(st.lists(st.sampled_from(sorted(how)), max_size=most, unique=True))
        return {**good, **{part: draw(how[part]) for part in parts}}

    pair = [changed(GOOD_TERMS, TERMS, 1), changed(GOOD_TERMS, TERMS, 1)]
    return {**changed(GOOD, CASE, 4), "terms": pair}


def build(case: dict[str, Any]) -> Facts:
    """The case as the documents and facts that the broker decides on."""
    assets = {}
    for i, alias in enumerate(("data", "more")):
        program = case["program"] and alias == "more"
        kind = case["program_type"] if program else "dataset"
        stated = {k: v for k, v in case["terms"][i].items() if v is not None}
        fields = {
            "name": alias,
            "owner": str(i + 1),
            "owner_digest": PARTIES[str(i + 1)],
            "type": kind,
            "content": "package" if kind == "program" else "table",
            "container": {"header": CODE, "digest": CODE, "size": 1, "plaintext_bytes": 1},
            "broker": case["asset_broker"][i],
            "terms": stated,
            "created": BEFORE,
        }
        if kind == "program":
            fields["package"] = PACKAGE
        assets[alias] = Asset.from_fields(fields)
    recipe = {
        "task": "classification",
        "data": {"form": "table", "assets": ["data", "more"], "target": "t", "classes": [0, 1]},
        "model": {"type": "mlp", "hidden": [2]},
        "optimizer": {"type": "adamw", "learning_rate": 0.1},
        "epochs": 1,
    }
    reference = {kind: {"code": [CODE]} for kind in case["listed"]}
    contract = Contract.from_fields(
        {
            "name": "study",
            "purpose": "care",
            "broker": case["broker"],
            "parties": PARTIES,
            "assets": {
                "data": {
                    "digest": assets["data"].digest if case["named_digest"] else OTHER,
                    "owner": "1" if case["named_owner"] else "3",
                },
                "more": {"digest": assets["more"].digest, "owner": "2"},
            },
            "job": {"type": "program", "program": "more"}
            if case["program"]
            else {"type": "recipe", "recipe": recipe},
            "enclave": {"reference": reference, "layers": case["demanded_layers"]},
            "outputs": [
                {"name": f"o{i}", "kind": kind, "recipient": to}
                for i, (kind, to) in enumerate(case["outputs"])
            ],
            "approval": case["rule"],
            "vetoes": case["may_veto"],
            "payments": [
                {"payer": a, "payee": b, "amount": n, "currency": c}
                for a, b, n, c in case["payments"]
            ],
            "expires": case["expires"],
        }
    )
    job = contract.job
    expected = job.program_digest() if isinstance(job, RecipeJob) else CODE
    measurements = {"program": expected if case["measured_program"] else FOREIGN}
    if not case["missing"]:
        measurements["code"] = case["code"]
    if case["surplus"]:
        measurements["surplus"] = CODE
    claims = Claims.model_validate(
        {
            "kind": case["kind"],
            "protection": KINDS[case["kind"]],
            "measurements": measurements,
            "layers": tuple(case["layers"]),
            "issued": NOW,
        }
    )

    def relatives(chain: list[Any]) -> tuple[tuple[Contract, frozenset[str]], ...]:
        return tuple(
            (
                Contract.from_fields({**contract.to_fields(), "name": f"c{i}", "approval": rule}),
                frozenset(signed),
            )
            for i, (rule, signed) in enumerate(chain)
        )

    return Facts(
        broker=HERE,
        contract=contract,
        assets=assets,
        signed=frozenset(case["signed"]),
        now=NOW,
        uses=dict(zip(("data", "more"), case["uses"], strict=True)),
        replaced={"more": OTHER} if case["replaced"] else {},
        vetoes=dict.fromkeys(case["vetoed"], "no"),
        lineage=Lineage(relatives(case["ancestors"]), relatives(case["descendants"])),
        claims=None if case["no_claims"] else claims,
        evidence_error="none came" if case["no_claims"] else None,
        review=case["review"],
    )


def in_effect(chain: list[Any], index: int) -> bool:
    """Whether a contract of a chain, oldest first, was approved: by its own rule and by that of
    the nearest one before it that was."""
    rule, signed = chain[index]
    before = [i for i in range(index) if in_effect(chain, i)]
    return holds(rule, signed) and (not before or holds(chain[before[-1]][0], signed))


def forbidden(case: dict[str, Any]) -> set[str]:
    """Every reason why no key may leave, read once more and by brute force."""
    reasons = set()

    def unless(allowed: bool, reason: str) -> None:
        if not allowed:
            reasons.add(reason)

    unless(case["broker"] == HERE, "contract broker")
    unless(holds(case["rule"], case["signed"]), "contract approval")
    unless(not set(case["vetoed"]) & set(case["may_veto"]), "contract vetoes")
    unless(case["expires"] == AFTER, "contract expires")
    chain = [
        *reversed(case["ancestors"]),
        (case["rule"], case["signed"]),
        *case["descendants"],
    ]
    here = len(case["ancestors"])
    if holds(case["rule"], case["signed"]):
        unless(in_effect(chain, here), "contract replaces")
        if in_effect(chain, here):
            later = [i for i in range(here + 1, len(chain)) if in_effect(chain, i)]
            unless(not later, "contract current")
    if case["review"] or case["no_claims"]:
        reasons.add("contract evidence")
    else:
        listed = case["kind"] in case["listed"]
        unless(listed, "contract evidence")
        if listed or not case["missing"]:  # else nobody speaks of it
            good = listed and not case["missing"] and case["code"] == CODE
            unless(good, "contract measurement code")
        unless(case["measured_program"], "contract measurement program")
        unless(not case["surplus"], "contract measurement surplus")
        unless(set(case["demanded_layers"]) <= set(case["layers"]), "contract layers")
        reasons |= UNPROVEN.get(case["kind"], set())
    for i, alias in enumerate(("data", "more")):
        reasons |= {f"asset {alias} {name}" for name in forbidden_by_terms(case, i)}
    return reasons


def forbidden_by_terms(case: dict[str, Any], i: int) -> set[str]:
    terms, owner, program = case["terms"][i], str(i + 1), case["program"]
    reasons = set()
    if case["asset_broker"][i] != case["broker"]:
        reasons.add("broker")
    if i == 0 and not (case["named_digest"] and case["named_owner"]):
        reasons.add("identity")
    if terms["approval"] == "owner" and owner not in case["signed"]:
        reasons.add("approval")
    shown = None if case["no_claims"] else KINDS[case["kind"]]
    if not case["review"] and STRENGTH[shown or "simulated"] < STRENGTH[terms["protection"]]:
        reasons.add("protection")
    if case["review"]:
        reasons |= {"protection", "uses"}  # not known yet, hence not met
    elif case["uses"][i] + 1 > terms["uses"]:
        reasons.add("uses")
    is_program = case["program_type"] == "program"
    if program and not (is_program and (i == 1 or PACKAGE in terms["programs"])):
        reasons.add("program")
    if not program and "mlp" not in terms["recipes"]:
        reasons.add("recipe")
    if "enclave" not in terms["offload"]:
        reasons.add("offload")
    if terms["privacy"] != "unbounded":
        reasons.add("privacy")
    if {kind for kind, _ in case["outputs"]} - set(terms["outputs"]):
        reasons.add("outputs")
    allowed = [owner] if terms["recipients"] is None else terms["recipients"]
    if {to for _, to in case["outputs"]} - {
        one[0] for one in allowed if one in PARTIES or one[2:] == PARTIES[one[0]]
    }:
        reasons.add("recipients")
    if "care" not in terms["purposes"]:
        reasons.add("purpose")
    if terms["expires"] == BEFORE:
        reasons.add("expires")
    paid = sum(n for a, b, n, c in case["payments"] if b == owner and a != owner and c == "EUR")
    if terms["price"] and paid < terms["price"]["amount"]:
        reasons.add("price")
    if i == 1 and case["replaced"]:
        reasons.add("current")
    return reasons


def told(clauses: list[dict[str, Any]]) -> set[str]:
    """Clauses as the brute-force reading names them."""
    return {f"{c['subject'].split(' of ')[0]} {c['name']}" for c in clauses}


@settings(max_examples=400, deadline=None)
@given(cases())
def test_exactly_what_no_clause_forbids_is_allowed(case: dict[str, Any]) -> None:
    facts, reasons = build(case), forbidden(case)
    if not reasons:
        require(decide(facts))
        return
    with pytest.raises(RefusedError) as caught:
        require(decide(facts))
    named = told(caught.value.clauses)
    assert reasons <= named
    # Of a contract that was not approved it is not worth asking what replaced it.
    assert named - reasons <= {"contract replaces", "contract current"}
    assert all(c["found"] and c["demanded"] for c in caught.value.clauses)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_nothing_helps_against_one_failed_clause(case: dict[str, Any], data: Any) -> None:
    """A list of clauses with one that is not met is refused, wherever it stands."""
    met = tuple(c for c in decide(build(case)) if c.verdict == "met")
    verdict = data.draw(st.sampled_from(["failed", "pending"]))
    one = Clause(subject="s", name="n", found="f", demanded="d", verdict=verdict)
    at = data.draw(st.integers(0, len(met)))
    with pytest.raises(RefusedError, match="s: n"):
        require((*met[:at], one, *met[at:]))


def test_no_clauses_at_all_are_refused() -> None:
    with pytest.raises(RefusedError, match="nothing was decided"):
        require(())


def _relative(name: str, rule: Any, base: Contract) -> Contract:
    return Contract.from_fields({**base.to_fields(), "name": name, "approval": rule})


@pytest.fixture
def agreement() -> Contract:
    return build(GOOD).contract


ALL, BOTH, ONE = frozenset("123"), frozenset("12"), frozenset("1")


@pytest.mark.parametrize(
    ("signed", "successors", "superseded"),
    [
        (BOTH, [], None),
        (BOTH, [("1", ONE)], None),  # its own rule alone does not do
        (BOTH, [("1", BOTH)], 0),
        (BOTH, [({"all_of": ["1", "2", "3"]}, BOTH)], None),
        (BOTH, [("1", ONE), ("2", BOTH)], 1),  # past the one that took no effect
        (ONE, [("1", ONE)], None),  # not approved yet, and squatted: still to be signed
        (ONE, [("1", BOTH)], 0),
        (frozenset(), [("3", frozenset("3"))], None),
    ],
)
def test_only_a_successor_under_the_governing_rule_supersedes(
    agreement: Contract,
    signed: frozenset[str],
    successors: list[tuple[Any, frozenset[str]]],
    superseded: int | None,
) -> None:
    chain = tuple((_relative(f"s{i}", r, agreement), by) for i, (r, by) in enumerate(successors))
    found = superseded_by(agreement, signed, Lineage(descendants=chain))
    assert found is (None if superseded is None else chain[superseded][0])


def test_a_predecessors_rule_governs_until_a_successor_takes_effect(agreement: Contract) -> None:
    older = _relative("older", {"all_of": ["1", "2", "3"]}, agreement)
    lineage = Lineage(ancestors=((older, ALL),))
    newer = _relative("newer", "1", agreement)
    # Two of three approve what three governed: it never took effect, nor does its successor.
    taken = Lineage(ancestors=lineage.ancestors, descendants=((newer, BOTH),))
    assert superseded_by(agreement, BOTH, taken) is None
    taken = Lineage(ancestors=lineage.ancestors, descendants=((newer, ALL),))
    assert superseded_by(agreement, BOTH, taken) is newer


def test_a_long_chain_of_junk_is_decided_at_once(agreement: Contract) -> None:
    """One pass over the chain: a party cannot make decisions slow by proposing successors."""
    junk = tuple((_relative(f"j{i}", "3", agreement), ONE) for i in range(100))
    lineage = Lineage(ancestors=junk, descendants=junk)
    assert superseded_by(agreement, BOTH, lineage) is None


def test_every_field_of_terms_is_drawn() -> None:
    """A new demand cannot be forgotten here."""
    assert set(GOOD_TERMS) == set(TERMS) == set(Terms.model_fields) - {"kind", "version"}


def test_the_good_case_is_allowed() -> None:
    require(decide(build(GOOD)))


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"protection": "tee"}, "protection"),
        ({"protection": "measured"}, "protection"),
        ({"recipes": []}, "recipe"),
        ({"recipes": ["logistic"]}, "recipe"),
        ({"offload": []}, "offload"),
        ({"offload": ["masked"]}, "offload"),
        ({"privacy": {"epsilon": 1e9, "delta": 0.5}}, "privacy"),
        ({"recipients": None}, "recipients"),
        ({"recipients": []}, "recipients"),
        ({"recipients": [f"3@{OTHER}"]}, "recipients"),
        ({"outputs": []}, "outputs"),
        ({"outputs": ["metrics"]}, "outputs"),
        ({"purposes": []}, "purpose"),
        ({"purposes": ["Care"]}, "purpose"),
        ({"uses": 0}, "uses"),
        ({"expires": BEFORE}, "expires"),
        ({"price": {"amount": 1, "currency": "EUR"}}, "price"),
    ],
)
def test_each_demand_of_an_owner_refuses_alone(changes: dict[str, Any], clause: str) -> None:
    case = {**GOOD, "terms": [{**GOOD_TERMS, **changes}, GOOD_TERMS]}
    with pytest.raises(RefusedError) as caught:
        require(decide(build(case)))
    assert told(caught.value.clauses) == forbidden(case) == {f"asset data {clause}"}


@pytest.mark.parametrize(
    ("changes", "clauses"),
    [
        ({"broker": ELSEWHERE}, {"contract broker", "asset data broker", "asset more broker"}),
        ({"asset_broker": [HERE, ELSEWHERE]}, {"asset more broker"}),
        ({"named_digest": False}, {"asset data identity"}),
        ({"named_owner": False}, {"asset data identity"}),
        ({"signed": ["1"]}, {"contract approval"}),
        ({"signed": []}, {"contract approval"}),
        ({"vetoed": ["3"]}, {"contract vetoes"}),
        ({"expires": BEFORE}, {"contract expires"}),
        ({"listed": ["tpm"]}, {"contract evidence", "contract measurement code"}),
        ({"kind": "nitro"}, {"contract evidence", "contract measurement code"}),
        ({"code": FOREIGN}, {"contract measurement code"}),
        ({"missing": True}, {"contract measurement code"}),
        ({"surplus": True}, {"contract measurement surplus"}),
        ({"measured_program": False}, {"contract measurement program"}),
        ({"layers": ["y"]}, {"contract layers"}),
        ({"no_claims": True}, {"contract evidence"}),
        ({"replaced": True}, {"asset more current"}),
        ({"uses": [3, 0]}, {"asset data uses"}),
        ({"descendants": [("1", ["1", "2"])]}, {"contract current"}),
        ({"ancestors": [("3", ["3"])]}, {"contract replaces"}),
        (
            {"program": True, "program_type": "dataset"},
            {"asset data program", "asset more program"},
        ),
    ],
)
def test_each_demand_of_the_contract_refuses_alone(
    changes: dict[str, Any], clauses: set[str]
) -> None:
    case = {**GOOD, **changes}
    with pytest.raises(RefusedError) as caught:
        require(decide(build(case)))
    assert told(caught.value.clauses) == forbidden(case) == clauses


def test_an_owner_who_wants_to_sign_must_have_signed() -> None:
    owner = {**GOOD_TERMS, "approval": "owner"}
    case = {**GOOD, "terms": [owner, GOOD_TERMS], "rule": "3", "signed": ["3"]}
    with pytest.raises(RefusedError) as caught:
        require(decide(build(case)))
    assert told(caught.value.clauses) == forbidden(case) == {"asset data approval"}


@pytest.mark.parametrize("programs", [[], [OTHER]])
def test_a_program_that_an_owner_did_not_approve_refuses(programs: list[str]) -> None:
    terms = [{**GOOD_TERMS, "programs": programs}, GOOD_TERMS]
    case = {**GOOD, "program": True, "terms": terms}
    with pytest.raises(RefusedError) as caught:
        require(decide(build(case)))
    assert told(caught.value.clauses) == forbidden(case) == {"asset data program"}
