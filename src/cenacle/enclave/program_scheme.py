"""``ctx.offload`` inside the program's process: a session whose products the agent computes.

The engine that finds a model's linear algebra runs here; what disguises, sends and checks runs in
the agent (:mod:`cenacle.enclave.program_products`). Neither keys of permutations nor a
socket to an accelerator is in this process.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.documents.offload import EnclavePlan, MeasuredPlan, OffloadPlan, PermutedPlan
from cenacle.documents.receipt import LeakageRecord
from cenacle.enclave.program_wire import map_fields, pack, unpack
from cenacle.errors import EnclaveError, InputError, RefusedError
from cenacle.offload.fleet import Fleet
from cenacle.offload.planned import planned_leakage, planned_scheme
from cenacle.offload.public_base import public_base
from cenacle.offload.schemes.base import Gradients, Needs, Scheme, Site
from cenacle.offload.session import Offload
from cenacle.training.randomness import secret_state

__all__ = ["AgentScheme", "program_offload"]

Ask = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytearray]]
"""Sends a request, and waits for its answer."""


@dataclass
class _Link:
    """The one way to the agent, which serves one session at a time."""

    ask: Ask
    used: bool = False


class _Saved:
    """A product that the agent keeps, until nobody here refers to it."""

    def __init__(self, number: int) -> None:
        self.number = number


class AgentScheme(Scheme):
    """The contract's scheme, as the agent applies it.

    Args:
        plan: the contract's.
        link: the way to the agent.
    """

    name: ClassVar[str] = "agent"
    keeps_input: ClassVar[bool] = False
    verified: ClassVar[bool] = False

    def __init__(self, plan: OffloadPlan, link: _Link) -> None:
        super().__init__()
        self.name = plan.scheme  # type: ignore[misc]
        self._plan = plan
        self._link = link
        self._sent: dict[str, tuple[int, int]] = {}
        self._dropped: list[int] = []

    @property
    def leakage(self) -> LeakageRecord:
        return planned_leakage(self._plan)

    @property
    def hinders_privacy(self) -> str | None:
        return planned_scheme(self._plan).hinders_privacy

    @property
    def checks_itself(self) -> bool:
        return not isinstance(self._plan, EnclavePlan | MeasuredPlan) and self._plan.check

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        """Raises :class:`RefusedError` for a model from a public checkpoint, where that matters."""
        plan = self._plan
        base = public_base(model) if isinstance(plan, PermutedPlan) else None
        if base and not (isinstance(plan, PermutedPlan) and plan.allow_public_base):
            raise RefusedError(
                "permuted must not be used for a model made from a public checkpoint",
                found=base,
                expected="a model trained from scratch",
                remedy="state allow_public_base in the contract, or choose another scheme",
            )
        if self._link.used:
            raise InputError(
                "a program has one offload session at a time",
                remedy="end the other session first, or offload one module that holds both models",
            )
        super().attach(fleet, model)
        self._link.used = True
        self._call({"call": "begin"}, [])

    def detach(self) -> None:
        self._sent.clear()
        self._dropped.clear()
        self._link.used = False
        self._call({"call": "end"}, [])

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        known = site.weight and self._sent.get(site.name) == site.key
        header = {
            "call": "forward",
            "name": site.name,
            "role": site.role,
            "weight": site.weight,
            "trains": site.trains,
            "learns": site.learns,
            "private": site.private,
            "map": map_fields(site.map),
            "drop": self._take_dropped(),
        }
        answer, (y,) = self._call(header, [x, None if known else w, bias])
        if site.weight:
            self._sent[site.name] = site.key
        saved = _Saved(answer["saved"])
        weakref.finalize(saved, self._dropped.append, saved.number).atexit = False
        assert y is not None
        return y, saved

    def backward(
        self,
        site: Site,  # noqa: ARG002
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,  # noqa: ARG002
        needs: Needs,
    ) -> Gradients:
        header = {
            "call": "backward",
            "saved": saved.number,
            "needs": [bool(need) for need in needs],
            "drop": self._take_dropped(),
        }
        _, found = self._call(header, [gy])
        return Gradients(*found)

    def _take_dropped(self) -> list[int]:
        # Finalizers may append at any point: what comes after the copy waits.
        taken = list(self._dropped)
        del self._dropped[: len(taken)]
        return taken

    def _call(
        self, header: dict[str, Any], tensors: Sequence[torch.Tensor | None]
    ) -> tuple[dict[str, Any], list[torch.Tensor | None]]:
        described, data = pack(tensors)
        answer, payload = self._link.ask({"kind": "offload", **header, "tensors": described}, data)
        if answer.get("kind") != "offloaded":
            raise EnclaveError("the agent does not answer")
        return answer, unpack(answer["tensors"], payload)


def program_offload(told: Mapping[str, Any], ask: Ask) -> Callable[[nn.Module], Offload]:
    """What ``ctx.offload`` calls; torch's own generator is started from a secret of the run.

    Whoever knows a model's first weights recovers the permutations of ``permuted``, and torch
    draws them from a seed that is the same everywhere.

    Args:
        told: ``plan`` as the contract has it, and ``secret``.
    """
    plan: OffloadPlan = TypeAdapter[OffloadPlan](OffloadPlan).validate_json(
        json.dumps(told["plan"])
    )
    torch.default_generator.set_state(secret_state(told["secret"], "program"))

    link = _Link(ask)

    def offload(model: nn.Module) -> Offload:
        # Never asked for anything: products are the agent's.
        return Offload(model, AgentScheme(plan, link), Fleet([InlineAccelerator("agent")]))

    return offload
