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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.protocol import Accelerator
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.attention import FastPath
from cenacle.offload.calls import looks_only, tensors
from cenacle.offload.chains import Chains
from cenacle.offload.claims import check_model, claiming, unclaim
from cenacle.offload.fleet import Fleet, Loss, Role
from cenacle.offload.fusion import NOTHING, Fusion, Plan, State, hollow
from cenacle.offload.integrity import Verifier
from cenacle.offload.intercept import Interceptor
from cenacle.offload.maps import Convolution, LinearMap, MatrixProduct
from cenacle.offload.nodes import Offloaded, Use
from cenacle.offload.pooling import max_pool
from cenacle.offload.private import PrivatePasses, Waiting, private_record
from cenacle.offload.profile import Profile
from cenacle.offload.resident import Keeper, Residency, Updates
from cenacle.offload.running import Running
from cenacle.offload.schemes.base import Scheme, Site, make_scheme
from cenacle.offload.torch_optimizers import TorchUpdates
from cenacle.offload.transcript import Transcript
from cenacle.offload.weights import Weights

__all__ = ["Offload", "offload"]

_log = logging.getLogger(__name__)


class Offload:
    """A session; made by :func:`offload`, used as a context manager.

    Attributes:
        fleet: the workers; ``fleet.losses`` names those that were dropped.
        profile: seconds and bytes by layer.
        kept_inside: operations that could not be offloaded, in the order of first use.
    """

    def __init__(
        self, model: nn.Module, scheme: Scheme, fleet: Fleet, resident: Updates | None = None
    ) -> None:
        self.model = model
        self.scheme = scheme
        scheme.stays = self.stays
        self.fleet = fleet
        self.kept_inside: list[str] = []
        self._fusion = Fusion()
        self._chains = Chains()
        self._weights = Weights(model)
        self._running: Running | None = None
        self._optimizers: Any = None
        self._modules: tuple[nn.Module, ...] = ()
        self._open = False
        self._private: PrivatePasses | None = None
        self._was_private = False
        self.residency: Residency | None = None
        if resident is not None:
            self.residency = _residency(scheme, fleet, resident, self._is_running)

    @property
    def profile(self) -> Profile:
        return self.fleet.profile

    @property
    def buffers(self) -> Buffers:
        """Memory for what is computed between layers."""
        return self._chains.buffers

    @property
    def leakage(self) -> LeakageRecord:
        record = self.scheme.leakage
        return private_record(record) if self._was_private else record

    @property
    def checked(self) -> bool:
        """Whether what workers return is verified."""
        return self.fleet.verifier is not None or self.scheme.checks_itself

    @property
    def losses(self) -> Sequence[Loss]:
        return tuple(self.fleet.losses)

    def __enter__(self) -> Self:
        if self._running is not None:
            raise InputError(
                "an offload session is used once", remedy="call offload() for another one"
            )
        try:
            check_model(self.model)
            with claiming(self, self.model):
                self.scheme.attach(self.fleet, self.model)
        except BaseException:
            self.fleet.close()
            raise
        self._open = True
        self._modules = tuple(self.model.modules())
        self._weights.refresh()
        self._running = Running(self.model, self._mode)
        self._optimizers = register_optimizer_step_post_hook(self._stepped)
        FastPath.off()
        if self.residency is not None:
            self.residency.begin()
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
        unclaim(self._modules)
        try:
            try:
                if self.residency is not None:
                    self.residency.end()
            finally:
                self.scheme.detach()
        finally:
            self.fleet.close()
            self._chains.close()
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

        Raises:
            InputError: a worker keeps a weight, so what was written to is an old copy of it.
        """
        if self.residency is not None:
            self.residency.check_home()
        self._weights.changed()

    def bring_home(self) -> None:
        """Bring the model's weights and the optimizer's state up to date, where workers keep them.

        Whatever looks at a weight with a function of torch does this by itself. Call it before
        looking past torch, e.g. through an array that shares a weight's memory, or from another
        thread.

        Raises:
            IntegrityError, AcceleratorError: a worker lied or was lost, and the enclave could not
                make the weight again.
        """
        if self.residency is not None:
            self.residency.all_home()

    # ------------------------------------------------------------------ the model runs

    def _mode(self) -> Interceptor:
        with self.eyes_shut():
            self._weights.refresh()
        return Interceptor(self, None if self._private is None else self._is_running)

    def _is_running(self) -> bool:
        return self._running is not None and self._running.active

    def eyes_shut(self) -> AbstractContextManager[None]:
        """While operands are handled: nobody looks at a weight that a worker keeps."""
        return nullcontext() if self.residency is None else self.residency.eyes_shut()

    def private_passes(self) -> PrivatePasses:
        """For who clips examples one by one, of what this session computes.

        Raises:
            InputError: the session's scheme or settings do not allow it.
        """
        return PrivatePasses(self)

    @contextmanager
    def steps_apart(self, passes: PrivatePasses) -> Iterator[None]:
        """For :class:`~cenacle.offload.private.PrivatePasses`: the model runs within."""
        self.check_open()
        assert self._running is not None
        self._private, self._was_private = passes, True
        try:
            with self._running.enclosing():
                yield
        finally:
            self._private = None

    def staying(self) -> AbstractContextManager[None]:
        """Within, the model runs in the enclave alone."""
        self.check_open()
        assert self._running is not None
        return self._running.unwatched()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """Fused optimizers write weights without counting a new version of them."""
        for group in optimizer.param_groups:
            if group.get("fused"):
                self._weights.changed(p for p in group["params"] if p.grad is not None)

    # ------------------------------------------------------------------ the engine

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return self._weights.find(tensor) is not None

    def hinders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Copies of a weight, one for each example, lie in one memory, but are not one weight."""
        if self._private is None:
            return None
        for tensor in tensors((args, kwargs)):
            if tensor.requires_grad and self.is_weight(tensor):
                return "a parameter for each example"
        return None

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
            private = self._private is not None
            trains = (torch.is_grad_enabled() and w.requires_grad) or (private and weight.learns)
            stays = self.residency is not None and self.residency.takes(w)
            site = Site(
                weight.name, map_, role, True, weight.key, w if stays else None, trains=trains,
                learns=weight.learns, private=private,
            )  # fmt: skip
        elif isinstance(map_, MatrixProduct):
            trains = torch.is_grad_enabled()
            site = Site(self._running.next_product(), map_, role, False, (0, 0), trains=trains)
        else:  # a weight that was computed, e.g. by a parametrization
            site = Site(self._running.path or "model", map_, role, False, (0, 0))
        if self._private is not None:
            return self._apart(site, x, w, bias)
        plan = NOTHING
        fuses = self.scheme.fuses_relu and isinstance(map_, Convolution)
        if fuses:
            plan = self._fusion.plan(site.name)
            if not self.scheme.fuses_pool:
                plan = plan._replace(pool=False)
        if plan.relu and isinstance(map_, Convolution):
            return self._fused(Use(self, site, x, w, bias), plan, map_.space(x.shape, w.shape))
        chains = self.scheme.fuses_norm and isinstance(map_, Convolution)
        if chains and isinstance(map_, Convolution):
            follows = self._chains.plan(site.name)
            if follows.norm:
                shape = (x.shape[0], w.shape[0], *map_.space(x.shape, w.shape))
                use = Use(self, site, x, w, bias)
                return self._chains.begin(use, follows, shape, x.dtype)
        found: torch.Tensor = Offloaded.apply(self, site, State(), x, w, bias)  # type: ignore[no-untyped-call]
        if fuses:
            self._fusion.made(site.name, found)
        if chains:
            self._chains.made(site.name, found)
        return found

    def _apart(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Nothing is fused: the gradient of each layer's own output is looked at."""
        assert self._private is not None
        state = State()
        found: torch.Tensor = Offloaded.apply(self, site, state, x, w, bias)  # type: ignore[no-untyped-call]
        if not isinstance(site.map, MatrixProduct):
            self._private.waiting.append(Waiting(self, site, state.saved, x, w))
        return found

    def _fused(self, use: Use, plan: Plan, space: Sequence[int]) -> torch.Tensor:
        """The output of a layer and, put aside, the result of what follows it."""
        if plan.pool and (len(space) != 2 or any(size % 2 for size in space)):
            plan = plan._replace(pool=False)
        width = space[-1] if plan.pool else None
        with self.profile.span(use.site, "forward"), torch.no_grad():
            value, gate, saved = self.scheme.forward_fused(use.place, use.x, use.w, use.bias, width)
        shape = torch.Size((use.x.shape[0], use.w.shape[0], *space))
        state = State(saved, hollow(shape, value.dtype))
        found = use.node(state)
        self._fusion.given(use, plan, state, found, value, gate)
        return found

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        if looks_only(func):
            return None
        with self.eyes_shut():
            found = self._fusion.sees(func, args, kwargs)
            if found is None:
                found = self._chains.sees(func, args, kwargs)
            if found is None and self.scheme.fuses_norm:
                found = max_pool(func, args, kwargs, self.buffers)
            return found

    def settle(self) -> None:
        self._fusion.settle()
        self._chains.settle()


def offload(
    model: nn.Module,
    scheme: str | Scheme,
    accelerators: Sequence[Accelerator],
    *,
    timeout: float = 120.0,
    transcript: Path | Transcript | None = None,
    check: bool | Verifier | None = None,
    resident: Optimizer | Updates | None = None,
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
        resident: the model's optimizer. Weights that have more numbers than go through their
            layer stay with workers, which carry out its steps for them; ``p.grad`` of these
            cannot be looked at. SGD, or without checks Adam and AdamW.

    Raises:
        InputError: no such scheme or option, accelerators with equal names, or an optimizer
            that workers cannot carry out or be checked in.
        RefusedError: the scheme must not be used for this model.
    """
    record = Transcript(transcript) if isinstance(transcript, Path) else transcript
    made = make_scheme(scheme, **options) if isinstance(scheme, str) else scheme
    if check is None:
        check = made.verified
    verifier = check if isinstance(check, Verifier) else Verifier() if check else None
    fleet = Fleet(accelerators, timeout=timeout, verifier=verifier, transcript=record)
    updates = TorchUpdates(resident) if isinstance(resident, Optimizer) else resident
    return Offload(model, made, fleet, updates)


def _residency(
    scheme: Scheme, fleet: Fleet, updates: Updates, running: Callable[[], bool]
) -> Residency:
    if not scheme.resident:
        raise InputError(
            "this scheme does not keep weights with workers",
            found=scheme.name,
            expected="permuted",
            remedy="leave out resident=",
        )
    if fleet.verifier is not None and not updates.linear:
        raise InputError(
            "this optimizer's steps cannot be checked where workers carry them out",
            found="an optimizer that is not linear in the gradient, such as Adam",
            expected="SGD, with momentum and weight decay as you like",
            remedy="leave out resident=, or give check=False if workers are trusted with it",
        )
    keeper: Keeper = cast("Keeper", scheme)
    keeper.may_keep()
    return Residency(keeper, updates, running)
