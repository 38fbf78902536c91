"""The layered sandbox of a process enclave.

Usage by a launcher::

    chosen = plan()                 # every layer that works on this machine
    chosen.layers, chosen.digest    # what the evidence will say

Usage by the agent, before any key arrives: :func:`apply_inner`, then :func:`verify_active`.
``no network`` is a result, not a layer: of ``bubblewrap``, or of ``seccomp``.
"""

from __future__ import annotations

from cenacle.enclave.sandbox.base import (
    InnerLayer,
    Layer,
    Mount,
    OuterLayer,
    View,
    layer,
    layers,
    register,
)
from cenacle.enclave.sandbox.bubblewrap import BubblewrapLayer
from cenacle.enclave.sandbox.landlock import LandlockLayer
from cenacle.enclave.sandbox.planning import (
    LayerStatus,
    SandboxPlan,
    apply_inner,
    plan,
    probe,
    verify_active,
)
from cenacle.enclave.sandbox.process import ProcessLayer
from cenacle.enclave.sandbox.seccomp import SeccompLayer

__all__ = [
    "InnerLayer",
    "Layer",
    "LayerStatus",
    "Mount",
    "OuterLayer",
    "SandboxPlan",
    "View",
    "apply_inner",
    "layer",
    "layers",
    "plan",
    "probe",
    "register",
    "verify_active",
]

# The order of application: seccomp last, because it forbids what the others need.
for _layer in (BubblewrapLayer(), ProcessLayer(), LandlockLayer(), SeccompLayer()):
    register(_layer)
