"""The agent's side of ``ctx.offload``: products that a program asks for.

The program has no way to an accelerator. Its process sends operands to the agent, which
disguises, sends, checks and accounts for them as for a recipe; so what a receipt says of
accelerators does not rest on the program's word. Two things do: which of its tensors are
weights, and which are inputs.

Requests are hostile. Sizes are checked before anything is computed, layers get names of the
agent's own (theirs would stand in the profile, which is in the open), and whatever goes wrong
ends the job with words that say nothing of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch

from cenacle.enclave.program_wire import pack, read_map, require_fit, result_shape, unpack
from cenacle.errors import EnclaveError, InputError
from cenacle.offload.fleet import Fleet, Role
from cenacle.offload.maps import MatrixProduct
from cenacle.offload.schemes.base import Needs, Scheme, Site
from cenacle.training.offloading import Offloading

__all__ = ["ProgramProducts"]

_MANY: Final = 100_000
"""Products that may wait for their gradients, and layers of a model."""
_LONGEST: Final = 1000
"""Characters of a layer's name."""
_ROLES: Final[Mapping[object, Role]] = {"inputs": "inputs", "activations": "activations"}


@dataclass(frozen=True)
class _Kept:
    """A product whose gradients may be asked for."""

    site: Site
    saved: Any
    x: torch.Tensor | None
    w: torch.Tensor
    shape: tuple[int, ...]


def _wrong(what: str) -> InputError:
    return InputError("a program's request to accelerators is malformed", found=what)


class ProgramProducts:
    """Answers one program's requests.

    Args:
        offloading: the contract's plan on the launcher's accelerators.
    """

    def __init__(self, offloading: Offloading) -> None:
        self._offloading = offloading
        self._open = ExitStack()
        self._session: tuple[Scheme, Fleet] | None = None
        self._names: dict[tuple[bool, str], str] = {}
        self._weights: dict[str, tuple[tuple[int, int], torch.Tensor]] = {}
        self._kept: dict[int, _Kept] = {}
        self._numbers = 0

    def answer(self, header: Mapping[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        """Do what a request asks for.

        Returns:
            Header and payload of the answer.

        Raises:
            EnclaveError: the request is malformed, or its product cannot be computed.
        """
        try:
            tensors = unpack(header.get("tensors", []), payload)
            with torch.no_grad():
                found, results = self._do(header, tensors)
            described, data = pack(results)
        except MemoryError:
            raise
        except InputError as error:
            raise EnclaveError(
                "the program's process broke the protocol",
                found=str(error.found) if error.what.startswith("a program's") else "its operands",
                expected="requests for products",
            ) from None
        except Exception as error:
            raise EnclaveError(
                "a product of the program could not be computed", found=type(error).__name__
            ) from None
        return {"kind": "offloaded", **found, "tensors": described}, data

    def close(self) -> None:
        """End the program's session, if one is open. Safe to call twice."""
        self._session = None
        self._kept.clear()
        self._weights.clear()
        self._open.close()

    def _do(
        self, header: Mapping[str, Any], tensors: list[torch.Tensor | None]
    ) -> tuple[dict[str, Any], list[torch.Tensor | None]]:
        match header.get("call"):
            case "begin" if self._session is None and not tensors:
                self._session = self._open.enter_context(self._offloading.relayed())
                return {}, []
            case "end" if self._session is not None and not tensors:
                self.close()
                return {}, []
            case "forward" if self._session is not None and len(tensors) == 3:
                self._forget(header.get("drop"))
                x, w, bias = tensors
                return self._forward(header, x, w, bias, *self._session)
            case "backward" if self._session is not None and len(tensors) == 1:
                self._forget(header.get("drop"))
                return {}, self._backward(header, tensors[0], *self._session)
        raise _wrong("a call of unknown kind, or out of turn")

    def _forget(self, numbers: object) -> None:
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise _wrong("products to forget that are no numbers")
        for number in numbers:
            self._kept.pop(number, None)

    def _forward(
        self,
        header: Mapping[str, Any],
        x: torch.Tensor | None,
        w: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: Scheme,
        fleet: Fleet,
    ) -> tuple[dict[str, Any], list[torch.Tensor | None]]:
        match header:
            case {
                "name": str(given),
                "role": ("inputs" | "activations") as told,
                "weight": bool(weight),
                "trains": bool(trains),
                "learns": bool(learns),
                "private": bool(private),
            }:
                role = _ROLES[told]
            case _:
                raise _wrong("a product that is not described")
        map_ = read_map(header.get("map"))
        if isinstance(map_, MatrixProduct) and weight:
            raise _wrong("a weight where there is none")
        name = self._name(given, weight=weight)
        key = (0, 0)
        if weight:
            if w is not None:
                self._numbers += 1
                self._weights[name] = (self._numbers, 0), w
            elif name not in self._weights:
                raise _wrong("a weight that was never sent")
            key, w = self._weights[name]
        if x is None or w is None:
            raise _wrong("a product without operands")
        require_fit(map_, x, w, bias)
        site = Site(name, map_, role, weight, key, trains=trains, learns=learns, private=private)
        with fleet.profile.span(name, "forward"):
            y, saved = scheme.forward(site, x, w, bias)
        if len(self._kept) >= _MANY:
            raise _wrong("too many products whose gradients are never asked for")
        self._numbers += 1
        shape = result_shape(map_, x.shape, w.shape)
        self._kept[self._numbers] = _Kept(site, saved, x if scheme.keeps_input else None, w, shape)
        return {"saved": self._numbers}, [y]

    def _backward(
        self, header: Mapping[str, Any], gy: torch.Tensor | None, scheme: Scheme, fleet: Fleet
    ) -> list[torch.Tensor | None]:
        number, needs = header.get("saved"), header.get("needs")
        kept = self._kept.get(number) if type(number) is int else None
        asked = isinstance(needs, list) and len(needs) == 3 and {type(n) for n in needs} == {bool}
        if kept is None or not asked or gy is None or tuple(gy.shape) != kept.shape:
            raise _wrong("gradients of a product that is not there")
        assert isinstance(needs, list)
        if gy.dtype != kept.w.dtype or (needs[2] and isinstance(kept.site.map, MatrixProduct)):
            raise _wrong("gradients of another form")
        with fleet.profile.span(kept.site.name, "backward"):
            found = scheme.backward(kept.site, kept.saved, gy, kept.x, kept.w, Needs(*needs))
        return [found.x, found.w, found.bias]

    def _name(self, given: str, *, weight: bool) -> str:
        """One of the agent's own for each of theirs."""
        if (weight, given) not in self._names:
            if len(self._names) >= _MANY or len(given) > _LONGEST:
                raise _wrong("too many layers, or too long a name")
            number = sum(kind == weight for kind, _ in self._names) + 1
            self._names[weight, given] = f"{'weight' if weight else 'product'}-{number}"
        return self._names[weight, given]
