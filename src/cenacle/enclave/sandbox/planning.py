"""Choose layers, describe them for the evidence, apply them, and verify them from inside."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from cenacle.enclave.sandbox import linux
from cenacle.enclave.sandbox.base import InnerLayer, OuterLayer, View, layer, layers
from cenacle.errors import CenacleError, EnclaveError, UnavailableError

__all__ = ["LayerStatus", "SandboxPlan", "apply_inner", "plan", "probe", "verify_active"]

# Left out of the plan's JSON where false, so that plans without them keep their digests.
_OPTIONAL: Final = ("platform", "serving")


@dataclass(frozen=True)
class LayerStatus:
    """One row of the table that a user sees.

    Attributes:
        name: the layer.
        protects: what it stops.
        missing: None if it works here, else why not and what would bring it.
    """

    name: str
    protects: str
    missing: str | None


@dataclass(frozen=True)
class SandboxPlan:
    """The layers of one enclave with their settings, in the order in which they are applied.

    Attributes:
        settings: layer name -> what it enforces; equal on equal systems, without host paths.
        accelerators: whether the enclave has sockets to accelerators outside of it.
        platform: whether it has a socket to its host's hardware, which makes its evidence.
        serving: whether it has a socket to its host's server, whose queries it answers.
    """

    settings: Mapping[str, Mapping[str, Any]]
    accelerators: bool = False
    platform: bool = False
    serving: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.settings)

    @property
    def digest(self) -> str:
        """``sha256:`` and the SHA-256 of the plan's canonical JSON (RFC 8785)."""
        return "sha256:" + hashlib.sha256(rfc8785.dumps(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON; the inverse of :meth:`from_dict`."""
        return {
            "version": 1,
            "accelerators": self.accelerators,
            "layers": [{"name": n, "settings": dict(s)} for n, s in self.settings.items()],
            **{name: True for name in _OPTIONAL if getattr(self, name)},
        }

    @classmethod
    def from_dict(cls, fields: Any) -> SandboxPlan:
        """A plan handed over by a launcher, which need not be honest.

        Raises EnclaveError for an unknown layer, a wrong order, or settings that this code
        would not enforce.
        """
        try:
            names = set(fields) - set(_OPTIONAL)
            if names != {"version", "accelerators", "layers"} or fields["version"] != 1:
                raise ValueError
            accelerators = fields["accelerators"]
            optional = {name: fields[name] for name in _OPTIONAL if name in fields}
            if not all(isinstance(v, bool) for v in (accelerators, *optional.values())) or not all(
                optional.values()
            ):
                raise ValueError
            settings = {str(entry["name"]): dict(entry["settings"]) for entry in fields["layers"]}
            if len(settings) != len(fields["layers"]):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise EnclaveError("the sandbox plan does not parse") from None
        if list(settings) != [one.name for one in layers() if one.name in settings]:
            raise EnclaveError(
                "the sandbox plan has unknown layers or another order",
                found=", ".join(settings),
                expected="a selection of " + ", ".join(one.name for one in layers()),
            )
        for name, described in settings.items():
            if not layer(name).accepts(described):
                raise EnclaveError(
                    "the sandbox plan promises what its layer does not enforce here",
                    found=name,
                    remedy="plan and run with the same version of cenacle on the same machine",
                )
        return cls(settings, accelerators, **optional)

    def outer(self) -> tuple[OuterLayer, ...]:
        """The layers that the launcher applies."""
        return tuple(one for name in self.layers if isinstance(one := layer(name), OuterLayer))

    def inner(self) -> tuple[InnerLayer, ...]:
        """The layers that the agent applies to itself."""
        return tuple(one for name in self.layers if isinstance(one := layer(name), InnerLayer))


def probe() -> list[LayerStatus]:
    """Every layer and whether it works here, found out by using it (results are kept)."""
    return [LayerStatus(one.name, one.protects, one.available()) for one in layers()]


def plan(
    requested: Sequence[str] | None = None,
    *,
    accelerators: bool = False,
    platform: bool = False,
    serving: bool = False,
) -> SandboxPlan:
    """Every layer that works here, or exactly the requested ones.

    Args:
        accelerators: whether the enclave gets sockets to accelerators.
        platform: whether it gets a socket to the host's hardware, for its evidence.
        serving: whether it gets a socket to the host's server, for queries.

    Raises:
        InputError: a requested layer does not exist.
        UnavailableError: a requested layer does not work here.
    """
    if requested is None:
        chosen = [one for one in layers() if one.available() is None]
    else:
        wanted = {layer(name).name for name in requested}
        chosen = [one for one in layers() if one.name in wanted]
        for one in chosen:
            if (reason := one.available()) is not None:
                raise UnavailableError(
                    f"the sandbox layer {one.name} does not work here",
                    found=reason,
                    remedy="install what is missing, or do without this layer",
                )
    settings = {one.name: one.settings() for one in chosen}
    return SandboxPlan(settings, accelerators, platform, serving)


def apply_inner(chosen: SandboxPlan, view: View) -> None:
    """Apply the plan's inner layers to this process, for good; raises EnclaveError.

    Whatever the plan, the process dies with whoever started it.
    """
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    for one in chosen.inner():
        one.apply(view)


def verify_active(chosen: SandboxPlan) -> list[str]:
    """From inside: the names of the active layers, which are all the planned ones.

    Each layer is tried: a forbidden thing is attempted and must fail.

    Raises:
        EnclaveError: a planned layer is not active.
    """
    for name, settings in chosen.settings.items():
        try:
            layer(name).verify(settings)
        except CenacleError:
            raise
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise EnclaveError(
                f"the sandbox layer {name} cannot be verified", found=type(error).__name__
            ) from None
    return list(chosen.layers)
