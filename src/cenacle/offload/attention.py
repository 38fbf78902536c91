"""Attention with its products outside and its softmax inside.

``F.multi_head_attention_forward`` is one Python function to a ``TorchFunctionMode``. It is run
here as torch wrote it, but without the check that hands it to a mode, so that the mode sees
what it calls: projections, products, dropout. So numbers, dropout and ``need_weights`` are
torch's own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

import torch
from torch.nn import functional

from cenacle.offload.products import Engine, matmul

__all__ = ["FastPath", "multi_head_attention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    engine: Engine,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """softmax(Q K^T scale + mask) V, as documented in torch.

    Q (..., L, E), K (..., S, E), V (..., S, Ev); leading dimensions are broadcast. A row whose
    every position is masked gives zeros, as in torch.
    """
    if min(query.dim(), key.dim(), value.dim()) < 2 or (is_causal and attn_mask is not None):
        return None
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            return None
        heads = query.shape[-3]
        if heads % key.shape[-3] or heads % value.shape[-3]:
            return None
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = matmul(engine, query * factor, key.mT)
    if scores is None or value.shape[-2] != scores.shape[-1]:
        return None
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = torch.where(attn_mask, scores, -math.inf)
        else:
            scores = scores + attn_mask
        weights = torch._safe_softmax(scores, -1)
    else:
        weights = scores.softmax(-1)
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    return matmul(engine, weights, value)


def _undispatched(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of a function of torch that never asks whether a mode wants it."""
    if "has_torch_function" not in function.__code__.co_names:
        return None
    found = FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        function.__name__,
        function.__defaults__,
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


multi_head_attention: Final = _undispatched(functional.multi_head_attention_forward)
"""``F.multi_head_attention_forward``, to be called with a mode active; None if this torch is
written in another way, and attention's fused function stays in the enclave."""


class FastPath:
    """Torch's fused inference path of attention layers, which no mode can look into.

    It is one switch for the process: off while any session runs, then as it was.
    """

    _lock: Final = threading.Lock()
    _users = 0
    _before = True

    @classmethod
    def off(cls) -> None:
        with cls._lock:
            if cls._users == 0:
                cls._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            cls._users += 1

    @classmethod
    def restore(cls) -> None:
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                torch.backends.mha.set_fastpath_enabled(cls._before)
