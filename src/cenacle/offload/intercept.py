"""Finding a model's linear algebra while it runs, whoever wrote the model.

While the model's ``forward`` runs, a ``TorchFunctionMode`` sees every torch function that it
calls. Dense layers, convolutions and attention's products are handed to the engine; all else
runs as it is. So no module is replaced, and nothing depends on how a model is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct

__all__ = ["Engine", "Interceptor"]


class Engine(Protocol):
    """Who computes a map; differentiable."""

    def apply(
        self,
        map_: LinearMap,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        parameter: torch.Tensor | None,
    ) -> torch.Tensor:
        """B(x, w) + bias. ``parameter``: the weight that ``w`` is a form of, if it is one."""
        ...

    def is_weight(self, tensor: torch.Tensor) -> bool: ...

    def stays(self, function: str) -> None:
        """A linear operation that is not offloaded runs in the enclave."""
        ...


def _linear(
    engine: Engine, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = engine.apply(Dense(), rows, w, bias, w if engine.is_weight(w) else None)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _addmm(
    engine: Engine,
    bias: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor | None:
    """GPT-2's dense layers: the weight is (in, out)."""
    if not engine.is_weight(w) or bias.dim() != 1 or (beta, alpha) != (1, 1):
        return None
    return engine.apply(Dense(), x, w.t(), bias, w)


def _matmul(engine: Engine, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    if w.dim() == 2 and x.dim() >= 2:
        rows = x.reshape(-1, x.shape[-1])
        y = engine.apply(Dense(), rows, w.t(), None, w if engine.is_weight(w) else None)
        return y.reshape(*x.shape[:-1], w.shape[1])
    if x.dim() == w.dim() >= 3 and x.shape[:-2] == w.shape[:-2]:
        flat = (x.reshape(-1, *x.shape[-2:]), w.reshape(-1, *w.shape[-2:]))
        y = engine.apply(MatrixProduct(), *flat, None, None)
        return y.reshape(*x.shape[:-1], w.shape[-1])
    return None


def _bmm(engine: Engine, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return engine.apply(MatrixProduct(), x, w, None, None)


def _baddbmm(
    engine: Engine,
    bias: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    return beta * bias + alpha * _bmm(engine, x, w)


def _padding(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """As numbers; None for ``same`` with an uneven sum, which pads more on one side."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    assert not isinstance(padding, str)
    return _each(padding, len(kernel))


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    listed = (value,) if isinstance(value, int) else tuple(value)
    return listed * count if len(listed) == 1 else listed


def _convolution(
    engine: Engine,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    dims = w.dim() - 2
    spread = _each(dilation, dims)
    pads = _padding(padding, w.shape[2:], spread)
    if pads is None:
        return None
    map_ = Convolution(_each(stride, dims), pads, spread, groups)
    batch = x if x.dim() == w.dim() else x.unsqueeze(0)
    y = engine.apply(map_, batch, w, bias, w if engine.is_weight(w) else None)
    return y if x.dim() == w.dim() else y.squeeze(0)


def _attention(
    engine: Engine,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """softmax(Q K^T scale + mask) V with both products outside, the softmax inside."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    lead = query.shape[:-2]
    if key.shape[:-2] != lead or value.shape[:-2] != lead:
        return None
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = _matmul(engine, query * factor, key.mT) if query.dim() > 2 else None
    if scores is None:
        return None
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = functional.dropout(scores.softmax(-1), dropout_p)
    return _matmul(engine, weights, value)


_HANDLERS: Final[Mapping[Any, Callable[..., torch.Tensor | None]]] = {
    functional.linear: _linear,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.bmm: _bmm,
    torch.Tensor.bmm: _bmm,
    torch.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    functional.scaled_dot_product_attention: _attention,
}
_STAYS: Final[Mapping[Any, str]] = {
    functional.conv3d: "conv3d",
    functional.conv_transpose1d: "conv_transpose1d",
    functional.conv_transpose2d: "conv_transpose2d",
    functional.conv_transpose3d: "conv_transpose3d",
    functional.bilinear: "bilinear",
    functional.multi_head_attention_forward: "multi_head_attention_forward",
    torch.einsum: "einsum",
    torch.addmm: "addmm",
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
    torch._transformer_encoder_layer_fwd: "transformer_encoder_layer (fast path)",
    torch._native_multi_head_attention: "multi_head_attention (fast path)",
}


class Interceptor(TorchFunctionMode):
    """Active while a model's ``forward`` runs."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and _floats(args):
            found = handler(self._engine, *args, **_renamed(kwargs))
            if found is not None:
                return found
            self._engine.stays(func.__name__)
        elif func in _STAYS:
            self._engine.stays(_STAYS[func])
        return func(*args, **kwargs)


def _floats(args: tuple[Any, ...]) -> bool:
    return all(
        a.dtype in {torch.float32, torch.float64} for a in args if isinstance(a, torch.Tensor)
    )


_NAMES: Final = {"input": "x", "weight": "w", "mat2": "w", "other": "w"}


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(name, name): value for name, value in kwargs.items() if name != "out"}
