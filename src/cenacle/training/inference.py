"""Using a trained model: rebuild it from tensors and metadata, and predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cenacle.errors import DataError, InputError
from cenacle.training._torch import nn, torch
from cenacle.training.data import feature_matrix, sample_array
from cenacle.training.front import FrontGraph, FrontUse, front_features
from cenacle.training.graph import Graph
from cenacle.training.model_file import ModelMetadata
from cenacle.training.models import load_tensors

__all__ = ["Predictions", "class_probabilities", "load_model", "predict"]


@dataclass(frozen=True)
class Predictions:
    """One entry a row.

    Attributes:
        labels: predicted classes; empty for a regression.
        probabilities: (rows, classes) in the order of the metadata's classes; else None.
        values: (rows,) predicted values of a regression in the target's unit; else None.
    """

    labels: tuple[str | int | bool, ...]
    probabilities: NDArray[np.float64] | None
    values: NDArray[np.float64] | None


def load_model(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> nn.Module:
    """The trained module, in evaluation mode. It reads preprocessed samples, see :func:`predict`.

    Raises:
        DocumentError: the metadata is not a model's.
        DataError: the tensors are not those of the metadata's model.
    """
    described = ModelMetadata.from_fields(dict(metadata))
    preprocessing = described.preprocessing
    model = Graph(described.nodes, preprocessing.shape, integers=preprocessing.integers)
    load_tensors(model, tensors, "the model's tensors")
    model.eval()
    return model


def class_probabilities(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    scores = outputs.astype(np.float64)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float64)


def predict(
    model: nn.Module,
    metadata: Mapping[str, Any],
    inputs: pa.Table | Mapping[str, Any] | NDArray[Any],
    *,
    front: FrontGraph | None = None,
) -> Predictions:
    """Predict for rows as they were stored before training.

    Args:
        model: from :func:`load_model`.
        inputs: a table or columns by name (other columns are not read), or an array of
            samples, shape (rows, *sample shape) or (rows, features in the metadata's order). For
            a front with several inputs: arrays by the names of the training data's tensors.
        front: runs the front that the model was trained behind, if it was.

    Raises:
        DataError: a column is missing, a value is not finite, or samples have another shape.
        InputError: the model needs a front and there is none, or the other way round.
    """
    described = ModelMetadata.from_fields(dict(metadata))
    stored = _stored(described, inputs, front)
    samples = described.preprocessing.apply(stored)
    if not isinstance(model, Graph):
        raise InputError("the model was not loaded with load_model", found=type(model).__name__)
    if described.preprocessing.integers:
        model.check_integers(samples)
    model.eval()
    rows = model.evaluation_rows
    with torch.no_grad():
        outputs = torch.cat(
            [model(torch.from_numpy(samples[i : i + rows])) for i in range(0, len(samples), rows)]
        ).numpy()
    if not np.isfinite(outputs).all():
        raise DataError(
            "the model gives numbers that are not finite for this input",
            remedy="check that the rows are like those the model was trained on",
        )
    if described.classes is None:
        return Predictions((), None, described.preprocessing.restore_target(outputs[:, 0]))
    probabilities = class_probabilities(outputs)
    labels = tuple(described.classes[code] for code in probabilities.argmax(axis=1))
    return Predictions(labels, probabilities, None)


def _stored(described: ModelMetadata, inputs: Any, front: FrontGraph | None) -> NDArray[Any]:
    if (front is None) != (described.front is None):
        raise InputError(
            "the model was trained behind a front, which is not here"
            if front is None
            else "the model was trained without a front",
            remedy="give its front.onnx" if front is None else "leave the front out",
        )
    if described.front is not None and front is not None:
        return _through(described.front, inputs, front)
    if isinstance(inputs, Mapping):
        inputs = pa.table(dict(inputs))
    if isinstance(inputs, pa.Table):
        if described.features is None:
            raise DataError("this model reads an array of samples, not a table")
        missing = [name for name in described.features if name not in inputs.column_names]
        if missing:
            raise DataError(
                "the table lacks columns that the model reads",
                found=f"{len(missing)} missing, the first {missing[0]!r}",
                expected=f"{len(described.features)} columns",
            )
        if inputs.num_rows == 0:
            raise DataError("the table has no rows")
        return feature_matrix(inputs, described.features, "the input")
    return sample_array(
        np.asarray(inputs),
        "the input",
        shape=described.preprocessing.shape,
        integers=described.preprocessing.integers,
    )


def _through(use: FrontUse, inputs: Any, front: FrontGraph) -> NDArray[Any]:
    if not isinstance(inputs, Mapping):
        inputs = {use.samples: inputs}
    for name in (use.samples, *use.others.values()):
        if name not in inputs:
            raise DataError(f"the input lacks tensor {name!r}", found=", ".join(map(str, inputs)))
    samples = sample_array(
        np.asarray(inputs[use.samples]), "the input", shape=use.shape, integers=use.integers
    )
    others = {port: np.asarray(inputs[tensor]) for port, tensor in use.others.items()}
    return front_features(front, use, samples, others)
