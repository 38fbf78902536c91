"""Untrusted workers that do algebra on whatever a scheme sends them; see ``protocol``.

Names are imported at their first use: they need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.accelerators.inline import InlineAccelerator
    from cenacle.accelerators.operations import execute
    from cenacle.accelerators.protocol import Accelerator, Operation, Pending, Staging

__all__ = ["Accelerator", "InlineAccelerator", "Operation", "Pending", "Staging", "execute"]

__getattr__ = lazy_names(
    __name__,
    {
        "Accelerator": "protocol",
        "InlineAccelerator": "inline",
        "Operation": "protocol",
        "Pending": "protocol",
        "Staging": "protocol",
        "execute": "operations",
    },
)
