"""``torch.optim.SGD``, ``Adam`` and ``AdamW`` as workers carry them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import Adam as TorchAdam

from cenacle.errors import InputError
from cenacle.offload.updates import Adam, Rule, Sgd

__all__ = ["TorchUpdates"]

_KNOWN: Final = (SGD, TorchAdam, AdamW)
_REFUSED: Final = ("maximize", "amsgrad", "differentiable", "capturable", "fused")


class TorchUpdates:
    """An optimizer of torch's, whose steps for some parameters workers carry out.

    Args:
        optimizer: of one of these classes itself: a subclass may do something else.

    Raises:
        InputError: it is of another class, or has settings that workers do not know.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in _KNOWN:
            raise InputError(
                "workers cannot carry out this optimizer",
                found=type(optimizer).__name__,
                expected="SGD, Adam or AdamW of torch.optim",
                remedy="offload without resident=",
            )
        self._optimizer = optimizer
        self._steps: dict[int, int] = {}
        self._handles: list[Any] = []
        for group in optimizer.param_groups:
            self._check(group)

    @property
    def linear(self) -> bool:
        """Whether its steps can be checked."""
        return type(self._optimizer) is SGD

    def parameters(self) -> Sequence[torch.Tensor]:
        return [one for group in self._optimizer.param_groups for one in group["params"]]

    def rule(self, parameter: torch.Tensor) -> Rule:
        group = next(
            group
            for group in self._optimizer.param_groups
            if any(parameter is one for one in group["params"])
        )
        self._check(group)
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        if type(self._optimizer) is SGD:
            return Sgd(
                lr=rate,
                momentum=float(group["momentum"]),
                dampening=float(group["dampening"]),
                weight_decay=decay,
                nesterov=bool(group["nesterov"]),
            )
        state = self._optimizer.state.get(parameter)
        before = int(state["step"]) if state else self._steps.get(id(parameter), 0)
        self._steps[id(parameter)] = before + 1
        first, second = group["betas"]
        return Adam(
            lr=rate,
            betas=(float(first), float(second)),
            eps=float(group["eps"]),
            weight_decay=decay,
            decoupled=type(self._optimizer) is AdamW or bool(group.get("decoupled_weight_decay")),
            step=before + 1,
        )

    def take(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._optimizer.state.pop(parameter, {})
        return {
            name: value for name, value in state.items() if name != "step" and value is not None
        }

    def give(self, parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        if not state:
            return
        self._optimizer.state[parameter] = dict(state)
        if type(self._optimizer) is not SGD:
            steps = torch.tensor(float(self._steps[id(parameter)]))
            self._optimizer.state[parameter]["step"] = steps

    def watch(
        self, before: Callable[[], None], after: Callable[[], None], home: Callable[[], None]
    ) -> None:
        optimizer = self._optimizer
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: before()),
            optimizer.register_step_post_hook(lambda *_: after()),
            optimizer.register_state_dict_pre_hook(lambda *_: home()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: home()),
        ]

    def ignore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check(self, group: dict[str, Any]) -> None:
        odd = [name for name in _REFUSED if group.get(name)]
        if odd:
            raise InputError(
                "workers cannot carry out an optimizer with this setting",
                found=", ".join(odd),
                remedy="leave it out, or offload without resident=",
            )
