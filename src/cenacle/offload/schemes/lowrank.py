"""``lowrank`` (AsymML, 3LegRace): accelerators get what is left when the main part is taken out.

Each input X of a layer is split into X_T = Q V of low rank, which stays in the enclave, and a
residual X_U, which accelerators get. Forward: B(X_U, W) comes from accelerators and B(X_T, W)
is computed inside, at about rank / channels of the work. Backward: dX and dW_U = grad(X_U, dY)
come from accelerators, dW_T is computed inside; dW = dW_U + dW_T is formed inside only.

Weights and gradients are in the open. What follows from that, and which layers stay inside
because of it, is in ``docs/schemes/lowrank.md``.

Sources: Niu, Ali and Avestimehr, "3LegRace" (PETS 2022) and "AsymML" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import nn

from cenacle.accelerators.buffers import Buffers
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.fleet import Fleet, Job, Parcel, Role
from cenacle.offload.lowrank_gate import gated_copy
from cenacle.offload.lowrank_guard import determined_share, leakage_record
from cenacle.offload.lowrank_inside import FewRows
from cenacle.offload.lowrank_noise import ResidualNoise
from cenacle.offload.lowrank_share import ConvolutionShare, DenseShare, Share
from cenacle.offload.lowrank_split import Scratch, turn
from cenacle.offload.maps import Convolution, Dense
from cenacle.offload.schemes.base import (
    Gradients,
    Needs,
    Scheme,
    Site,
    add_bias,
    bias_gradient,
    register,
)

__all__ = ["LowRank"]

_IMAGE_CHANNELS: Final = 4
"""Up to so many channels, x counts as a picture whatever the model did to it before."""
_DENSE_SHARE: Final = 0.25
"""A dense layer stays inside if the enclave's part would be more than this of the whole."""
_POSITIONS: Final = 8
"""A scheduled rank is at most this fraction of the channels, and of the positions."""


@dataclass
class _Inside:
    """A layer that was computed in the enclave."""

    x: torch.Tensor
    version: int

    @classmethod
    def of(cls, x: torch.Tensor) -> _Inside:
        return cls(x, 0 if x.is_inference() else x._version)

    def value(self, site: Site) -> torch.Tensor:
        if not self.x.is_inference() and self.x._version != self.version:
            raise InputError(
                "a layer's input was changed in place before its gradients were taken",
                found=site.name,
                remedy="use operations that do not work in place",
            )
        return self.x


@dataclass
class _Split:
    """A layer whose residual was sent."""

    share: Share
    sent: Parcel
    weight: Parcel
    shape: torch.Size
    kept: _Inside | None  # the input, if the backward pass has to stay inside


