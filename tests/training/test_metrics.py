from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from cenacle.training.metrics import (
    accuracy,
    area_under_curve,
    balanced_accuracy,
    classification_metrics,
    confusion_matrix,
    log_loss,
    noisy_classification_metrics,
    regression_metrics,
    rmse,
)


@given(seed=st.integers(0, 2**32), classes=st.integers(2, 5), rows=st.integers(5, 60))
@settings(max_examples=40, deadline=None)
def test_agrees_with_scikit_learn(seed: int, classes: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), generator.integers(0, classes, rows)])
    # Few distinct scores, so that ties occur.
    scores = generator.integers(1, 4, (len(truth), classes)).astype(float)
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    assert accuracy(truth, predicted) == pytest.approx(reference.accuracy_score(truth, predicted))
    assert balanced_accuracy(truth, predicted, classes) == pytest.approx(
        reference.balanced_accuracy_score(truth, predicted)
    )
    np.testing.assert_array_equal(
        confusion_matrix(truth, predicted, classes), reference.confusion_matrix(truth, predicted)
    )
    assert log_loss(truth, probabilities) == pytest.approx(reference.log_loss(truth, probabilities))
    expected = (
        reference.roc_auc_score(truth, probabilities[:, 1])
        if classes == 2
        else reference.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    )
    assert area_under_curve(truth, probabilities) == pytest.approx(expected)


def test_undefined_measures_are_none() -> None:
    probabilities = np.array([[0.2, 0.8], [0.6, 0.4]])
    one_class = np.array([1, 1])
    assert area_under_curve(one_class, probabilities) is None
    measured = classification_metrics(one_class, probabilities)
    assert measured["auc"] is None
    assert measured["balanced_accuracy"] == 0.5
    assert measured["confusion"] == [[0, 0], [1, 1]]
    assert regression_metrics(np.array([2.0, 2.0]), np.array([1.0, 3.0]))["r2"] is None


def test_regression() -> None:
    truth, predicted = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0])
    measured = regression_metrics(truth, predicted)
    assert (
        measured["rmse"]
        == pytest.approx(np.sqrt(1.25 / 3))
        == pytest.approx(rmse(truth, predicted))
    )
    assert measured["mae"] == pytest.approx(0.5)
    assert measured["r2"] == pytest.approx(reference.r2_score(truth, predicted))


def test_a_certain_mistake_costs_a_bounded_loss() -> None:
    assert log_loss(np.array([0]), np.array([[0.0, 1.0]])) == pytest.approx(-np.log(1e-15))


@pytest.mark.parametrize(
    ("noisy", "accuracy", "balanced"),
    [
        ([[40.0, 10.0], [5.0, 45.0]], 0.85, 0.85),
        ([[60.0, -3.0], [-1.0, 70.0]], 1.0, 1.0),
        ([[-4.0, 50.0], [40.0, -2.0]], 0.0, 0.0),
        # A class whose number drowns in the noise is not counted; with none there is no mean.
        ([[80.0, 20.0], [1.0, 4.0]], 0.84, 0.8),
        ([[1.0, -2.0], [1.0, 3.0]], 0.04, None),
    ],
)
def test_noisy_counts_give_figures_in_range(
    noisy: list[list[float]], accuracy: float, balanced: float | None
) -> None:
    measured = noisy_classification_metrics(np.array(noisy), 100, 2.0)
    assert measured.pop("accuracy") == pytest.approx(accuracy)
    assert measured.pop("balanced_accuracy") == (balanced and pytest.approx(balanced))
    assert measured == {"rows": 100, "noisy": True, "noise_std": 2.0, "confusion": noisy}
