"""The patients of the hospitals' demonstration: scikit-learn's breast-cancer data."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.errors import UnavailableError

__all__ = [
    "CLASSES",
    "HOSPITALS",
    "RANGES",
    "TARGET",
    "hospital_patients",
    "share_with_clinic",
]

HOSPITALS: Final = ("hospital-a", "hospital-b", "hospital-c")
TARGET: Final = "diagnosis"
CLASSES: Final = ("malignant", "benign")
_HELD_OUT: Final = 0.3
_SEED: Final = 7

_BOUNDS: Final = {
    "radius": ((5, 30), (0, 3), (5, 40)),
    "texture": ((5, 40), (0, 5), (10, 50)),
    "perimeter": ((40, 190), (0, 22), (50, 260)),
    "area": ((100, 2500), (0, 550), (150, 4300)),
    "smoothness": ((0.05, 0.17), (0, 0.03), (0.07, 0.23)),
    "compactness": ((0, 0.35), (0, 0.14), (0, 1.1)),
    "concavity": ((0, 0.45), (0, 0.4), (0, 1.3)),
    "concave_points": ((0, 0.2), (0, 0.06), (0, 0.3)),
    "symmetry": ((0.1, 0.31), (0, 0.08), (0.15, 0.67)),
    "fractal_dimension": ((0.04, 0.1), (0, 0.03), (0.05, 0.21)),
}

RANGES: Final = {
    name: [float(low), float(high)]
    for feature, bounds in _BOUNDS.items()
    for name, (low, high) in zip(
        (f"mean_{feature}", f"{feature}_error", f"worst_{feature}"), bounds, strict=True
    )
}
"""Public bounds of every feature: round numbers about those that the data set's published
description gives (Street, Wolberg and Mangasarian 1993; in scikit-learn's documentation)."""


def hospital_patients() -> tuple[list[str], dict[str, list[list[Any]]]]:
    """The 569 patients as three hospitals with different case mixes: 310, 170 and 89.

    A screening centre sees mostly benign findings and obvious tumours, a surgical clinic mostly
    malignant ones, a referral centre few and difficult cases. So none of them alone sees what
    decides the others' cases. The mix is chosen to make that point: with a random split the
    largest hospital alone is about as good as all together.

    Returns:
        Column names, and rows by hospital, in a fixed order; every patient is in one hospital.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise UnavailableError(
            "the demonstration's data is not here",
            found="no scikit-learn",
            remedy="pip install 'cenacle[demo]'",
        ) from None
    data = load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in data.feature_names]
    by_size = np.argsort(data.data[:, names.index("mean_radius")], kind="stable")
    malignant, benign = by_size[data.target[by_size] == 0], by_size[data.target[by_size] == 1]
    # The 20 largest tumours and the 60 smallest benign findings are the easy cases.
    hard_malignant, hard_benign = malignant[:-20], benign[60:]
    few_benign = np.linspace(0, len(hard_benign) - 1, 7).astype(int)
    some_malignant = np.linspace(0, len(hard_malignant) - 1, 82).astype(int)
    rows = {
        "hospital-a": [np.delete(hard_benign, few_benign), malignant[-20:]],
        "hospital-b": [np.delete(hard_malignant, some_malignant), benign[:60]],
        "hospital-c": [hard_benign[few_benign], hard_malignant[some_malignant]],
    }
    labels = [str(name) for name in data.target_names]
    return [*names, TARGET], {
        name: [
            [*map(float, data.data[row]), labels[data.target[row]]]
            for row in np.sort(np.concatenate(parts))
        ]
        for name, parts in rows.items()
    }


def share_with_clinic(
    patients: dict[str, list[list[Any]]],
) -> tuple[dict[str, list[list[Any]]], list[list[Any]]]:
    """Let a clinic have some patients of each mix, for it to measure on: 398 stay, 171 go.

    Returns:
        What stays with each hospital, and the clinic's.
    """
    generator = np.random.default_rng(_SEED)
    stay: dict[str, list[list[Any]]] = {}
    clinic: list[list[Any]] = []
    for name, rows in patients.items():
        chosen: NDArray[np.int64] = np.sort(
            generator.permutation(len(rows))[: round(_HELD_OUT * len(rows))]
        )
        gone = set(chosen.tolist())
        stay[name] = [row for number, row in enumerate(rows) if number not in gone]
        clinic += [rows[number] for number in chosen]
    return stay, clinic
