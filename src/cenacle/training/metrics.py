"""Measures of a trained model, in plain numpy.

Labels are codes ``0 .. classes - 1``; every result is a Python number or nested list fit
for JSON, and None where a measure is undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "accuracy",
    "area_under_curve",
    "balanced_accuracy",
    "classification_metrics",
    "confusion_matrix",
    "log_loss",
    "noisy_classification_metrics",
    "regression_metrics",
    "rmse",
]

Codes = NDArray[np.int64]
Reals = NDArray[np.float64]


def confusion_matrix(truth: Codes, predicted: Codes, classes: int) -> NDArray[np.int64]:
    """Counts, shape (classes, classes): row is the truth, column the prediction."""
    flat = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def accuracy(truth: Codes, predicted: Codes) -> float:
    """The share of rows predicted correctly, in [0, 1]."""
    return float(np.mean(truth == predicted))


def balanced_accuracy(truth: Codes, predicted: Codes, classes: int) -> float:
    """The mean of the recalls of the classes that occur in ``truth``."""
    matrix = confusion_matrix(truth, predicted, classes)
    rows = matrix.sum(axis=1)
    present = rows > 0
    return float(np.mean(np.diag(matrix)[present] / rows[present]))


def _midranks(scores: Reals) -> Reals:
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def area_under_curve(truth: Codes, probabilities: Reals) -> float | None:
    """Area under the ROC curve (Mann-Whitney U, ties counted half; Hanley and McNeil 1982).

    Args:
        truth: (rows,).
        probabilities: (rows, classes). Two classes: the area for class 1. More: the mean of
            one class against the rest over the classes for which it is defined.

    Returns:
        None when no class has both members and others in ``truth``.
    """
    classes = probabilities.shape[1]
    areas = []
    for positive in (1,) if classes == 2 else range(classes):
        members = truth == positive
        inside = int(members.sum())
        outside = len(truth) - inside
        if inside and outside:
            rank_sum = float(_midranks(probabilities[:, positive])[members].sum())
            areas.append((rank_sum - inside * (inside + 1) / 2) / (inside * outside))
    return float(np.mean(areas)) if areas else None


def log_loss(truth: Codes, probabilities: Reals) -> float:
    """Mean negative log likelihood in nats; probabilities below 1e-15 count as 1e-15."""
    chosen = probabilities[np.arange(len(truth)), truth]
    return float(-np.mean(np.log(np.maximum(chosen, 1e-15))))


def rmse(truth: Reals, predicted: Reals) -> float:
    """Root of the mean squared error, in the unit of the target."""
    return float(np.sqrt(np.mean((truth - predicted) ** 2)))


def classification_metrics(truth: Codes, probabilities: Reals) -> dict[str, Any]:
    """Every measure of a classification on at least one row."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1).astype(np.int64)
    return {
        "rows": len(truth),
        "accuracy": accuracy(truth, predicted),
        "balanced_accuracy": balanced_accuracy(truth, predicted, classes),
        "auc": area_under_curve(truth, probabilities),
        "log_loss": log_loss(truth, probabilities),
        "confusion": confusion_matrix(truth, predicted, classes).tolist(),
    }


def regression_metrics(truth: Reals, predicted: Reals) -> dict[str, Any]:
    """Every measure of a regression on at least one row; ``r2`` is None for a constant truth."""
    spread = float(np.sum((truth - truth.mean()) ** 2))
    residual = float(np.sum((truth - predicted) ** 2))
    return {
        "rows": len(truth),
        "rmse": rmse(truth, predicted),
        "mae": float(np.mean(np.abs(truth - predicted))),
        "r2": 1.0 - residual / spread if spread > 0 else None,
    }


def noisy_classification_metrics(noisy: Reals, rows: int, deviation: float) -> dict[str, Any]:
    """What noisy counts say of a classification; nothing else of the rows is read.

    Args:
        noisy: (classes, classes) confusion matrix to whose counts independent Gaussian noise
            was added.
        rows: how many were counted; public.
        deviation: standard deviation of that noise.

    Returns:
        ``accuracy`` and ``balanced_accuracy`` within [0, 1], and ``confusion`` as it is: its
        counts may be negative, so that sums of them are not biased. A class counts towards
        the balanced accuracy if its noisy number of rows is above two standard deviations;
        None if no class is.
    """
    hits, sizes = np.diag(noisy), noisy.sum(axis=1)
    present = sizes > 2 * deviation * np.sqrt(len(noisy))
    recalls = np.clip(hits[present] / sizes[present], 0.0, 1.0)
    return {
        "rows": rows,
        "noisy": True,
        "noise_std": deviation,
        "accuracy": float(np.clip(hits.sum() / rows, 0.0, 1.0)),
        "balanced_accuracy": float(np.mean(recalls)) if present.any() else None,
        "confusion": np.round(noisy, 3).tolist(),
    }
