"""A ReLU, and pooling after it, in the same pass as the layer before them.

The enclave's part of a step is bound by memory: a ReLU of its own reads and writes every
activation once more, pooling too, and so do their gradients. Where a model applies a ReLU to a
convolution's output, or a ReLU and then 2 x 2 maximum pooling, and nothing else sees what is
between them, a scheme can do it all while it unblinds, and the gradients while it blinds.

Nothing is assumed of the model. The first pass shows which layers are followed in such a way.
From the second on, a layer's output is a *hollow* tensor: right in shape, type and graph, but
without numbers of its own (whoever reads it nevertheless, past torch's functions, finds NaN).
If the model calls the expected function on it, it gets the result that is there already, as the
output of a new node of the graph; the hollow tensor's own node is then part of no graph. If
anything else is done with it, by whomever, now or later, or if it is still there when the model
has run, it is filled with its true numbers before anybody sees them, and the layer is fused less
from then on. Since both nodes are the layer's, gradients are right in any case: they are added.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import torch

from cenacle.errors import InputError
from cenacle.offload.calls import Call, looks_only, tensors

__all__ = [
    "NOTHING",
    "Fusion",
    "Layer",
    "Plan",
    "State",
    "alone",
    "fill",
    "hollow",
    "references",
    "strange",
]


class Plan(NamedTuple):
    """What follows a layer: a ReLU, in place or not, and pooling of its result."""

    relu: bool = False
    in_place: bool = False
    pool: bool = False


NOTHING: Final = Plan()


@dataclass
class State:
    """What the autograd node of a layer remembers; shared with :class:`Fusion`.

    Attributes:
        saved: the scheme's own.
        ready: an output that was computed before the node.
        relu: whether the output has a ReLU applied; its gradient is due in the backward pass.
        pool: the width of the images that were pooled after it.
        gate: then, what the scheme needs to know of the output.
    """

    saved: Any = None
    ready: torch.Tensor | None = None
    relu: bool = False
    pool: int | None = None
    gate: Any = None
    _witness: torch.Tensor | None = field(default=None, repr=False)
    _version: int = 0

    def watch(self, output: torch.Tensor) -> None:
        """A ReLU's output must not be changed before its gradient is taken, as in torch."""
        if not output.is_inference():  # those have no version, and no gradient
            self._version = output._version
            # Shares the version with the output, but neither its memory nor its graph.
            self._witness = output.detach()
            self._witness.data = torch.empty(0, dtype=output.dtype)

    def check(self) -> None:
        """Raise torch's own kind of error if the output was changed since."""
        if self._witness is not None and self._witness._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: the output of a ReLU"
            )

    def forget(self) -> None:
        """As torch frees what it saved itself, although the node lives on."""
        self.saved = self.gate = self._witness = None


class Layer(Protocol):
    """One use of a layer, for :class:`Fusion`."""

    @property
    def site(self) -> str:
        """Its name."""

    def node(self, state: State) -> torch.Tensor:
        """A new node of the graph with the layer's operands, and ``state.ready`` as output."""

    def recover(self, state: State, *, relu: bool) -> torch.Tensor:
        """The whole output, computed again from what it was computed from; sets the gate.

        Raises:
            InputError: that is not there any more.
        """

    def unchanged(self) -> bool:
        """Whether its operands still are what they were, as far as torch can tell."""


