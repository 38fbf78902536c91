"""``permuted`` (Tempo): rows and columns change places and signs. Obfuscation, not encryption.

A product Y = X W^T is disguised by one signed permutation for each of its three dimensions:
M for samples, N for input features, P for output features. Workers get X' = M X N^T and
W' = P W N^T and return Y' = X' W'^T = M Y P^T. For a gradient G of Y they get G' = M G P^T and
return G' W' = M dX N^T and G'^T X' = P dW N^T. A signed permutation's inverse is its
transpose, so one blinded copy of each tensor serves all three products; nothing is rounded.

Source: Tempo (confidential training of deep networks with permuted linear algebra), rebuilt
from its formulas, with signs in place of its real coefficients as the default.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import nn

from cenacle.crypto.memory import SecretBytes
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError, RefusedError
from cenacle.offload.fleet import Fleet, Job, Parcel, Remote, Role
from cenacle.offload.kernels import Scales
from cenacle.offload.keystream import Keystream
from cenacle.offload.maps import Convolution, MatrixProduct
from cenacle.offload.public_base import public_base
from cenacle.offload.resident import RemoteGradient
from cenacle.offload.schemes.base import Fused, Gradients, Needs, Scheme, Site, register
from cenacle.offload.schemes.permuted_keys import Coefficients, Key, Keys, weight_frame
from cenacle.offload.schemes.permuted_moves import Gate, Moves
from cenacle.offload.schemes.permuted_resident import Resident, ResidentWeights
from cenacle.offload.schemes.permuted_uses import (
    Use,
    asked_of_gradient,
    asked_of_input,
    asked_of_weight,
    is_flipped,
    plan_use,
    y_shape,
)
from cenacle.offload.updates import Rule

__all__ = ["Permuted"]

_MAX_REKEY: Final = 1_000_000


class _Weight(NamedTuple):
    """A weight in use: its keys stay, its parcel follows its values.

    ``inner`` and ``outer`` belong to its input and output features.
    """

    inner: Key
    outer: Key
    value: tuple[int, int]
    parcel: Parcel
    uses: int


class _Saved(NamedTuple):
    """What the backward pass needs."""

    use: Use
    x: Parcel
    w: Parcel | Remote
    inner: Key
    resident: Resident | None = None


@register
class Permuted(Scheme):
    """Signed permutations of samples and features.

    Args:
        rekey: after so many uses of a weight its permutations are drawn anew. Those of the
            samples are fresh in every use.
        coefficients: ``signs``: +1 and -1. ``general``: powers of two with signs, between 1/8
            and 8, so that norms of rows and columns are hidden a little too. Results are the
            same to the bit.
        public_base: whether the model was made from a public checkpoint. None: look for a
            name that ``transformers`` left in it.
        allow_public_base: the owner accepts that such a model's permutations can be recovered
            completely.
        seed: 32 bytes, to draw the same permutations again; fresh by default.

    Raises:
        InputError: an option has no such value.
    """

    name: ClassVar[str] = "permuted"
    fuses_relu: ClassVar[bool] = True
    fuses_pool: ClassVar[bool] = True
    fuses_norm: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = False
    resident: ClassVar[bool] = True

    def __init__(
        self,
        *,
        rekey: int = 100,
        coefficients: Coefficients = "signs",
        public_base: bool | None = None,
        allow_public_base: bool = False,
        seed: SecretBytes | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rekey <= _MAX_REKEY:
            raise InputError(
                "weights cannot be re-keyed that often", found=rekey, expected=f"1 .. {_MAX_REKEY}"
            )
        if coefficients not in {"signs", "general"}:
            raise InputError(
                "no such coefficients", found=coefficients, expected="signs or general"
            )
        self.rekey = rekey
        self.coefficients = coefficients
        self.public_base = public_base
        self.allow_public_base = allow_public_base
        self._keys = Keys(Keystream(seed), coefficients)
        self._weights: dict[tuple[str, bool, int], _Weight] = {}
        self._moves: Moves
        self._resident: ResidentWeights
        self._keeps = False

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="obfuscated",
            weights="obfuscated",
            activations="obfuscated",
            gradients="obfuscated",
            labels="obfuscated",
            note=_NOTE
            + (_NOTE_GENERAL if self.coefficients == "general" else _NOTE_SIGNS)
            + (_NOTE_KEPT if self._keeps else ""),
        )

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        """Raises :class:`RefusedError` for a model from a public checkpoint."""
        base = public_base(model) if self.public_base is None else "as its owner declares"
        if self.public_base is not False and base and not self.allow_public_base:
            raise RefusedError(
                "permuted must not be used for a model made from a public checkpoint: whoever "
                "has the checkpoint can recover both permutations of every weight",
                found=base,
                expected="a model trained from scratch",
                remedy="choose another scheme, or let the owner set allow_public_base",
            )
        super().attach(fleet, model)
        self._moves = Moves(fleet, signs=self.coefficients == "signs")
        self._resident = ResidentWeights(fleet, self._moves, self._keys, self.rekey)

    def detach(self) -> None:
        self._weights.clear()
        self._moves.close()

    def kept(self) -> tuple[str, ...]:
        """Names of the weights that workers keep."""
        return self._resident.names()

    def rekey_after(self, uses: int) -> None:
        """Change ``rekey``, for weights that have their keys already too."""
        self.rekey = self._resident.rekey = uses

    # ------------------------------------------------------------------ the three products

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return self._forward(site, x, w, bias)

    def forward_fused(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        pool: int | None,
    ) -> tuple[torch.Tensor, Any, Any]:
        gate = Gate(pool)
        y, saved = self._forward(site, x, w, bias, gate)
        return y, gate, saved

    def recover(
        self, site: Site, saved: Any, bias: torch.Tensor | None, *, relu: bool
    ) -> tuple[torch.Tensor, Any]:
        """From what was sent, which nobody can change."""
        gate = Gate() if relu else None
        return self._product(site, saved, bias, gate), gate

    def _forward(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        gate: Gate | None = None,
    ) -> tuple[torch.Tensor, _Saved]:
        saved = self._sent(site, x, w)
        return self._product(site, saved, bias, gate), saved

    def start(self, site: Site, x: torch.Tensor, w: torch.Tensor) -> tuple[Any, Any]:
        saved = self._sent(site, x, w)
        return self._begun(site, saved), saved

    def finish(
        self,
        site: Site,
        saved: Any,
        under_way: Any,
        bias: torch.Tensor | None,
        scale: Scales | None,
        *,
        relu: bool,
    ) -> torch.Tensor:
        """In the pass that unblinds."""
        use: Use = saved.use
        shape = y_shape(site.map, use.x_shape, use.w_shape)
        return self._moves.open(under_way, shape, use.y, bias, Gate() if relu else None, scale)

    def _sent(self, site: Site, x: torch.Tensor, w: torch.Tensor) -> _Saved:
        flipped = is_flipped(site.map, w)
        resident = self._resident.use(site, x.shape, w)
        weight: Parcel | Remote | None
        if resident is not None:
            inner, outer, weight = resident.inner, resident.outer, resident.w
        else:
            inner, outer, weight = self._weight(site, w, flipped)
        use = plan_use(self._keys, site.map, x.shape, w.shape, inner, outer, flipped=flipped)
        trains = site.trains
        if weight is None:
            role: Role = "activations" if isinstance(site.map, MatrixProduct) else "weights"
            asked = asked_of_weight(site.map, use, trains=trains)
            weight = self._moves.send(w.mT if flipped else w, use.w, role, site.name, asked=asked)
        asked = asked_of_input(use, weight, trains=trains)
        sent = self._moves.send(x, use.x, site.role, site.name, trains=trains, asked=asked)
        return _Saved(use, sent, weight, inner, resident)

    def _begun(self, site: Site, saved: _Saved) -> Job:
        use, slot = saved.use, saved.w.slot if isinstance(saved.w, Remote) else None
        return self.fleet.product(use.forward, saved.x, saved.w, site=site.name, slot=slot)

    def _product(
        self, site: Site, saved: _Saved, bias: torch.Tensor | None, gate: Gate | None
    ) -> torch.Tensor:
        use, job = saved.use, self._begun(site, saved)
        return self._moves.open(job, y_shape(site.map, use.x_shape, use.w_shape), use.y, bias, gate)

    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,  # noqa: ARG002
        needs: Needs,
    ) -> Gradients:
        return self._backward(site, saved, gy, None, needs)

    def backward_fused(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        fused: Fused,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,  # noqa: ARG002
        needs: Needs,
    ) -> Gradients:
        return self._backward(site, saved, gy, fused.gate, needs)

    def _backward(
        self, site: Site, saved: _Saved, gy: torch.Tensor, gate: Gate | None, needs: Needs
    ) -> Gradients:
        use = saved.use
        sums = torch.zeros(gy.shape[1], dtype=torch.float64) if needs.bias else None
        gradient = self._moves.send(
            gy, use.gy, "gradients", site.name, sums, gate, trains=needs.w,
            asked=asked_of_gradient(use, saved.w, saved.x, needs),
        )  # fmt: skip
        first = second = None
        slot = saved.w.slot if isinstance(saved.w, Remote) else None
        if needs.x:
            first = self.fleet.product(
                use.input_gradient, gradient, saved.w, site=site.name, slot=slot
            )
        dx = dw = None
        resident = saved.resident
        if needs.w and resident is not None and resident.inner is saved.inner:
            dw = self._kept_gradient(resident, use, gradient, saved.x)
        elif needs.w:  # computed while the enclave unblinds the other
            second = self.fleet.product(use.weight_gradient, gradient, saved.x, site=site.name)
        if first is not None:
            dx = self._moves.open(first, use.x_shape, use.gx)
        if second is not None:
            shape = use.w_shape
            if use.flipped:
                dw = self._moves.open(second, (*shape[:-2], shape[-1], shape[-2]), use.gw).mT
            else:
                dw = self._moves.open(second, shape, use.gw)
        return Gradients(dx, dw, None if sums is None else sums.to(gy.dtype))

    # ------------------------------------------------------------------ weights that stay

    def _kept_gradient(
        self, weight: Resident, use: Use, gradient: Parcel, x: Parcel
    ) -> torch.Tensor:
        remote = self._resident.gradient(weight, use, gradient, x)
        return RemoteGradient(weight.parameter, remote, weight.site, self._resident.add)

    def may_keep(self) -> None:
        """See :class:`~cenacle.offload.resident.Keeper`, as for the next three."""
        if self.coefficients != "signs":
            raise InputError(
                "weights cannot stay with workers under general coefficients: an optimizer's step "
                "does not commute with them",
                found=self.coefficients,
                expected="signs",
                remedy="leave out resident=, or choose coefficients signs",
            )
        self._keeps = True

    def update(
        self, parameter: torch.Tensor, g: Remote | None, rule: Rule, state: dict[str, torch.Tensor]
    ) -> None:
        weight = self._resident.find(parameter)
        assert weight is not None
        self._resident.update(weight, g, rule, state)

    def is_away(self, parameter: torch.Tensor) -> bool:
        weight = self._resident.find(parameter)
        return weight is not None and weight.lent

    def home(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = self._resident.find(parameter)
        assert weight is not None
        return self._resident.home(weight)

    # ------------------------------------------------------------------ keys

    def _weight(self, site: Site, w: torch.Tensor, flipped: bool) -> tuple[Key, Key, Parcel | None]:
        """Keys of the inner and the outer features; and the parcel, where it is kept."""
        groups = site.map.groups if isinstance(site.map, Convolution) else 1
        inner, outer = (w.shape[1] * groups, w.shape[0])
        if isinstance(site.map, MatrixProduct):
            return self._keys.one(w.shape[1]), self._keys.one(w.shape[2]), None
        name = (site.name, flipped, groups)
        known = self._weights.get(name) if site.weight else None
        if known is not None and (
            known.uses >= self.rekey or (len(known.inner), len(known.outer)) != (inner, outer)
        ):
            known = None
        if known is not None and known.value == site.key:
            self._weights[name] = known._replace(uses=known.uses + 1)
            return known.inner, known.outer, known.parcel
        keys = (known.inner, known.outer) if known else self._keys.pair(inner, outer, groups)
        if not site.weight:
            return *keys, None
        frame = weight_frame(*keys, groups, flipped)
        parcel = self._moves.send(
            w.mT if flipped else w, frame, "weights", site.name, asked=asked_of_weight(site.map)
        )
        uses = 1 + (known.uses if known else 0)
        self._weights[name] = _Weight(*keys, site.key, parcel, uses)
        return *keys, parcel


_NOTE: Final = (
    "Obfuscation, not encryption: workers see every tensor with its rows and columns in another "
    "order. The values themselves, which of them are zero, norms up to the coefficients, and "
    "ranks stay. Images keep their spatial layout: channels and samples change places, so a "
    "worker can see what an input image shows. With a public checkpoint that a model was "
    "made from, both permutations of each weight can be recovered completely; one known batch "
    "after a ReLU suffices too. Labels are not sent, but gradients of the last layer tell which "
    "samples of a batch have the same label. Permutations of features stay until weights are "
    "re-keyed, those of samples are fresh in every batch. "
)
_NOTE_SIGNS: Final = (
    "Coefficients are +1 and -1: signs hide nothing of a tensor that is known not to be "
    "negative, such as one after a ReLU, and norms of rows and columns stay as they are."
)
_NOTE_GENERAL: Final = (
    "Coefficients are powers of two between 1/8 and 8 with signs: they hide nothing of the "
    "signs of a tensor that is known not to be negative, and mantissas of all values stay."
)
_NOTE_KEPT: Final = (
    " Workers keep large weights under their permutations and train them: they know the "
    "optimizer, its settings and its state."
)
