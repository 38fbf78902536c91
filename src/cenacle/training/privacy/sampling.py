"""Choosing the examples of a step, and telling the record the truth about it.

Poisson sampling takes every example independently with one probability, so the number of
examples varies and may be zero; an empty batch still is a step, of noise alone. Accountants'
amplification by sampling holds for exactly that. A shuffled epoch of fixed batches is what
most loaders do; it is offered too, and the record calls it ``shuffled``.

Which examples a step takes is as secret as the noise, so choices come from the same kind
of cryptographic keystream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cenacle.training.privacy.clipping import positive
from cenacle.training.privacy.keystream import Keystream
from cenacle.training.privacy.record import Sampling
from cenacle.training.privacy.refusals import PrivacyError
from cenacle.training.privacy.trees import count_examples, slice_examples

__all__ = ["PoissonSampler", "ShuffledSampler", "batches"]


class PoissonSampler:
    """Batches of indices; each of ``population`` examples is in with probability ``rate``.

    Works as ``batch_sampler`` of a ``DataLoader`` whose ``collate_fn`` allows for empty
    batches, or with :func:`batches`.

    Args:
        population: examples in the data set.
        rate: probability of each, above 0 and at most 1.
        steps: batches of one iteration; by default about one pass, ``ceil(1 / rate)``.
        key: 32 bytes that determine the batches; unless ``secret``, for tests alone.
        secret: the given key is known to nobody else, and nothing else has it.
    """

    def __init__(
        self,
        population: int,
        rate: float,
        *,
        steps: int | None = None,
        key: bytes | None = None,
        secret: bool = False,
    ) -> None:
        if population < 1:
            raise PrivacyError("population cannot be used", found=population, expected="1 or more")
        if positive("rate", rate) > 1:
            raise PrivacyError("rate cannot be used", found=rate, expected="at most 1")
        self.population, self.rate = population, float(rate)
        self.steps = math.ceil(1 / self.rate) if steps is None else steps
        self._stream = Keystream(key, secret=secret)

    @property
    def expected_batch(self) -> float:
        """The mean number of examples of a batch, for :func:`make_private`."""
        return self.population * self.rate

    @property
    def sampling(self) -> Sampling:
        """For the record."""
        return Sampling("poisson", self.population, rate=self.rate, secure=self._stream.secure)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        # 2^-64 is the resolution; rounding down never samples more often than recorded.
        bound = math.floor(self.rate * 2.0**64)
        for _ in range(self.steps):
            words = self._stream.words(self.population)
            chosen = words < np.uint64(bound) if bound < 2**64 else np.ones_like(words, dtype=bool)
            yield np.flatnonzero(chosen).tolist()


class ShuffledSampler:
    """Batches of a fixed size from a secret permutation of each pass.

    The last batch of a pass may be smaller. The record says ``shuffled``: an accountant
    must not treat it as Poisson sampling.

    Args:
        population: examples in the data set.
        batch_size: examples of a batch.
        key: 32 bytes that determine the order; unless ``secret``, for tests alone.
        secret: the given key is known to nobody else, and nothing else has it.
    """

    def __init__(
        self, population: int, batch_size: int, *, key: bytes | None = None, secret: bool = False
    ) -> None:
        if population < 1 or batch_size < 1:
            raise PrivacyError(
                "population and batch_size cannot be used",
                found=f"{population}, {batch_size}",
                expected="1 or more",
            )
        self.population, self.batch_size = population, batch_size
        self._stream = Keystream(key, secret=secret)

    @property
    def expected_batch(self) -> float:
        """The examples of a full batch."""
        return float(min(self.batch_size, self.population))

    @property
    def sampling(self) -> Sampling:
        """For the record."""
        return Sampling(
            "shuffled", self.population, batch_size=self.batch_size, secure=self._stream.secure
        )

    def __len__(self) -> int:
        return math.ceil(self.population / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Sorting by random words is uniform but for equal words, of probability n^2 / 2^65.
        order = np.argsort(self._stream.words(self.population), kind="stable")
        for begin in range(0, self.population, self.batch_size):
            yield order[begin : begin + self.batch_size].tolist()


def batches(sampler: Any, *data: Any) -> Iterator[tuple[Any, ...]]:
    """Batches of data in memory; an empty one has tensors of length 0.

    Args:
        sampler: gives lists of indices.
        data: tensors, or lists and dictionaries of tensors, with the examples first.
    """
    examples = count_examples(data)
    if examples != sampler.population:
        raise PrivacyError("the sampler is for another number of examples",
                           found=examples, expected=sampler.population)  # fmt: skip
    for chosen in sampler:
        which = torch.tensor(chosen, dtype=torch.long)
        yield tuple(slice_examples(part, which) for part in data)
