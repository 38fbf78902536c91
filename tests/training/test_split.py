from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError
from cenacle.training.data import Dataset, PartyRows
from cenacle.training.randomness import numpy_generator, torch_generator
from cenacle.training.split import choose, split_rows


def party(alias: str, targets: list[int]) -> PartyRows:
    return PartyRows(alias, np.zeros((len(targets), 1)), np.array(targets))


@given(
    strata=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_never_takes_a_whole_stratum(strata: list[int], fraction: float, seed: int) -> None:
    numbers = np.array(strata)
    drawn = choose(numbers, fraction, numpy_generator(seed, "test"))
    for stratum in set(strata):
        size = int((numbers == stratum).sum())
        taken = int(drawn[numbers == stratum].sum())
        assert taken < size
        assert taken == min(int(np.floor(fraction * size + 0.5)), size - 1)


def test_a_party_keeps_its_split_when_others_change(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    a, b, c = party("a", [0, 1] * 20), party("b", [0] * 9), party("c", [1, 0] * 5)
    alone = split_rows(recipe, Dataset((a,), None))[0]
    among = split_rows(recipe, Dataset((c, b, a), None))[2]
    np.testing.assert_array_equal(alone.holdout, among.holdout)
    other_seed = split_rows(make_recipe(seed=6), Dataset((a,), None))[0]
    assert not np.array_equal(alone.holdout, other_seed.holdout)
    other_alias = split_rows(recipe, Dataset((party("z", [0, 1] * 20),), None))[0]
    assert not np.array_equal(alone.holdout, other_alias.holdout)


def test_training_and_holdout_are_a_partition(make_recipe: Callable[..., Recipe]) -> None:
    rows = party("a", [0] * 30 + [1] * 10)
    split = split_rows(make_recipe(), Dataset((rows,), None))[0]
    together = np.sort(np.concatenate([split.training, split.holdout]))
    np.testing.assert_array_equal(together, np.arange(40))
    assert np.bincount(rows.targets[split.holdout]).tolist() == [8, 3]


def test_regression_is_stratified_by_the_target(make_recipe: Callable[..., Recipe]) -> None:
    data = {"form": "table", "assets": ["a"], "target": "y"}
    recipe = make_recipe(task="regression", data=data, holdout={"fraction": 0.5})
    targets = np.random.default_rng(0).standard_normal(100)
    split = split_rows(recipe, Dataset((PartyRows("a", np.zeros((100, 1)), targets),), None))[0]
    ranks = np.argsort(np.argsort(targets))
    assert np.bincount(ranks[split.holdout] // 10).tolist() == [5] * 10


def test_refuses_a_holdout_without_rows(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="the holdout has no rows"):
        split_rows(make_recipe(), Dataset((party("a", [0]), party("b", [1])), None))
    recipe = make_recipe(holdout={"fraction": 0})
    splits = split_rows(recipe, Dataset((party("a", [0]), party("b", [1])), None))
    assert [len(split.training) for split in splits] == [1, 1]


def test_draws_are_named() -> None:
    def draws(seed: int, *place: str | int) -> tuple[int, int]:
        first = int(numpy_generator(seed, *place).integers(2**62))
        return first, torch_generator(seed, *place).initial_seed()

    assert draws(1, "x", 2) == draws(1, "x", 2)
    places = [
        draws(1, "x", 2),
        draws(1, "x", 3),
        draws(2, "x", 2),
        draws(1, "x2"),
        draws(1, "x", "2"),
    ]
    assert len(set(places)) == len(places)


def test_subjects_are_split_by_their_number(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(holdout={"fraction": 0.25, "stratified": False})
    subjects = np.repeat(np.arange(12), np.arange(1, 13))
    labels = np.zeros(len(subjects), dtype=np.int64)

    def held(subjects: Any, labels: Any) -> set[int]:
        rows = PartyRows("a", np.zeros((len(labels), 1)), labels, subjects)
        split = split_rows(recipe, Dataset((rows,), None))[0]
        assert not set(subjects[split.training]) & set(subjects[split.holdout])
        return set(subjects[split.holdout])

    assert len(held(subjects, labels)) == 3
    assert held(np.arange(12), labels[:12]) == held(subjects, labels) == held(subjects, labels + 1)
