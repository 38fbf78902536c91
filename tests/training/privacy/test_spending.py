"""What the engine did, in the accountant's terms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("dp_accounting", reason="accounting needs dp-accounting (cenacle[privacy])")

import torch
from torch.nn import functional

from cenacle import accounting
from cenacle.documents.privacy import PrivacyEvent
from cenacle.training.privacy import PoissonSampler, batches, make_private
from cenacle.training.privacy.record import Event, Record, Sampling
from cenacle.training.privacy.spending import describe, epsilon, spent

POISSON = Sampling("poisson", population=1000, rate=0.05)
STEP = Event(POISSON, "flat", 1.0, (1.0,), noise_multiplier=1.5, steps=40)


def _spent(noise: float, probability: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise, sampling_probability=probability, steps=steps)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (STEP, _spent(1.5, 0.05, 40)),
        (replace(STEP, sampling=Sampling()), _spent(1.5, 1.0, 40)),
        # Foreseeable choices amplify nothing.
        (replace(STEP, sampling=replace(POISSON, secure=False)), _spent(1.5, 1.0, 40)),
        # 1000 examples in batches of 100: 40 steps are four epochs, 41 begin a fifth.
        (replace(STEP, sampling=Sampling("shuffled", 1000, batch_size=100)), _spent(1.5, 1.0, 4)),
        (
            replace(STEP, steps=41, sampling=Sampling("shuffled", 1000, batch_size=100)),
            _spent(1.5, 1.0, 5),
        ),
        # A batch that does not divide: the last one may be short, or of the next epoch.
        (replace(STEP, sampling=Sampling("shuffled", 1000, batch_size=300)), _spent(1.5, 1.0, 14)),
        (replace(STEP, sampling=Sampling("shuffled", 10, batch_size=100)), _spent(1.5, 1.0, 40)),
        (replace(STEP, sampling=Sampling("shuffled")), _spent(1.5, 1.0, 40)),
    ],
)
def test_each_way_of_sampling(event: Event, expected: PrivacyEvent) -> None:
    assert spent(Record([event])) == (expected,)


def test_a_noisy_count_costs_what_andrew_et_al_say() -> None:
    """Their z_delta: the noise on the sum for which both together cost what z does alone."""
    z, count = 1.0, 10.0
    on_sum = (z**-2 - (2 * count) ** -2) ** -0.5
    (found,) = spent(Record([replace(STEP, noise_multiplier=on_sum, count_noise_multiplier=count)]))
    assert found.noise_multiplier == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("change", [{"noise_multiplier": 0.0}, {"secure": False}])
def test_without_real_noise_there_is_no_epsilon(change: dict[str, float]) -> None:
    record = Record([STEP, replace(STEP, **change)])  # type: ignore[arg-type]
    assert epsilon(record, 1e-5) == math.inf
    assert describe(record, 1e-5).startswith("No differential privacy")


def test_a_training_says_what_it_cost() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 8), torch.randint(0, 2, (200,))
    model = torch.nn.Linear(8, 2)
    sampler = PoissonSampler(len(x), rate=0.1, steps=5)
    private = make_private(
        model,
        clip=1.0,
        noise_multiplier=2.0,
        expected_batch=sampler.expected_batch,
        sampling=sampler.sampling,
    )
    for xb, yb in batches(sampler, x, y):
        private.backward(
            lambda a, b: functional.cross_entropy(model(a), b, reduction="none"), xb, yb
        )
    expected = accounting.epsilon([_spent(2.0, 0.1, 5)], 1e-5)
    assert epsilon(private.record, 1e-5) == pytest.approx(expected)
    said = describe(private.record, 1e-5)
    assert f"({expected:.4g}, 1e-05)-differential privacy" in said
    assert "5 steps: Poisson sampling with probability 0.1; flat clipping to 1;" in said
    assert "Not covered" in said
