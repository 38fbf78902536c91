"""A ReLU in the same pass as the layer before it.

The enclave's part of a step is bound by memory: a ReLU of its own reads and writes every
activation once more, and its gradient too. Where the model applies an in-place ReLU to a
layer's output and nothing else sees that output before, a scheme can apply it while it
unblinds, and its gradient while it blinds.

Nothing is assumed of the model. The first forward pass shows which layers are followed by such
a ReLU; from the second on it is applied early there, and the model's own call finds it done.
Should the model use the output in another way this time, the layer is computed again without
it before anybody sees a number, and is not fused any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

__all__ = ["Fusion", "State"]


@dataclass
class State:
    """What the autograd node of a layer remembers; shared with :class:`Fusion`.

    Attributes:
        saved: the scheme's own.
        relu: whether the output has its ReLU applied; its gradient is due in the backward pass.
        output: then, outside the graph (it would keep itself alive), and its version.
    """

    saved: Any
    relu: bool = False
    output: torch.Tensor | None = None
    version: int = 0

    def keep(self, output: torch.Tensor) -> None:
        """Remember the output that a ReLU was applied to."""
        if not output.is_inference():  # those have no version, and no gradient
            self.output, self.version = output.detach(), output._version

    def kept(self) -> torch.Tensor:
        """The output; raises torch's own kind of error if it was changed since."""
        if self.output is None or self.output._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: the output of a ReLU"
            )
        return self.output


@dataclass
class _Made:
    """An output that no function has seen yet."""

    output: weakref.ref[torch.Tensor]
    site: str
    state: State
    again: Callable[[], tuple[torch.Tensor, Any]]


_IN_PLACE: Final = (torch.relu_, torch.Tensor.relu_)
_PLAIN: Final = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "__len__"}
)
"""Functions that look at no element."""
_ATTRIBUTES: Final = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn"}
)


class Fusion:
    """Decides for each layer whether a ReLU follows. One serves one session."""

    def __init__(self) -> None:
        self._follows: dict[str, bool] = {}
        self._made: dict[int, _Made] = {}

    def expects(self, site: str) -> bool:
        """Whether to apply a ReLU to the layer's output."""
        return self._follows.get(site, False)

    def made(
        self,
        site: str,
        output: torch.Tensor,
        state: State,
        again: Callable[[], tuple[torch.Tensor, Any]],
    ) -> None:
        """A layer's output exists. ``again`` computes it without a ReLU."""
        self._made[id(output)] = _Made(weakref.ref(output), site, state, again)

    def sees(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The model calls a function. The result, if it is a ReLU that is done already."""
        if not self._made or _looks_only(func):
            return None
        relu = _in_place_relu(func, args, kwargs)
        for tensor in _tensors((args, tuple(kwargs.values()))):
            made = self._made.pop(id(tensor), None)
            if made is None or made.output() is not tensor:
                continue
            if tensor is relu:
                if made.state.relu:
                    return tensor
                self._follows.setdefault(made.site, True)
            else:
                self._refute(made)
        return None

    def settle(self) -> None:
        """The model has run: what nobody has put a ReLU on must not have one."""
        for made in list(self._made.values()):
            self._refute(made)
        self._made.clear()

    def _refute(self, made: _Made) -> None:
        self._follows[made.site] = False
        output = made.output()
        if made.state.relu and output is not None:
            right, made.state.saved = made.again()
            made.state.relu, made.state.output = False, None
            # Past the version counter: for autograd this is the value that it always had.
            output.data.copy_(right)


def _looks_only(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _ATTRIBUTES
    return name in _PLAIN


def _in_place_relu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that an in-place ReLU is asked of."""
    if func in _IN_PLACE:
        found: torch.Tensor | None = args[0] if args else kwargs.get("input")
        return found
    if func is functional.relu:
        inplace = args[1] if len(args) > 1 else kwargs.get("inplace", False)
        if inplace:
            return args[0] if args else kwargs.get("input")
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
