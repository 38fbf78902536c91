"""Terms against a contract: each demand violated alone, and all of them together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.documents import Terms, UseFacts, all_met, failed, match_terms
from cenacle.documents.clauses import Clause, check
from cenacle.documents.privacy import PrivacyLoss

Scenario = Any  # of conftest, which tests cannot import

Change = Callable[[Scenario], None]

PROGRAM_JOB = {"type": "program", "program": "trainer", "parameters": {}}
OTHER = "sha256:" + "0" * 64
SERVE_JOB = {
    "type": "serve",
    "model": "a",
    "outputs": {"form": "top-k", "k": 3, "decimals": 2},
    "tickets": "hospital-a",
}

RECIPE_CLAUSES = [
    "identity",
    "broker",
    "approval",
    "protection",
    "recipe",
    "offload",
    "privacy",
    "outputs",
    "recipients",
    "purpose",
    "uses",
    "expires",
    "price",
]
PROGRAM_CLAUSES = ["program" if name == "recipe" else name for name in RECIPE_CLAUSES]
SERVE_CLAUSES = ["serving" if name == "recipe" else name for name in RECIPE_CLAUSES]


def test_the_example_meets_every_clause(scenario: Scenario) -> None:
    clauses = scenario().clauses()
    assert [clause.name for clause in clauses] == RECIPE_CLAUSES
    assert all_met(clauses)
    assert {clause.subject for clause in clauses} == {"asset a of hospital-a"}
    assert all(clause.remedy is None for clause in clauses)
    assert all_met(scenario().clauses("b"))


def test_a_program_meets_every_clause(scenario: Scenario) -> None:
    example = scenario(job=copy.deepcopy(PROGRAM_JOB))
    for alias in ("a", "b", "trainer"):
        clauses = example.clauses(alias)
        assert [clause.name for clause in clauses] == PROGRAM_CLAUSES
        assert all_met(clauses)


# --- one at a time ---------------------------------------------------------------------------


def terms(**fields: Any) -> Change:
    return lambda s: s.terms.update(fields)


def without(*names: str) -> Change:
    """The field is absent: the safe default holds."""
    return lambda s: setattr(s, "without", names)


def asset(**fields: Any) -> Change:
    return lambda s: s.asset.update(fields)


def contract(**fields: Any) -> Change:
    return lambda s: s.contract.update(fields)


def contracted(protection: Any) -> Change:
    """The contract's own demand for asset a."""

    def apply(s: Scenario) -> None:
        s.ref["protection"] = protection

    return apply


def facts(**fields: Any) -> Change:
    return lambda s: setattr(
        s, "facts", UseFacts(**{"protection": "measured", "uses": 0, **fields})
    )


def signed(*names: str) -> Change:
    return lambda s: setattr(s, "signed", frozenset(names))


def now(moment: datetime) -> Change:
    return lambda s: setattr(s, "now", moment)


def paying(*payments: tuple[str, str, int, str]) -> Change:
    names = ("payer", "payee", "amount", "currency")
    own = ("clinic", "hospital-b", 1250, "EUR")
    listed = [dict(zip(names, payment, strict=True)) for payment in (*payments, own)]
    return contract(payments=listed)


def sending(*outputs: tuple[str, str, str]) -> Change:
    names = ("name", "kind", "recipient")
    return contract(outputs=[dict(zip(names, output, strict=True)) for output in outputs])


def program(change: Change) -> Change:
    def apply(s: Scenario) -> None:
        s.job = copy.deepcopy(PROGRAM_JOB)
        change(s)

    return apply


def serve(change: Change) -> Change:
    def apply(s: Scenario) -> None:
        s.job = copy.deepcopy(SERVE_JOB)
        change(s)

    return apply


def served(outputs: dict[str, Any], *, allowed: dict[str, Any]) -> Change:
    """What a query is told, and what the owner allows it to be told."""

    def apply(s: Scenario) -> None:
        serve(terms(serving={"outputs": allowed}))(s)
        s.job["outputs"] = outputs

    return apply


MODEL = ("model", "model", "clinic")
END = datetime(2027, 12, 31, 23, 59, 59, tzinfo=UTC)

