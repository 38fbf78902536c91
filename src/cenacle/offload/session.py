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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cenacle.accelerators.protocol import Accelerator
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.fleet import Fleet, Loss, Role
from cenacle.offload.intercept import Interceptor
from cenacle.offload.maps import LinearMap
from cenacle.offload.profile import Profile
from cenacle.offload.schemes.base import Needs, Scheme, Site, make_scheme
from cenacle.offload.transcript import Transcript

__all__ = ["Offload", "offload"]

_log = logging.getLogger(__name__)


class _Offloaded(torch.autograd.Function):
    """One linear map as a node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        session: Offload,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        with session.profile.span(site.name, "forward"):
            y, ctx.saved = session.scheme.forward(site, x, w, bias)
        ctx.session, ctx.site = session, site
        ctx.save_for_backward(x if session.scheme.keeps_input else None, w)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        session: Offload = ctx.session
        session.check_open()
        x, w = ctx.saved_tensors
        _, _, *wanted = ctx.needs_input_grad
        with session.profile.span(ctx.site.name, "backward"), torch.no_grad():
            found = session.scheme.backward(ctx.site, ctx.saved, gy, x, w, Needs(*wanted))
        return (None, None, *found)


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
        self.fleet = fleet
        self.kept_inside: list[str] = []
        self._names: dict[int, str] = {}
        self._given: set[int] = set()
        self._products = 0
        self._running: list[Interceptor] = []
        self._hooks: list[Any] = []
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
        self.scheme.attach(self.fleet, self.model)
        self._names = {id(p): name for name, p in self.model.named_parameters()}
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        self._open = True
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
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._open:
            self._open = False
            self.scheme.detach()
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

    # ------------------------------------------------------------------ the model runs

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = {
            value.untyped_storage().data_ptr()
            for value in (*args, *kwargs.values())
            if isinstance(value, torch.Tensor)
        }
        self._products = 0
        mode = Interceptor(self)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._running.append(mode)

    def _end(self, *_: Any) -> None:
        if self._running:
            self._running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._given = set()

    # ------------------------------------------------------------------ the engine

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._names

    def stays(self, function: str) -> None:
        if function not in self.kept_inside:
            self.kept_inside.append(function)
            _log.warning("%s is not offloaded: it runs in the enclave", function)

    def apply(
        self,
        map_: LinearMap,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        parameter: torch.Tensor | None,
    ) -> torch.Tensor:
        if parameter is None:
            self._products += 1
            name, key = f"product-{self._products}", (0, 0)
        else:
            name, key = self._names[id(parameter)], (id(parameter), parameter._version)
        given = x.untyped_storage().data_ptr() in self._given
        role: Role = "inputs" if given else "activations"
        site = Site(name.removesuffix(".weight"), map_, role, parameter is not None, key)
        found: torch.Tensor = _Offloaded.apply(self, site, x, w, bias)  # type: ignore[no-untyped-call]
        return found


def offload(
    model: nn.Module,
    scheme: str | Scheme,
    accelerators: Sequence[Accelerator],
    *,
    timeout: float = 120.0,
    transcript: Path | Transcript | None = None,
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

    Raises:
        InputError: no such scheme or option, or accelerators with equal names.
        RefusedError: the scheme must not be used for this model.
    """
    record = Transcript(transcript) if isinstance(transcript, Path) else transcript
    made = make_scheme(scheme, **options) if isinstance(scheme, str) else scheme
    return Offload(model, made, Fleet(accelerators, timeout=timeout, transcript=record))
