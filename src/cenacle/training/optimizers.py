"""SGD, Adam and AdamW as torch computes them, with their state as plain tensors.

The arithmetic is ``torch.optim``'s own functional form (``torch.optim.sgd.sgd``,
``torch.optim.adam.adam``), so steps are bit for bit those of ``torch.optim.SGD``, ``Adam`` and
``AdamW``. Their classes are not used because the first instance imports ``torch._dynamo``: 800
modules and 4 s in an enclave, which reads no byte-code caches, to compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from cenacle.documents.recipe import Adam, AdamW, Sgd
from cenacle.training._torch import adam, sgd, torch

__all__ = ["Optimizer", "Slots"]

Slots = dict[str, torch.Tensor]
"""One parameter's state: ``momentum_buffer``, or ``step``, ``exp_avg``, ``exp_avg_sq``."""


def _nothing() -> None:
    return None


class Optimizer:
    """Updates parameters in place from their ``grad``.

    Attributes:
        state: slots by the parameter's position; empty before its first step.
        rate: learning rate of the step under way.
        before_step, after_step: called around each step.
    """

    def __init__(self, plan: Sgd | Adam | AdamW, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._plan = plan
        self._parameters = list(parameters)
        self.state: dict[int, Slots] = {}
        self.rate = 0.0
        self.before_step: Callable[[], None] = _nothing
        self.after_step: Callable[[], None] = _nothing

    @property
    def plan(self) -> Sgd | Adam | AdamW:
        return self._plan

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        return tuple(self._parameters)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at learning rate ``rate``; a parameter without a gradient stays as it is."""
        self.rate = rate
        self.before_step()
        try:
            self._step(rate)
        finally:
            self.after_step()

    def _step(self, rate: float) -> None:
        chosen = [i for i, parameter in enumerate(self._parameters) if parameter.grad is not None]
        parameters = [self._parameters[i] for i in chosen]
        gradients = [g for p in parameters if (g := p.grad) is not None]
        if isinstance(self._plan, Sgd):
            self._step_sgd(self._plan, chosen, parameters, gradients, rate)
        else:
            self._step_adam(self._plan, chosen, parameters, gradients, rate)

    def _step_sgd(
        self,
        plan: Sgd,
        chosen: list[int],
        parameters: list[torch.nn.Parameter],
        gradients: list[torch.Tensor],
        rate: float,
    ) -> None:
        buffers = [self.state.get(i, {}).get("momentum_buffer") for i in chosen]
        sgd(
            list(parameters),
            gradients,
            buffers,
            foreach=False,
            weight_decay=plan.weight_decay,
            momentum=plan.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=plan.nesterov,
            maximize=False,
        )
        for i, buffer in zip(chosen, buffers, strict=True):
            if buffer is not None:
                self.state[i] = {"momentum_buffer": buffer}

    def _step_adam(
        self,
        plan: Adam | AdamW,
        chosen: list[int],
        parameters: list[torch.nn.Parameter],
        gradients: list[torch.Tensor],
        rate: float,
    ) -> None:
        for i, parameter in zip(chosen, parameters, strict=True):
            if i not in self.state:
                self.state[i] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        slots = [self.state[i] for i in chosen]
        adam(
            list(parameters),
            gradients,
            [slot["exp_avg"] for slot in slots],
            [slot["exp_avg_sq"] for slot in slots],
            [],
            [slot["step"] for slot in slots],
            foreach=False,
            decoupled_weight_decay=plan.type == "adamw",
            amsgrad=False,
            beta1=plan.betas[0],
            beta2=plan.betas[1],
            lr=rate,
            weight_decay=plan.weight_decay,
            eps=plan.eps,
            maximize=False,
        )

    def load(self, state: Mapping[int, Slots]) -> None:
        """Replace the state by one of the same optimizer on the same parameters.

        Raises:
            ValueError: a slot is unknown or missing, or has another shape.
        """
        wanted = (
            {"momentum_buffer"}
            if isinstance(self._plan, Sgd)
            else {"step", "exp_avg", "exp_avg_sq"}
        )
        for index, slots in state.items():
            if not 0 <= index < len(self._parameters) or set(slots) != wanted:
                raise ValueError("the optimizer has other slots")
            shape = self._parameters[index].shape
            for name, value in slots.items():
                if value.shape != (torch.Size() if name == "step" else shape):
                    raise ValueError("a slot of the optimizer has another shape")
        self.state = {
            index: {name: value.to(torch.float32) for name, value in slots.items()}
            for index, slots in state.items()
        }