VIOLATIONS = [
    # protection
    pytest.param("protection", terms(protection="tee"), id="tee demanded, measured shown"),
    pytest.param("protection", without("protection"), id="protection absent: tee"),
    pytest.param("protection", facts(protection="simulated"), id="simulated shown"),
    pytest.param(
        "protection", terms(protection={"training": "tee"}), id="tee demanded of training"
    ),
    pytest.param("protection", terms(protection={}), id="by use, both absent: tee"),
    pytest.param(
        "protection",
        program(terms(protection={"training": "measured", "inference": "tee"})),
        id="a program could infer, which demands tee",
    ),
    pytest.param("protection", contracted("tee"), id="the contract demands tee"),
    pytest.param(
        "protection", contracted({"training": "tee"}), id="the contract demands tee of training"
    ),
    pytest.param(
        "protection",
        lambda s: (contracted("simulated")(s), terms(protection="tee")(s)),
        id="a contract that demands less than the owner",
    ),
    # programs
    pytest.param("program", program(terms(programs=[])), id="no program allowed"),
    pytest.param("program", program(without("programs")), id="programs absent: none"),
    pytest.param("program", program(terms(programs=[OTHER])), id="another program allowed"),
    # recipes
    pytest.param("recipe", terms(recipes=[]), id="no recipe allowed"),
    pytest.param("recipe", without("recipes"), id="recipes absent: none"),
    pytest.param("recipe", terms(recipes=["mlp", "cnn"]), id="other models allowed"),
    pytest.param("recipe", terms(recipes=[OTHER]), id="another recipe's digest allowed"),
    pytest.param("recipe", terms(recipes=["logisti", "logistic2"]), id="no prefix matching"),
    # serving
    pytest.param("serving", serve(without("serving")), id="serving absent: not at all"),
    pytest.param("serving", serve(terms(serving={})), id="by default the label alone"),
    pytest.param(
        "serving", served({"form": "scores"}, allowed={"form": "top-k", "k": 3}), id="all scores"
    ),
    pytest.param(
        "serving",
        served({"form": "top-k", "k": 4}, allowed={"form": "top-k", "k": 3}),
        id="one label too many",
    ),
    pytest.param(
        "serving",
        served({"form": "scores", "decimals": 3}, allowed={"form": "scores", "decimals": 2}),
        id="a decimal too many",
    ),
    pytest.param(
        "serving",
        served({"form": "top-k", "k": 1}, allowed={"form": "scores", "decimals": 2}),
        id="not rounded",
    ),
    pytest.param("serving", serve(lambda s: s.job.pop("tickets")), id="no tickets"),
    pytest.param(
        "serving", serve(lambda s: s.job.update(tickets="hospital-b")), id="another's tickets"
    ),
    pytest.param("serving", serve(asset(type="dataset")), id="no model"),
    pytest.param("serving", serve(asset(content="file")), id="a model that is no tensors"),
    pytest.param(
        "protection",
        serve(terms(protection={"training": "measured", "inference": "tee"})),
        id="tee demanded of inference",
    ),
    # offload
    pytest.param("offload", terms(offload=[]), id="no scheme allowed"),
    pytest.param("offload", terms(offload=["permuted"]), id="another scheme allowed"),
    # privacy
    pytest.param("privacy", terms(privacy={"epsilon": 1e6, "delta": 0.5}), id="bounded"),
    pytest.param("privacy", without("privacy"), id="privacy absent: none to spend"),
    # recipients
    pytest.param("recipients", terms(recipients=[]), id="nobody allowed"),
    pytest.param("recipients", without("recipients"), id="recipients absent: the owner alone"),
    pytest.param("recipients", terms(recipients=None), id="recipients null: the owner alone"),
    pytest.param("recipients", terms(recipients=["hospital-b"]), id="another party allowed"),
    pytest.param("recipients", terms(recipients=["clinic-2", "clini"]), id="no prefix matching"),
    pytest.param("recipients", terms(recipients=[f"clinic@{OTHER}"]), id="another party's keys"),
    pytest.param(
        "recipients", sending(MODEL, ("m2", "model", "hospital-b")), id="one recipient too many"
    ),
    # outputs
    pytest.param("outputs", terms(outputs=[]), id="no output allowed"),
    pytest.param("outputs", without("outputs"), id="outputs absent: none"),
    pytest.param("outputs", terms(outputs=["metrics"]), id="no model allowed"),
    pytest.param("outputs", terms(outputs=["model", "table", "file"]), id="no metrics allowed"),
    # purposes
    pytest.param("purpose", terms(purposes=[]), id="no purpose allowed"),
    pytest.param("purpose", without("purposes"), id="purposes absent: none"),
    pytest.param("purpose", terms(purposes=["diagnosis"]), id="another purpose allowed"),
    pytest.param("purpose", contract(purpose="Diagnosis of breast cancer"), id="to the letter"),
    # uses
    pytest.param("uses", terms(uses=0), id="no use allowed"),
    pytest.param("uses", facts(uses=2), id="all uses taken"),
    pytest.param("uses", facts(uses=10**9), id="far more uses taken"),
    pytest.param("uses", lambda s: (without("uses")(s), facts(uses=1)(s)), id="uses absent: one"),
    # expires
    pytest.param("expires", terms(expires="2027-02-01T09:59:59Z"), id="expired a second ago"),
    pytest.param("expires", now(END + timedelta(seconds=1)), id="a second too late"),
    pytest.param("expires", terms(expires="2026-01-01"), id="expired long ago"),
    # price
    pytest.param("price", paying(), id="nothing paid"),
    pytest.param("price", paying(("clinic", "hospital-a", 1249, "EUR")), id="a cent too little"),
    pytest.param("price", paying(("clinic", "hospital-a", 1250, "USD")), id="another currency"),
    pytest.param("price", paying(("hospital-a", "hospital-a", 9999, "EUR")), id="paid by itself"),
    pytest.param("price", paying(("clinic", "hospital-b", 9999, "EUR")), id="paid to another"),
    pytest.param("price", paying(("hospital-a", "clinic", 9999, "EUR")), id="paid backwards"),
    pytest.param(
        "price",
        paying(("clinic", "hospital-a", 800, "EUR"), ("clinic", "hospital-a", 450, "USD")),
        id="two currencies do not add up",
    ),
    # approval
    pytest.param("approval", signed("hospital-b", "clinic"), id="the owner did not sign"),
    pytest.param("approval", signed(), id="nobody signed"),
    pytest.param(
        "approval",
        lambda s: (without("approval")(s), signed("clinic")(s)),
        id="approval absent: the owner",
    ),
    # what is not in the terms but goes with them
    pytest.param("broker", asset(broker=OTHER), id="sealed for another broker"),
    pytest.param("broker", contract(broker=OTHER), id="a contract of another broker"),
    pytest.param("identity", lambda s: s.ref.update(digest=OTHER), id="another manifest"),
    pytest.param("identity", asset(owner_digest=OTHER), id="another owner of that name"),
    pytest.param("identity", lambda s: s.ref.update(owner="hospital-b"), id="another's asset"),
]


