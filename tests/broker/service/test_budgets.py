"""Privacy budgets: composed over all jobs on the same data, on both databases, come what may."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cenacle.accounting import epsilon
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.broker.losses import Losses, UnaccountedError, events_of_text, until_accounted
from cenacle.broker.messages import BudgetView
from cenacle.broker.receipts import verify_receipt
from cenacle.broker.store import Store
from cenacle.broker.store.migrate import VERSION_TABLE
from cenacle.broker.store.migrations.versions import r0002_lineages
from cenacle.documents.base import parse_json, unb64
from cenacle.documents.privacy import NOT_PRIVATE, PrivacyEvent, PrivacyPlan, PrivacyRecord
from cenacle.errors import ConflictError, DocumentError, ProofError, RefusedError

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (cenacle[privacy])")

DELTA = 1e-5
STEPS = 2  # two epochs in which every record joins every step
JOB = PrivacyEvent(noise_multiplier=8.0, sampling_probability=1.0, steps=STEPS)


def spent(jobs: int, event: PrivacyEvent = JOB) -> float:
    return epsilon([event] * jobs, DELTA)


def recipe(*aliases: str) -> dict[str, Any]:
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(aliases),
                "target": "diagnosis",
                "classes": ["malignant", "benign"],
                "standardize": False,
            },
            "model": {"type": "logistic"},
            "optimizer": {"type": "sgd", "learning_rate": 0.1},
            "epochs": STEPS,
            "holdout": {"fraction": 0.0},
        },
    }


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "epsilon": 1.0,
        "delta": DELTA,
        "clipping_norm": 1.0,
        "noise_multiplier": JOB.noise_multiplier,
        "sampling_probability": 1.0,
        **changes,
    }


def private(world: Any, *assets: Any, name: str = "study", **changes: Any) -> Any:
    aliases = [asset.owner for asset in assets]
    fields = {"privacy": plan(), "job": recipe(*aliases), "name": name, **changes}
    return world.contract(*assets, **fields)


def budgeted(make_terms: Any, limit: float) -> dict[str, Any]:
    terms: dict[str, Any] = make_terms(
        recipes=["logistic"], privacy={"epsilon": limit, "delta": DELTA}
    )
    return terms


def view(world: Any, asset: Any) -> BudgetView:
    found = world.broker.budget(world.request_of(world.actors[asset.owner], "budget", asset.digest))
    assert isinstance(found, BudgetView)
    return found


def refused(world: Any, contract: str) -> RefusedError:
    """The refusal of a release, which must leave no trace."""
    enclave = world.enclave(contract)
    request, before = enclave.request(), world.state()
    with pytest.raises(RefusedError) as caught:
        world.desk.release(request)
    assert world.state() == before
    return caught.value


# ------------------------------------------------------------------ charged and refused


def test_jobs_are_composed_and_the_one_too_many_is_refused(any_world: Any, make_terms: Any) -> None:
    world = any_world
    limit = (spent(3) + spent(4)) / 2
    asset = world.deposit("hospital-a", "scarce", terms=budgeted(make_terms, limit))
    assert view(world, asset).spent == 0.0
    for number in range(3):
        digest = world.agree(private(world, asset, name=f"study-{number}"))
        enclave = world.enclave(digest)
        answer = enclave.release()
        entry = parse_json(unb64(answer.log.entry))
        assert entry["privacy"] == [JOB.to_fields()]
        enclave.settle(answer.run, privacy=[JOB.to_fields()])
        found = view(world, asset)
        assert found.spent == pytest.approx(spent(number + 1), abs=1e-12)
        assert (found.jobs, found.unbounded, found.epsilon) == (number + 1, 0, limit)
    # Composed, three jobs cost far less than three times one.
    assert spent(3) < 3 * spent(1) * 0.8

    error = refused(world, world.agree(private(world, asset, name="one-too-many")))
    (clause,) = error.clauses
    assert clause["name"] == "privacy"
    assert f"{spent(4):.4g} with this job, {spent(3):.4g} before it" in clause["found"]
    assert f"<= {limit:g} at delta 1e-05 over all jobs" in clause["demanded"]
    assert f"{limit - spent(3):.4g} is left" in clause["remedy"]
    assert view(world, asset).spent == pytest.approx(spent(3), abs=1e-12)


def test_the_review_shows_what_a_job_would_add(world: Any, make_terms: Any) -> None:
    asset = world.deposit("hospital-a", "scarce", terms=budgeted(make_terms, spent(1)))
    first = world.agree(private(world, asset))
    clause = next(c for c in world.broker.review(first).clauses if c.name == "privacy")
    assert (clause.subject, clause.verdict) == ("contract", "met")
    (clause,) = [c for c in world.broker.review(first).clauses if "epsilon" in c.demanded][1:]
    assert clause.verdict == "pending"
    assert f"{spent(1):.4g} with this job, 0 before it" in clause.found
    world.enclave(first).release()
    second = world.agree(private(world, asset, name="again"))
    (clause,) = [c for c in world.broker.review(second).clauses if c.verdict == "failed"]
    assert clause.name == "privacy"


def test_a_plan_whose_noise_does_not_keep_its_epsilon(world: Any, make_terms: Any) -> None:
    asset = world.deposit("hospital-a", "rich", terms=budgeted(make_terms, 100.0))
    promised = spent(1) * 0.99
    error = refused(world, world.agree(private(world, asset, privacy=plan(epsilon=promised))))
    (clause,) = error.clauses
    assert (clause["subject"], clause["name"]) == ("contract", "privacy")
    assert f"epsilon {spent(1):.4g}" in clause["found"]


def test_the_budgets_own_delta_counts(world: Any, make_terms: Any) -> None:
    strict = make_terms(recipes=["logistic"], privacy={"epsilon": spent(1), "delta": 1e-9})
    asset = world.deposit("hospital-a", "strict", terms=strict)
    error = refused(world, world.agree(private(world, asset)))
    assert f"epsilon {epsilon([JOB], 1e-9):.4g} with this job" in error.clauses[0]["found"]
    none = make_terms(recipes=["logistic"], privacy={"epsilon": 100.0, "delta": 0.0})
    asset = world.deposit("hospital-a", "purest", terms=none)
    assert (
        "epsilon unbounded"
        in refused(world, world.agree(private(world, asset, name="pure"))).clauses[0]["found"]
    )


def test_a_job_without_a_plan_is_refused_and_once_run_leaves_no_budget(
    world: Any, make_terms: Any
) -> None:
    open_terms = make_terms(recipes=["logistic"])
    asset = world.deposit("hospital-a", "open", terms=open_terms)
    world.enclave(world.agree(world.contract(asset, job=recipe("hospital-a")))).release()
    closed = world.deposit(
        "hospital-a", "open", terms=budgeted(make_terms, 100.0), replaces=asset.digest
    )
    found = view(world, closed)
    assert (found.spent, found.unbounded, found.jobs) == (None, 1, 0)
    error = refused(
        world, world.agree(world.contract(closed, job=recipe("hospital-a"), name="plain"))
    )
    assert "no differential privacy" in error.clauses[0]["found"]
    error = refused(world, world.agree(private(world, closed, name="late")))
    assert "unbounded before it" in error.clauses[0]["found"]


def test_weights_that_training_starts_from_are_not_protected(world: Any, make_terms: Any) -> None:
    terms = make_terms(recipes=["graph"], privacy={"epsilon": 100.0, "delta": DELTA})
    rows = world.deposit("hospital-a", "rows", terms=terms)
    weights = world.deposit(
        "hospital-b", "weights", terms=terms, type="model", content="tensors", layout={}
    )
    job = recipe("hospital-a")
    job["recipe"]["model"] = {
        "type": "graph",
        "nodes": [{"name": "out", "op": "linear", "out_features": 2}],
        "initial_weights": "hospital-b",
    }
    error = refused(world, world.agree(private(world, rows, weights, job=job)))
    assert [c["subject"] for c in error.clauses] == ["asset hospital-b of hospital-b"]


# ------------------------------------------------------------------ whose data it is


def test_every_manifest_of_the_same_data_draws_on_one_budget(
    any_world: Any, make_terms: Any
) -> None:
    world = any_world
    limit = (spent(2) + spent(3)) / 2
    terms = budgeted(make_terms, limit)
    first = world.deposit("hospital-a", "a", terms=terms)
    # The same sealed file under other terms, and a newer version of another file.
    again = world.deposit("hospital-a", "a-again", terms=terms, container=_container(first))
    other = world.deposit("hospital-a", "b", terms=terms)
    world.enclave(world.agree(private(world, first, name="one"))).release()
    assert view(world, again).spent == pytest.approx(spent(1))
    assert view(world, other).spent == 0.0
    world.enclave(world.agree(private(world, other, name="two"))).release()
    # One manifest that replaces the second and names the first's file makes them one.
    joined = world.deposit(
        "hospital-a", "b", terms=terms, container=_container(first), replaces=other.digest
    )
    for asset in (first, again, other, joined):
        assert view(world, asset).spent == pytest.approx(spent(2))
    assert "privacy" in {
        c["name"] for c in refused(world, world.agree(private(world, again, name="three"))).clauses
    }


def test_a_stranger_cannot_spend_a_budget_by_naming_the_file(
    any_world: Any, make_terms: Any
) -> None:
    world = any_world
    terms = budgeted(make_terms, 2.0)
    mine = world.deposit("hospital-a", "a", terms=terms)
    theirs = world.deposit("hospital-b", "a", terms=terms, container=_container(mine))
    world.enclave(world.agree(private(world, theirs))).release()
    assert view(world, mine).spent == 0.0


def _container(asset: Any) -> dict[str, Any]:
    fields: dict[str, Any] = asset.container.to_fields()
    return fields


# ------------------------------------------------------------------ at once, again, and afterwards


def test_two_jobs_racing_for_the_last_of_a_budget(any_world: Any, make_terms: Any) -> None:
    """Exactly as many as fit win, whatever comes first; nobody sees a figure of the past."""
    world = any_world
    limit = (spent(2) + spent(3)) / 2
    asset = world.deposit("hospital-a", "scarce", terms=budgeted(make_terms, limit))
    requests = [
        world.enclave(world.agree(private(world, asset, name=f"study-{i}"))).request()
        for i in range(6)
    ]
    outcomes = world.race(requests)
    assert outcomes.count("privacy") == 4
    assert len({run for run in outcomes if run != "privacy"}) == 2
    assert view(world, asset).spent == pytest.approx(spent(2))
    assert world.kinds().count("release") == 2


def test_resuming_charges_nothing_more_and_abandoning_gives_nothing_back(
    any_world: Any, make_terms: Any
) -> None:
    world = any_world
    asset = world.deposit("hospital-a", "once", terms=budgeted(make_terms, spent(1)))
    digest = world.agree(private(world, asset))
    begun = world.enclave(digest).release()
    world.restart()
    world.enclave(digest).release(resume=begun.run)
    assert view(world, asset).spent == pytest.approx(spent(1))
    world.desk.abandon(world.request_of(world.actors["clinic"], "abandon", begun.run))
    assert view(world, asset).spent == pytest.approx(spent(1))
    error = refused(world, digest)
    assert "privacy" in {c["name"] for c in error.clauses}


def test_a_settlement_comes_down_to_what_was_spent(any_world: Any, make_terms: Any) -> None:
    world = any_world
    asset = world.deposit("hospital-a", "a", terms=budgeted(make_terms, 5.0))
    digest = world.agree(private(world, asset))
    enclave = world.enclave(digest)
    answer = enclave.release()
    assert view(world, asset).spent == pytest.approx(spent(1))
    half = JOB.model_copy(update={"steps": 1, "noise_multiplier": 9.0})
    enclave.settle(answer.run, privacy=[half.to_fields()])
    assert view(world, asset).spent == pytest.approx(spent(1, half))
    assert view(world, asset).events == (half,)


@pytest.mark.parametrize(
    "reported",
    [
        pytest.param(None, id="nothing"),
        pytest.param([], id="no event"),
        pytest.param([JOB.model_copy(update={"steps": STEPS + 1})], id="a step more"),
        pytest.param([JOB.model_copy(update={"noise_multiplier": 7.9})], id="less noise"),
        pytest.param([JOB, JOB], id="an event more"),
    ],
)
def test_a_settlement_that_spent_more_or_says_nothing_is_refused(
    world: Any, make_terms: Any, reported: list[PrivacyEvent] | None
) -> None:
    asset = world.deposit("hospital-a", "a", terms=budgeted(make_terms, 5.0))
    enclave = world.enclave(world.agree(private(world, asset)))
    answer = enclave.release()
    fields = None if reported is None else [event.to_fields() for event in reported]
    with pytest.raises(RefusedError, match="another privacy loss than it reserved"):
        enclave.settle(answer.run, privacy=fields)
    assert view(world, asset).spent == pytest.approx(spent(1))
    assert world.desk.open_run(enclave.contract) is not None


def test_only_the_owner_asks_and_only_once(world: Any, make_terms: Any) -> None:
    asset = world.deposit("hospital-a", "a", terms=budgeted(make_terms, 5.0))
    with pytest.raises(RefusedError, match="only the owner"):
        world.broker.budget(world.request_of(world.actors["clinic"], "budget", asset.digest))
    request = world.request_of(world.actors["hospital-a"], "budget", asset.digest)
    world.broker.budget(request)
    with pytest.raises(ConflictError):
        world.broker.budget(request)


# ------------------------------------------------------------------ receipts


def _verify(world: Any, bundle: Any) -> Any:
    verifiers = VerifierSet.of_development(SimulatedVerifier())
    return verify_receipt(bundle, broker_digest=world.broker.digest, verifiers=verifiers)


def test_a_receipt_carries_the_events_and_the_guarantee(world: Any, make_terms: Any) -> None:
    asset = world.deposit("hospital-a", "a", terms=budgeted(make_terms, 5.0))
    contract = private(world, asset)
    enclave = world.enclave(world.agree(contract))
    answer = enclave.release()
    record = PrivacyRecord.of(contract.privacy, (JOB,))
    found = _verify(world, enclave.finish(answer, record, (JOB,)))
    assert found.receipt.privacy == record
    assert record.description.startswith("(1, 1e-05)-differential privacy")


def _more_steps(record: PrivacyRecord) -> PrivacyRecord:
    return record.model_copy(update={"events": (JOB.model_copy(update={"steps": 3}),)})


FALSE_ACCOUNTS = {
    "none claimed": lambda _: NOT_PRIVATE,
    "a smaller epsilon": lambda r: r.model_copy(update={"epsilon": 0.1}),
    "another description": lambda r: r.model_copy(update={"description": "all is well"}),
    "another clipping norm": lambda r: r.model_copy(update={"clipping_norm": 2.0}),
    "more steps than agreed": _more_steps,
}


@pytest.mark.parametrize("name", FALSE_ACCOUNTS)
def test_a_false_account_of_privacy_is_no_receipt(world: Any, make_terms: Any, name: str) -> None:
    asset = world.deposit("hospital-a", "a", terms=budgeted(make_terms, 5.0))
    contract = private(world, asset)
    enclave = world.enclave(world.agree(contract))
    answer = enclave.release()
    record = FALSE_ACCOUNTS[name](PrivacyRecord.of(contract.privacy, (JOB,)))
    with pytest.raises(ProofError):
        _verify(world, enclave.finish(answer, record, (JOB,)))


def test_a_guarantee_that_no_contract_gave_is_no_receipt(world: Any) -> None:
    enclave = world.enclave(world.agree())
    answer = enclave.release()
    plan_ = PrivacyPlan.from_fields(plan())
    with pytest.raises(ProofError, match="privacy is not the contract's"):
        _verify(world, enclave.finish(answer, PrivacyRecord.of(plan_, (JOB,))))


# ------------------------------------------------------------------ figures


def test_figures_are_worked_out_beside_the_writer_and_remembered() -> None:
    losses = Losses()
    question = (((8.0, 1.0, 2),), DELTA)
    with pytest.raises(UnaccountedError) as caught:
        losses.figures([question])
    assert caught.value.questions == (question,)
    found = until_accounted(losses, lambda: losses.figures([question]))
    assert found == {question: spent(1)}
    assert losses.figures([((), DELTA), (((8.0, 1.0, 2),), 0.0)]) == {
        ((), DELTA): 0.0,
        (((8.0, 1.0, 2),), 0.0): math.inf,
    }


def test_somebody_else_is_charged_again_and_again() -> None:
    losses, asked = Losses(), iter(range(1, 100))

    def never_the_same() -> Any:
        return losses.figures([(((1e6, 1.0, next(asked)),), DELTA)])

    with pytest.raises(UnaccountedError, match="not composed"):
        until_accounted(losses, never_the_same)


@pytest.mark.parametrize("text", ["[]", "[{}]", '{"steps":1}', "[1]", "null"])
def test_an_altered_reservation_is_no_budget(text: str) -> None:
    with pytest.raises(DocumentError):
        events_of_text(text)


# ------------------------------------------------------------------ stores of the first version


def test_an_older_store_learns_which_manifests_belong_together(tmp_path: Path) -> None:
    def manifest(container: str) -> str:
        payload = json.dumps({"container": {"digest": container}}).encode()
        return json.dumps({"payload": base64.b64encode(payload).decode()})

    rows = [
        ("sha256:1", "alice", manifest("x"), "sha256:2"),
        ("sha256:2", "alice", manifest("y"), None),
        ("sha256:3", "alice", manifest("y"), None),
        ("sha256:4", "bob", manifest("y"), None),
        ("sha256:5", "alice", "{}", None),
    ]
    found = {row["asset"]: row for row in r0002_lineages._lineages(rows)}
    lineages = {asset: row["lineage"] for asset, row in found.items()}
    assert lineages["sha256:1"] == lineages["sha256:2"] == lineages["sha256:3"]
    assert len({lineages[f"sha256:{n}"] for n in (1, 4, 5)}) == 3
    assert found["sha256:5"]["container"] == "sha256:5"

    # A store that stands at the first version is brought to this one when it is opened.
    path = tmp_path / "broker.db"
    with Store.open(path) as store:
        store.run(lambda tx: tx.add_party("alice", "sha256:" + "a" * 64, "{}", "2027-01-31"))
        store.run(lambda tx: tx.add_asset("sha256:" + "1" * 64, "x", "alice", "{}", b"k"))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        for table in ("lineages", "states", "watches", "revocations"):
            connection.execute(sa.text(f"DROP TABLE {table}"))
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))
    engine.dispose()
    with Store.open(path) as store:
        assert store.run(lambda tx: tx.charged_events("sha256:" + "1" * 64)) == []
        rows = store.run(lambda tx: tx._session.all("SELECT asset, lineage FROM lineages"))
        assert [tuple(row) for row in rows] == [("sha256:" + "1" * 64,) * 2]
