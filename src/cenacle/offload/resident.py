"""Weights that stay with workers: what the model, its optimizer and the user see of it.

Where a scheme keeps a weight at a worker, three things differ from an ordinary loop, and none
of them is to give anybody a wrong number:

* The gradient is never in the enclave. ``p.grad`` is a :class:`RemoteGradient`: it can be added
  to another one and dropped, and anything else is refused.
* The optimizer's step is carried out where the weight is, with the optimizer's own settings.
* The enclave's copy of the weight is old. Whoever looks at it, with any function of torch, in
  the thread of the session, makes it come home first: ``state_dict``, a copy, a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, Self

import torch
from torch.overrides import TorchFunctionMode

from cenacle.errors import InputError
from cenacle.offload.calls import tensors
from cenacle.offload.fleet import Remote
from cenacle.offload.updates import Rule

__all__ = ["Keeper", "RemoteGradient", "Residency", "Updates"]

Tensors = dict[str, torch.Tensor]


class Keeper(Protocol):
    """A scheme that keeps weights at workers."""

    def may_keep(self) -> None:
        """Raises :class:`InputError` if it cannot with the options it has."""
        ...

    def update(self, parameter: torch.Tensor, g: Remote | None, rule: Rule, state: Tensors) -> None:
        """One step of the optimizer, at the worker.

        ``g``: the gradient, or zero. ``state``: the optimizer's in the enclave.
        """
        ...

    def is_away(self, parameter: torch.Tensor) -> bool:
        """Whether the enclave's copy of the weight is old."""
        ...

    def home(self, parameter: torch.Tensor) -> Tensors:
        """Bring the weight up to date; returns the optimizer's state for it."""
        ...


class Updates(Protocol):
    """An optimizer whose steps workers carry out.

    Attributes:
        linear: whether steps are linear in weight and gradient, so that they can be checked.
    """

    @property
    def linear(self) -> bool: ...

    def parameters(self) -> Sequence[torch.Tensor]:
        """What it trains."""
        ...

    def rule(self, parameter: torch.Tensor) -> Rule:
        """How the parameter is to be updated in this step, which is counted.

        Raises:
            InputError: in a way that workers do not know.
        """
        ...

    def take(self, parameter: torch.Tensor) -> Tensors:
        """The state of a parameter; the optimizer has none afterwards."""
        ...

    def give(self, parameter: torch.Tensor, state: Tensors) -> None:
        """Put it back."""
        ...

    def watch(
        self, before: Callable[[], None], after: Callable[[], None], home: Callable[[], None]
    ) -> None:
        """Call back around each step, and ``home`` before anybody saves or loads the state."""
        ...

    def ignore(self) -> None:
        """Call back no more."""
        ...


_ATEN: Final = torch.ops.aten


class RemoteGradient(torch.Tensor):
    """Stands for a gradient that a worker keeps; has its shape and none of its numbers.

    Attributes:
        remote: the gradient; ``None``: zero.
        weight_name: for errors.
    """

    remote: Remote | None
    weight_name: str
    add_up: Callable[[Remote, Remote], Remote]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Self],
        like: torch.Tensor,
        remote: Remote | None,
        name: str,
        add_up: Callable[[Remote, Remote], Remote],
    ) -> RemoteGradient:
        made: RemoteGradient = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, strides=like.stride()
        )
        made.remote, made.weight_name, made.add_up = remote, name, add_up
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RemoteGradient({self.weight_name}, shape={tuple(self.shape)})"

    def _another(self, remote: Remote | None) -> RemoteGradient:
        return RemoteGradient(self, remote, self.weight_name, self.add_up)

    def _plus(self, other: RemoteGradient) -> Remote | None:
        if self.remote is None or other.remote is None:
            return self.remote or other.remote
        return self.add_up(self.remote, other.remote)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        mine = next(one for one in args if isinstance(one, cls)) if args else None
        if mine is not None and args[0] is mine:
            if func in _SAME:
                return mine._another(mine.remote)
            if func in _EMPTY:
                return mine._another(None)
            other = args[1] if len(args) > 1 else None
            if isinstance(other, cls) and (kwargs or {}).get("alpha", 1) == 1:
                if func is _ATEN.add.Tensor:
                    return mine._another(mine._plus(other))
                if func is _ATEN.add_.Tensor:
                    mine.remote = mine._plus(other)
                    return mine
                if func is _ATEN.copy_.default:
                    mine.remote = other.remote
                    return mine
            if func is _ATEN.zero_.default:
                mine.remote = None
                return mine
        name = mine.weight_name if mine is not None else "a weight"
        raise InputError(
            f"the gradient of {name} is kept by a worker and cannot be used in the enclave",
            found=str(func),
            expected="nothing but optimizer.step(), zero_grad() and accumulation",
            remedy="offload without resident=, or do without gradient clipping and scaling",
        )


