from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cenacle.cli.demo_patients import hospital_patients
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
    """The demonstration's three hospitals, each with a case mix of its own."""
    names, patients = hospital_patients()
    return {
        alias: MemoryTable(dict(zip(names, zip(*rows, strict=True), strict=True)))
        for alias, rows in patients.items()
    }
