"""A tensor of the enclave's that goes to workers."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Held", "Parcel", "Role"]

Role = Literal["inputs", "activations", "weights", "gradients"]
"""What of the model a tensor stands for; the terms of a leakage record."""

Held = dict[tuple[str, int | None], int]
"""Handles by worker and part."""


class Parcel:
    """A tensor for workers. It is put where it is needed, when it is needed.

    Attributes:
        value: as workers see it; contiguous, and not to be changed any more.
        role: what it stands for; transcripts and leakage records speak of it.
    """

    __slots__ = ("__weakref__", "_held", "role", "site", "value")

    def __init__(self, value: torch.Tensor, role: Role, site: str) -> None:
        self.value = value
        self.role: Role = role
        self.site = site
        self._held: Held = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)
