"""``draft`` with a privacy plan, ``review``, ``budget``, ``evaluate``: what people see and get."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cenacle.accounting import epsilon
from cenacle.broker.messages import BudgetView
from cenacle.cli.main import app
from cenacle.cli.privacy import budget_row, completed_plan
from cenacle.documents.privacy import PrivacyPlan
from cenacle.documents.private_recipe import privacy_events
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError, InputError

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (cenacle[privacy])")

JOB: dict[str, Any] = {
    "type": "recipe",
    "recipe": {
        "task": "classification",
        "data": {
            "form": "table",
            "assets": ["a"],
            "target": "t",
            "classes": ["n", "y"],
            "standardize": False,
        },
        "model": {"type": "logistic"},
        "optimizer": {"type": "sgd", "learning_rate": 0.1},
        "epochs": 3,
        "holdout": {"fraction": 0.0},
    },
}
PLAN: dict[str, Any] = {
    "epsilon": 1.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "sampling_probability": 1.0,
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"metrics_noise": 20.0},
        {"unit": {"subject": "patient", "most_records": 3}},
    ],
    ids=["records", "metrics too", "subjects"],
)
def test_a_draft_gets_the_least_noise_that_keeps_its_epsilon(more: dict[str, Any]) -> None:
    completed = completed_plan({**PLAN, **more}, JOB)
    plan = PrivacyPlan.from_fields(completed)
    assert plan.noise_multiplier is not None
    recipe = Recipe.from_fields(JOB["recipe"])
    found = epsilon(privacy_events(plan, recipe), plan.delta)
    assert 0.99 < found <= 1.0
    less = plan.model_copy(update={"noise_multiplier": plan.noise_multiplier * 0.99})
    assert epsilon(privacy_events(less, recipe), plan.delta) > 1.0


def test_noise_that_is_stated_stays() -> None:
    stated = {**PLAN, "noise_multiplier": 9.0}
    assert completed_plan(stated, JOB) == stated


def test_no_noise_keeps_what_the_metrics_spend_already() -> None:
    with pytest.raises(InputError, match="no noise multiplier keeps this epsilon"):
        completed_plan({**PLAN, "metrics_noise": 0.5}, JOB)


@pytest.mark.parametrize(
    ("view", "row"),
    [
        (
            {"epsilon": 2.0, "delta": 1e-5, "spent": 0.5, "jobs": 1, "unbounded": 0},
            ("epsilon 2 at delta 1e-05", "0.500", "1.500", "1 with a plan"),
        ),
        (
            {"epsilon": 2.0, "delta": 1e-5, "jobs": 1, "unbounded": 2},
            ("epsilon 2 at delta 1e-05", "unbounded", "0.000", "1 with a plan, 2 without"),
        ),
        ({"jobs": 0, "unbounded": 1}, ("unbounded", "unbounded", "-", "0 with a plan, 1 without")),
    ],
)
def test_a_budget_in_a_table(view: dict[str, Any], row: tuple[str, ...]) -> None:
    fields = {"asset": "sha256:" + "0" * 64, "name": "records", **view}
    assert budget_row(BudgetView.from_fields(fields)) == ("records", *row)


def test_a_budget_of_no_such_asset(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["budget", str(tmp_path / "none.json"), "--as", "a", "--json"])
    assert done.exit_code == InputError.exit_code
    assert "manifest is not there" in json.loads(done.stdout.splitlines()[-1])["what"]


# ------------------------------------------------------------------ evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predicts y where x is above zero."""
    training = pytest.importorskip("cenacle.training")
    x = np.linspace(-1, 1, 60)
    table = training.MemoryTable({"x": x, "t": np.where(x > 0, "y", "n").tolist()})
    fields = copy.deepcopy(JOB["recipe"])
    fields |= {"optimizer": {"type": "sgd", "learning_rate": 1.0}, "epochs": 20}
    result = training.train(Recipe.from_fields(fields), {"a": table})
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    path.write_bytes(training.write_model(result.model_tensors, result.metadata))
    return path


def _evaluate(model: Path, data: Path) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["evaluate", str(model), str(data), "--json"])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_measured_on_rows_of_ones_own(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("x,t,other\n-0.9,n,1\n0.9,y,2\n0.8,n,3\n-0.7,n,4\n")
    code, found = _evaluate(model, rows)
    assert code == 0
    assert (found["rows"], found["accuracy"]) == (4, 0.75)
    assert found["confusion"] == [[2, 1], [0, 1]]
    shown = CliRunner().invoke(app, ["evaluate", str(model), str(rows)])
    assert "accuracy" in shown.stdout


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x\n1\n", "lacks the column that the model predicts"),
        ("t\nn\n", "lacks columns that the model reads"),
        ("x,t\n1,maybe\n", "a label in row 0 that the model does not know"),
        ("x,t\n1,n\n,n\n", "has no value in row 1"),
        ("x,t\n1,n\n2\n", "damaged"),
        ("x,t\n", "no rows"),
    ],
    ids=["no target", "no feature", "unknown label", "no value", "ragged", "no rows"],
)
def test_rows_that_cannot_be_measured_on(
    model: Path, tmp_path: Path, text: str, problem: str
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(text)
    code, found = _evaluate(model, rows)
    assert code == DataError.exit_code
    assert problem in json.dumps(found)


def test_files_that_are_not_there(model: Path, tmp_path: Path) -> None:
    assert _evaluate(model, tmp_path / "rows.csv")[0] == 2
    assert _evaluate(tmp_path / "model.safetensors", model)[0] == 2
    (tmp_path / "rows.csv").write_text("x,t\n1,n\n")
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    damaged, rows = tmp_path / "model.safetensors", tmp_path / "rows.csv"
    assert _evaluate(damaged, rows)[0] == DataError.exit_code
