"""Linear algebra on accelerators that nobody trusts: engine, schemes, checks, profile.

Names are imported at their first use: they need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.offload.profile import Profile
    from cenacle.offload.schemes.base import make_scheme
    from cenacle.offload.session import Offload, offload
    from cenacle.offload.transcript import Transcript

__all__ = ["Offload", "Profile", "Transcript", "make_scheme", "offload"]

__getattr__ = lazy_names(
    __name__,
    {
        "Offload": "session",
        "Profile": "profile",
        "Transcript": "transcript",
        "make_scheme": "schemes.base",
        "offload": "session",
    },
)
