"""What a sandbox layer is, and the registry of layers.

A layer is applied from the outside by the launcher, which wraps the enclave's command line
(:class:`OuterLayer`), or from the inside by the agent, in its own process and before any key
arrives (:class:`InnerLayer`). Every layer can verify from inside that it really holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from cenacle.errors import EnclaveError, InputError

__all__ = [
    "PLATFORM_SOCKET",
    "SERVING_SOCKET",
    "InnerLayer",
    "Layer",
    "Mount",
    "OuterLayer",
    "View",
    "layer",
    "layers",
    "register",
]


@dataclass(frozen=True)
class Mount:
    """A file, folder or socket of the host and the path at which the enclave sees it."""

    source: Path
    inside: Path


PLATFORM_SOCKET: Final = "platform_socket"
"""The mount where the launcher serves evidence that the host's hardware makes."""

SERVING_SOCKET: Final = "serving_socket"
"""The mount where the host's server waits for an enclave that answers queries."""


@dataclass(frozen=True)
class View:
    """Everything of the host that an enclave may touch, next to the interpreter.

    Attributes:
        read_only: sealed assets and whatever else the job reads.
        writable: folders for sealed outputs and checkpoints.
        sockets: unix sockets that it may connect to: the relay to the broker, the host's
            hardware where that makes the evidence, and the host's server where it serves.
        accelerators: whether it shares memory with accelerators over sockets that it inherits.
    """

    read_only: tuple[Mount, ...] = ()
    writable: tuple[Mount, ...] = ()
    sockets: tuple[Mount, ...] = ()
    accelerators: bool = False


class Layer(ABC):
    """One way of confining a process.

    Attributes:
        name: the word that contracts and evidence use.
        protects: one sentence for people on what the layer stops.
    """

    name: ClassVar[str]
    protects: ClassVar[str]

    @abstractmethod
    def available(self) -> str | None:
        """None when the layer works here, found out by using it; else why not, and the remedy."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the layer enforces, as JSON: equal on equal systems, and without host paths."""

    @abstractmethod
    def accepts(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings, handed over by a launcher, are ones this code enforces."""

    @abstractmethod
    def verify(self, settings: Mapping[str, Any]) -> None:
        """From inside the enclave: raise EnclaveError unless the layer is active."""

    def _inactive(self, found: str, expected: str) -> EnclaveError:
        return EnclaveError(
            f"the sandbox layer {self.name} is planned but not active",
            found=found,
            expected=expected,
            remedy="start the enclave through cenacle's launcher, or plan without this layer",
        )


class OuterLayer(Layer):
    """A layer that the launcher applies by wrapping the command.

    Attributes:
        root: the folder under which the enclave sees its mounts.
    """

    root: ClassVar[Path]

    @abstractmethod
    def wrap(self, command: Sequence[str], view: View, environment: Mapping[str, str]) -> list[str]:
        """The command line that starts ``command`` inside the layer."""


class InnerLayer(Layer):
    """A layer that the agent applies to its own process, for good."""

    @abstractmethod
    def apply(self, view: View) -> None:
        """Confine this process. Needs a single thread; raises EnclaveError when it fails."""


_REGISTRY: dict[str, Layer] = {}


def register(new: Layer) -> None:
    """Add a layer; layers are applied in the order of their registration."""
    if new.name in _REGISTRY:
        raise InputError(
            "a sandbox layer of this name is registered already",
            found=new.name,
            remedy="give the new layer another name",
        )
    _REGISTRY[new.name] = new


def layer(name: str) -> Layer:
    """The layer of this name; raises InputError for an unknown one."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise InputError(
            "there is no such sandbox layer", found=name, expected=", ".join(_REGISTRY)
        ) from None


def layers() -> tuple[Layer, ...]:
    """All layers in the order in which they are applied."""
    return tuple(_REGISTRY.values())
