"""Batch normalisation after a convolution, with a residual's addition and a ReLU after it.

As :mod:`cenacle.offload.fusion`, for what residual networks do between convolutions. The first
pass shows which convolutions are followed by ``batch_norm``, and whether another tensor is
added to its result, and whether a ReLU comes then. From the second on, their outputs are hollow
tensors, and what follows is computed in one pass over memory (:mod:`cenacle.offload.norms`) when
its last function is called. Where nobody asks for gradients and statistics are the running
ones, that pass is the one that unblinds.

Nothing is assumed here either. A hollow tensor that meets another function than the one that was
seen before gets its true numbers first, and its layer is fused less from then on. Each function
that is expected adds a node to the graph, with the operands of the convolution, of the
normalisation and the residual; those before it are then part of no graph. What a pending result
depends on is watched: it is computed before anything else happens to that.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.errors import InputError
from cenacle.offload.calls import looks_only, tensors
from cenacle.offload.chain_steps import (
    ADDED,
    CONVOLVED,
    NORMALISED,
    NOTHING,
    Learning,
    Link,
    Operand,
    Plan,
    Step,
    User,
)
from cenacle.offload.fusion import State, alone, fill, hollow, references, strange
from cenacle.offload.norms import BatchNorm, Norm, can_normalise, normalise
from cenacle.offload.passes import marks_for

__all__ = ["Chains"]


@dataclass
class _Chain:
    """One use of a convolution, and what is known of what follows it."""

    user: User
    plan: Plan
    saved: Any
    under_way: Any
    state: State
    grad: bool
    inference: bool
    y: Operand | None = None
    bn: BatchNorm | None = None
    norm: Norm | None = None
    residual: Operand | None = None
    summand: torch.Tensor | None = None

    def value(
        self, stage: int, buffers: Buffers, *, relu: bool = False, marks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers after a stage, and perhaps a ReLU.

        Raises:
            InputError: what they are computed from may have been changed.
        """
        norm = None if stage == CONVOLVED else self.norm
        residual = self.residual if stage == ADDED else None
        if self.y is None:
            folded = norm, relu and residual is None
            if self.under_way is not None:
                self.under_way, job = None, self.under_way
                y = self.user.finish(job, self.saved, norm, relu=folded[1])
            else:
                y = self.user.recover(self.state, relu=False)
                if norm is not None:
                    y = normalise(y, norm, y, relu=folded[1])
            if residual is None:
                return y
            return _added(y, residual.value, relu=relu)
        if norm is None:
            return self.y.value
        return normalise(
            self.y.value, norm, buffers.empty(self.y.value.shape),
            residual=None if residual is None else residual.value.contiguous(),
            relu=relu, marks=marks,
        )  # fmt: skip

    def unchanged(self) -> bool:
        """Whether what is pending can be computed still, after something else has happened."""
        return all(one is None or one.unchanged() for one in (self.y, self.residual))


def _added(y: torch.Tensor, residual: torch.Tensor, *, relu: bool) -> torch.Tensor:
    """In place."""
    y += residual
    return y.relu_() if relu else y


@dataclass
class _Entry:
    """A tensor without numbers that the model was given."""

    chain: _Chain
    stage: int
    tensor: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    full: torch.Tensor | None = None
    passed: bool = False

    @property
    def lives(self) -> bool:
        return references(self.storage) > alone()

    def fill(self, tensor: torch.Tensor) -> None:
        """``tensor`` is the hollow one, or another one in its memory."""
        fill(tensor, self.storage, self.full, self.chain.user.site)


