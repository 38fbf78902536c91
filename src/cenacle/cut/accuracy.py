"""How well a model could be retrained behind each cut, estimated quickly.

What crosses at a cut is computed once by the front, and one linear layer is trained on it. That
is what the features there are worth to a linear head; training the whole tail can do better,
above all behind early cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.cutting import Cutter
from cenacle.cut.front_runner import OnnxFront
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.retraining import linear_head
from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.errors import DataError, InputError
from cenacle.training.sources import MemoryTensors

__all__ = ["MAX_CUTS", "Samples", "head_accuracy", "spread"]

MAX_CUTS: Final = 12
"""Cuts that are measured unless more are asked for."""
_SIDE: Final = 4
_MAX_FEATURES: Final = 16_384


@dataclass(frozen=True)
class Samples:
    """Labelled samples to measure cuts with.

    Attributes:
        tensors: by name.
        inputs, labels: names of two of them.
        others: the model's inputs but one, each with the tensor that feeds it.
        scale: factor on every element.
    """

    tensors: Mapping[str, NDArray[Any]]
    inputs: str = "images"
    labels: str = "labels"
    others: Mapping[str, str] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in (self.inputs, self.labels, *(self.others or {}).values()):
            if name not in self.tensors:
                raise InputError(
                    f"the data has no tensor {name!r}",
                    found=", ".join(sorted(self.tensors))[:200],
                    remedy="name the tensors of samples and labels",
                )

    def first(self, rows: int) -> Samples:
        """So many of them."""
        cut = {name: array[:rows] for name, array in self.tensors.items()}
        return Samples(cut, self.inputs, self.labels, self.others, self.scale)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return [int(label) for label in np.unique(self.tensors[self.labels])]

    def data_fields(self) -> dict[str, Any]:
        """A recipe's data on these, under the alias ``data``."""
        return {
            "form": "tensors",
            "assets": ["data"],
            "inputs": self.inputs,
            "labels": self.labels,
            "classes": self.classes,
            "scale": self.scale,
        }


def spread(layers: Sequence[str], most: int = MAX_CUTS) -> tuple[str, ...]:
    """At most so many layers, evenly over the model, the last one among them."""
    if len(layers) <= most:
        return tuple(layers)
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return tuple(layers[i] for i in dict.fromkeys(places.tolist()))


def head_accuracy(
    model: OnnxModel,
    layers: Sequence[str],
    samples: Samples,
    *,
    epochs: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, float | None]:
    """Accuracy on a quarter of the samples, of a linear head behind each cut.

    Args:
        layers: last public layers; see :func:`spread`.
        samples: some hundreds per class are enough.
        progress: called with (cuts measured, cuts in all).

    Returns:
        By layer; None where no linear head fits (several tensors cross, or no numbers).

    Raises:
        InputError: the data lacks a tensor, or a layer is no cut.
        DataError: the samples do not fit the model.
    """
    cutter = Cutter(model)
    found: dict[str, float | None] = {}
    for count, layer in enumerate(layers):
        progress(count, len(layers))
        found[layer] = _measure(cutter, layer, samples, epochs, seed)
    progress(len(layers), len(layers))
    return found


def _measure(cutter: Cutter, layer: str, samples: Samples, epochs: int, seed: int) -> float | None:
    from cenacle.training import train  # noqa: PLC0415 - torch

    cut = cutter.cut(layer)
    if len(cut.crossing) != 1:
        return None
    crossing = cut.crossing[0]
    sizes = [size or 0 for size in crossing.shape[1:]]
    side = _SIDE if len(sizes) == 3 and sizes[0] * _SIDE**2 <= _MAX_FEATURES else 1
    try:
        head = linear_head(crossing, len(samples.classes), side=side)
    except DataError:
        return None
    data = samples.data_fields()
    front = OnnxFront(cut.front)
    integers = all(spec.dtype != "F32" for spec in front.inputs)
    data |= {
        "standardize": True,
        "integers": integers,
        "front": {
            "asset": "front",
            "output": crossing.name,
            **({"inputs": dict(samples.others)} if samples.others else {}),
        },
    }
    recipe = Recipe.from_fields(
        {
            "task": "classification",
            "data": data,
            "model": GraphModel(type="graph", nodes=head.nodes).to_fields(),
            "optimizer": {"type": "adam", "learning_rate": 0.01},
            "schedule": {"type": "cosine"},
            "epochs": epochs,
            "batch_size": 64,
            "seed": seed,
            "holdout": {"fraction": 0.25},
        }
    )
    result = train(recipe, {"data": MemoryTensors(dict(samples.tensors))}, front=front)
    return float(result.metrics["pooled"]["accuracy"])