@pytest.mark.parametrize(("name", "change"), VIOLATIONS)
def test_one_violation_fails_one_clause(scenario: Scenario, name: str, change: Change) -> None:
    example = scenario()
    change(example)
    clauses = example.clauses()
    (wrong,) = failed(clauses)
    assert (wrong.name, wrong.verdict) == (name, "failed")
    assert wrong.found.strip()
    assert wrong.demanded.strip()
    assert wrong.remedy
    expected = {"program": PROGRAM_CLAUSES, "recipe": RECIPE_CLAUSES, "serve": SERVE_CLAUSES}[
        example.job["type"]
    ]
    assert [clause.name for clause in clauses] == expected


def test_serving_meets_every_clause(scenario: Scenario) -> None:
    clauses = scenario(job=copy.deepcopy(SERVE_JOB)).clauses()
    assert [clause.name for clause in clauses] == SERVE_CLAUSES
    assert all_met(clauses)


def test_every_field_of_the_terms_is_violated_above() -> None:
    clause_of = {"programs": "program", "recipes": "recipe", "purposes": "purpose"}
    fields = Terms.model_fields.keys() - {"kind", "version"}
    violated = {param.values[0] for param in VIOLATIONS}
    assert {clause_of.get(name, name) for name in fields} <= violated
    assert violated - {"broker", "identity"} == {clause_of.get(name, name) for name in fields}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(terms(protection="simulated"), id="more protection than demanded"),
        pytest.param(
            lambda s: (terms(protection="tee")(s), facts(protection="tee")(s)), id="tee shown"
        ),
        pytest.param(
            terms(protection={"training": "measured", "inference": "tee"}),
            id="measured is enough for training",
        ),
        pytest.param(contracted("measured"), id="the contract demands no more than is shown"),
        pytest.param(terms(offload=["permuted", "enclave"]), id="one scheme of several"),
        pytest.param(without("offload"), id="offload absent: enclave"),
        pytest.param(terms(recipients=["hospital-b", "clinic"]), id="one recipient of several"),
        pytest.param(
            lambda s: (without("recipients")(s), sending(("m", "model", "hospital-a"))(s)),
            id="the owner receives",
        ),
        pytest.param(terms(uses=1), id="the only use"),
        pytest.param(facts(uses=1), id="the last use"),
        pytest.param(now(END), id="the last second"),
        pytest.param(without("price"), id="price absent: nothing"),
        pytest.param(terms(price={"amount": 0, "currency": "JPY"}), id="a price of nothing"),
        pytest.param(
            paying(("clinic", "hospital-a", 1000, "EUR"), ("hospital-b", "hospital-a", 250, "EUR")),
            id="two pay together",
        ),
        pytest.param(lambda s: (terms(approval="terms")(s), signed()(s)), id="the terms suffice"),
        pytest.param(program(terms(recipes=[])), id="recipes do not concern a program"),
        pytest.param(terms(programs=[]), id="programs do not concern a recipe"),
        pytest.param(serve(terms(recipes=[], programs=[])), id="they do not concern serving"),
        pytest.param(
            serve(terms(protection={"training": "tee", "inference": "measured"})),
            id="measured is enough for inference",
        ),
        pytest.param(
            served({"form": "label"}, allowed={"form": "top-k", "k": 1, "decimals": 0}),
            id="a label tells less than any score",
        ),
        pytest.param(
            served({"form": "top-k", "k": 9, "decimals": 1}, allowed={"form": "scores"}),
            id="some scores tell less than all",
        ),
        pytest.param(
            lambda s: (
                serve(terms(serving={"tickets": False, "outputs": SERVE_JOB["outputs"]}))(s),
                s.job.pop("tickets"),
            ),
            id="no tickets demanded",
        ),
    ],
)
def test_what_is_allowed(scenario: Scenario, change: Change) -> None:
    example = scenario()
    change(example)
    assert all_met(example.clauses())


