"""Choosing examples: rates, independence, empty batches, and the truth in the record."""

from __future__ import annotations

import math

import pytest
import torch

from cenacle.training.privacy import PoissonSampler, PrivacyError, ShuffledSampler, batches

KEY = bytes(range(32))


def test_poisson_takes_each_example_at_its_rate() -> None:
    sampler = PoissonSampler(400, 0.05, steps=500, key=KEY)
    taken = torch.zeros(500, 400)
    for step, chosen in enumerate(sampler):
        taken[step, chosen] = 1
    assert abs(float(taken.mean()) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / taken.numel())
    sizes = taken.sum(1)
    assert float(sizes.var()) == pytest.approx(400 * 0.05 * 0.95, rel=0.3)
    by_example = taken.sum(0)
    assert float(by_example.var()) == pytest.approx(500 * 0.05 * 0.95, rel=0.3)
    centred = taken - taken.mean()
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 4 * 0.0475 / math.sqrt(199_500)


def test_empty_batches_come_and_are_kept() -> None:
    sampler = PoissonSampler(10, 0.02, steps=200, key=KEY)
    x = torch.arange(10.0)
    sizes = [len(part) for (part,) in batches(sampler, x)]
    assert len(sizes) == 200
    assert sizes.count(0) > 100
    assert max(sizes) >= 1


def test_every_iteration_chooses_anew() -> None:
    sampler = PoissonSampler(1000, 0.5, steps=1, key=KEY)
    assert list(sampler) != list(sampler)
    assert list(PoissonSampler(1000, 0.5, steps=1)) != list(PoissonSampler(1000, 0.5, steps=1))
    assert list(PoissonSampler(7, 1.0, steps=2)) == [list(range(7))] * 2


def test_records_say_what_was_done() -> None:
    poisson = PoissonSampler(1000, 0.05)
    assert (poisson.sampling.kind, poisson.sampling.rate) == ("poisson", 0.05)
    assert poisson.sampling.secure
    assert poisson.expected_batch == pytest.approx(50)
    assert len(poisson) == 20
    shuffled = ShuffledSampler(1000, 50, key=KEY)
    assert (shuffled.sampling.kind, shuffled.sampling.rate) == ("shuffled", None)
    assert shuffled.sampling.batch_size == 50
    assert not shuffled.sampling.secure


def test_a_shuffled_pass_takes_every_example_once() -> None:
    sampler = ShuffledSampler(103, 10)
    chosen = list(sampler)
    assert len(chosen) == len(sampler) == 11
    assert sorted(i for part in chosen for i in part) == list(range(103))
    assert chosen != list(sampler)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(PrivacyError):
        PoissonSampler(10, rate)


def test_a_sampler_for_other_data_is_refused() -> None:
    with pytest.raises(PrivacyError, match="another number"):
        next(batches(PoissonSampler(10, 0.5), torch.zeros(11)))
    with pytest.raises(PrivacyError):
        ShuffledSampler(0, 1)
    with pytest.raises(PrivacyError):
        PoissonSampler(0, 0.5)
