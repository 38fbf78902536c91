"""Nodes of the autograd graph: one linear map each, computed by a session's scheme."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from cenacle.errors import InputError
from cenacle.offload.chain_steps import Link
from cenacle.offload.fusion import State
from cenacle.offload.norms import Norm, gradient
from cenacle.offload.schemes.base import Fused, Gradients, Needs, Site

if TYPE_CHECKING:
    from cenacle.offload.session import Offload

__all__ = ["Normalised", "Offloaded", "Use"]


class Offloaded(torch.autograd.Function):
    """One linear map as a node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        session: Offload,
        site: Site,
        state: State,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        scheme = session.scheme
        if state.ready is not None:
            y, state.ready = state.ready, None
        else:
            with session.profile.span(site.name, "forward"):
                y, state.saved = scheme.forward(site, x, w, bias)
        ctx.session, ctx.site, ctx.state = session, site, state
        ctx.save_for_backward(x if scheme.keeps_input else None, w)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        session: Offload = ctx.session
        session.check_open()
        scheme, site, state = session.scheme, ctx.site, ctx.state
        x, w = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[3:])
        spans = session.profile.span(site.name, "backward")
        with spans, torch.no_grad(), session.eyes_shut(), torch._C.DisableTorchFunction():
            if state.relu:
                state.check()
                fused = Fused(state.gate, state.pool)
                found = scheme.backward_fused(site, state.saved, gy, fused, x, w, needs)
            else:
                found = scheme.backward(site, state.saved, gy, x, w, needs)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            state.forget()
        return (None, None, None, *_last(found))


class Normalised(torch.autograd.Function):
    """A convolution and what follows it, as one node; see :mod:`cenacle.offload.chains`."""

    @staticmethod
    def forward(
        ctx: Any,
        use: Use,
        link: Link,
        target: torch.Tensor | None,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,  # noqa: ARG004 - for its gradient, as for the others
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,  # noqa: ARG004
        residual: torch.Tensor | None,  # noqa: ARG004
    ) -> torch.Tensor:
        ctx.use, ctx.link = use, link
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if use.session.scheme.keeps_input else None, w, weight)
        found, link.ready = link.ready, None
        if target is not None:
            ctx.mark_dirty(target)
            return target
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        use: Use = ctx.use
        link: Link = ctx.link
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if g is None:  # something in place came after
            if not keep:
                link.forget()
            return (None,) * 9
        session, place = use.session, use.place
        session.check_open()
        x, w, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        spans = session.profile.span(place.name, "backward")
        with spans, torch.no_grad(), session.eyes_shut(), torch._C.DisableTorchFunction():
            gy, residual, weight, shift = gradient(
                g.contiguous(), link.output(), link.norm, session.buffers,
                relu=link.relu, marks=link.marks,
                needs=(any(needs[:3]), needs[5], needs[3] or needs[4]),
            )  # fmt: skip
            found = Gradients()
            if gy is not None:
                found = session.scheme.backward(place, link.saved, gy, x, w, Needs(*needs[:3]))
        if not keep:
            link.forget()
        others = (weight if needs[3] else None, shift if needs[4] else None, residual)
        return (None, None, None, *_last((*found, *others)))


def _last(found: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Gradients; under ``create_graph=True`` they say that there are no further ones."""
    if not torch.is_grad_enabled():
        return found
    once: Any = _Once.apply
    anchor = torch.zeros((), requires_grad=True)
    return [None if g is None else once(g, anchor) for g in found]


class Use:
    """One use of a layer, of which several nodes of the graph may be made."""

    def __init__(
        self,
        session: Offload,
        place: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self.place, self.x, self.w, self.bias = place, x, w, bias
        self.session = session
        self._versions = self._found()
        self._bias = None if bias is None else bias.detach().clone()

    @property
    def site(self) -> str:
        return self.place.name

    def node(self, state: State) -> torch.Tensor:
        found: torch.Tensor = Offloaded.apply(  # type: ignore[no-untyped-call]
            self.session, self.place, state, self.x, self.w, self.bias
        )
        return found

    def recover(self, state: State, *, relu: bool) -> torch.Tensor:
        scheme = self.session.scheme
        with self.session.profile.span(self.site, "forward"), torch.no_grad():
            found = scheme.recover(self.place, state.saved, self._bias, relu=relu)
            if found is not None:
                full, state.gate = found
                return full
            if not self.unchanged() or self.x.is_inference():
                raise InputError(
                    "a layer's output is used in another way than in the pass before, and what "
                    "it was computed from may be changed",
                    found=self.site,
                    remedy="run the model once more: this layer is not fused any more",
                )
            if relu:
                full, state.gate, state.saved = scheme.forward_fused(
                    self.place, self.x, self.w, self._bias, None
                )
            else:
                full, state.saved = scheme.forward(self.place, self.x, self.w, self._bias)
            return full

    def span(self) -> AbstractContextManager[None]:
        return self.session.profile.span(self.site, "forward")

    def start(self) -> tuple[Any, Any]:
        with self.span(), torch.no_grad():
            return self.session.scheme.start(self.place, self.x, self.w)

    def finish(self, under_way: Any, saved: Any, norm: Norm | None, *, relu: bool) -> torch.Tensor:
        scale, bias = None, self._bias
        if norm is not None:
            scale, bias = norm.affine
            if self._bias is not None:
                bias += torch.from_numpy(scale) * self._bias
        with torch.no_grad():
            return self.session.scheme.finish(self.place, saved, under_way, bias, scale, relu=relu)

    def linked(self, link: Link, target: torch.Tensor | None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            found = link.ready if target is None else target
            assert found is not None
            return found
        bn = link.bn
        node: torch.Tensor = Normalised.apply(  # type: ignore[no-untyped-call]
            self, link, target, self.x, self.w, self.bias, bn.weight, bn.bias, link.residual
        )
        link.residual = None
        return node

    def unchanged(self) -> bool:
        return self._found() == self._versions

    def _found(self) -> list[int]:
        given = (t for t in (self.x, self.w, self.bias) if t is not None)
        return [0 if t.is_inference() else t._version for t in given]


class _Once(torch.autograd.Function):
    """A gradient that must not be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:  # noqa: ARG004
        raise InputError(
            "gradients of an offloaded model cannot be differentiated again",
            remedy="take second derivatives of the model outside the `with offload(...)` block",
        )
