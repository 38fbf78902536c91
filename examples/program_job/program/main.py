"""Pooled statistics of several hospitals' tables: what is sealed, reviewed and approved.

For each column: number of patients, mean and standard deviation over all hospitals, and
nothing of a single one. A group too small to hide a patient in is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def run(ctx: Any) -> None:
    """The entry point: ``ctx`` is a :class:`cenacle.enclave.context.JobContext`."""
    columns: list[str] = ctx.parameters["columns"]
    smallest: int = ctx.parameters["smallest_group"]
    tables = ctx.assets

    count, total, squares = 0, np.zeros(len(columns)), np.zeros(len(columns))
    for step, alias in enumerate(sorted(tables), 1):
        if tables[alias].num_rows < smallest:
            raise ValueError("a hospital has too few patients")
        # Batch by batch: the whole table never has to fit into memory.
        for batch in tables[alias].batches(columns):
            rows = np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch])
            count += len(rows)
            total += rows.sum(axis=0)
            squares += (rows**2).sum(axis=0)
        ctx.progress(step, len(tables))

    means = total / count
    deviations = [math.sqrt(max(value, 0.0)) for value in squares / count - means**2]
    ctx.output(
        "statistics",
        {
            "patients": count,
            "columns": {
                name: {"mean": round(float(mean), 6), "deviation": round(deviation, 6)}
                for name, mean, deviation in zip(columns, means, deviations, strict=True)
            },
        },
    )
