"""Which models are in which open session: each in one at most."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from cenacle.errors import InputError

if TYPE_CHECKING:
    from cenacle.offload.session import Offload

__all__ = ["check_model", "claiming", "session_of", "unclaim"]

_LOCK: Final = threading.Lock()
_CLAIMED: Final[weakref.WeakKeyDictionary[nn.Module, weakref.ref[Offload]]] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def claiming(session: Offload, model: nn.Module) -> Iterator[None]:
    """The model and its parts are the session's, unless the block fails.

    Raises:
        InputError: a part of it is in a session already.
    """
    with _LOCK:
        if any(module in _CLAIMED for module in model.modules()):
            raise InputError(
                "the model is in an offload session already",
                remedy="end that session first, or offload another copy of the model",
            )
        yield
        _CLAIMED.update(dict.fromkeys(model.modules(), weakref.ref(session)))


def unclaim(modules: Iterable[nn.Module]) -> None:
    """They are in no session any more."""
    with _LOCK:
        for module in modules:
            _CLAIMED.pop(module, None)


def session_of(model: nn.Module) -> Offload | None:
    """The open session that a model, or a part of it, is in.

    Raises:
        InputError: its parts are in several.
    """
    with _LOCK:
        references = {_CLAIMED[module] for module in model.modules() if module in _CLAIMED}
    found = [session for session in (reference() for reference in references) if session]
    if len(found) > 1:
        raise InputError(
            "parts of a model are in several offload sessions",
            found=f"{len(found)} sessions",
            remedy="offload the whole model in one",
        )
    return found[0] if found else None


def check_model(model: nn.Module) -> None:
    """Raise :class:`InputError` if a model cannot be offloaded."""
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
