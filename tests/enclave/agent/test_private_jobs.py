"""A recipe under a privacy plan in a real enclave: one release, however often it is interrupted."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from cenacle.documents.base import unb64
from cenacle.documents.dsse import Envelope
from cenacle.documents.privacy import PrivacyRecord
from cenacle.documents.receipt import OutputRecord, Statement
from cenacle.enclave.receipt import DRAFT_FILE
from cenacle.errors import EnclaveError
from cenacle.sealing import SealedReader
from tests.support.house import House, Outcome, Sealed, Trap, patient_rows, recipe_job

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (cenacle[privacy])")
pytestmark = pytest.mark.processes

OUTPUTS = {"model": "model", "metrics": "metrics"}
BUDGET = {"epsilon": 3.0, "delta": 1e-5}
PLAN = {
    **BUDGET,
    "clipping_norm": 1.0,
    "noise_multiplier": 3.0,
    "sampling_probability": 0.5,
    "metrics_noise": 6.0,
}


def _job() -> Any:
    job = recipe_job(["a"], epochs=4, every=3, holdout={"fraction": 0.2, "stratified": False})
    job["recipe"]["data"]["standardize"] = False
    return job


def _opened(house: House, statement: Envelope, outcome: Outcome, name: str) -> bytes:
    """An output of a job that may not be settled yet, as the clinic could open it."""
    receipt = statement.peek(Statement).predicate
    record = next(output for output in receipt.outputs if output.name == name)
    context = OutputRecord.wrapping_context(receipt.contract, record.name, record.header)
    key = house.parties["clinic"].hpke_key.open(unb64(record.wrapped_key), *context)
    with SealedReader(outcome.out / f"{name}.sealed", key, expected_header=record.header) as reader:
        return reader.read_range(0, reader.size)


def test_a_private_job_that_is_stopped_before_it_settles_releases_nothing_more(
    house: House, trap: Trap
) -> None:
    """Whoever stops the enclave to get a second noisy model of the same records gets the first."""
    source = house.folder / "private.csv"
    source.write_text(patient_rows(60, seed=3))
    patients = {"a": house.seal("hospital-a", source, privacy=BUDGET)}
    digest = house.agree(house.contract(patients, _job(), OUTPUTS, privacy=PLAN))
    out = house.path("results")

    trap.set("settle", when="before")
    first = house.run(digest, patients, out)
    run = house.open_run(digest)
    assert isinstance(first.error, EnclaveError), first.error
    assert "stopped" in first.error.what
    kept = house.path("kept")
    shutil.copytree(out, kept)
    draft = json.loads((kept / DRAFT_FILE).read_bytes())

    # The draft is thrown away: the job ends a second time, under new keys.
    (out / DRAFT_FILE).unlink()
    last = house.run(digest, patients, out, resume=run)
    assert last.error is None
    statement = Envelope.from_fields(draft["statement"])
    first.out = kept
    for name in OUTPUTS:
        assert _opened(house, statement, first, name) == house.open(last, name)
        assert (kept / f"{name}.sealed").read_bytes() != (out / f"{name}.sealed").read_bytes()

    record = house.verify(last.receipt).receipt.privacy
    assert isinstance(record, PrivacyRecord)
    assert [event.steps for event in record.events] == [8, 1]
    found = house.client.budget(
        house.parties["hospital-a"].signing_key, "hospital-a", patients["a"].asset.digest
    )
    assert (found.jobs, found.unbounded) == (1, 0)
    assert found.spent is not None
    assert 1.0 < found.spent <= 3.0
    metrics = house.metrics(last)
    assert metrics["pooled"]["noisy"] is True
    assert "training_loss" not in json.dumps(metrics)
    assert set(metrics["pooled"]) == {
        *("rows", "noisy", "noise_std", "accuracy", "balanced_accuracy", "confusion", "epochs")
    }


def test_terms_without_a_budget_accept_a_plan(house: House, patients: dict[str, Sealed]) -> None:
    """They ask for less than it gives."""
    job = _job()
    contract = house.contract({"a": patients["a"]}, job, OUTPUTS, privacy=PLAN)
    clauses = house.client.review(house.agree(contract)).clauses
    privacy = [c for c in clauses if c.name == "privacy"]
    assert [c.verdict for c in privacy] == ["met", "met"]
    assert "epsilon <= 3 at delta 1e-05 for this job" in privacy[1].found