def test_a_recipe_may_be_allowed_by_its_digest(scenario: Scenario) -> None:
    digest = scenario().build()[0].job.program_digest()
    assert all_met(scenario(terms={"recipes": [digest]}).clauses())


def test_a_recipient_may_be_pinned_by_digest(scenario: Scenario) -> None:
    pinned = f"clinic@{scenario().build()[0].parties['clinic']}"
    assert all_met(scenario(terms={"recipients": [pinned]}).clauses())
    other = scenario(terms={"recipients": [pinned]})
    parties = {**scenario().build()[0].parties, "clinic": OTHER}
    other.contract.update(parties=parties)
    assert [clause.name for clause in failed(other.clauses())] == ["recipients"]


def test_an_asset_that_the_contract_lacks(scenario: Scenario) -> None:
    contract, assets = scenario().build()
    clauses = match_terms(
        "c",
        {**assets, "c": assets["a"]},
        contract,
        now=scenario().now,
        signed=scenario().signed,
        facts=scenario().facts,
    )
    (wrong,) = failed(clauses)
    assert (wrong.name, wrong.found) == ("identity", "not in the contract")


def test_the_program_must_be_a_program(
    scenario: Scenario,
) -> None:
    example = scenario(
        job=copy.deepcopy(PROGRAM_JOB),
        program={"type": "dataset", "content": "table", "package": None},
    )
    for alias in ("a", "trainer"):
        (wrong,) = failed(example.clauses(alias))
        assert wrong.name == "program"
        assert wrong.found in {"not a program", "a dataset"}
        assert wrong.demanded
        assert wrong.remedy


def test_one_owner_s_terms_say_nothing_about_another_s(scenario: Scenario) -> None:
    example = scenario(terms={"uses": 0, "purposes": []})
    assert len(failed(example.clauses("a"))) == 2
    assert all_met(example.clauses("b"))


# --- before the job --------------------------------------------------------------------------


def test_a_review_leaves_open_what_only_the_moment_of_use_tells(scenario: Scenario) -> None:
    example = scenario(facts=None)
    clauses = example.clauses()
    assert {c.name: c.verdict for c in clauses if c.verdict != "met"} == {
        "protection": "pending",
        "uses": "pending",
    }
    assert not all_met(clauses)
    assert [clause.name for clause in clauses] == RECIPE_CLAUSES


def test_a_review_judges_the_weakest_kind_that_the_contract_accepts(
    scenario: Scenario, name_digest: Callable[[str], str]
) -> None:
    reference = {"package": [name_digest("p")]}
    for kinds, verdict in (
        (["simulated"], "failed"),
        (["snp", "simulated"], "failed"),
        (["tpm", "snp"], "pending"),
        (["snp"], "pending"),
    ):
        example = scenario(facts=None)
        example.contract["enclave"] = {"reference": dict.fromkeys(kinds, reference)}
        (clause,) = [c for c in example.clauses() if c.name == "protection"]
        assert clause.verdict == verdict


