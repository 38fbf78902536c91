"""What accelerators can work out under ``lowrank``: the guard's count, and the leakage record.

``docs/schemes/lowrank.md`` has the attacks and the proof of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from cenacle.documents.receipt import LeakageRecord
from cenacle.offload.lowrank_noise import ResidualNoise
from cenacle.offload.maps import Convolution, Dense

__all__ = ["determined_share", "leakage_record"]


def determined_share(
    map_: Dense | Convolution, x_shape: Sequence[int], w_shape: Sequence[int], rank: int, bases: int
) -> float:
    """Equations that dW gives for V / unknowns of V, from 0; 1 and more: all of it.

    A residual has no part along its own Q, so whoever sees it knows Q, and X_T = Q V is unknown
    in V alone: ``rank`` numbers for each position that a window meets, of each sample. dW is
    linear in V. For each output channel and tap its values over a group's input channels are
    combinations of the samples' columns of Q; as many of these are independent as there are
    channels, or columns (``bases`` * ``rank``, where ``bases`` is how many different Q there
    are). So with few samples each one's equations come apart, and more samples hide nothing.
    """
    if isinstance(map_, Dense):  # rows are split together, and have one number each in V
        return w_shape[0] / x_shape[0]
    taps = math.prod(w_shape[2:])
    met = min(math.prod(x_shape[2:]), math.prod(map_.space(x_shape, w_shape)) * taps)
    independent = min(w_shape[1], bases * rank)
    return w_shape[0] * taps * independent / (x_shape[0] * rank * met)


def leakage_record(name: str, guard: float | None, noise: ResidualNoise | None) -> LeakageRecord:
    """Of the scheme with these options."""
    seen: Literal["obfuscated", "plaintext"]
    seen = "plaintext" if guard is None else "obfuscated"
    if guard is None:
        solved = (
            "No layer is guarded: where a sample's positions are no more than output "
            "channels times kernel size, these give the hidden part exactly."
        )
    else:
        solved = (
            f"In one step they determine at most {guard:.0%} of a layer's hidden part; "
            "layers that would exceed this are trained inside. Steps add up where a sample "
            "is split alike again, as the model's inputs are."
        )
    note = (
        "Accelerators see each input less its part of low rank: of the model's own inputs, "
        "less its first cosine components over the channels, always the same ones; of "
        "activations, less each sample's main directions, which the residual itself shows. "
        "Known attack: after a ReLU most numbers are zero or positive, and linear programming "
        "finds the hidden part from one residual, exactly at most positions for ranks up to "
        "4, at fewer for higher ones; with it, and the first layer's weight, the model's "
        "input. Several views of one sample give more of its activations away. Weights, "
        "gradients of outputs and of inputs and dW_U are in the open; the whole dW follows "
        "from two versions of a weight, and gives linear equations for the hidden part. "
        f"{solved} Labels follow from gradients in training. Products of two activations, "
        "depthwise convolutions and dense layers of few rows stay inside."
    )
    if noise is not None:
        note += " " + noise.describe()
    return LeakageRecord(
        scheme=name,
        inputs=seen,
        weights="plaintext",
        activations=seen,
        gradients="plaintext",
        labels="plaintext",
        note=note,
    )
