"""What a recipe must leave out under a privacy plan, and what the whole job then costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import TypeAdapter

from cenacle.documents.offload import OffloadPlan
from cenacle.documents.privacy import PrivacyPlan
from cenacle.documents.private_recipe import (
    check_private_offload,
    check_private_recipe,
    privacy_events,
)
from cenacle.documents.recipe import Recipe

Fields = dict[str, Any]

RECIPE: Fields = {
    "task": "classification",
    "data": {
        "form": "table",
        "assets": ["a", "b"],
        "target": "diagnosis",
        "classes": ["benign", "malignant"],
        "standardize": False,
    },
    "model": {"type": "logistic"},
    "optimizer": {"type": "sgd", "learning_rate": 0.1},
    "epochs": 3,
    "holdout": {"fraction": 0.2, "stratified": False},
}
PLAN: Fields = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "noise_multiplier": 1.5,
    "sampling_probability": 0.5,
}


def _recipe(**changes: Any) -> Recipe:
    fields = copy.deepcopy(RECIPE)
    for name, value in changes.items():
        target = fields
        *parents, last = name.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return Recipe.from_fields(fields)


def _plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan.from_fields({**PLAN, **changes})


def test_a_private_recipe() -> None:
    check_private_recipe(_plan(), _recipe(), metrics=False)
    check_private_recipe(_plan(metrics_noise=3.0), _recipe(compare_alone=True), metrics=True)
    check_private_recipe(_plan(), _recipe(holdout={"fraction": 0.0}), metrics=False)


REGRESSION: Fields = {
    "task": "regression",
    "data__classes": None,
    "model": {"type": "linear"},
}
GRAPH: Fields = {
    "type": "graph",
    "nodes": [{"name": "n", "op": "batch_norm"}, {"name": "o", "op": "linear", "out_features": 2}],
}
CNN: Fields = {
    "data": {
        "form": "tensors",
        "assets": ["a"],
        "inputs": "x",
        "labels": "y",
        "classes": [0, 1],
    },
    "model": {"type": "cnn", "channels": [2], "batch_norm": True},
}


@pytest.mark.parametrize(
    ("recipe", "plan", "metrics", "problem"),
    [
        ({"data__standardize": True}, {}, False, "standardize makes means"),
        ({**REGRESSION, "data__standardize_target": True}, {}, False, "standardize makes means"),
        ({"early_stopping": {"patience": 3}}, {}, False, "early_stopping"),
        ({"model": GRAPH}, {}, False, "group_norm"),
        (CNN, {}, False, "group_norm"),
        ({"holdout": {"fraction": 0.2}}, {}, False, "looks at labels"),
        (REGRESSION, {"metrics_noise": 2.0}, True, "regression"),
        ({}, {}, True, "metrics are exact"),
        ({}, {"metrics_noise": 2.0}, False, "metrics_noise would be paid for"),
        ({"compare_alone": True}, {}, False, "compare_alone would be paid for"),
        ({}, {"noise_multiplier": None}, False, "cenacle draft"),
    ],
)
def test_what_would_let_records_past_the_noise(
    recipe: Fields, plan: Fields, metrics: bool, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_private_recipe(_plan(**plan), _recipe(**recipe), metrics=metrics)


def test_what_the_whole_job_costs() -> None:
    (training,) = privacy_events(_plan(), _recipe())
    assert (training.steps, training.noise_multiplier) == (6, 1.5)
    training, counting = privacy_events(_plan(metrics_noise=3.0), _recipe())
    assert (training.steps, counting.steps, counting.noise_multiplier) == (6, 1, 3.0)
    # Each record trains the pooled model and its party's, and measures those of both parties.
    training, counting = privacy_events(_plan(metrics_noise=3.0), _recipe(compare_alone=True))
    assert (training.steps, counting.steps) == (12, 3)


@pytest.mark.parametrize(
    ("offload", "problem"),
    [
        ({"scheme": "enclave"}, None),
        ({"scheme": "measured"}, None),
        ({"scheme": "permuted"}, None),
        ({"scheme": "permuted", "options": {"coefficients": "general"}}, None),
        ({"scheme": "permuted", "allow_public_base": True}, None),
        ({"scheme": "lowrank"}, None),
        ({"scheme": "permuted", "check": False}, "set check: true"),
        ({"scheme": "lowrank", "check": False}, "set check: true"),
        ({"scheme": "permuted", "resident": True}, "leave resident out"),
        (
            {
                "scheme": "lowrank",
                "options": {"noise": {"epsilon": 1.0, "delta": 1e-5, "clip": 1.0}},
            },
            "leave options.noise out",
        ),
        ({"scheme": "masked"}, "use permuted or lowrank"),
        (
            {"scheme": "masked-training", "accelerators": {"count": 2}},
            "use permuted or lowrank",
        ),
    ],
)
def test_under_which_offload_plans_a_privacy_plan_can_be_kept(
    offload: Fields, problem: str | None
) -> None:
    plan: Any = TypeAdapter(OffloadPlan).validate_python(offload)
    if problem is None:
        check_private_offload(plan)
        return
    with pytest.raises(ValueError, match=problem) as caught:
        check_private_offload(plan)
    assert f"under offload {plan.scheme}" in str(caught.value)
