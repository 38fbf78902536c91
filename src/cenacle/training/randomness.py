"""Randomness by key: every draw depends on the recipe's seed and its place, on nothing else.

No global generator is read or moved. Because the draws of an epoch or step are named
rather than taken from a running stream, training resumes anywhere with the same numbers
and a checkpoint holds no generator state. This is for reproducible training only; it is
neither secret nor cryptographic.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import rfc8785

if TYPE_CHECKING:
    import torch

__all__ = ["numpy_generator", "torch_generator"]


def _key(seed: int, place: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(rfc8785.dumps(["cenacle/training", seed, *place])).digest()


def numpy_generator(seed: int, *place: str | int) -> np.random.Generator:
    """A Philox generator (Salmon et al. 2011) keyed by ``seed`` and ``place``."""
    key = int.from_bytes(_key(seed, place)[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator seeded from ``seed`` and ``place``."""
    from cenacle.training._torch import torch as framework  # noqa: PLC0415 - torch is optional

    generator = framework.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(_key(seed, place)[:8], "big"))
    return generator
