"""Which modules of a model are running, and the mode that is active while they do.

Every module of the model has a pair of hooks, so it does not matter which of them is called:
the model, one of its parts (``model.encoder(x)``), or a block that a checkpoint runs again
during the backward pass. The outermost call turns the mode on and off, also when it fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
)

from cenacle.errors import InputError

__all__ = ["Running"]


@dataclass
class _Frame:
    """One call of a module."""

    path: str
    products: int = 0


@dataclass
class _Thread(threading.local):
    frames: list[_Frame] = field(default_factory=list)
    mode: TorchFunctionMode | None = None
    given: set[int] = field(default_factory=set)
    kept: bool = False  # the mode is on for longer than a call
    stays: bool = False  # calls are not watched


class Running:
    """Hooks on all modules of a model.

    Args:
        model: whose modules to watch.
        make_mode: called by each outermost call, for the mode to be active within it.
    """

    def __init__(self, model: nn.Module, make_mode: Callable[[], TorchFunctionMode]) -> None:
        self._make_mode = make_mode
        self._thread = _Thread()
        self._handles: list[Any] = []
        for path, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(
                    _Hook(self.begin, path), prepend=True, with_kwargs=True
                ),
                module.register_forward_hook(_Hook(self.end, path), always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off, and the mode if an interrupt left it on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._thread.frames.clear()
        self._leave()

    @property
    def path(self) -> str:
        """Of the module that is running; empty for the model itself."""
        return self._thread.frames[-1].path if self._thread.frames else ""

    @property
    def active(self) -> bool:
        """Whether a module of the model is running, in this thread."""
        return bool(self._thread.frames)

    def next_product(self) -> str:
        """A name for a product of activations: the same each time that the module runs."""
        frame = self._thread.frames[-1]
        frame.products += 1
        return f"{frame.path}.product-{frame.products}".removeprefix(".")

    def is_given(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of those that the outermost call was given."""
        return tensor.untyped_storage().data_ptr() in self._thread.given

    def begin(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = self._thread
        if not thread.frames:
            if not thread.kept:
                self._leave()
            again = torch._C._current_graph_task_id() != -1  # a checkpoint, in a backward pass
            thread.given = set() if again else set(_addresses((args, kwargs)))
            if not thread.kept and not thread.stays and not _preceded():
                thread.mode = self._make_mode()
                thread.mode.__enter__()  # type: ignore[no-untyped-call]
        thread.frames.append(_Frame(path))

    def end(self, path: str, *_: Any) -> None:
        thread = self._thread
        if thread.frames and thread.frames[-1].path == path:
            thread.frames.pop()
            if not thread.frames:
                if not thread.kept:
                    self._leave()
                thread.given = set()

    @contextmanager
    def enclosing(self) -> Iterator[None]:
        """Keep the mode on for the whole block, so that modes entered within come before it."""
        thread = self._thread
        if thread.frames or thread.kept or thread.stays:
            raise InputError("a private step cannot begin while the model runs")
        self._leave()
        mode = self._make_mode()
        thread.mode, thread.kept = mode, True
        try:
            with mode:
                yield
        finally:
            thread.mode, thread.kept = None, False
            thread.frames.clear()  # left by an error within a module
            thread.given = set()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What the model calls within the block runs as it is."""
        thread = self._thread
        if thread.frames or thread.kept:
            raise InputError("a private step cannot begin while the model runs")
        before, thread.stays = thread.stays, True
        try:
            yield
        finally:
            thread.stays = before
            thread.frames.clear()

    def _leave(self) -> None:
        thread = self._thread
        if thread.mode is not None:
            if _get_current_function_mode() is thread.mode:  # type: ignore[no-untyped-call]
                thread.mode.__exit__(None, None, None)
            thread.mode = None


def _preceded() -> bool:
    """Whether a mode is on that has to see every function first, and does not know of this one.

    What a private step of another model calls then runs as it is.
    """
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(getattr(mode, "comes_first", False) for mode in modes)


class _Hook:
    """A hook that a copy of the model does not inherit."""

    def __init__(self, call: Callable[..., None], path: str) -> None:
        self._call = call
        self._path = path

    def __call__(self, _: nn.Module, *rest: Any) -> None:
        self._call(self._path, *rest)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()


def _nothing(*_: Any) -> None:
    return None


def _no_hook() -> Callable[..., None]:
    return _nothing


def _addresses(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(
            value
        ):
            yield value.untyped_storage().data_ptr()
    elif isinstance(value, dict):
        for one in value.values():
            yield from _addresses(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _addresses(one)
