"""What a scheme is: how operands are disguised, and what of them shows nevertheless.

A scheme sees one linear map at a time. It may keep what it needs between a forward and its
backward pass; everything that it hands to :class:`~cenacle.offload.fleet.Fleet` leaves the
enclave, and its leakage record has to say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import torch
from torch import nn

from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.fleet import Fleet, Role
from cenacle.offload.maps import LinearMap, MatrixProduct

__all__ = [
    "SCHEMES",
    "Gradients",
    "Needs",
    "Scheme",
    "Site",
    "add_bias",
    "bias_gradient",
    "make_scheme",
    "register",
]


@dataclass(frozen=True)
class Site:
    """One place in a model where algebra leaves the enclave.

    Attributes:
        name: the weight's name in the model, or a number for a product of activations.
        role: what ``x`` is: the model's ``inputs``, or ``activations`` of an earlier layer.
        weight: whether ``w`` is a weight of the model (else both operands are activations).
        key: identifies the weight's values: equal only while nothing changed them.
    """

    name: str
    map: LinearMap
    role: Role
    weight: bool
    key: tuple[int, int]


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    bias: bool


class Gradients(NamedTuple):
    """Of a map's operands; ``None`` where none was asked for."""

    x: torch.Tensor | None = None
    w: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def _nobody(_: str) -> None:
    """Takes notices while there is no session."""


class Scheme(ABC):
    """Base of all schemes. One instance serves one session.

    Attributes:
        fuses_relu: whether it applies a ReLU in the pass in which it unblinds.
        keeps_input: whether :meth:`backward` needs the true ``x``; if not, the enclave does
            not keep it.
        verified: whether the fleet checks every product by default: not where workers are
            trusted, nor where the scheme checks by itself.
    """

    name: ClassVar[str]
    fuses_relu: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = True
    verified: ClassVar[bool] = True

    def __init__(self) -> None:
        self.fleet: Fleet
        self.stays: Callable[[str], None] = _nobody

    @property
    @abstractmethod
    def leakage(self) -> LeakageRecord:
        """What accelerators learn, part by part; goes into the receipt as it is."""

    def attach(self, fleet: Fleet, model: nn.Module) -> None:  # noqa: ARG002
        """Begin a session; may refuse the model with :class:`RefusedError`."""
        self.fleet = fleet

    @abstractmethod
    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """y = B(x, w) + bias, and what :meth:`backward` will need beside ``x`` and ``w``."""

    @abstractmethod
    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        """Gradients for the gradient ``gy`` of y. ``x`` only if :attr:`keeps_input`."""

    def forward_relu(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """max(0, B(x, w) + bias); of a scheme that :attr:`fuses_relu`."""
        y, saved = self.forward(site, x, w, bias)
        return y.clamp_min_(0), saved

    def backward_relu(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        """:meth:`backward` for the output ``y`` of :meth:`forward_relu`."""
        return self.backward(site, saved, gy * (y > 0), x, w, needs)

    def detach(self) -> None:  # noqa: B027 - most schemes keep nothing
        """End the session."""


def bias_gradient(gy: torch.Tensor, map_: LinearMap) -> torch.Tensor:
    """Summed over everything but the output features (dimension 1)."""
    assert not isinstance(map_, MatrixProduct)
    return gy.sum(dim=[d for d in range(gy.dim()) if d != 1])


def add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In place; features are dimension 1 of ``y``."""
    if bias is not None:
        y += bias.view(1, -1, *([1] * (y.dim() - 2)))
    return y


SCHEMES: Final[dict[str, Callable[..., Scheme]]] = {}
"""Schemes by name; :func:`make_scheme` fills it from ``cenacle.offload.schemes``."""

S = TypeVar("S", bound=type[Scheme])


def register(scheme: S) -> S:
    """Class decorator: make a scheme known under its name."""
    SCHEMES[scheme.name] = scheme
    return scheme


def make_scheme(name: str, **options: Any) -> Scheme:
    """A scheme by its name in contracts.

    Raises:
        InputError: there is no such scheme, or it has no such option.
    """
    from cenacle.offload import schemes  # noqa: F401, PLC0415 - registers them

    kind = SCHEMES.get(name)
    if kind is None:
        raise InputError(
            "an offload scheme is not known", found=name, expected=", ".join(sorted(SCHEMES))
        )
    try:
        return kind(**options)
    except TypeError as error:
        raise InputError(f"scheme {name} has no such option ({error})") from None
