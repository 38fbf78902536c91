"""Privacy plans: what they mean in events, and what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan, PrivacyRecord
from cenacle.errors import DocumentError

Fields = dict[str, Any]
POISSON: Fields = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "noise_multiplier": 1.5,
    "sampling_probability": 0.03,
}
SHUFFLE: Fields = {
    **{k: v for k, v in POISSON.items() if k != "sampling_probability"},
    "sampling": "shuffle",
}


def _event(noise: float, probability: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise, sampling_probability=probability, steps=steps)


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        (POISSON, _event(1.5, 0.03, 134)),  # 4 epochs of 33.3 steps, rounded up
        ({**POISSON, "sampling_probability": 1.0}, _event(1.5, 1.0, 4)),
        (SHUFFLE, _event(1.5, 1.0, 4)),
        (
            {**POISSON, "unit": {"subject": "patient", "most_records": 3}},
            _event(0.5, 0.03, 134),
        ),
    ],
)
def test_events(fields: Fields, event: PrivacyEvent) -> None:
    plan = PrivacyPlan.from_fields(fields)
    assert plan.events(4)[0] == event
    assert PrivacyPlan.from_fields(plan.to_fields()) == plan


def test_noise_that_follows_from_epsilon() -> None:
    plan = PrivacyPlan.from_fields({**POISSON, "noise_multiplier": None})
    with pytest.raises(ValueError, match="follows from its epsilon"):
        plan.events(4)[0]
    assert plan.events(4, noise_multiplier=2.5)[0] == _event(2.5, 0.03, 134)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"sampling_probability": None}, "poisson needs"),
        ({"sampling": "shuffle"}, "shuffle has none"),
        ({"sampling": "none"}, "sampling"),
        ({"clipping": "none"}, "clipping"),
        ({"unit": "patient"}, "unit"),
        ({"unit": {"subject": "", "most_records": 1}}, "unit"),
        ({"unit": {"subject": "p", "most_records": 0}}, "most_records"),
        ({"seed": 1}, "unknown field"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change: Fields, problem: str) -> None:
    with pytest.raises(DocumentError) as caught:
        PrivacyPlan.from_fields({**POISSON, **change})
    assert problem in caught.value.what


def test_subjects_cannot_be_shuffled() -> None:
    with pytest.raises(DocumentError, match="poisson only"):
        PrivacyPlan.from_fields({**SHUFFLE, "unit": {"subject": "p", "most_records": 2}})


def test_metrics_and_several_models_are_events_too() -> None:
    plan = PrivacyPlan.from_fields({**POISSON, "metrics_noise": 4.0})
    assert plan.events(4, trainings=2) == (_event(1.5, 0.03, 268),)
    assert plan.events(4, trainings=2, measurements=3) == (
        _event(1.5, 0.03, 268),
        _event(4.0, 1.0, 3),
    )
    subjects = PrivacyPlan.from_fields(
        {**POISSON, "metrics_noise": 4.0, "unit": {"subject": "patient", "most_records": 2}}
    )
    assert subjects.events(4, measurements=1)[1] == _event(2.0, 1.0, 1)


@pytest.mark.parametrize(
    ("spent", "covered"),
    [
        (_event(1.5, 0.03, 134), True),
        (_event(1.6, 0.03, 134), True),
        (_event(1.5, 0.02, 134), True),
        (_event(1.5, 0.03, 1), True),
        (_event(1.49, 0.03, 1), False),
        (_event(9.0, 0.031, 1), False),
        (_event(9.0, 0.001, 135), False),
    ],
)
def test_what_an_event_covers(spent: PrivacyEvent, covered: bool) -> None:
    assert _event(1.5, 0.03, 134).covers(spent) is covered


def test_a_record_says_what_is_promised_and_what_is_not() -> None:
    plan = PrivacyPlan.from_fields({**POISSON, "metrics_noise": 4.0})
    record = PrivacyRecord.of(plan, plan.events(4, measurements=1))
    assert PrivacyRecord.from_fields(record.to_fields()) == record
    for words in (
        "(2, 1e-05)-differential privacy for each unit: one record",
        "134 steps, Poisson sampling with probability 0.03",
        "clipped as a whole to an L2 norm of 1",
        "1.5 times what one unit",
        "1 tables of counts with Gaussian noise of 4 times",
        "Not covered: how many records there are",
    ):
        assert words in record.description
    subjects = PrivacyPlan.from_fields(
        {**POISSON, "unit": {"subject": "patient", "most_records": 3}, "clipping": "per-layer"}
    )
    described = PrivacyRecord.of(subjects, subjects.events(4)).description
    assert "all records of one subject ('patient' within one asset; at most 3" in described
    assert "layer by layer" in described
