"""Privacy plans: what they mean in events, and what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan
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
    assert plan.event(4) == event
    assert PrivacyPlan.from_fields(plan.to_fields()) == plan


def test_noise_that_follows_from_epsilon() -> None:
    plan = PrivacyPlan.from_fields({**POISSON, "noise_multiplier": None})
    with pytest.raises(ValueError, match="follows from its epsilon"):
        plan.event(4)
    assert plan.event(4, 2.5) == _event(2.5, 0.03, 134)


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
