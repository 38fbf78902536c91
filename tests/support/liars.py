"""Accelerators that answer falsely, and gradients to compare what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Operation

__all__ = ["LIES", "Lie", "Lying", "gradients"]

Lie = Callable[[torch.Tensor], object]
"""Changes a result in place."""


class Lying(InlineAccelerator):
    """Changes the results of one kind of operation, once it was asked for ``after`` of them."""

    def __init__(self, name: str, lie: Lie, about: Callable[[Operation], bool]) -> None:
        super().__init__(name)
        self._lie, self._about = lie, about
        self.after = 10**9

    def call(self, operation: Operation, result: int, operands: Any) -> None:
        super().call(operation, result, operands)
        if self._about(operation):
            self.after -= 1
            if self.after < 0:
                value = self._kept[result].clone()
                self._lie(value)
                self._kept[result] = value


def _one_element(value: torch.Tensor) -> None:
    place = int(torch.randint(0, value.numel(), (1,)))
    value.view(-1)[place] += 3 * value.abs().max()


LIES: Final[Mapping[str, Lie]] = {
    "element": _one_element,
    "nan": lambda value: value.view(-1)[3:4].fill_(torch.nan),
    "zeros": lambda value: value.zero_(),
    "scaled": lambda value: value.mul_(1.02),
}


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output for ``x``, and of some loss of it the gradients of all parameters."""
    net.zero_grad()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
