"""Checkpoints: the state of an interrupted training as tensors and JSON, never pickle.

The trainer makes the state; the caller, who has the keys, seals it and keeps it. Versions
increase by one, so a sink that remembers the newest version it sealed (or asks the broker)
can refuse an old checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cenacle.errors import VerificationError

__all__ = ["Checkpoint", "CheckpointSink", "MemorySink", "Tensors", "check"]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    Attributes:
        version: 1, 2, 3, ... within a job.
        tensors: arrays by name, fit for safetensors.
        meta: JSON values (finite numbers, text, lists, mappings).
    """

    version: int
    tensors: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]


class CheckpointSink(Protocol):
    """Where checkpoints go. Implementations seal; both calls are durable or raise."""

    def save(
        self, version: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Keep this state as the newest. ``version`` is above every one saved before."""

    def load(self) -> Checkpoint | None:
        """The newest state, or None when there is none yet.

        Raises:
            VerificationError: what is there is not the newest, or is damaged.
        """


class MemorySink:
    """Keeps the newest checkpoint in memory: for tests and for jobs within one process."""

    def __init__(self) -> None:
        self.newest: Checkpoint | None = None

    def save(
        self, version: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        if self.newest is not None and version <= self.newest.version:
            raise VerificationError(
                "a checkpoint would replace a newer one",
                found=f"version {version}",
                expected=f"above {self.newest.version}",
            )
        copies = {name: np.array(array) for name, array in tensors.items()}
        self.newest = Checkpoint(version, copies, dict(meta))

    def load(self) -> Checkpoint | None:
        return self.newest


def check(checkpoint: Checkpoint, *, recipe: str, data: str, privacy: str | None = None) -> None:
    """Refuse a checkpoint of another job.

    Args:
        recipe: digest of the recipe that is about to run.
        data: digest of the rows it is about to read.
        privacy: what stands for the plan and the secret that it draws noise from; None: no plan.

    Raises:
        VerificationError: it belongs elsewhere, or its version was changed.
    """
    wanted = {
        "format": 1,
        "version": checkpoint.version,
        "recipe": recipe,
        "data": data,
        "privacy": privacy,
    }
    for field, value in wanted.items():
        if checkpoint.meta.get(field) != value:
            raise VerificationError(
                f"the checkpoint belongs to another job: its {field} differs",
                found=checkpoint.meta.get(field),
                expected=value,
                remedy="run the job from the start",
            )
