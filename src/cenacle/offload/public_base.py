"""Whether a model was made from a checkpoint that everybody has."""

from __future__ import annotations

from torch import nn

__all__ = ["public_base"]


def public_base(model: nn.Module) -> str | None:
    """The checkpoint that ``transformers`` says a model, or a part of it, came from."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner, attribute in (
            (module, "name_or_path"),
            (config, "_name_or_path"),
            (config, "name_or_path"),
        ):
            found = getattr(owner, attribute, None)
            if isinstance(found, str) and found:
                return found
    return None
