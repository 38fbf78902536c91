"""A recipe over the demonstration's hospitals that compares and measures inside the enclave."""

from __future__ import annotations

from typing import Any

from cenacle.cli.demo_patients import HOSPITALS, TARGET

__all__ = ["hospital_job"]


def hospital_job() -> dict[str, Any]:
    """Training without a privacy plan, pooled and for each hospital alone."""
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(HOSPITALS),
                "target": TARGET,
                "classes": ["malignant", "benign"],
            },
            "model": {"type": "mlp", "hidden": [16]},
            "optimizer": {"type": "adamw", "learning_rate": 0.01},
            "epochs": 40,
            "batch_size": 32,
            "seed": 7,
            "holdout": {"fraction": 0.3},
            "compare_alone": True,
        },
    }
