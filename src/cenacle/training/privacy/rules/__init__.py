"""Rules for operations on trainable parameters, one family a file; importing registers them."""

from __future__ import annotations

from cenacle.training.privacy.rules import (
    attention,
    convolution,
    elementwise,
    embedding,
    linear,
    normalization,
    recurrent,
)

__all__ = [
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "linear",
    "normalization",
    "recurrent",
]
