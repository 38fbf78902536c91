"""Epsilons: equal to closed forms and to published values, never too small, monotonous."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("dp_accounting", reason="accounting needs dp-accounting (cenacle[privacy])")

import dp_accounting as dp
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from cenacle.accounting import epsilon, noise_multiplier_for, spend, steps_within
from cenacle.documents.privacy import PrivacyEvent
from cenacle.errors import InputError


def event(noise: float, probability: float = 1.0, steps: int = 1) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise, sampling_probability=probability, steps=steps)


def gaussian_delta(noise: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8: exactly, for one release."""
    a, b = 1 / (2 * noise), eps * noise
    return float(norm.cdf(a - b) - math.exp(eps) * norm.cdf(-a - b))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (0.7, 1), (5.0, 1), (10.0, 100), (30.0, 9)])
def test_gaussian_releases_equal_the_closed_form(noise: float, steps: int) -> None:
    found = epsilon([event(noise, steps=steps)], 1e-5)
    alone = noise / math.sqrt(steps)  # composition of Gaussians is a Gaussian
    assert gaussian_delta(alone, found) <= 1e-5 * 1.0001
    assert gaussian_delta(alone, found * 0.995) > 1e-5


def moments(noise: float, q: float, order: int) -> float:
    """Renyi DP of the sampled Gaussian at a whole order; Mironov et al. 2019, section 3.3."""
    terms = [
        gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        + k * math.log(q) + (order - k) * math.log1p(-q) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    return float(logsumexp(terms)) / (order - 1)


@pytest.mark.parametrize(
    ("noise", "q", "steps", "published"),
    [
        # Abadi et al. 2016, figure 2 and section 3.2: q = 0.01, sigma = 4, 100 epochs, 1e-5.
        (4.0, 0.01, 10_000, 1.26),
        # TensorFlow Privacy's classification tutorial: N 60000, batch 250, 15 epochs.
        (1.3, 250 / 60_000, 3_600, 1.18),
        # TensorFlow Privacy's compute_dp_sgd_privacy: N 60000, batch 256, 60 epochs.
        (1.12, 256 / 60_000, 14_063, 2.92),
    ],
)
def test_published_values(noise: float, q: float, steps: int, published: float) -> None:
    """They were converted by Mironov 2017, proposition 3; ours are tighter and say so."""
    delta = 1e-5
    classic = min(
        steps * moments(noise, q, order) + math.log(1 / delta) / (order - 1)
        for order in range(2, 128)
    )
    assert classic == pytest.approx(published, abs=0.006)
    renyi = epsilon([event(noise, q, steps)], delta, method="rdp")
    tight = epsilon([event(noise, q, steps)], delta)
    assert 0.7 * classic < tight < renyi < classic


def test_one_step_of_sampling_equals_its_closed_form() -> None:
    """Add and remove: the worse of both, from the densities of the mixture."""
    noise, q, delta = 1.0, 0.1, 1e-5
    found = epsilon([event(noise, q)], delta)
    grid = [x / 500 for x in range(-12 * 500, 14 * 500)]

    def loss(eps: float) -> float:
        """sup over events of P[M(D)] - e^eps P[M(D')], in both directions."""
        plain = [norm.pdf(x, 0, noise) for x in grid]
        mixed = [(1 - q) * p + q * norm.pdf(x, 1, noise) for x, p in zip(grid, plain, strict=True)]
        remove = sum(max(0.0, m - math.exp(eps) * p) for m, p in zip(mixed, plain, strict=True))
        adding = sum(max(0.0, p - math.exp(eps) * m) for m, p in zip(mixed, plain, strict=True))
        return float(max(remove, adding)) / 500

    assert loss(found) == pytest.approx(delta, rel=0.01)


def test_composition_is_that_of_the_library() -> None:
    """By hand, with dp-accounting."""
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.5)), 300)
    accountant.compose(dp.GaussianDpEvent(8.0), 4)
    events = [event(1.5, 0.02, 100), event(8.0, 1.0, 4), event(1.5, 0.02, 200)]
    for order in itertools.permutations(events):
        assert epsilon(order, 1e-6) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([event(1.0, steps=0)], 1e-5) == 0.0


@settings(max_examples=8, deadline=None)
@given(
    noise=st.floats(0.8, 4),
    q=st.floats(0.01, 0.3),
    steps=st.integers(1, 50),
    more=st.integers(1, 50),
)
def test_more_costs_more(noise: float, q: float, steps: int, more: int) -> None:
    before, after = spend([event(noise, q, steps)], event(noise, q, more), 1e-5, method="rdp")
    assert 0 < before < after
    assert epsilon([event(noise * 1.5, q, steps)], 1e-5, method="rdp") < before
    assert epsilon([event(noise, q, steps)], 1e-4, method="rdp") < before


@pytest.mark.parametrize(
    ("target", "q", "steps"),
    [
        (1.0, 0.01, 500),
        pytest.param(8.0, 0.1, 60, marks=pytest.mark.slow),
        (0.5, 1.0, 3),
    ],
)
def test_the_noise_that_a_target_takes(target: float, q: float, steps: int) -> None:
    found = noise_multiplier_for(target, 1e-5, sampling_probability=q, steps=steps)
    assert epsilon([event(found, q, steps)], 1e-5) <= target
    assert epsilon([event(found * 0.995, q, steps)], 1e-5) > target


def test_steps_until_a_budget_is_spent() -> None:
    training, before = event(1.0, 0.02, 400), [event(2.0, 0.05, 50)]
    whole = epsilon([*before, training], 1e-5)
    assert steps_within(whole + 1, 1e-5, training, before) == 400
    possible = steps_within(whole * 0.8, 1e-5, training, before)
    assert 0 < possible < 400
    part = training.model_copy(update={"steps": possible})
    assert epsilon([*before, part], 1e-5) <= whole * 0.8
    assert steps_within(epsilon(before, 1e-5) * 0.9, 1e-5, training, before) == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match="delta"):
        epsilon([event(1.0)], delta)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_noise_for_what_is_no_training(steps: int) -> None:
    with pytest.raises(InputError, match="no noise multiplier"):
        noise_multiplier_for(1.0, 1e-5, sampling_probability=0.1, steps=steps)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match="not installed"):
        epsilon([event(1.0)], 1e-5)
