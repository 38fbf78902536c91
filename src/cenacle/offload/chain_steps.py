"""What may follow a convolution, and how the first pass finds out; for :mod:`.chains`."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch.nn import functional

from cenacle.offload.calls import Call
from cenacle.offload.fusion import State
from cenacle.offload.norms import BatchNorm, Norm, can_normalise

__all__ = [
    "ADDED", "CONVOLVED", "NORMALISED", "NOTHING", "Learning", "Link", "Operand", "Plan", "Step",
    "User",
]  # fmt: skip


class Plan(NamedTuple):
    """What follows a convolution, one after the other."""

    norm: bool = False
    add: bool = False
    relu: bool = False


NOTHING: Final = Plan()
CONVOLVED, NORMALISED, ADDED = range(3)


class Operand(NamedTuple):
    """What a pending result depends on, and the version in which it counts."""

    value: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Operand:
        detached = tensor.detach()  # shares memory and version
        return cls(detached, 0 if detached.is_inference() else detached._version)

    def unchanged(self) -> bool:
        return not self.value.is_inference() and self.value._version == self.version


@dataclass
class Link:
    """What an autograd node remembers of a convolution and what follows it.

    Attributes:
        saved: the scheme's own, of the convolution.
        bn, norm: the normalisation, and what it did.
        y: the convolution's output.
        relu: whether a ReLU comes last; with ``marks`` if something was added before it.
        ready: an output that was computed before the node.
    """

    saved: Any
    bn: BatchNorm
    norm: Norm
    y: Operand | None
    residual: torch.Tensor | None = None
    relu: bool = False
    marks: torch.Tensor | None = None
    ready: torch.Tensor | None = None

    def output(self) -> torch.Tensor:
        """The convolution's; raises torch's own kind of error if it was changed since."""
        assert self.y is not None
        if not self.y.unchanged():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: the operand of a batch normalisation"
            )
        return self.y.value

    def forget(self) -> None:
        """As torch frees what it saved itself, although the node lives on."""
        self.saved = self.y = self.marks = None


class User(Protocol):
    """One use of a convolution."""

    @property
    def site(self) -> str:
        """Its name."""

    def node(self, state: State) -> torch.Tensor:
        """See :class:`~cenacle.offload.fusion.Layer`, as for the next one."""

    def recover(self, state: State, *, relu: bool) -> torch.Tensor: ...

    def span(self) -> AbstractContextManager[None]:
        """The enclave works on it."""

    def start(self) -> tuple[Any, Any]:
        """Begin it: what is under way, and what the scheme saves."""

    def finish(self, under_way: Any, saved: Any, norm: Norm | None, *, relu: bool) -> torch.Tensor:
        """Its output, perhaps normalised."""

    def linked(self, link: Link, target: torch.Tensor | None) -> torch.Tensor:
        """A node of the graph for a link; its output is ``target``, in place, if given."""


class Step:
    """A call of the model's, if it is one that may follow a convolution."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(func, args, kwargs)
        self.run = call.run
        self.relu, self.in_place = call.relu, call.in_place
        self.normed: torch.Tensor | None = None
        self.bn: BatchNorm | None = None
        self.summands: tuple[torch.Tensor, ...] = ()
        if func is functional.batch_norm:
            self.normed, self.bn = _batch_norm(*args, **kwargs)
        elif func in _ADDITIONS and len(args) == 2 and not kwargs:
            one, other = args
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                alike = one is not other and one.shape == other.shape and one.dtype == other.dtype
                self.summands = (one, other) if alike else ()
            self.in_place = func in _IN_PLACE

    def other(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What is added to a tensor; None if nothing is."""
        if self.summands and self.summands[0] is tensor:
            return self.summands[1]
        if self.summands and self.summands[1] is tensor and not self.in_place:
            return self.summands[0]
        return None


_IN_PLACE: Final = (torch.Tensor.__iadd__, torch.Tensor.add_)
_ADDITIONS: Final = (*_IN_PLACE, torch.Tensor.__add__, torch.Tensor.add, torch.add)


def _batch_norm(
    input: torch.Tensor,  # noqa: A002 - torch's name
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, BatchNorm]:
    return input, BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)


@dataclass
class Learning:
    """A convolution's output in a pass that is not fused: what follows it?"""

    site: str
    stages: list[weakref.ref[torch.Tensor]]
    plan: Plan = NOTHING
    over: bool = False

    def stage(self, tensor: torch.Tensor) -> int | None:
        """The last one, if a tensor went through several in place."""
        found = [number for number, ref in enumerate(self.stages) if ref() is tensor]
        return found[-1] if found else None

    def see(self, stage: int, tensor: torch.Tensor, step: Step) -> torch.Tensor | None:
        """A function gets a tensor of its; the result, if it had to be computed here."""
        if stage < len(self.stages) - 1:  # what is before the last function is used after it
            added = self.plan.add and stage > NORMALISED
            self.plan, self.over = Plan(norm=stage > CONVOLVED, add=added), True
            return None
        if self.over or self.plan.relu:
            return None
        if stage == CONVOLVED and step.normed is tensor and step.bn is not None:
            if can_normalise(tensor) and step.bn.fits(tensor.shape):
                return self._went(step, self.plan._replace(norm=True))
        elif stage == NORMALISED and not self.plan.add and step.other(tensor) is not None:
            return self._went(step, self.plan._replace(add=True))
        elif stage > CONVOLVED and step.relu is tensor:
            return self._went(step, self.plan._replace(relu=True))
        self.over = True
        return None

    def _went(self, step: Step, plan: Plan) -> torch.Tensor:
        found: torch.Tensor = step.run()
        self.plan = plan
        self.stages.append(weakref.ref(found))
        return found
