"""Measuring a model file on rows of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cenacle.errors import DataError
from cenacle.training.data import feature_matrix
from cenacle.training.front import FrontGraph
from cenacle.training.inference import load_model, predict
from cenacle.training.metrics import classification_metrics, regression_metrics
from cenacle.training.model_file import ModelMetadata, read_model

__all__ = ["evaluate", "evaluate_tensors"]


def evaluate(model_file: bytes, table: pa.Table) -> dict[str, Any]:
    """Exact measures of a model on a table that holds its features and its target.

    Args:
        model_file: what :func:`~cenacle.training.model_file.write_model` wrote.

    Returns:
        As :func:`~cenacle.training.metrics.classification_metrics` or ``regression_metrics``.

    Raises:
        DataError: the model reads tensors, a column is missing, or a value does not fit.
        DocumentError: the file is no model that cenacle trained.
    """
    tensors, metadata = read_model(model_file)
    described = ModelMetadata.from_fields(metadata)
    if described.features is None:
        raise DataError(
            "this model reads tensors, not a table",
            remedy="give the rows as .npz or .safetensors",
        )
    if described.target not in table.column_names:
        raise DataError(
            "the table lacks the column that the model predicts",
            found=f"{table.num_columns} columns without {described.target!r}",
        )
    found = predict(load_model(tensors, metadata), metadata, table)
    if described.classes is None or found.probabilities is None:
        assert found.values is not None
        truth = feature_matrix(table, (described.target,), "the input")[:, 0]
        return regression_metrics(truth, found.values)
    return classification_metrics(
        _codes(described.classes, table.column(described.target).to_pylist()), found.probabilities
    )


def evaluate_tensors(
    model_file: bytes,
    tensors: Mapping[str, NDArray[Any]],
    *,
    samples: str | None = None,
    front: FrontGraph | None = None,
) -> dict[str, Any]:
    """Exact measures of a model on tensors that hold its samples and its target.

    Args:
        samples: name of the tensor of samples, for a model without a front; one with a front
            says it itself.
        front: runs the front that the model was trained behind, if it was.

    Returns, Raises:
        As :func:`evaluate`; InputError: the front is missing, or there should be none.
    """
    parameters, metadata = read_model(model_file)
    described = ModelMetadata.from_fields(metadata)
    if described.features is not None:
        raise DataError(
            "this model reads a table, not tensors", remedy="give the rows as .csv or .parquet"
        )
    name = described.front.samples if described.front is not None else samples
    for wanted in (name, described.target):
        if wanted is None or wanted not in tensors:
            raise DataError(
                f"the data lacks tensor {wanted!r}"
                if wanted is not None
                else "it is not said which tensor holds the samples",
                found=", ".join(sorted(tensors))[:200],
            )
    assert name is not None
    inputs: Any = tensors if front is not None else tensors[name]
    found = predict(load_model(parameters, metadata), metadata, inputs, front=front)
    truth = np.asarray(tensors[described.target])
    rows = len(tensors[name])
    if truth.size != rows:
        raise DataError(
            "the data has another number of targets than of samples",
            found=f"{truth.size} targets",
            expected=f"{rows}",
        )
    truth = truth.reshape(rows)
    if described.classes is None or found.probabilities is None:
        assert found.values is not None
        return regression_metrics(truth.astype(np.float64), found.values)
    return classification_metrics(_codes(described.classes, truth.tolist()), found.probabilities)


def _codes(classes: tuple[Any, ...], labels: list[Any]) -> NDArray[np.int64]:
    # By type too: True is no class 1.
    known = {(type(label), label): code for code, label in enumerate(classes)}
    codes = np.empty(len(labels), dtype=np.int64)
    for row, label in enumerate(labels):
        code = known.get((type(label), label))
        if code is None:
            raise DataError(
                f"the target holds a label in row {row} that the model does not know",
                expected=f"one of {', '.join(map(repr, classes[:8]))}",
            )
        codes[row] = code
    return codes
