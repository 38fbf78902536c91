"""``torch.nn.MultiheadAttention``, written with operations that have rules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import rules

__all__ = ["multi_head_attention"]


@rules(functional.multi_head_attention_forward)
def multi_head_attention(
    tape: Tape,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the examples first; arguments are (T, B, e), as the function's own."""
    target = tape.target(out_proj_weight) or tape.target(in_proj_weight)
    unusual = add_zero_attn or any(t is not None for t in (bias_k, bias_v, static_k, static_v))
    if unusual or query.dim() != 3:
        tape.refuse(func, target)
    same = query is key and key is value
    # The layer's own transposes lost the mark of data on neither; swapping keeps it.
    with tape:
        q, k, v = (t.transpose(0, 1) for t in (query, key, value))
        if use_separate_proj_weight:
            assert q_proj_weight is not None
            assert k_proj_weight is not None
            assert v_proj_weight is not None
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
            q, k, v = (
                functional.linear(t, w, b)
                for t, w, b in zip((q, k, v), weights, biases, strict=True)
            )
        elif same:
            assert in_proj_weight is not None
            q, k, v = functional.linear(q, in_proj_weight, in_proj_bias).chunk(3, -1)
        else:
            assert in_proj_weight is not None
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            q, k, v = (
                functional.linear(t, w, b)
                for t, w, b in zip((q, k, v), in_proj_weight.chunk(3), biases, strict=True)
            )
        b, length, width = q.shape
        q, k, v = (
            t.reshape(b, -1, num_heads, width // num_heads).transpose(1, 2) for t in (q, k, v)
        )
        scores = q @ k.mT / math.sqrt(width // num_heads)
        mask = _mask(attn_mask, key_padding_mask, b, num_heads, scores.dtype)
        if is_causal and attn_mask is None:
            ahead = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        if mask is not None:
            scores = scores + mask
        attention = functional.dropout(scores.softmax(-1), dropout_p, training=training)
        mixed = (attention @ v).transpose(1, 2).reshape(b, length, width)
        out = functional.linear(mixed, out_proj_weight, out_proj_bias).transpose(0, 1)
        if not need_weights:
            return out, None
        return out, attention.mean(1) if average_attn_weights else attention


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    examples: int,
    heads: int,
    kind: torch.dtype,
) -> Tensor | None:
    """Both masks as one that is added to scores (B, heads, T, S)."""
    total = None
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        part = mask
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=kind).masked_fill(part, -math.inf)
        if mask is key_padding_mask:
            part = part[:, None, None, :]
        elif part.dim() == 3:
            part = part.view(examples, heads, *part.shape[1:])
        total = part if total is None else total + part
    return total