@register
class LowRank(Scheme):
    """Keeps the part of low rank inside.

    Args:
        ranks: ``doubling``: 2 for the first convolution or dense layer, doubled with each, at
            most ``max_rank`` and an eighth of the channels and positions, but at least 2 for
            convolutions; or one number for all layers; or numbers by layer name, where layers
            that are not named stay inside. A layer whose rank would leave no residual, or
            whose enclave part would save nothing, stays inside.
        max_rank: the end of the doubling.
        rounds: of subspace iteration for each split; 2 leave at most about 15 % more energy in
            residuals than the best split of that rank.
        guard: the largest share of a layer's hidden part that the linear equations
            "dW - dW_U = grad(Q V, dY)" of one step may determine, where accelerators learn the
            whole dW from two versions of a plain weight, and Q from the residual. A layer that
            exceeds it stays inside once it learns. ``None``: no limit; then the record calls
            inputs and activations plaintext.
        noise: ``(epsilon, delta, clip)``: clip each residual to a Frobenius norm of ``clip``
            and add Gaussian noise, (epsilon, delta)-private for one release; see
            :class:`~cenacle.offload.lowrank_noise.ResidualNoise`. Results are approximate
            then, and dense layers stay inside.

    Raises:
        InputError: an option out of range.
    """

    name: ClassVar[str] = "lowrank"
    fuses_relu: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = False

    def __init__(
        self,
        *,
        ranks: Literal["doubling"] | int | Mapping[str, int] = "doubling",
        max_rank: int = 32,
        rounds: int = 2,
        guard: float | None = 0.5,
        noise: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        given = ranks.values() if isinstance(ranks, Mapping) else (ranks,)
        if not all(rank == "doubling" or _positive(rank) for rank in given):
            raise InputError(
                "ranks are not usable", found=repr(ranks), expected="doubling, or numbers from 1"
            )
        if not _positive(max_rank) or not _positive(rounds):
            raise InputError(
                "max_rank and rounds count from 1", found=f"{max_rank!r} and {rounds!r}"
            )
        if guard is not None and not 0 < guard <= 1:
            raise InputError("guard is a share", found=repr(guard), expected="in (0, 1], or none")
        if noise is not None and len(noise) != 3:
            raise InputError("noise is (epsilon, delta, clip)", found=repr(noise))
        self.ranks = ranks
        self.max_rank, self.rounds, self.guard = max_rank, rounds, guard
        self.noise = None if noise is None else ResidualNoise(*noise)
        self.chosen: dict[str, int] = {}
        """The rank of each layer that was split, by name; 0: stayed inside."""
        self._order: dict[str, int] = {}
        self._guarded: set[str] = set()
        self._weights: dict[str, tuple[tuple[int, int], Parcel, torch.Tensor]] = {}
        self._scratch = Scratch()
        self._buffers = Buffers()
        self._few = FewRows(self._buffers)
        self._model: nn.Module | None = None

    @property
    def leakage(self) -> LeakageRecord:
        return leakage_record(self.name, self.guard, self.noise)

    @property
    def hinders_privacy(self) -> str | None:
        if self.noise is None:
            return None
        return (
            "the noise on residuals is part of the sums of gradients, so clipping does not bound "
            "them; leave noise out"
        )

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        super().attach(fleet, model)
        self._model = model
        if isinstance(self.ranks, Mapping):
            known = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
            unknown = sorted(set(self.ranks) - known)
            if unknown:
                raise InputError(
                    "ranks name layers that the model does not have",
                    found=", ".join(unknown),
                    expected="names of its weights, without .weight",
                )

    def detach(self) -> None:
        self._weights.clear()
        self._buffers.close()

    # ------------------------------------------------------------------ one layer

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return self._forward(site, x, w, bias, relu=False)

    def forward_relu(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return self._forward(site, x, w, bias, relu=True)

    def _forward(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        relu: bool,
    ) -> tuple[torch.Tensor, Any]:
        rank = self.rank(site, x, w)
        guarded = rank > 0 and site.learns and self._determined(site, x, w, rank)
        if guarded and self._model is not None and self._model.training:
            self._guarded.add(site.name)
        if rank == 0 or site.name in self._guarded:
            few = isinstance(site.map, Dense) and self._few.fits(x, w)
            y = self._few.forward(x, w) if few else site.map.forward().compute(x, w)
            y = add_bias(y, bias)
            return y.clamp_min_(0) if relu else y, _Inside.of(x)
        kept = _Inside.of(x) if guarded else None
        share = self._split(site, x.contiguous(), w, rank)
        if self.noise is not None:
            self.noise.apply(share.residual)
        sent = self.fleet.send(share.residual, site.role, site.name)
        weight, turned = self._weight(site, w)
        job = self.fleet.product(site.map.forward(), sent, weight, site=site.name)
        share.prepare(turned, bias)
        y = self._buffers.empty(_out_shape(site, x, w), x.dtype)
        job.collect(lambda rows, part: share.add(part, rows.start, y, relu=relu))
        return y, _Split(share, sent, weight, x.shape, kept)

    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        return self._backward(site, saved, gy, None, w, needs)

    def backward_relu(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        return self._backward(site, saved, gy, y, w, needs)

    def _backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        gate: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        if isinstance(saved, _Inside):
            return self._inside(site, saved, gy, gate, w, needs)
        assert isinstance(saved, _Split)
        if saved.kept is not None and needs.w:
            self._guarded.add(site.name)  # and this weight is never sent again
            self._weights.pop(site.name, None)
            return self._inside(site, saved.kept, gy, gate, w, needs)
        if not needs.x and not needs.w:
            _, db = gated_copy(site.map, gy, gate, self._buffers, sums=needs.bias)
            return Gradients(None, None, db)
        # A copy: what is sent must not change.
        copied, db = gated_copy(site.map, gy, gate, self.fleet.staging, sums=needs.bias)
        gradient = self.fleet.send(copied, "gradients", site.name)
        first = second = None
        if needs.w:
            product = site.map.weight_gradient(w.shape)
            second = self.fleet.product(product, gradient, saved.sent, site=site.name)
        if needs.x:
            product = site.map.input_gradient(saved.shape)
            first = self.fleet.product(product, gradient, saved.weight, site=site.name)
        dw = None
        if second is not None:
            # Of what a gate changed there is no other copy; no worker can write this one.
            saved.share.gather(gradient.value if gate is not None else gy.contiguous())
            dw = saved.share.weight_gradient(second.result())
        return Gradients(None if first is None else self._whole(first, saved.shape, gy), dw, db)

    def _inside(
        self,
        site: Site,
        saved: _Inside,
        gy: torch.Tensor,
        gate: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        x = saved.value(site)
        db = None
        if gate is not None:
            gy, db = gated_copy(site.map, gy, gate, self._buffers, sums=needs.bias)
        elif needs.bias:
            db = bias_gradient(gy, site.map)
        if isinstance(site.map, Dense) and self._few.fits(x, w):
            return Gradients(
                self._few.input_gradient(gy, w) if needs.x else None,
                self._few.weight_gradient(gy, x) if needs.w else None,
                db,
            )
        return Gradients(
            site.map.input_gradient(x.shape).compute(gy, w) if needs.x else None,
            site.map.weight_gradient(w.shape).compute(gy, x) if needs.w else None,
            db,
        )

    # ------------------------------------------------------------------ decisions

    def rank(self, site: Site, x: torch.Tensor, w: torch.Tensor) -> int:
        """Of the part that stays inside; 0: all of it does."""
        if not site.weight or not isinstance(site.map, Dense | Convolution) or not x.numel():
            return 0
        place = self._order.setdefault(site.name, len(self._order))
        rank = self._rank(site, x, w, place)
        self.chosen[site.name] = rank
        return rank

    def _rank(self, site: Site, x: torch.Tensor, w: torch.Tensor, place: int) -> int:
        dense = isinstance(site.map, Dense)
        if dense and (self.noise is not None or site.private):
            return 0  # rows, and with them examples, are split together
        # What a sample's matrix can have, and how many channels one output sums over.
        positions = x.shape[0] if dense else x.shape[2:].numel()
        channels, summed = x.shape[1], w.shape[1]
        if isinstance(self.ranks, Mapping):
            rank = self.ranks.get(site.name, 0)
        elif isinstance(self.ranks, int):
            rank = self.ranks
        else:
            rank = min(2 ** min(place + 1, 30), self.max_rank)
            least = min(channels, positions) // _POSITIONS
            rank = min(rank, least if dense else max(2, least))
        if rank >= min(summed, channels, positions):
            return 0
        if dense and rank / positions + rank / channels > _DENSE_SHARE:
            return 0
        return rank

    def _determined(self, site: Site, x: torch.Tensor, w: torch.Tensor, rank: int) -> bool:
        """Whether dW determines too much of V. See :func:`determined_share`."""
        if self.guard is None:
            return False
        assert isinstance(site.map, Dense | Convolution)
        bases = 1 if isinstance(site.map, Dense) or self._fixed(site, x) else x.shape[0]
        return determined_share(site.map, x.shape, w.shape, rank, bases) > self.guard

    def _fixed(self, site: Site, x: torch.Tensor) -> bool:
        """Whether to split by the same directions whatever the sample.

        Two residuals of one sample under different directions give it away, and the model's
        inputs come again in each epoch, shifted and mirrored perhaps.
        """
        return site.role == "inputs" or (x.dim() > 2 and x.shape[1] <= _IMAGE_CHANNELS)

    # ------------------------------------------------------------------ sending

    def _split(self, site: Site, x: torch.Tensor, w: torch.Tensor, rank: int) -> Share:
        residual = self.fleet.empty(*x.shape, dtype=x.dtype)
        rounds = 0 if self._fixed(site, x) else self.rounds
        if isinstance(site.map, Convolution):
            return ConvolutionShare(
                site.map, x, tuple(w.shape), residual, rank, rounds, self._scratch
            )
        return DenseShare(x, residual, rank, rounds)

    def _whole(self, job: Job, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """A result by rows, in memory that was used before."""
        found = self._buffers.empty(shape, like.dtype)

        def take(rows: slice, part: torch.Tensor) -> None:
            found[rows].copy_(part)

        job.collect(take)
        return found

    def _send(self, value: torch.Tensor, role: Role, site: Site) -> Parcel:
        """A copy: what is sent must not change, nor be memory that the enclave reads again."""
        memory = self.fleet.empty(*value.shape, dtype=value.dtype)
        return self.fleet.send(memory.copy_(value), role, site.name)

    def _weight(self, site: Site, w: torch.Tensor) -> tuple[Parcel, torch.Tensor]:
        """Sent once for each of its values; with what shares fold."""
        known = self._weights.get(site.name)
        if known is None or known[0] != site.key:
            turned = turn(w) if isinstance(site.map, Convolution) else w.detach()
            known = self._weights[site.name] = site.key, self._send(w, "weights", site), turned
        return known[1:]


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _out_shape(site: Site, x: torch.Tensor, w: torch.Tensor) -> tuple[int, ...]:
    if isinstance(site.map, Convolution):
        return (x.shape[0], w.shape[0], *site.map.space(x.shape, w.shape))
    return (x.shape[0], w.shape[0])
