"""Finding a model's linear algebra while it runs, whoever wrote the model.

While one of the model's modules runs, a ``TorchFunctionMode`` sees every torch function that
it calls. Dense layers, convolutions and attention's products are handed to the engine; all
else runs as it is. So no module is replaced, and nothing depends on how a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cenacle.errors import InputError
from cenacle.offload.attention import multi_head_attention, scaled_dot_product_attention
from cenacle.offload.calls import tensors
from cenacle.offload.maps import Convolution
from cenacle.offload.products import (
    Engine,
    addmm,
    baddbmm,
    bmm,
    einsum,
    linear,
    matmul,
    rmatmul,
)

__all__ = ["Engine", "Interceptor"]


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
    """x (batch, in, *space) or one sample, w (out, in / groups, *kernel)."""
    dims = w.dim() - 2
    steps, spread = _each(stride, dims), _each(dilation, dims)
    batch = x if x.dim() == w.dim() else x.unsqueeze(0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        if set(steps) != {1}:
            return None
        total = [d * (k - 1) for d, k in zip(spread, w.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # torch pads the odd one at the end
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            batch, total = functional.pad(batch, sides), [0] * dims
        padding = [t // 2 for t in total]
    if isinstance(padding, str) or not _fits(batch, w, bias, groups):
        return None
    map_ = Convolution(steps, _each(padding, dims), spread, groups)
    if len(map_.stride) != dims or len(map_.padding) != dims or len(map_.dilation) != dims:
        return None
    if min(map_.space(batch.shape, w.shape)) < 1:
        return None
    y = engine.apply(map_, batch, w, bias)
    return y if x.dim() == w.dim() else y.squeeze(0)


def _raw_convolution(
    engine: Engine,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> torch.Tensor | None:
    """What all convolutions of torch become."""
    if transposed or any(output_padding) or not 3 <= w.dim() <= 4 or x.dim() != w.dim():
        return None
    return _convolution(engine, x, w, bias, stride, padding, dilation, groups)


def _fits(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, groups: int) -> bool:
    """Whether torch would compute it: a mistake is to raise torch's own error, unsent."""
    return (
        x.dim() == w.dim()
        and groups > 0
        and x.shape[1] == w.shape[1] * groups
        and w.shape[0] % groups == 0
        and (bias is None or bias.shape == w.shape[:1])
    )


_HANDLERS: Final[Mapping[Any, Callable[..., torch.Tensor | None]]] = {
    functional.linear: linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.convolution: _raw_convolution,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.Tensor.__rmatmul__: rmatmul,
    torch.linalg.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.mv: matmul,
    torch.Tensor.mv: matmul,
    torch.bmm: bmm,
    torch.Tensor.bmm: bmm,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.baddbmm: baddbmm,
    torch.Tensor.baddbmm: baddbmm,
    torch.einsum: einsum,
    functional.scaled_dot_product_attention: scaled_dot_product_attention,
}
_STAYS: Final[Mapping[Any, str]] = {
    getattr(module, name): name
    for module, names in (
        (torch, "conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc bilinear"),
        (torch, "inner tensordot addmv addbmm addr chain_matmul cdist"),
        (torch, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
        (torch, "_transformer_encoder_layer_fwd _native_multi_head_attention"),
        (torch.linalg, "multi_dot"),
        (torch.Tensor, "inner addmv addbmm addr addmm_ baddbmm_ addmv_ addbmm_ addr_"),
    )
    for name in names.split()
    if hasattr(module, name)
}
_NAMES: Final = {"input": "x", "weight": "w", "mat2": "w", "other": "w", "vec": "w"}
_SUMMAND_NAMES: Final = {
    "input": "bias", "mat1": "x", "mat2": "w", "batch1": "x", "batch2": "w",
}  # fmt: skip
_SUMMANDS: Final = (addmm, baddbmm)


class Interceptor(TorchFunctionMode):
    """Active while modules of a model run.

    Args:
        within: says whether one does, where the mode is on for longer than that.
    """

    def __init__(self, engine: Engine, within: Callable[[], bool] | None = None) -> None:
        super().__init__()
        self._engine = engine
        self._within = within

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._within is not None and not self._within():
            return func(*args, **kwargs)
        done = self._engine.sees(func, args, kwargs)
        if done is not None:
            return done
        handler = _HANDLERS.get(func)
        if handler is not None:
            found = self._offloaded(func, handler, args, kwargs)
            if found is not None:
                return found
        elif func in _STAYS:
            self._engine.stays(_STAYS[func])
        elif func is functional.multi_head_attention_forward:
            if multi_head_attention is None:
                self._engine.stays(func.__name__)
            else:
                with self:
                    return multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._engine.settle()

    def _offloaded(
        self,
        func: Any,
        handler: Callable[..., torch.Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        reason = "an argument out" if kwargs.get("out") is not None else _obstacle(args, kwargs)
        if reason is None:
            reason = self._engine.hinders(args, kwargs)
        if reason is None:
            names = _SUMMAND_NAMES if handler in _SUMMANDS else _NAMES
            named = {names.get(name, name): v for name, v in kwargs.items() if name != "out"}
            # What follows is the engine's own: it need not be seen, which costs more than it does.
            with self._engine.eyes_shut(), torch._C.DisableTorchFunction():
                found = handler(self._engine, *args, **named)
            if found is not None:
                return found
            reason = "these operands"
        if reason:
            self._engine.stays(f"{func.__name__} with {reason}")
        return None


def _obstacle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why operands cannot be offloaded; empty if that is not worth a notice.

    Raises:
        InputError: a tensor is not in the enclave's memory.
    """
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    found: set[torch.dtype] = set()
    for tensor in tensors((args, tuple(kwargs.values()))):
        if tensor.device.type != "cpu":
            raise InputError(
                "a model that is offloaded computes on another device",
                found=str(tensor.device),
                expected="cpu, which is the enclave's own memory",
                remedy="keep model and data on the CPU; give devices to offload() as accelerators",
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "a transform of torch.func"
        if tensor.layout is not torch.strided:
            return f"layout {tensor.layout}"
        if tensor.numel() == 0:
            return ""
        if tensor.dtype != torch.bool:  # a mask
            found.add(tensor.dtype)
    odd = found - {torch.float32, torch.float64}
    if odd:
        return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in odd))
    return None if len(found) == 1 else "mixed dtypes"
