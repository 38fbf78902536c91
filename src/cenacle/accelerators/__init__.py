"""Untrusted workers that do algebra on whatever a scheme sends them; see ``protocol``.

Names are imported at their first use: they need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.accelerators.inline import InlineAccelerator
    from cenacle.accelerators.operations import execute
    from cenacle.accelerators.process import ProcessAccelerator
    from cenacle.accelerators.protocol import Accelerator, Operation, Pending, Staging
    from cenacle.accelerators.ray import RayAccelerator, ray_workers
    from cenacle.accelerators.remote import RemoteAccelerator
    from cenacle.accelerators.shared_memory import SharedStaging

__all__ = [
    "Accelerator",
    "InlineAccelerator",
    "Operation",
    "Pending",
    "ProcessAccelerator",
    "RayAccelerator",
    "RemoteAccelerator",
    "SharedStaging",
    "Staging",
    "execute",
    "ray_workers",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Accelerator": "protocol",
        "InlineAccelerator": "inline",
        "Operation": "protocol",
        "Pending": "protocol",
        "ProcessAccelerator": "process",
        "RayAccelerator": "ray",
        "RemoteAccelerator": "remote",
        "SharedStaging": "shared_memory",
        "Staging": "protocol",
        "execute": "operations",
        "ray_workers": "ray",
    },
)
