"""``masked-training`` (Beaver): both operands hidden, from two workers who do not collude.

Everything is fixed point modulo p = 2^31 - 1. For a product B(a, b) the enclave draws uniform
u1, u2, v1, v2 that are used once, and with u = u1 + u2, v = v1 + v2 sends e = a - u and
f = b - v to both workers, (u1, f + v1) to the first and (u2, v2) to the second. They answer
B(e, f + v1) + B(u1, f) and B(e, v2) + B(u2, f). Since B is bilinear,

    B(a, b) = B(e, f) + B(e, v) + B(u, f) + B(u, v).

The last term depends on no data: the enclave computes it before (:meth:`MaskedTraining.prepare`).
Each worker alone sees uniform numbers, because the other's share of u and v is unknown to it.
See ``docs/schemes/masked.md``.

Source: Beaver, Efficient multiparty protocols using circuit randomization (CRYPTO 1991).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import nn

from cenacle.accelerators.protocol import Operation
from cenacle.crypto import SecretBytes
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import DataError, InputError
from cenacle.offload.field import HALF, FieldStream, lift, to_field
from cenacle.offload.fleet import Fleet, Job, Role
from cenacle.offload.maps import MatrixProduct, Product
from cenacle.offload.schemes.base import (
    Gradients,
    Needs,
    Scheme,
    Site,
    add_bias,
    bias_gradient,
    register,
)

__all__ = ["MaskedTraining"]

_TERMS: Final = 1 << 21  # products of 32 bits whose sum float64 still holds exactly


class _Kind(NamedTuple):
    """All that a triple depends on."""

    product: Product
    a: tuple[int, ...]
    b: tuple[int, ...]


class _Triple(NamedTuple):
    """Positions of u1, u2, v1, v2 in the stream of masks, and B(u, v)."""

    first: int
    uv: torch.Tensor


@dataclass
class _Known:
    """A kind of product that the model was seen to need in each step."""

    kind: _Kind
    ready: deque[_Triple] = field(default_factory=deque)


@register
class MaskedTraining(Scheme):
    """Training and inference with inputs, activations, weights and gradients hidden.

    Exactly two workers, run by parties who do not tell each other what they see. A worker that
    is lost is replaced by the enclave, never by the other worker.
    """

    name: ClassVar[str] = "masked-training"

    def __init__(self) -> None:
        super().__init__()
        self._secret = SecretBytes.random(64)
        self._stream = FieldStream(self._secret)
        self._drawn = 0
        self._known: dict[str, _Known] = {}
        self._workers: tuple[Fleet, Fleet]

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="hidden",
            weights="hidden",
            activations="hidden",
            gradients="hidden",
            labels="hidden",
            note=(
                "Assumes that the two workers do not collude: each alone sees uniform numbers "
                "modulo 2^31 - 1, independent of the data as long as AES-256 in counter mode "
                "cannot be told from random; together they can compute everything. Layers, "
                "shapes, batch sizes and timing are visible."
            ),
        )

    @property
    def hinders_privacy(self) -> str:
        return (
            "its fixed point is scaled by the largest numbers of a batch, so one example changes "
            "what is computed of all others; use permuted or lowrank"
        )

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        if len(fleet.members) != 2:
            raise InputError(
                "masked training needs two workers that do not collude",
                found=len(fleet.members),
                expected="exactly 2",
            )
        super().attach(fleet, model)
        first, second = (
            Fleet(
                [member],
                timeout=fleet.timeout,
                verifier=fleet.verifier,
                transcript=fleet.transcript,
                profile=fleet.profile,
            )
            for member in fleet.members
        )
        first.losses = second.losses = fleet.losses
        self._workers = first, second

    def detach(self) -> None:
        for fleet in self._workers:
            fleet.close()
        self._known.clear()

    def prepare(self, steps: int) -> None:
        """Compute what is independent of data for more steps like those so far.

        Run one step first: it shows which products a step needs. Without this the enclave
        computes B(u, v) within the step, which then costs it more than doing all by itself.
        """
        for known in self._known.values():
            known.ready.extend(self._triple(known.kind) for _ in range(steps))

    # ------------------------------------------------------------------ the three products

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        roles: tuple[Role, Role] = (site.role, "weights" if site.weight else "activations")
        return add_bias(self._product(site, site.map.forward(), x, w, roles), bias), None

    def backward(
        self,
        site: Site,
        saved: Any,  # noqa: ARG002
        gy: torch.Tensor,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        assert x is not None
        dx = dw = None
        if needs.x:
            other: Role = "weights" if site.weight else "activations"
            into = site.map.input_gradient(x.shape)
            dx = self._product(site, into, gy, w, ("gradients", other))
        if needs.w:
            into = site.map.weight_gradient(w.shape)
            dw = self._product(site, into, gy, x, ("gradients", site.role))
        return Gradients(dx, dw, bias_gradient(gy, site.map) if needs.bias else None)

    def _product(
        self,
        site: Site,
        product: Product,
        a: torch.Tensor,
        b: torch.Tensor,
        roles: tuple[Role, Role],
    ) -> torch.Tensor:
        terms = _terms(product, a, b)
        if not a.numel() or not b.numel() or terms > _TERMS:
            if terms > _TERMS:
                self.stays(f"{site.name}, whose sums have more than {_TERMS} terms,")
            return product.compute(a, b)
        (a_scale, a_fixed), (b_scale, b_fixed) = _fix(site, product, a.detach(), b.detach())
        kind = _Kind(_modular(product), tuple(a.shape), tuple(b.shape))
        known = self._known.setdefault(f"{site.name} {kind}", _Known(kind))
        triple = known.ready.popleft() if known.ready else self._triple(kind)
        u1, u2, v1, v2 = self._masks(kind, triple.first)

        e, f = to_field(a_fixed - u1 - u2), to_field(b_fixed - v1 - v2)
        jobs: list[Job] = []
        for fleet, u, v in zip(self._workers, (u1, u2), (to_field(f.long() + v1), v2), strict=True):
            sent = [
                fleet.send(value.int(), role, site.name)
                for value, role in ((e, roles[0]), (u, roles[0]), (f, roles[1]), (v, roles[1]))
            ]
            jobs.append(fleet.product(kind.product, sent[0], sent[3], site=site.name))
            jobs.append(fleet.product(kind.product, sent[1], sent[2], site=site.name))
        total = triple.uv.long()
        for job in jobs:
            total = total + job.result().long()
        return (lift(to_field(total)).double() * (a_scale * b_scale)).to(a.dtype)

    # ------------------------------------------------------------------ masks

    def _triple(self, kind: _Kind) -> _Triple:
        first = self._drawn
        self._drawn += 2 * (math.prod(kind.a) + math.prod(kind.b))
        u1, u2, v1, v2 = self._masks(kind, first)
        return _Triple(first, kind.product.compute(to_field(u1 + u2), to_field(v1 + v2)))

    def _masks(self, kind: _Kind, first: int) -> list[torch.Tensor]:
        found = []
        for shape in (kind.a, kind.a, kind.b, kind.b):
            found.append(self._stream.tensor(first, shape).long())
            first += math.prod(shape)
        return found


def _modular(product: Product) -> Product:
    plain = product.operation
    operation = Operation(f"{plain.name}_mod", {**plain.attributes, "split": [True, True]})
    return Product(operation, product.rows, product.reduce)


def _terms(product: Product, a: torch.Tensor, b: torch.Tensor) -> int:
    """How many products one element of the result is the sum of, at most."""
    name = product.operation.name
    if name == "conv":
        return b[0].numel()
    if name == "conv_input":
        return b.numel() // max(1, b.shape[1])
    if name == "conv_weight":
        return a.numel() // max(1, a.shape[1])
    return a.shape[-2] if _contracts_rows(product) else a.shape[-1]


def _contracts_rows(product: Product) -> bool:
    operation = product.operation
    return operation.name == "matmul_weight" or bool(operation.attributes.get("transpose_a"))


def _norms(
    site: Site, product: Product, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers whose product bounds every element of B(a, b), whatever the signs.

    With a weight: the greatest |a| times the greatest sum of |w| into one result. Without one
    (weight gradients, attention) Cauchy and Schwarz: the norms of what is multiplied.
    """
    name = product.operation.name
    a, b = a.double(), b.double()
    if isinstance(site.map, MatrixProduct):
        down = -2 if _contracts_rows(product) else -1
        along = -1 if product.operation.attributes.get("transpose_b") else -2
        return _norm(a, [down]), _norm(b, [along])
    if _contracts_rows(product) or name == "conv_weight":
        return _norm(a, [d for d in range(a.dim()) if d != 1]), _norm(
            b, [d for d in range(b.dim()) if d != 1]
        )
    into = 0 if product.operation.attributes.get("transpose_b") or name == "conv" else 1
    return a.abs().max(), b.abs().sum(dim=[d for d in range(b.dim()) if d != into]).max()