def hollow(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without numbers of its own: all are one NaN. No view, so it can be filled."""
    one = torch.full((1,), torch.nan, dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(one, 0, shape, [0] * len(shape))


def fill(
    tensor: torch.Tensor, storage: torch.UntypedStorage, value: torch.Tensor | None, site: str
) -> None:
    """Give ``tensor`` its numbers, if it is the hollow one of ``storage`` or shares its memory.

    Raises:
        InputError: its shape is another than the layer's output had.
    """
    assert value is not None
    if tensor.untyped_storage()._cdata != storage._cdata:
        return
    if value.shape not in (tensor.shape, (1, *tensor.shape)):
        raise InputError(
            "a layer's output was taken past torch's functions, before it had its numbers",
            found=f"{site} as {tuple(tensor.shape)}",
            remedy="run the model once more: this layer is not fused any more",
        )
    # Past the version counter: for autograd this is the value that it always had.
    tensor.data = value.view(tensor.shape)


# ---------------------------------------------------------------------- what is followed


@dataclass
class _Learning:
    """A layer's output in a pass that is not fused: what follows it?"""

    site: str
    output: weakref.ref[torch.Tensor]
    relu: weakref.ref[torch.Tensor] | None = None
    plan: Plan = NOTHING
    over: bool = False

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it is one of its tensors, and not another one in a dead one's place."""
        return self.output() is tensor or (self.relu is not None and self.relu() is tensor)

    def see(self, tensor: torch.Tensor, call: Call) -> torch.Tensor | None:
        """A function gets one of its tensors; the result, if it had to be computed here."""
        if self.relu is None:
            if not self.over and call.relu is tensor:
                done: torch.Tensor = call.run()
                self.plan, self.relu = Plan(relu=True, in_place=call.in_place), weakref.ref(done)
                return done
            self.over = True
        elif self.relu() is not tensor:
            self.plan, self.over = NOTHING, True  # what was before the ReLU is used after it
        elif not self.over and not self.plan.pool and call.pool is tensor:
            self.plan = self.plan._replace(pool=True)
        else:
            self.plan, self.over = self.plan._replace(pool=False), True
        return None

    def learned(self) -> Plan:
        """At the end of the pass. (Pooling keeps a ReLU's result alive, so that tells nothing.)"""
        kept = not self.plan.in_place and self.output() is not None
        return NOTHING if kept else self.plan


@dataclass
class _Hollow:
    """A tensor without numbers that the model was given."""

    layer: Layer
    plan: Plan
    state: State
    tensor: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    value: torch.Tensor | None
    gate: Any
    inference: bool
    grad: bool
    relu: bool = False
    full: torch.Tensor | None = None

    @property
    def lives(self) -> bool:
        """Whether anybody but this refers to the tensor, or to another one in its memory."""
        return references(self.storage) > alone()

    def fill(self, tensor: torch.Tensor) -> None:
        """``tensor`` is the hollow one, or another one in its memory."""
        fill(tensor, self.storage, self.full, self.layer.site)


def references(storage: torch.UntypedStorage) -> int:
    """How many there are to a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def alone(found: list[int] = []) -> int:  # noqa: B006 - measured once
    """How many references to a storage are counted where only Python's is left."""
    if not found:
        found.append(references(hollow(torch.Size((2,)), torch.float32).untyped_storage()))
    return found[0]


def strange(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory to be known by."""
    return tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


class Fusion:
    """Decides for each layer what to fuse. One serves one session."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}
        self._learning: dict[int, _Learning] = {}
        self._lessons: list[_Learning] = []
        self._hollow: dict[int, _Hollow] = {}

    def plan(self, site: str) -> Plan:
        """What to do while the layer's output is unblinded."""
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # Those who count what nodes save (checkpoints) count the same in every pass.
            return NOTHING
        return self._plans.get(site, NOTHING)

    def made(self, site: str, output: torch.Tensor) -> None:
        """A layer's output that is not fused exists."""
        if site not in self._plans:
            self._lessons.append(learning := _Learning(site, weakref.ref(output)))
            self._learning[id(output)] = learning

    def given(
        self, layer: Layer, plan: Plan, state: State, output: torch.Tensor, value: torch.Tensor,
        gate: Any,
    ) -> None:  # fmt: skip
        """A hollow output exists; ``value`` is the result of what follows it."""
        self._sweep()
        self._note(layer, plan, state, output, value, gate, torch.is_grad_enabled())

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The model calls a function. The result, if it is there already."""
        if not (self._learning or self._hollow) or looks_only(func):
            return None
        call = Call(func, args, kwargs)
        result: torch.Tensor | None = None
        for tensor in tensors((args, tuple(kwargs.values()))):
            learning = self._learning.get(id(tensor))
            if learning is not None and learning.knows(tensor):
                result = learning.see(tensor, call)
                if result is not None:
                    self._learning[id(result)] = learning
                    return result
            entry = self._find(tensor)
            if entry is not None:
                result = self._expected(entry, tensor, call)
                if result is not None:
                    return result
                self._refute(entry)
                entry.fill(tensor)
        return None

    def settle(self) -> None:
        """The model has run: what somebody still has must have its numbers."""
        learned: dict[str, Plan] = {}
        for learning in self._lessons:
            plan = learning.learned()
            if learned.setdefault(learning.site, plan) != plan:
                learned[learning.site] = NOTHING
        self._learning.clear()
        self._lessons.clear()
        for site, plan in learned.items():
            self._plans.setdefault(site, plan)
        hollow, self._hollow = self._hollow, {}
        for entry in hollow.values():
            if entry.full is None and entry.lives:
                self._refute(entry)
        strangers = [entry for entry in hollow.values() if entry.lives]
        if strangers:
            raise InputError(
                "a layer's output was taken past torch's functions, before it had its numbers",
                found=", ".join(entry.layer.site for entry in strangers),
                remedy="run the model once more: these layers are not fused any more",
            )

    # ------------------------------------------------------------------ hollow tensors

    def _note(
        self, layer: Layer, plan: Plan, state: State, output: torch.Tensor,
        value: torch.Tensor | None, gate: Any, grad: bool,
    ) -> _Hollow:  # fmt: skip
        entry = _Hollow(
            layer, plan, state, weakref.ref(output), output.untyped_storage(), value, gate,
            torch.is_inference_mode_enabled(), grad,
        )  # fmt: skip
        self._hollow[entry.storage._cdata] = entry
        return entry

    def _find(self, tensor: torch.Tensor) -> _Hollow | None:
        if not self._hollow or strange(tensor):
            return None
        return self._hollow.get(tensor.untyped_storage()._cdata)

    def _sweep(self) -> None:
        for key in [key for key, entry in self._hollow.items() if not entry.lives]:
            del self._hollow[key]

    def _expected(self, entry: _Hollow, tensor: torch.Tensor, call: Call) -> torch.Tensor | None:
        """What the call gives, if it is the one that was planned for."""
        if (
            entry.value is None
            or entry.tensor() is not tensor
            or entry.inference != torch.is_inference_mode_enabled()
            or not entry.layer.unchanged()
        ):
            return None
        plan, value, saved = entry.plan, entry.value, entry.state.saved
        if not entry.relu and call.relu is tensor and call.in_place == plan.in_place:
            if not plan.in_place:
                entry.value = None
                return self._rectified(entry, value)
            entry.relu = True
            if not plan.pool:
                entry.value = None
                entry.state.relu, entry.state.gate = True, entry.gate
                entry.full = tensor.data = value
                entry.state.watch(tensor)
            return tensor
        if entry.relu and plan.pool and call.pool is tensor:
            entry.value = None
            state = State(saved, value, relu=True, pool=tensor.shape[-1], gate=entry.gate)
            with torch.set_grad_enabled(entry.grad and torch.is_grad_enabled()):
                return entry.layer.node(state)
        return None

    def _rectified(self, entry: _Hollow, value: torch.Tensor) -> torch.Tensor:
        """The result of a ReLU that is not in place: hollow again, if pooling follows."""
        tensor = entry.tensor()
        assert tensor is not None
        pool = entry.plan.pool
        state = State(entry.state.saved, value, relu=True, gate=entry.gate)
        if pool:
            state.ready, state.gate = hollow(tensor.shape, tensor.dtype), None
        grad = entry.grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad):
            found = entry.layer.node(state)
        if pool:
            after = self._note(entry.layer, entry.plan, state, found, value, entry.gate, grad)
            after.relu = True
        else:
            state.watch(found)
        return found

    def _refute(self, entry: _Hollow) -> None:
        """Something else happens to the tensor: give it its numbers, and fuse less from now on."""
        if entry.full is not None:
            return
        after_relu = entry.relu and entry.plan.pool
        self._plans[entry.layer.site] = entry.plan._replace(pool=False) if after_relu else NOTHING
        state = entry.state
        entry.value = None
        entry.full = entry.layer.recover(state, relu=entry.relu)
        state.relu, state.pool = entry.relu, None
        tensor = entry.tensor()
        if tensor is not None:
            entry.fill(tensor)
            if entry.relu:
                state.watch(tensor)
