"""The fewest bytes that an enclave has to move for one step, counted from the model's shapes.

Counted once for each use of a layer, in bytes of what is read plus bytes of what is written:

* ``measured``, ``permuted``: an input, an output, and each gradient that is needed (of the
  output, the input, the weight) is read once and written once; the weight too where it changes
  between steps (training).
* ``lowrank``: as these, and the input is read once more, because its low-rank part has to be
  known before the first element of the residual can be written.
* ``masked``: input, mask and masked input; result, correction and output: three times each.
* A layer that a scheme keeps inside: its operands are read once and its results written once.
* Modules between them (activations, normalisation, pooling): input read and output written, and
  the same for their gradients. What a model does in plain functions (a residual's addition,
  attention's softmax) is not seen and not counted, so the bound is a lower one.
* The optimizer (SGD with momentum): weight, gradient and momentum read, weight and momentum
  written.

Caches, the algebra itself (``lowrank``'s own part is not bound by memory) and integrity checks
are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from cenacle.offload.schemes.base import Gradients, Needs, Site
from cenacle.offload.schemes.enclave import Enclave

__all__ = ["Traffic", "bandwidth"]

_PASSES: Final[dict[str, dict[str, int]]] = {
    "measured": {"x": 2, "y": 2},
    "permuted": {"x": 2, "y": 2},
    "lowrank": {"x": 3, "y": 2},
    "masked": {"x": 3, "y": 3},
}


@dataclass
class _Use:
    site: str
    x: int
    w: int
    y: int
    gradients: int = 0


class Traffic(Enclave):
    """The scheme ``enclave``, counting what passes through each layer in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[_Use] = []
        self.between = 0

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        y, _ = super().forward(site, x, w, bias)
        self.uses.append(use := _Use(site.name, x.nbytes, w.nbytes, y.nbytes))
        return y, use

    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        found = super().backward(site, None, gy, x, w, needs)
        saved.gradients = gy.nbytes + sum(g.nbytes for g in found[:2] if g is not None)
        return found

    def watch(self, model: nn.Module, *, train: bool) -> list[Any]:
        """Count modules between layers too; returns hooks to be removed."""

        def count(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], torch.Tensor):
                return
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                passes = 2 if train and output.requires_grad else 1
                self.between += passes * (args[0].nbytes + output.nbytes)

        return [
            module.register_forward_hook(count)
            for module in model.modules()
            if not any(True for _ in module.children())
            and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Flatten | nn.Identity)
            and not (isinstance(module, nn.Dropout) and (module.p == 0 or not train))
        ]

    def fewest(self, scheme: str, sent: Callable[[str], bool], parameters: int) -> int:
        """Bytes per step.

        Args:
            scheme: its name.
            sent: whether it sends a layer's operands to workers.
            parameters: bytes of the parameters that an optimizer updates; 0 for inference.
        """
        passes = _PASSES[scheme]
        total = self.between + 5 * parameters
        for use in self.uses:
            if sent(use.site):
                total += passes["x"] * use.x + passes["y"] * use.y + 2 * use.gradients
                total += 2 * use.w if parameters else 0
            else:
                total += use.x + use.w + use.y + 2 * use.gradients
        return total


def bandwidth(size: int = 256 << 20, rounds: int = 5) -> float:
    """Bytes that one thread reads and writes per processor second when it copies memory."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source).zero_()
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        target.copy_(source)
        best = min(best, time.process_time() - begin)
    return 2 * source.nbytes / best
