"""One line around a loop: a model's linear algebra goes to accelerators under a scheme.

    with offload(model, "permuted", [ProcessAccelerator("gpu-0")]) as session:
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()

The model keeps its class, its ``state_dict`` keys and its optimizer; gradients are the plain
model's. Whatever is not a dense layer, a convolution or a product of attention runs in the
enclave, as does everything outside the model's ``forward``.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cenacle.accelerators.protocol import Accelerator
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.attention import FastPath
from cenacle.offload.fleet import Fleet, Loss, Role
from cenacle.offload.fusion import Fusion, State
from cenacle.offload.integrity import Verifier
from cenacle.offload.intercept import Interceptor
from cenacle.offload.maps import Convolution, LinearMap, MatrixProduct
from cenacle.offload.profile import Profile
from cenacle.offload.running import Running
from cenacle.offload.schemes.base import Needs, Scheme, Site, make_scheme
from cenacle.offload.transcript import Transcript
from cenacle.offload.weights import Weights

__all__ = ["Offload", "offload"]

_log = logging.getLogger(__name__)


class _Offloaded(torch.autograd.Function):
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
        with session.profile.span(site.name, "forward"):
            forward = scheme.forward_relu if state.relu else scheme.forward
            y, state.saved = forward(site, x, w, bias)
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
        with session.profile.span(site.name, "backward"), torch.no_grad():
            if state.relu:
                found = scheme.backward_relu(site, state.saved, gy, state.kept(), x, w, needs)
            else:
                found = scheme.backward(site, state.saved, gy, x, w, needs)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # As torch frees what it saved itself, although the node lives on.
            state.saved = state.output = None
        if torch.is_grad_enabled():  # create_graph=True
            once: Any = _Once.apply
            anchor = torch.zeros((), requires_grad=True)
            return (None, None, None, *(None if g is None else once(g, anchor) for g in found))
        return (None, None, None, *found)


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


class Offload:
    """A session; made by :func:`offload`, used as a context manager.

    Attributes:
        fleet: the workers; ``fleet.losses`` names those that were dropped.
        profile: seconds and bytes by layer.
        kept_inside: operations that could not be offloaded, in the order of first use.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, fleet: Fleet) -> None:
        self.model = model
        self.scheme = scheme
        scheme.stays = self.stays
        self.fleet = fleet
        self.kept_inside: list[str] = []
        self._fusion = Fusion()
        self._weights = Weights(model)
        self._running: Running | None = None
        self._optimizers: Any = None
        self._modules: tuple[nn.Module, ...] = ()
        self._open = False

    @property
    def profile(self) -> Profile:
        return self.fleet.profile

    @property
    def leakage(self) -> LeakageRecord:
        return self.scheme.leakage

    @property
    def losses(self) -> Sequence[Loss]:
        return tuple(self.fleet.losses)

    def __enter__(self) -> Self:
        if self._running is not None:
            raise InputError(
                "an offload session is used once", remedy="call offload() for another one"
            )
        try:
            _check(self.model)
            with _LOCK:
                if any(module in _OFFLOADED for module in self.model.modules()):
                    raise InputError(
                        "the model is in an offload session already",
                        remedy="end that session first, or offload another copy of the model",
                    )
                self.scheme.attach(self.fleet, self.model)
                _OFFLOADED.update(self.model.modules())
        except BaseException:
            self.fleet.close()
            raise
        self._open = True
        self._modules = tuple(self.model.modules())
        self._weights.refresh()
        self._running = Running(self.model, self._mode)
        self._optimizers = register_optimizer_step_post_hook(self._stepped)
        FastPath.off()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was and let the workers go. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        if self._running is not None:
            self._running.remove()
        self._optimizers.remove()
        FastPath.restore()
        with _LOCK:
            for module in self._modules:
                _OFFLOADED.discard(module)
        try:
            self.scheme.detach()
        finally:
            self.fleet.close()
            if self.fleet.transcript is not None:
                self.fleet.transcript.close()

    def check_open(self) -> None:
        """Raise :class:`InputError` if the session has ended."""
        if not self._open:
            raise InputError(
                "an offload session has ended before its gradients were taken",
                remedy="call backward() within the `with offload(...)` block",
            )

    def weights_changed(self) -> None:
        """Say that weights were written past torch: through ``.data``, or as an array.

        All other changes are seen: by optimizers, in place, by ``load_state_dict``, and by
        putting another tensor in a weight's place.
        """
        self._weights.changed()

    # ------------------------------------------------------------------ the model runs

    def _mode(self) -> Interceptor:
        self._weights.refresh()
        return Interceptor(self)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """Fused optimizers write weights without counting a new version of them."""
        for group in optimizer.param_groups:
            if group.get("fused"):
                self._weights.changed(p for p in group["params"] if p.grad is not None)

    # ------------------------------------------------------------------ the engine

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return self._weights.find(tensor) is not None

    def stays(self, function: str) -> None:
        if function not in self.kept_inside:
            self.kept_inside.append(function)
            _log.warning("%s is not offloaded: it runs in the enclave", function)

    def apply(
        self, map_: LinearMap, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert self._running is not None
        role: Role = "inputs" if self._running.is_given(x) else "activations"
        weight = self._weights.find(w)
        if weight is not None:
            site = Site(weight.name, map_, role, True, weight.key)
        elif isinstance(map_, MatrixProduct):
            site = Site(self._running.next_product(), map_, role, False, (0, 0))
        else:  # a weight that was computed, e.g. by a parametrization
            site = Site(self._running.path or "model", map_, role, False, (0, 0))
        fused = self.scheme.fuses_relu and isinstance(map_, Convolution)
        state = State(None, relu=fused and self._fusion.expects(site.name))
        found: torch.Tensor = _Offloaded.apply(self, site, state, x, w, bias)  # type: ignore[no-untyped-call]
        if state.relu:
            state.keep(found)
        if fused:

            def again() -> tuple[torch.Tensor, Any]:
                with self.profile.span(site.name, "forward"), torch.no_grad():
                    return self.scheme.forward(site, x, w, bias)

            self._fusion.made(site.name, found, state, again)
        return found

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        return self._fusion.sees(func, args, kwargs)

    def settle(self) -> None:
        self._fusion.settle()


def _check(model: nn.Module) -> None:
    """Raises :class:`InputError` if a model cannot be offloaded."""
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.jit.ScriptModule)
            or hasattr(module, "_orig_mod")
            or module._compiled_call_impl is not None
        ):
            raise InputError(
                "a compiled model cannot be offloaded: its layers cannot be seen",
                found=f"{name or 'the model'} of class {type(module).__name__}",
                remedy="offload the model that it was compiled from",
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise InputError(
                "a model that is offloaded lies on another device",
                found=f"{name} on {tensor.device}",
                expected="cpu, which is the enclave's own memory",
                remedy="keep the model on the CPU; give devices to offload() as accelerators",
            )


_LOCK = threading.Lock()
_OFFLOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def offload(
    model: nn.Module,
    scheme: str | Scheme,
    accelerators: Sequence[Accelerator],
    *,
    timeout: float = 120.0,
    transcript: Path | Transcript | None = None,
    check: bool | Verifier | None = None,
    **options: Any,
) -> Offload:
    """Offload ``model`` within a ``with`` block.

    Args:
        model: any module on the CPU, with float32 or float64 weights.
        scheme: a name (``enclave``, ``measured``, ``lowrank``, ``permuted``, ``masked``) with
            the scheme's ``options``, or a scheme made before.
        accelerators: workers; closed when the block ends.
        timeout: seconds after which a worker counts as hanging.
        transcript: a folder, to record what every worker received.
        check: whether to verify what workers return, or how; by default unless the scheme
            trusts them.

    Raises:
        InputError: no such scheme or option, or accelerators with equal names.
        RefusedError: the scheme must not be used for this model.
    """
    record = Transcript(transcript) if isinstance(transcript, Path) else transcript
    made = make_scheme(scheme, **options) if isinstance(scheme, str) else scheme
    if check is None:
        check = made.verified
    verifier = check if isinstance(check, Verifier) else Verifier() if check else None
    fleet = Fleet(accelerators, timeout=timeout, verifier=verifier, transcript=record)
    return Offload(model, made, fleet)