# --- together --------------------------------------------------------------------------------

LATE = datetime(2030, 1, 1, tzinfo=UTC)
INDEPENDENT: dict[str, Change] = {
    "protection": terms(protection="tee"),
    "recipe": terms(recipes=["cnn"]),
    "offload": terms(offload=[]),
    "privacy": without("privacy"),
    "recipients": terms(recipients=[]),
    "outputs": terms(outputs=["metrics"]),
    "purpose": terms(purposes=["another"]),
    "uses": terms(uses=0),
    "expires": now(LATE),
    "price": paying(),
    "approval": signed("clinic"),
    "broker": asset(broker=OTHER),
    "identity": asset(owner_digest=OTHER),
}


@given(st.sets(st.sampled_from(sorted(INDEPENDENT))))
@settings(max_examples=60, deadline=None)
def test_no_clause_hides_another(scenario: Scenario, broken: set[str]) -> None:
    example = scenario()
    for name in broken:
        INDEPENDENT[name](example)
    clauses = example.clauses()
    assert {clause.name for clause in failed(clauses)} == broken
    assert [clause.name for clause in clauses] == RECIPE_CLAUSES


# --- clauses ---------------------------------------------------------------------------------


def clause(verdict: Any) -> Clause:
    return Clause(subject="s", name="n", found="f", demanded="d", verdict=verdict)


@pytest.mark.parametrize(
    ("verdicts", "met"),
    [
        ([], False),
        (["met"], True),
        (["met", "met"], True),
        (["failed"], False),
        (["pending"], False),
        (["met", "pending"], False),
        (["met", "failed", "met"], False),
    ],
)
def test_all_met(verdicts: list[str], met: bool) -> None:
    clauses = [clause(verdict) for verdict in verdicts]
    assert all_met(clauses) is met
    assert all_met(iter(clauses)) is met
    assert [c.verdict for c in failed(clauses)] == [v for v in verdicts if v != "met"]


def test_a_remedy_stands_only_where_something_failed() -> None:
    assert check("s", "n", True, 1, 2, "do").remedy is None
    assert check("s", "n", False, 1, 2, "do") == Clause(
        subject="s", name="n", found="1", demanded="2", verdict="failed", remedy="do"
    )


# --- privacy budgets -----------------------------------------------------------------------


def _with_plan(scenario: Scenario, **changes: Any) -> Clause:
    """The privacy clause of an asset with a budget of epsilon 2, under a plan of epsilon 1."""
    job = copy.deepcopy(scenario().job)
    job["recipe"]["data"]["standardize"] = False
    job["recipe"]["holdout"] = {"stratified": False}
    plan = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
        "sampling_probability": 0.1,
        "metrics_noise": 3.0,
    }
    example = scenario(
        job=job,
        terms={"privacy": {"epsilon": 2.0, "delta": 1e-6}},
        contract={"privacy": plan},
        **changes,
    )
    (clause,) = [c for c in example.clauses() if c.name == "privacy"]
    return clause  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("loss", "verdict", "found"),
    [
        (PrivacyLoss(0.0, 2.0), "met", "epsilon 2 with this job, 0 before it, at delta 1e-06"),
        (PrivacyLoss(1.2, 2.0000001), "failed", "1.2 before it"),
        (PrivacyLoss(math.inf, math.inf), "failed", "unbounded with this job, unbounded before"),
        (None, "pending", "epsilon <= 1 at delta 1e-05 for this job"),
    ],
)
def test_what_jobs_cost_together_is_held_against_the_budget(
    scenario: Scenario, loss: PrivacyLoss | None, verdict: str, found: str
) -> None:
    clause = _with_plan(scenario, loss=loss)
    assert clause.verdict == verdict
    assert found in clause.found
    assert clause.demanded == "epsilon <= 2 at delta 1e-06 over all jobs"
    assert (clause in failed([clause])) == (verdict != "met")


def test_a_review_leaves_a_budget_that_suffices_pending(scenario: Scenario) -> None:
    assert _with_plan(scenario, loss=PrivacyLoss(0.0, 1.0), facts=None).verdict == "pending"
    short = _with_plan(scenario, loss=PrivacyLoss(1.5, 2.1), facts=None)
    assert short.verdict == "failed"
    assert short.remedy is not None
    assert short.remedy.startswith("0.5 is left")