def _norm(value: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """The greatest Euclidean norm over ``dims``."""
    return value.square().sum(dim=dims).max().sqrt()


def _fix(
    site: Site, product: Product, a: torch.Tensor, b: torch.Tensor
) -> tuple[tuple[float, torch.Tensor], tuple[float, torch.Tensor]]:
    """Both operands as int64 with what one step stands for; no result exceeds p/2.

    Raises:
        DataError: an operand is not finite.
    """
    na, nb = (float(n) for n in _norms(site, product, a, b))
    if not (math.isfinite(na) and math.isfinite(nb)):
        raise DataError(f"an operand of {site.name} is not finite", expected="finite numbers")
    if na == 0 or nb == 0:
        return (0.0, torch.zeros_like(a, dtype=torch.int64)), (
            0.0,
            torch.zeros_like(b, dtype=torch.int64),
        )
    # steps in inverse proportion to the root mean squares: both round off alike
    ra, rb = (float(t.double().square().mean().sqrt()) for t in (a, b))
    room = 0.95 * HALF
    while True:
        fa = math.sqrt(room / (na * nb) * rb / ra)
        fb = room / (na * nb) / fa
        qa, qb = ((t.double() * s).round().long() for t, s in ((a, fa), (b, fb)))
        ba, bb = _norms(site, product, qa, qb)
        if float(ba) * float(bb) <= HALF:
            return (1 / fa, qa), (1 / fb, qb)
        room /= 2  # rounding up small numbers made them too large