class Chains:
    """Decides for each convolution what to fuse. One serves one session."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        self._plans: dict[str, Plan] = {}
        self._learning: dict[int, Learning] = {}
        self._lessons: list[Learning] = []
        self._entries: dict[int, _Entry] = {}
        self._watched: dict[int, _Entry] = {}
        self._given: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def close(self) -> None:
        """Give the buffers back."""
        self.buffers.close()

    def plan(self, site: str) -> Plan:
        """What is expected after a convolution."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return NOTHING  # those who count what nodes save count the same in every pass
        return self._plans.get(site, NOTHING)

    def made(self, site: str, output: torch.Tensor) -> None:
        """A convolution's output that is not fused exists."""
        if site not in self._plans:
            self._lessons.append(learning := Learning(site, [weakref.ref(output)]))
            self._learning[id(output)] = learning

    def begin(
        self, user: User, plan: Plan, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A convolution that is under way: its hollow output."""
        self._sweep()
        under_way, saved = user.start()
        state = State(saved, hollow(torch.Size(shape), dtype))
        found = user.node(state)
        chain = _Chain(
            user, plan, saved, under_way, state, torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )  # fmt: skip
        self._note(chain, CONVOLVED, found)
        return found

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The model calls a function. The result, if it is there already or pending."""
        if not (self._learning or self._entries) or looks_only(func):
            return None
        step = Step(func, args, kwargs)
        for tensor in tensors((args, tuple(kwargs.values()))):
            result = self._learns(tensor, step)
            if result is not None:
                return result
            with torch._C.DisableTorchFunction():
                result = self._meets(tensor, step)
            if result is not None:
                return result
        return None

    def settle(self) -> None:
        """The model has run: what somebody still has must have its numbers."""
        learned: dict[str, Plan] = {}
        for learning in self._lessons:
            if learned.setdefault(learning.site, learning.plan) != learning.plan:
                learned[learning.site] = NOTHING
        self._learning.clear()
        self._lessons.clear()
        for site, plan in learned.items():
            self._plans.setdefault(site, plan)
        given, self._given = self._given, []
        for site, ref in given:
            if ref() is not None:  # somebody keeps an output that nobody was to see
                self._plans[site] = NOTHING
        entries, self._entries = self._entries, {}
        self._watched.clear()
        for entry in entries.values():
            if entry.full is None and entry.lives:
                with entry.chain.user.span():
                    self._refute(entry)
        strangers = [entry for entry in entries.values() if entry.lives]
        if strangers:
            raise InputError(
                "a layer's output was taken past torch's functions, before it had its numbers",
                found=", ".join(entry.chain.user.site for entry in strangers),
                remedy="run the model once more: these layers are not fused any more",
            )

    # ------------------------------------------------------------------ what is followed

    def _learns(self, tensor: torch.Tensor, step: Step) -> torch.Tensor | None:
        learning = self._learning.get(id(tensor))
        stage = None if learning is None else learning.stage(tensor)
        if learning is None or stage is None:
            return None
        result = learning.see(stage, tensor, step)
        if result is not None:
            self._learning[id(result)] = learning
        return result

    # ------------------------------------------------------------------ hollow tensors

    def _meets(self, tensor: torch.Tensor, step: Step) -> torch.Tensor | None:
        """A function gets a tensor; if that is hollow or watched, what it gives, or numbers."""
        entry = self._find(tensor)
        if entry is not None:
            with entry.chain.user.span():
                result = self._expected(entry, tensor, step)
                if result is not None:
                    return result
                self._refute(entry)
                entry.fill(tensor)
        elif self._watched and not strange(tensor):
            dependent = self._watched.get(tensor.untyped_storage()._cdata)
            if dependent is not None:
                self._refute(dependent)
        return None

    def _note(self, chain: _Chain, stage: int, output: torch.Tensor) -> _Entry:
        entry = _Entry(chain, stage, weakref.ref(output), output.untyped_storage())
        self._entries[entry.storage._cdata] = entry
        return entry

    def _find(self, tensor: torch.Tensor) -> _Entry | None:
        if not self._entries or strange(tensor):
            return None
        return self._entries.get(tensor.untyped_storage()._cdata)

    def _sweep(self) -> None:
        for key in [key for key, entry in self._entries.items() if not entry.lives]:
            del self._entries[key]

    def _expected(self, entry: _Entry, tensor: torch.Tensor, step: Step) -> torch.Tensor | None:
        """What a call gives, if it is the one that was planned for."""
        chain = entry.chain
        if (
            entry.full is not None
            or entry.passed
            or entry.tensor() is not tensor
            or chain.inference != torch.is_inference_mode_enabled()
            or chain.grad != torch.is_grad_enabled()
            or not can_normalise(tensor)
        ):
            return None
        if entry.stage == CONVOLVED:
            if step.normed is tensor and step.bn is not None and step.bn.fits(tensor.shape):
                return self._normalised(entry, tensor, step.bn)
            return None
        if entry.stage == NORMALISED and chain.plan.add:
            other = step.other(tensor)
            return None if other is None else self._sum(entry, tensor, other, step)
        if chain.plan.relu and step.relu is tensor:
            return self._rectified(entry, tensor, step)
        return None

    def _normalised(self, entry: _Entry, tensor: torch.Tensor, bn: BatchNorm) -> torch.Tensor:
        chain = entry.chain
        wanted = (tensor, bn.weight, bn.bias)
        learns = chain.grad and any(t is not None and t.requires_grad for t in wanted)
        if learns or bn.training:
            entry.full = chain.value(CONVOLVED, self.buffers)
            entry.fill(tensor)
            del self._entries[entry.storage._cdata]
            chain.y = Operand.of(tensor)
            self._given.append((chain.user.site, entry.tensor))
        chain.bn = bn
        chain.norm = bn.measured(tensor.detach())
        entry.passed = True
        pending = chain.plan.add or chain.plan.relu
        ready = (
            hollow(tensor.shape, tensor.dtype) if pending else chain.value(NORMALISED, self.buffers)
        )
        found = chain.user.linked(self._link(chain, ready=ready), None)
        if pending:
            after = self._note(chain, NORMALISED, found)
            if chain.y is not None:
                self._watched[tensor.untyped_storage()._cdata] = after
        return found

    def _sum(
        self, entry: _Entry, tensor: torch.Tensor, other: torch.Tensor, step: Step
    ) -> torch.Tensor | None:
        chain = entry.chain
        beside = self._find(other)
        if beside is not None:
            self._refute(beside)
            beside.fill(other)
        learns = chain.grad and other.requires_grad
        if not can_normalise(other) or (learns and chain.y is None):
            return None
        chain.residual, chain.summand = Operand.of(other), other
        pending = chain.plan.relu
        ready = hollow(tensor.shape, tensor.dtype) if pending else chain.value(ADDED, self.buffers)
        link = self._link(chain, residual=other, ready=ready)
        if step.in_place:
            if not pending:
                self._unwatch(entry)
                entry.full = tensor.data = ready
            found = chain.user.linked(link, tensor)
            entry.stage, after = ADDED, entry
        else:
            entry.passed = True
            found = chain.user.linked(link, None)
            if pending:
                after = self._note(chain, ADDED, found)
        if pending:
            if chain.y is not None:
                self._watched[chain.y.value.untyped_storage()._cdata] = after
            self._watched[other.untyped_storage()._cdata] = after
        else:
            self._unwatch(entry)
            chain.summand = None
        return found

    def _rectified(self, entry: _Entry, tensor: torch.Tensor, step: Step) -> torch.Tensor:
        chain = entry.chain
        summed = entry.stage == ADDED
        marks = None
        if summed and chain.y is not None and chain.grad:
            rows, columns = tensor.shape[:2]
            marks = marks_for(rows, columns, tensor[0, 0].numel(), None, self.buffers)
        value = chain.value(entry.stage, self.buffers, relu=True, marks=marks)
        link = self._link(
            chain, residual=chain.summand if summed else None, relu=True, marks=marks, ready=value
        )
        self._unwatch(entry)
        chain.summand = None
        if not step.in_place:
            entry.passed = True
            return chain.user.linked(link, None)
        entry.full = tensor.data = value
        del self._entries[entry.storage._cdata]
        return chain.user.linked(link, tensor)

    @staticmethod
    def _link(chain: _Chain, **options: Any) -> Link:
        assert chain.bn is not None
        assert chain.norm is not None
        return Link(chain.saved, chain.bn, chain.norm, chain.y, **options)

    def _unwatch(self, entry: _Entry) -> None:
        chain = entry.chain
        for key in [key for key, one in self._watched.items() if one.chain is chain]:
            del self._watched[key]

    def _refute(self, entry: _Entry) -> None:
        """It was not to be: the tensor gets its numbers, and next time less is fused."""
        chain = entry.chain
        site = chain.user.site
        known = self._plans.get(site, NOTHING)
        self._plans[site] = Plan(
            known.norm and entry.stage > CONVOLVED, known.add and entry.stage > NORMALISED
        )
        if entry.full is not None:
            return
        if entry.passed and chain.y is None and chain.norm is not None:
            usable = entry.stage < ADDED or chain.unchanged()
        else:
            usable = not entry.passed or chain.unchanged()
        if not usable:
            raise InputError(
                "a layer's output is used in another way than in the pass before, and what "
                "it was computed from may be changed",
                found=site,
                remedy="run the model once more: this layer is not fused any more",
            )
        self._unwatch(entry)
        with torch.no_grad():
            entry.full = chain.value(entry.stage, self.buffers)
        tensor = entry.tensor()
        if tensor is not None:
            entry.fill(tensor)
