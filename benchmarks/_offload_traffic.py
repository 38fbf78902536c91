"""The fewest bytes that an enclave has to move for one step, counted from the model's shapes.

Counted once for each use of a layer, in bytes of what is read plus bytes of what is written:

* ``measured``, ``permuted``: an input, an output, and each gradient that is needed (of the
  output, the input, the weight) is read once and written once; the weight too where it changes
  between steps (training).
* ``lowrank``: the same. Its low-rank directions come from a part of the positions, and are known
  before the one pass that reads the input. But it computes: :meth:`Traffic.algebra` counts that.
* ``permuted``, ``lowrank``: where a ReLU follows a convolution it happens in the pass that writes
  the output, and its gradient in the one that reads the output's gradient: the module is not
  counted, but a bit for each number, written and, where it learns, read. ``permuted``: where 2 x 2
  pooling follows that, only the pooled output is written and only its gradient is read, and
  there is a byte for each window instead.
* ``masked``: input, mask and masked input; result, correction and output: three times each.
* A layer that a scheme keeps inside: its operands are read once and its results written once.
* Modules between them (activations, normalisation, pooling): input read and output written, and
  the same for their gradients. What a model does in plain functions (a residual's addition,
  attention's softmax) is not seen and not counted, so the bound is a lower one.
* The optimizer (SGD with momentum): weight, gradient and momentum read, weight and momentum
  written.
* Of a weight that stays with a worker nothing is counted: neither it, nor its gradient, nor the
  optimizer's step.

Caches, the algebra of layers that stay inside and integrity checks are not counted.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from cenacle.offload.maps import Convolution
from cenacle.offload.schemes.base import Gradients, Needs, Site
from cenacle.offload.schemes.enclave import Enclave

__all__ = ["Traffic", "bandwidth", "peak"]

_PASSES: Final[dict[str, dict[str, int]]] = {
    "measured": {"x": 2, "y": 2},
    "permuted": {"x": 2, "y": 2},
    "lowrank": {"x": 2, "y": 2},
    "masked": {"x": 3, "y": 3},
}


_FUSES: Final = {"permuted", "lowrank"}


@dataclass
class _Use:
    site: str
    x: int
    w: int
    y: int
    gradients: int = 0
    x_shape: tuple[int, ...] = ()
    w_shape: tuple[int, ...] = ()
    y_shape: tuple[int, ...] = ()
    needs: int = 0  # 1: a gradient of the weight
    gw: int = 0
    relu: int = 0  # bytes that a ReLU after it and pooling after that would be counted as
    pool: int = 0
    pooled: int = 0


class Traffic(Enclave):
    """The scheme ``enclave``, counting what passes through each layer in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[_Use] = []
        self.between = 0
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], _Use, bool]] = {}

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        y, _ = super().forward(site, x, w, bias)
        self.uses.append(use := _Use(site.name, x.nbytes, w.nbytes, y.nbytes))
        if isinstance(site.map, Convolution):
            self._made[id(y)] = weakref.ref(y), use, False
        use.x_shape, use.w_shape, use.y_shape = tuple(x.shape), tuple(w.shape), tuple(y.shape)
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
        saved.needs = int(needs.w)
        saved.gw = 0 if found.w is None else found.w.nbytes
        saved.gradients = gy.nbytes + sum(g.nbytes for g in found[:2] if g is not None)
        return found

    def watch(self, model: nn.Module, *, train: bool) -> list[Any]:
        """Count modules between layers too; returns hooks to be removed."""

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], torch.Tensor):
                return
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                passes = 2 if train and output.requires_grad else 1
                size = passes * (args[0].nbytes + output.nbytes)
                self.between += size
                self._follow(module, args[0], output, size)

        return [
            module.register_forward_hook(count)
            for module in model.modules()
            if not any(True for _ in module.children())
            and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Flatten | nn.Identity)
            and not (isinstance(module, nn.Dropout) and (module.p == 0 or not train))
        ]

    def _follow(self, module: nn.Module, x: torch.Tensor, output: torch.Tensor, size: int) -> None:
        """Note which modules come directly after a convolution."""
        ref, use, relu = self._made.get(id(x), (None, None, False))
        if use is None or ref is None or ref() is not x:
            return
        if isinstance(module, nn.ReLU) and not relu:
            use.relu = size
            self._made[id(output)] = weakref.ref(output), use, True
        elif isinstance(module, nn.MaxPool2d) and relu and 4 * output.nbytes == x.nbytes:
            use.pool, use.pooled = size, output.nbytes

    def _saved(self, scheme: str, use: _Use) -> int:
        """Bytes that need not be moved for what follows a layer."""
        if scheme not in _FUSES or not use.relu:
            return 0
        times = 2 if use.gradients else 1
        if scheme == "permuted" and use.pool:
            return use.relu + use.pool + times * (use.y - use.pooled - use.pooled // 4)
        return use.relu - times * (use.y // 32)

    def fewest(
        self,
        scheme: str,
        sent: Callable[[str], bool],
        parameters: int,
        stays: Callable[[str], bool] = lambda _: False,
    ) -> int:
        """Bytes per step.

        Args:
            scheme: its name.
            sent: whether it sends a layer's operands to workers.
            parameters: bytes of the parameters that an optimizer updates; 0 for inference.
            stays: whether a layer's weight stays with a worker while it is trained.
        """
        passes = _PASSES[scheme]
        total = self.between + 5 * parameters
        for use in self.uses:
            if sent(use.site):
                total += passes["x"] * use.x + passes["y"] * use.y + 2 * use.gradients
                total += 2 * use.w if parameters else 0
                total -= self._saved(scheme, use)
                if parameters and stays(use.site):
                    total -= 7 * use.w + 2 * use.gw
            else:
                total += use.x + use.w + use.y + 2 * use.gradients
        return total

    def algebra(self, sent: Callable[[str], bool], ranks: Mapping[str, int]) -> int:
        """Multiplications and additions of ``lowrank``'s own share in one step.

        For each sample of a convolution of rank r: V = Q^T X and Q V, 4 r elements of the input;
        folding the weight and, where it learns, unfolding its gradient, 2 r elements of it each;
        the convolution with V and, where it learns, the correlation of its gradient with V, 2 r
        taps elements of the output each. Dense layers' rows are one sample. The subspace
        iteration is not counted.
        """
        total = 0
        for use in self.uses:
            rank = ranks.get(use.site, 0)
            if not rank or not sent(use.site):
                continue
            dense = len(use.x_shape) == 2
            samples = 1 if dense else use.x_shape[0]
            taps = 1 if dense else math.prod(use.w_shape[2:])
            each = samples * math.prod(use.w_shape) + taps * math.prod(use.y_shape)
            total += 4 * rank * math.prod(use.x_shape) + 2 * rank * each * (1 + use.needs)
        return total


def peak(size: int = 768, rounds: int = 5) -> float:
    """Operations per processor second of one thread in a product of square matrices."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    found = torch.empty_like(a)
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        torch.mm(a, b, out=found)
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best


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
