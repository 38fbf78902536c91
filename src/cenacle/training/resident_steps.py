"""A recipe's optimizer, whose steps accelerators carry out for the weights that they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cenacle.documents.recipe import Sgd as SgdPlan
from cenacle.offload.updates import Adam, Rule, Sgd
from cenacle.training._torch import torch
from cenacle.training.optimizers import Optimizer, Slots

__all__ = ["ResidentSteps"]


class ResidentSteps:
    """A :class:`~cenacle.offload.resident.Updates`: rules are those of the recipe."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._numbers = {id(p): number for number, p in enumerate(optimizer.parameters)}
        self._steps: dict[int, int] = {}

    @property
    def linear(self) -> bool:
        return isinstance(self._optimizer.plan, SgdPlan)

    def parameters(self) -> Sequence[torch.Tensor]:
        return self._optimizer.parameters

    def rule(self, parameter: torch.Tensor) -> Rule:
        plan, rate = self._optimizer.plan, self._optimizer.rate
        if isinstance(plan, SgdPlan):
            return Sgd(
                lr=rate,
                momentum=plan.momentum,
                weight_decay=plan.weight_decay,
                nesterov=plan.nesterov,
            )
        number = self._numbers[id(parameter)]
        slots = self._optimizer.state.get(number)
        before = int(slots["step"]) if slots else self._steps.get(number, 0)
        self._steps[number] = before + 1
        return Adam(
            lr=rate,
            betas=(plan.betas[0], plan.betas[1]),
            eps=plan.eps,
            weight_decay=plan.weight_decay,
            decoupled=plan.type == "adamw",
            step=before + 1,
        )

    def take(self, parameter: torch.Tensor) -> Slots:
        slots = self._optimizer.state.pop(self._numbers[id(parameter)], {})
        return {name: value for name, value in slots.items() if name != "step"}

    def give(self, parameter: torch.Tensor, state: Slots) -> None:
        if not state:
            return
        number = self._numbers[id(parameter)]
        self._optimizer.state[number] = dict(state)
        if not self.linear:
            self._optimizer.state[number]["step"] = torch.tensor(float(self._steps[number]))

    def watch(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        home: Callable[[], None],  # noqa: ARG002 - whoever saves the state reads the weights first
    ) -> None:
        self._optimizer.before_step, self._optimizer.after_step = before, after

    def ignore(self) -> None:
        self._optimizer.before_step = self._optimizer.after_step = lambda: None
