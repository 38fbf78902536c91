"""The trained model as a file: safetensors with the metadata that rebuilds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import model_validator

from cenacle.documents.base import Digest, Frozen, canonical_json, parse_json
from cenacle.documents.layers import Node
from cenacle.documents.recipe import GraphModel, Label
from cenacle.errors import DataError, DocumentError
from cenacle.training.front import FrontUse
from cenacle.training.preprocessing import Preprocessing

__all__ = ["METADATA_KEY", "ModelMetadata", "read_model", "write_model"]

METADATA_KEY = "cenacle"
"""The key of the JSON text in the file's safetensors metadata."""


class ModelMetadata(Frozen):
    """What a user of the tensors must know.

    Attributes:
        features: columns of a table in the order of the inputs; None for tensors.
        target: name of the column or tensor that the model predicts.
        classes: labels in the order of the outputs; None for a regression.
        front: what stored samples go through first; None: nothing.
        preprocessing: between stored values, or what the front gives, and the model's.
        nodes: the layers; the tensors are named after them.
        recipe: digest of the recipe that trained the model.
        torch: version that trained it.
        threads: number of threads that trained it.
    """

    format: Literal["cenacle.model/1"] = "cenacle.model/1"
    task: Literal["classification", "regression"]
    features: tuple[str, ...] | None = None
    target: str
    classes: tuple[Label, ...] | None = None
    front: FrontUse | None = None
    preprocessing: Preprocessing
    nodes: tuple[Node, ...]
    recipe: Digest
    torch: str
    threads: int

    @model_validator(mode="after")
    def _graph_is_sound(self) -> Self:
        GraphModel(type="graph", nodes=self.nodes)
        if self.front is not None and (self.features is not None or self.preprocessing.integers):
            raise ValueError("what a front gives are tensors of numbers")
        return self


def write_model(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> bytes:
    """One safetensors file, the same bytes for the same model."""
    text = canonical_json(dict(metadata)).decode()
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    return bytes(safetensors.numpy.save(arrays, {METADATA_KEY: text}))


def read_model(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The inverse of :func:`write_model`.

    Raises:
        DataError: the bytes are no safetensors file.
        DocumentError: it holds no metadata of a model.
    """
    try:
        tensors = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    except (safetensors.SafetensorError, ValueError, KeyError):
        raise DataError("a model file is damaged", expected="safetensors") from None
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise DocumentError(
            "a safetensors file does not say how to rebuild its model",
            expected=f"metadata under {METADATA_KEY!r}",
            remedy="use a model that cenacle trained",
        )
    metadata = ModelMetadata.from_fields(parse_json(text)).to_fields()
    return tensors, metadata
