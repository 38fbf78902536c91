"""Which rows train and which only measure, decided by seed and party.

A party's split depends on its own rows, its alias and the recipe's seed alone: another
party that joins or leaves does not move it. Where rows have subjects, subjects are split, by
their number alone; all rows of one go to the same side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError
from cenacle.training.data import Dataset, PartyRows
from cenacle.training.randomness import numpy_generator

__all__ = ["Split", "choose", "split_rows", "strata_of"]

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Row numbers of one party, ascending."""

    training: Rows
    holdout: Rows


def choose(strata: Rows, fraction: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw about ``fraction`` of the rows of every stratum, never all of one.

    Args:
        strata: (rows,) stratum numbers from 0.

    Returns:
        (rows,) true for the rows drawn. Per stratum the number is rounded to nearest.
    """
    drawn = np.zeros(len(strata), dtype=np.bool_)
    for stratum in range(int(strata.max(initial=-1)) + 1):
        rows = np.flatnonzero(strata == stratum)
        count = min(int(np.floor(fraction * len(rows) + 0.5)), len(rows) - 1)
        if count > 0:
            drawn[generator.permutation(rows)[:count]] = True
    return drawn


def strata_of(recipe: Recipe, targets: NDArray[np.int64] | NDArray[np.float64]) -> Rows:
    """Class codes, or tenths of the target's order for a regression, or one stratum."""
    if not recipe.holdout.stratified:
        return np.zeros(len(targets), dtype=np.int64)
    if recipe.task == "classification":
        return targets.astype(np.int64)
    ranks = np.argsort(np.argsort(targets, kind="stable"), kind="stable")
    bins = max(1, min(10, len(targets) // 10))
    return (ranks * bins // len(targets)).astype(np.int64)


def _split_party(recipe: Recipe, party: PartyRows) -> Split:
    generator = numpy_generator(recipe.seed, "holdout", party.alias)
    fraction = recipe.holdout.fraction
    if party.subjects is not None:
        alike = np.zeros(int(party.subjects.max()) + 1, dtype=np.int64)
        held = choose(alike, fraction, generator)[party.subjects]
    else:
        held = choose(strata_of(recipe, party.targets), fraction, generator)
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def split_rows(recipe: Recipe, dataset: Dataset) -> tuple[Split, ...]:
    """Split each party's rows, in the order of the parties.

    Raises:
        DataError: a holdout was asked for and no party has rows enough for one.
    """
    splits = tuple(_split_party(recipe, party) for party in dataset.parties)
    if recipe.holdout.fraction > 0 and not any(len(split.holdout) for split in splits):
        raise DataError(
            "the holdout has no rows",
            found=f"{sum(len(party) for party in dataset.parties)} rows in all",
            remedy="raise holdout.fraction or bring more rows",
        )
    return splits
