"""What a scheme is: how operands are disguised, and what of them shows nevertheless.

A scheme sees one linear map at a time. It may keep what it needs between a forward and its
backward pass; everything that it hands to :class:`~cenacle.offload.fleet.Fleet` leaves the
enclave, and its leakage record has to say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.fleet import Fleet, Role
from cenacle.offload.maps import LinearMap, MatrixProduct

__all__ = [
    "SCHEMES",
    "Fused",
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
        parameter: the weight itself, if it may stay with a worker.
        trains: whether gradients may be asked for.
        learns: whether the weight is one that learns, in whatever mode it is used now.
        private: gradients of the weight are of examples that are clipped one by one, so no
            example may have a part in what is computed of another.
    """

    name: str
    map: LinearMap
    role: Role
    weight: bool
    key: tuple[int, int]
    parameter: torch.Tensor | None = field(default=None, compare=False)
    trains: bool = False
    learns: bool = False
    private: bool = False


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    bias: bool


class Fused(NamedTuple):
    """What was applied to a map's output in the pass that unblinded it: a ReLU, and pooling.

    Attributes:
        gate: what the scheme remembers of the output.
        pool: the width of the images that were pooled by windows of 2 x 2, if they were.
    """

    gate: Any
    pool: int | None


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
        fuses_pool: whether it pools after that in the same pass.
        fuses_norm: whether batch normalisation after a convolution is computed with it.
        keeps_input: whether :meth:`backward` needs the true ``x``; if not, the enclave does
            not keep it.
        verified: whether the fleet checks every product by default: not where workers are
            trusted, nor where the scheme checks by itself.
        resident: whether it can keep weights with workers; then it is a
            :class:`~cenacle.offload.resident.Keeper`.
    """

    name: ClassVar[str]
    fuses_relu: ClassVar[bool] = False
    fuses_pool: ClassVar[bool] = False
    fuses_norm: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = True
    verified: ClassVar[bool] = True
    resident: ClassVar[bool] = False

    def __init__(self) -> None:
        self.fleet: Fleet
        self.stays: Callable[[str], None] = _nobody

    @property
    @abstractmethod
    def leakage(self) -> LeakageRecord:
        """What accelerators learn, part by part; goes into the receipt as it is."""

    @property
    def hinders_privacy(self) -> str | None:
        """Why examples cannot be clipped one by one under it, and what to do; None: they can."""
        return None

    @property
    def checks_itself(self) -> bool:
        """Whether results are verified without the fleet's verifier."""
        return False

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

    def forward_fused(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        pool: int | None,
    ) -> tuple[torch.Tensor, Any, Any]:
        """max(0, B(x, w) + bias), pooled if ``pool`` is its width; a gate; what is saved.

        Pooling is asked for only if the scheme :attr:`fuses_pool`; then height and width are
        even, and windows are 2 x 2, side by side.
        """
        assert pool is None
        y, saved = self.forward_relu(site, x, w, bias)
        return y, y.detach(), saved

    def backward_fused(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        fused: Fused,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        """:meth:`backward` for the output of :meth:`forward_fused`."""
        return self.backward_relu(site, saved, gy, fused.gate, x, w, needs)

    def start(self, site: Site, x: torch.Tensor, w: torch.Tensor) -> tuple[Any, Any]:
        """Begin B(x, w): what is under way, for :meth:`finish`, and what is saved."""
        return self.forward(site, x, w, None)

    def finish(
        self,
        site: Site,  # noqa: ARG002
        saved: Any,  # noqa: ARG002
        under_way: Any,
        bias: torch.Tensor | None,
        scale: np.ndarray[Any, np.dtype[np.float32]] | None,
        *,
        relu: bool,
    ) -> torch.Tensor:
        """``scale * B(x, w) + bias``, both by output feature, and perhaps a ReLU of that."""
        y: torch.Tensor = under_way
        if scale is not None:
            y *= torch.from_numpy(scale).view(1, -1, *([1] * (y.dim() - 2)))
        y = add_bias(y, bias)
        return y.clamp_min_(0) if relu else y

    def recover(
        self,
        site: Site,  # noqa: ARG002
        saved: Any,  # noqa: ARG002
        bias: torch.Tensor | None,  # noqa: ARG002
        *,
        relu: bool,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Any] | None:
        """The whole output and its gate, from what was saved; None: not without the operands."""
        return None

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
