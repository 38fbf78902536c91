"""The one place that imports torch, so that its absence is one clear error."""

from __future__ import annotations

from cenacle.errors import UnavailableError

try:
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.optim.adam import adam
    from torch.optim.sgd import sgd
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    raise UnavailableError(
        "training needs torch, which is not installed",
        remedy="install it with: pip install cenacle[train]",
    ) from None

__all__ = ["adam", "functional", "nn", "sgd", "torch"]
