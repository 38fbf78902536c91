"""The sandbox inside a guest: the layers that its kernel has, with their settings.

The host cannot try them, because it runs another kernel; the guest verifies every one of them
before it runs anything, so a wrong table here can only make it refuse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from cenacle.enclave.sandbox import SandboxPlan, layer
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.errors import InputError, UnavailableError

__all__ = ["GUEST_LAYERS", "guest_plan", "landlock_abi"]

GUEST_LAYERS: Final = ("process", "landlock", "seccomp")

# The kernel that brought each version of Landlock (landlock(7), "VERSIONS").
_LANDLOCK: Final = ((5, 13), (5, 19), (6, 2), (6, 7), (6, 10), (6, 12))


def landlock_abi(release: str) -> int:
    """Version of Landlock that a kernel of this release has; 0 for none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        raise InputError("a kernel's release has another form", found=release)
    version = (int(found[1]), int(found[2]))
    return sum(version >= since for since in _LANDLOCK)


def guest_plan(
    manifest: ImageManifest,
    layers: Sequence[str] | None = None,
    *,
    platform: bool = False,
    serving: bool = False,
) -> SandboxPlan:
    """The plan of an enclave in this image.

    Args:
        layers: those wanted; None for all that the guest has.
        platform: whether the machine's hardware makes the evidence.
        serving: whether the enclave answers queries of the host's server.

    Raises:
        InputError: the guest has no such layer.
        UnavailableError: a package that describes a layer is not installed here.
    """
    wanted = GUEST_LAYERS if layers is None else tuple(layers)
    if unknown := sorted(set(wanted) - set(GUEST_LAYERS)):
        raise InputError(
            "a virtual machine has no such sandbox layer",
            found=", ".join(unknown),
            expected=", ".join(GUEST_LAYERS),
            remedy="demand in the contract only layers that the virtual machine has",
        )
    settings: dict[str, dict[str, Any]] = {
        name: layer(name).settings() for name in GUEST_LAYERS if name in wanted
    }
    if "landlock" in settings:
        settings["landlock"] |= _landlock(manifest.kernel_release)
    return SandboxPlan(settings, platform=platform, serving=serving)


def _landlock(release: str) -> dict[str, Any]:
    try:
        from py_landlock import abi  # noqa: PLC0415 - an extra
    except ImportError:
        raise UnavailableError(
            "the sandbox of a virtual machine cannot be planned",
            found="no py-landlock",
            remedy="pip install py-landlock",
        ) from None
    version: Any = landlock_abi(release)
    return {
        "restricted_files": _names(abi.get_supported_fs(version)),
        "restricted_network": _names(abi.get_supported_net(version)),
        "scoped": _names(abi.get_supported_scope(version)),
    }


def _names(flags: Any) -> list[str]:
    return sorted(str(flag.name).lower() for flag in flags)