_SAME: Final = frozenset({_ATEN.detach.default, _ATEN.clone.default, _ATEN.alias.default})
_EMPTY: Final = frozenset({_ATEN.new_empty_strided.default, _ATEN.zeros_like.default})

_BLIND: Final = frozenset(
    {
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn"),
        *("grad", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous"),
        *("__len__", "__hash__", "is_floating_point", "is_complex", "element_size", "type"),
        *("is_sparse", "is_cuda", "is_meta", "is_quantized", "_version", "retains_grad"),
        *("is_inference", "is_pinned", "has_names", "names", "__repr__", "_backward_hooks"),
        *("_post_accumulate_grad_hooks", "register_hook", "is_mkldnn", "is_cpu", "itemsize"),
        *("requires_grad_", "register_post_accumulate_grad_hook"),
    }
) - {"__repr__"}
"""What looks at no number."""


class Residency(TorchFunctionMode):
    """Watches over the weights that workers keep. One serves one session.

    Args:
        keeper: the scheme.
        updates: the optimizer.
        running: whether a module of the model is running, in this thread.
    """

    def __init__(self, keeper: Keeper, updates: Updates, running: Callable[[], bool]) -> None:
        super().__init__()
        self._keeper = keeper
        self._updates = updates
        self._running = running
        self._own = 0
        self._addresses: dict[int, torch.Tensor] = {}
        self._aside: list[tuple[torch.Tensor, RemoteGradient]] = []
        self._unfit: set[int] = set()
        for parameter in updates.parameters():
            if parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous():
                address = parameter.untyped_storage().data_ptr()
                if address in self._addresses:  # two parameters in one memory
                    self._unfit |= {id(parameter), id(self._addresses[address])}
                self._addresses[address] = parameter

    # ------------------------------------------------------------------ the session's side

    def begin(self) -> None:
        """Watch the optimizer, and every function that this thread calls."""
        self._updates.watch(self._before_step, self._after_step, self.all_home)
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Bring everything home. Raises what the keeper raises, when all is tried."""
        self._updates.ignore()
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.all_home()

    def all_home(self) -> None:
        """Bring every weight up to date. Tries all before it raises what one of them raised."""
        failed: Exception | None = None
        with self.eyes_shut():
            for parameter in self._addresses.values():
                try:
                    self._bring(parameter)
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed

    def check_home(self) -> None:
        """Raises :class:`InputError` if a weight is away."""
        away = sum(self._keeper.is_away(parameter) for parameter in self._addresses.values())
        if away:
            raise InputError(
                "weights were written past torch while workers kept them",
                found=f"{away} old copies in the enclave",
                remedy="call bring_home() of the session before you write",
            )

    def takes(self, w: torch.Tensor) -> bool:
        """Whether a weight may stay with a worker."""
        found = self._addresses.get(w.untyped_storage().data_ptr())
        return found is w and id(w) not in self._unfit

    @contextmanager
    def eyes_shut(self) -> Iterator[None]:
        """Within it nothing comes home: the session itself knows how old its copies are."""
        self._own += 1
        try:
            yield
        finally:
            self._own -= 1

    # ------------------------------------------------------------------ who looks at a weight

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not self._own and _name(func) not in _BLIND:
            for tensor in tensors((args, kwargs)):
                self._seen(tensor)
        return func(*args, **(kwargs or {}))

    def _seen(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided or isinstance(tensor, RemoteGradient):
            return
        parameter = self._addresses.get(tensor.untyped_storage().data_ptr())
        if parameter is None:
            return
        with self.eyes_shut():
            self._bring(parameter)
        if self._running() and torch.is_grad_enabled():
            # Its gradient will have a part that is the enclave's.
            self._unfit.add(id(parameter))

    def _bring(self, parameter: torch.Tensor) -> None:
        if self._keeper.is_away(parameter):
            self._updates.give(parameter, self._keeper.home(parameter))

    # ------------------------------------------------------------------ the optimizer

    def _before_step(self) -> None:
        with self.eyes_shut():
            for parameter in self._addresses.values():
                g = parameter.grad
                if isinstance(g, RemoteGradient):
                    self._step(parameter, g)
                elif g is not None:
                    self._bring(parameter)

    def _step(self, parameter: torch.Tensor, g: RemoteGradient) -> None:
        rule = self._updates.rule(parameter)
        state = {} if self._keeper.is_away(parameter) else self._updates.take(parameter)
        try:
            self._keeper.update(parameter, g.remote, rule, state)
        except BaseException:
            if not self._keeper.is_away(parameter):
                self._updates.give(parameter, state)
            raise
        self._aside.append((parameter, g))
        parameter.grad = None

    def _after_step(self) -> None:
        with self.eyes_shut():
            for parameter, g in self._aside:
                parameter.grad = g
            self._aside.clear()


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name)
