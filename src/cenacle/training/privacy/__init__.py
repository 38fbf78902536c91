"""Differentially private training of any PyTorch model, usable without the rest of Cenacle.

::

    sampler = PoissonSampler(len(x), rate=256 / len(x))
    private = make_private(model, clip=1.0, noise_multiplier=1.1,
                           expected_batch=sampler.expected_batch, sampling=sampler.sampling)
    for xb, yb in batches(sampler, x, y):
        private.backward(lambda x, y: cross_entropy(model(x), y, reduction="none"), xb, yb)
        optimizer.step()

:mod:`engine` is the way in; :mod:`tape` sees operations, :mod:`rules` and :mod:`gradients`
know per-example gradients, :mod:`clipping` bounds them, :mod:`noise` hides them,
:mod:`sampling` chooses examples, :mod:`record` tells an accountant what was done,
and :mod:`spending` asks it what that cost.
"""

from __future__ import annotations

from cenacle.training.privacy.clipping import AdaptiveClip
from cenacle.training.privacy.engine import Private, make_private
from cenacle.training.privacy.noise import Noise
from cenacle.training.privacy.record import Event, Record, Sampling
from cenacle.training.privacy.refusals import (
    GiveLossPerExampleError,
    KeepExamplesApartError,
    PrivacyError,
    ReplaceBatchNormError,
    ReplaceOperationError,
    UnprotectedGradientError,
)
from cenacle.training.privacy.sampling import PoissonSampler, ShuffledSampler, batches
from cenacle.training.privacy.targets import rules as register_rule

__all__ = [
    "AdaptiveClip",
    "Event",
    "GiveLossPerExampleError",
    "KeepExamplesApartError",
    "Noise",
    "PoissonSampler",
    "PrivacyError",
    "Private",
    "Record",
    "ReplaceBatchNormError",
    "ReplaceOperationError",
    "Sampling",
    "ShuffledSampler",
    "UnprotectedGradientError",
    "batches",
    "make_private",
    "register_rule",
]
