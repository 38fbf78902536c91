"""Tables of rows: ``embedding``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.gradients import EmbeddingUse
from cenacle.training.privacy.refusals import ReplaceOperationError
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import rules

__all__ = ["embedding"]


@rules(functional.embedding)
def embedding(
    tape: Tape,
    func: Any,  # noqa: ARG001
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001 - the gradient is released dense
) -> Tensor:
    """``torch.nn.functional.embedding``; gradients of one example's equal ids add."""
    target = tape.target(weight)
    if target is None:
        return functional.embedding(input, weight, padding_idx)
    if max_norm is not None or scale_grad_by_freq:
        raise ReplaceOperationError(
            f"the embedding '{target.name}' depends on which other rows the batch uses",
            found=f"max_norm={max_norm}, norm_type={norm_type}, "
            f"scale_grad_by_freq={scale_grad_by_freq}",
            remedy="use max_norm=None and scale_grad_by_freq=False",
        )
    where = f"embedding '{target.name}'"
    ids = tape.split(where, input.detach()).flatten(1)
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    if torch.is_grad_enabled():
        tape.expect(target)

    def take(gradient: Tensor) -> None:
        d = gradient.reshape(tape.examples, -1, gradient.shape[-1])
        tape.use(target, lambda: EmbeddingUse(ids, d, rows, padding))

    plain = tape.plain(weight)
    return tape.run(where, [input], lambda: functional.embedding(input, plain, padding), take)
