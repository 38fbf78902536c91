"""Scaling between stored values and what a model computes with.

Means and standard deviations are taken over training rows only, in float64, and become
part of the model: whoever receives the model learns them. Ranges are the recipe's, and tell
nothing of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cenacle.documents.base import Frozen, PositiveInt
from cenacle.documents.recipe import Range, Recipe, TableData, TensorData

__all__ = ["Moments", "Preprocessing"]

_CHUNK_ROWS = 4096

Spread = Annotated[float, Field(gt=0.0)]


class Moments(Frozen):
    """Mean and population standard deviation; 1 in place of a deviation of 0."""

    mean: tuple[float, ...]
    std: tuple[Spread, ...]


class Preprocessing(Frozen):
    """How stored samples become the model's input, and outputs become targets again.

    Attributes:
        shape: of one sample as the model reads it.
        integers: inputs stay integers (for embeddings).
        scale: factor on every element, before standardization.
        inputs: per channel, per feature or (one entry) over all elements; None: leave.
        target: of a standardized regression target, one entry.
        ranges: per feature (low, high), to which values are clamped before they are scaled to
            -1 .. 1, or None for a feature that stays as it is.
    """

    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=5)]
    integers: bool
    scale: Spread
    inputs: Moments | None = None
    target: Moments | None = None
    ranges: tuple[Range | None, ...] | None = None

    @model_validator(mode="after")
    def _moments_fit(self) -> Self:
        if self.inputs is not None:
            lengths = {len(self.inputs.mean), len(self.inputs.std)}
            if lengths != {1} and lengths != {self.shape[0]}:
                raise ValueError("inputs has another number of moments than the samples")
        if self.target is not None and (len(self.target.mean), len(self.target.std)) != (1, 1):
            raise ValueError("target has one mean and one std")
        if self.ranges is not None:
            if self.integers or self.inputs is not None or self.shape != (len(self.ranges),):
                raise ValueError("ranges are one a feature, of numbers scaled by nothing else")
            if any(pair is not None and not pair[0] < pair[1] for pair in self.ranges):
                raise ValueError("a range is empty")
        return self

    @classmethod
    def fit(
        cls,
        recipe: Recipe,
        shape: tuple[int, ...],
        inputs: NDArray[Any],
        targets: NDArray[Any],
        features: Sequence[str] | None = None,
    ) -> Self:
        """Take the moments that the recipe asks for over these training rows.

        Args:
            features: names of a table's features, for the recipe's ranges.
        """
        data = recipe.data
        ranges = None
        if isinstance(data, TableData) and data.ranges is not None:
            ranges = tuple(map(data.ranges.get, features or ()))
        moments = None
        # A front scales what it reads; what it gives is the model's input as it is.
        scaled = isinstance(data, TensorData) and data.front is None
        scale = data.scale if isinstance(data, TensorData) and scaled else 1.0
        if data.standardize:
            moments = _moments(inputs.reshape(len(inputs), *shape), scale)
        target = None
        if data.standardize_target:
            target = _moments(targets.reshape(-1, 1), 1.0)
        return cls(
            shape=shape,
            integers=isinstance(data, TensorData) and data.integer_samples,
            scale=scale,
            inputs=moments,
            target=target,
            ranges=ranges,
        )

    def apply(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The model's input: float32 (or int64), shape (rows, *shape), a fresh array."""
        samples = stored.reshape(len(stored), *self.shape)
        if self.integers:
            return samples.astype(np.int64)
        out = np.empty(samples.shape, dtype=np.float32)
        for start in range(0, len(samples), _CHUNK_ROWS):
            chunk = samples[start : start + _CHUNK_ROWS].astype(np.float64) * self.scale
            if self.inputs is not None:
                mean, std = np.array(self.inputs.mean), np.array(self.inputs.std)
                if len(self.shape) > 1:
                    wide = (-1, *(1 for _ in self.shape[1:]))
                    mean, std = mean.reshape(wide), std.reshape(wide)
                chunk = (chunk - mean) / std
            out[start : start + _CHUNK_ROWS] = self._within_ranges(chunk)
        return out

    def _within_ranges(self, chunk: NDArray[np.float64]) -> NDArray[np.float64]:
        for feature, pair in enumerate(self.ranges or ()):
            if pair is not None:
                low, high = pair
                values = np.clip(chunk[:, feature], low, high)
                chunk[:, feature] = (values - low) / (high - low) * 2.0 - 1.0
        return chunk

    def apply_target(self, targets: NDArray[np.float64]) -> NDArray[np.float32]:
        """Regression targets in the model's unit."""
        if self.target is not None:
            targets = (targets - self.target.mean[0]) / self.target.std[0]
        return targets.astype(np.float32)

    def restore_target(self, outputs: NDArray[Any]) -> NDArray[np.float64]:
        """The model's outputs in the unit of the stored targets."""
        values = outputs.astype(np.float64)
        if self.target is not None:
            values = values * self.target.std[0] + self.target.mean[0]
        return values


def _moments(samples: NDArray[Any], scale: float) -> Moments:
    """Two passes over chunks of rows, in float64."""
    rank = samples.ndim - 1
    keep = {1: (1,), 3: (1,)}.get(rank, ())
    axes = tuple(axis for axis in range(samples.ndim) if axis not in keep)
    chunks = range(0, len(samples), _CHUNK_ROWS)
    count = int(np.prod([samples.shape[axis] for axis in axes]))

    def read(start: int) -> NDArray[np.float64]:
        return samples[start : start + _CHUNK_ROWS].astype(np.float64) * scale

    mean = np.sum([read(start).sum(axis=axes) for start in chunks], axis=0) / count
    wide = tuple(-1 if axis in keep else 1 for axis in range(1, samples.ndim))
    centre = np.reshape(mean, wide)
    variance = np.sum([((read(s) - centre) ** 2).sum(axis=axes) for s in chunks], axis=0) / count
    std = np.atleast_1d(np.sqrt(variance))
    mean = np.atleast_1d(mean)
    # Rounding leaves a constant column a deviation near 1e-16 times its size.
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return Moments(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
