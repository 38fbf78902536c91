from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.datasets import load_breast_cancer

from cenacle.documents.recipe import Recipe
from cenacle.training import MemoryTable

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are tiny, and threads that wait for each other cost more than they help."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """A small table recipe, with top-level fields replaced by keyword."""

    def make(**changes: Any) -> Recipe:
        fields: dict[str, Any] = {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": ["a", "b", "c"],
                "target": "label",
                "classes": ["no", "yes"],
            },
            "model": {"type": "mlp", "hidden": [8]},
            "optimizer": {"type": "adam", "learning_rate": 0.01},
            "epochs": 3,
            "batch_size": 16,
            "seed": 5,
            "holdout": {"fraction": 0.25},
        }
        return Recipe.from_fields(fields | changes)

    return make


@pytest.fixture(scope="session")
def tables() -> dict[str, MemoryTable]:
    """Three parties of 40, 25 and 18 rows, five features, two classes."""
    generator = np.random.Generator(np.random.Philox(key=3))
    out = {}
    for alias, rows in (("a", 40), ("b", 25), ("c", 18)):
        x = generator.standard_normal((rows, 5)) * [1, 10, 0.1, 5, 1] + [0, 100, 0, -3, 1]
        score = x[:, 0] + 0.2 * (x[:, 1] - 100) + generator.standard_normal(rows) * 0.3
        columns: dict[str, Any] = {f"x{i}": x[:, i] for i in range(5)}
        columns["label"] = np.where(score > 0, "yes", "no").tolist()
        out[alias] = MemoryTable(columns)
    return out


@pytest.fixture(scope="session")
def hospitals() -> dict[str, MemoryTable]:
    """scikit-learn's breast cancer data as three hospitals with different case mixes.

    A screening practice sees almost every benign lump and only the largest tumours, a
    surgical ward the other tumours and only the smallest benign lumps, a referral centre an
    even sample of both.
    """
    data = load_breast_cancer()
    names = [name.replace(" ", "_") for name in data.feature_names]
    by_size = np.argsort(data.data[:, names.index("mean_radius")], kind="stable")
    malignant, benign = by_size[data.target[by_size] == 0], by_size[data.target[by_size] == 1]
    plain_malignant, plain_benign = malignant[-20:], benign[:60]
    hard_malignant, hard_benign = malignant[:-20], benign[60:]
    to_c_benign = np.linspace(0, len(hard_benign) - 1, 7).astype(int)
    to_c_malignant = np.linspace(0, len(hard_malignant) - 1, 82).astype(int)
    rows = {
        "a": [np.delete(hard_benign, to_c_benign), plain_malignant],
        "b": [np.delete(hard_malignant, to_c_malignant), plain_benign],
        "c": [hard_benign[to_c_benign], hard_malignant[to_c_malignant]],
    }
    out = {}
    for alias, parts in rows.items():
        chosen = np.sort(np.concatenate(parts))
        columns = {name: data.data[chosen, i] for i, name in enumerate(names)}
        labels = pa.array(data.target_names[data.target[chosen]].tolist())
        out[alias] = MemoryTable({**columns, "diagnosis": labels})
    return out
