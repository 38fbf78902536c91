"""Refusals named by their remedy: what would train without protection is never run.

All are :class:`~cenacle.errors.InputError`: the model, the loss or the batch cannot be
used as it is. None carries a value of anyone's data.
"""

from __future__ import annotations

from cenacle.errors import InputError

__all__ = [
    "GiveLossPerExampleError",
    "KeepExamplesApartError",
    "PrivacyError",
    "ReplaceBatchNormError",
    "ReplaceOperationError",
    "UnprotectedGradientError",
]


class PrivacyError(InputError):
    """The model or loop cannot be trained with differential privacy as it is."""


class ReplaceBatchNormError(PrivacyError):
    """A layer normalizes over the batch, so that examples influence each other."""


class ReplaceOperationError(PrivacyError):
    """An operation uses a trainable parameter, and no rule gives its per-example gradients."""


class KeepExamplesApartError(PrivacyError):
    """One example's forward or backward values depend on another example."""


class GiveLossPerExampleError(PrivacyError):
    """The loss is not one number per example."""


class UnprotectedGradientError(PrivacyError):
    """Autograd reached a trainable parameter past the rules; the gradient was discarded."""
