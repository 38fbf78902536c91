"""``permuted`` (Tempo): rows and columns change places and signs. Obfuscation, not encryption.

A product Y = X W^T is disguised by one signed permutation for each of its three dimensions:
M for samples, N for input features, P for output features. Workers get X' = M X N^T and
W' = P W N^T and return Y' = X' W'^T = M Y P^T. For a gradient G of Y they get G' = M G P^T and
return G' W' = M dX N^T and G'^T X' = P dW N^T. A signed permutation's inverse is its
transpose, so one blinded copy of each tensor serves all three products; nothing is rounded.

Shape suffixes are not used here: every tensor is moved as (rows, columns, plane), where a plane
is what keeps its inner order, e.g. an image, a filter, or a single number.

Source: Tempo (confidential training of deep networks with permuted linear algebra), rebuilt
from its formulas, with signs in place of its real coefficients as the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from torch import nn

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.protocol import Operation
from cenacle.crypto.memory import SecretBytes
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError, IntegrityError, RefusedError
from cenacle.offload.fleet import Fleet, Job, Parcel, Role
from cenacle.offload.integrity import Check
from cenacle.offload.kernels import move_planes
from cenacle.offload.keystream import Keystream
from cenacle.offload.maps import Convolution, Dense, MatrixProduct, Product
from cenacle.offload.public_base import public_base
from cenacle.offload.schemes.base import Gradients, Needs, Scheme, Site, register
from cenacle.offload.schemes.permuted_keys import (
    Coefficients,
    Frame,
    Key,
    Keys,
    nested,
    weight_frame,
)

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

    map: _Map
    x: Parcel
    w: Parcel


@dataclass(frozen=True)
class _Map:
    """One use of a map: its three products, and the frames of all tensors in them.

    ``flipped``: ``w`` is a transposed view, as in GPT-2's layers and in Q K^T. Its memory is
    blinded as it lies, and the product takes the transposition.
    """

    forward: Product
    input_gradient: Product
    weight_gradient: Product
    x: Frame
    w: Frame
    y: Frame
    flipped: bool
    x_shape: torch.Size
    w_shape: torch.Size

    @property
    def gy(self) -> Frame:
        """Of the gradient of y: reciprocal, so that rows cancel against those of x."""
        return Frame(self.y.rows.dual, self.y.cols.dual)

    @property
    def gx(self) -> Frame:
        return Frame(self.x.rows.dual, self.x.cols.dual)

    @property
    def gw(self) -> Frame:
        return Frame(self.w.rows.dual, self.w.cols.dual)


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
    keeps_input: ClassVar[bool] = False

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
        self._buffers = Buffers()

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="obfuscated",
            weights="obfuscated",
            activations="obfuscated",
            gradients="obfuscated",
            labels="obfuscated",
            note=_NOTE + (_NOTE_GENERAL if self.coefficients == "general" else _NOTE_SIGNS),
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

    def detach(self) -> None:
        self._weights.clear()
        self._buffers.close()

    # ------------------------------------------------------------------ the three products

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
        flipped = _is_flipped(site, w)
        inner, outer, weight = self._weight(site, w, flipped)
        use = self._map(site, x.shape, w.shape, flipped, inner, outer)
        sent = self._send(x, use.x, site.role, site.name)
        if weight is None:
            role: Role = "activations" if isinstance(site.map, MatrixProduct) else "weights"
            weight = self._send(w.mT if flipped else w, use.w, role, site.name)
        job = self.fleet.product(use.forward, sent, weight, site=site.name)
        y = self._open(job, _y_shape(site, x.shape, w.shape), use.y, bias, relu=relu)
        return y, _Saved(use, sent, weight)

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

    def backward_relu(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,  # noqa: ARG002
        needs: Needs,
    ) -> Gradients:
        return self._backward(site, saved, gy, y, needs)

    def _backward(
        self, site: Site, saved: _Saved, gy: torch.Tensor, gate: torch.Tensor | None, needs: Needs
    ) -> Gradients:
        use = saved.map
        sums = torch.zeros(gy.shape[1], dtype=torch.float64) if needs.bias else None
        gradient = self._send(gy, use.gy, "gradients", site.name, sums, gate)
        first = second = None
        if needs.x:
            first = self.fleet.product(use.input_gradient, gradient, saved.w, site=site.name)
        if needs.w:  # computed while the enclave unblinds the other
            second = self.fleet.product(use.weight_gradient, gradient, saved.x, site=site.name)
        dx = dw = None
        if first is not None:
            dx = self._open(first, use.x_shape, use.gx)
        if second is not None:
            shape = use.w_shape
            if use.flipped:
                dw = self._open(second, (*shape[:-2], shape[-1], shape[-2]), use.gw).mT
            else:
                dw = self._open(second, shape, use.gw)
        return Gradients(dx, dw, None if sums is None else sums.to(gy.dtype))

    # ------------------------------------------------------------------ blinding

    def _send(
        self,
        value: torch.Tensor,
        frame: Frame,
        role: Role,
        site: str,
        sums: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> Parcel:
        value = value.detach().contiguous()
        blinded = self.fleet.empty(*value.shape, dtype=value.dtype)
        rows, cols = frame
        move_planes(
            frame.planes(value),
            frame.planes(blinded),
            rows.index,
            cols.index,
            rows.scale,
            cols.scale,
            sums=sums,
            gate=None if gate is None else frame.planes(gate.detach().contiguous()),
        )
        return self.fleet.send(blinded, role, site)

    def _open(
        self,
        job: Job,
        shape: Sequence[int],
        frame: Frame,
        bias: torch.Tensor | None = None,
        *,
        relu: bool = False,
    ) -> torch.Tensor:
        """Unblind each part as it arrives, straight from where the worker put it.

        Parts of a sum are whole and are added in order; others are rows.
        """
        summed = job.product.reduce == "sum"
        found: list[torch.Tensor] = []
        each = len(frame.rows) // max(1, shape[0])  # of the frame's rows in one of the tensor
        back = frame.cols.inverse

        def consume(rows: slice, part: torch.Tensor, check: Check | None) -> None:
            expected = shape if summed else (rows.stop - rows.start, *shape[1:])
            if part.shape != torch.Size(expected):
                raise IntegrityError(
                    "a result has the wrong shape",
                    found=tuple(part.shape),
                    expected=tuple(expected),
                )
            if check is not None:  # of a copy: what is checked must be what is used
                part = check.verify(self._buffers.empty(part.shape, part.dtype).copy_(part))
            own = self._buffers.empty(shape, part.dtype) if summed or not found else found[0]
            whole = frame.planes(own)
            chosen = slice(0, None) if summed else slice(rows.start * each, rows.stop * each)
            into = frame.rows.index[chosen]
            move_planes(
                part.contiguous().view(len(into), *whole.shape[1:]),
                whole,
                np.arange(len(into), dtype=np.int32),
                back.index,
                np.reciprocal(frame.rows.scale[chosen]),
                back.scale,
                into=into,
                bias=None if bias is None else bias.detach().contiguous(),
                relu=relu,
            )
            if not found:
                found.append(own)
            elif summed:
                found[0] += own

        job.collect_fused(consume)
        return found[0]

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
        parcel = self._send(w.mT if flipped else w, frame, "weights", site.name)
        uses = 1 + (known.uses if known else 0)
        self._weights[name] = _Weight(*keys, site.key, parcel, uses)
        return *keys, parcel

    def _map(
        self,
        site: Site,
        x_shape: torch.Size,
        w_shape: torch.Size,
        flipped: bool,
        inner: Key,
        outer: Key,
    ) -> _Map:
        map_ = site.map
        samples = self._keys.one(x_shape[0])
        forward, input_gradient = map_.forward(), map_.input_gradient(x_shape)
        weight_gradient = map_.weight_gradient(w_shape)
        if flipped:
            forward, input_gradient, weight_gradient = _flipped(map_)
        if not isinstance(map_, MatrixProduct):
            groups = map_.groups if isinstance(map_, Convolution) else 1
            x, y = Frame(samples, inner), Frame(samples, outer)
            w = weight_frame(inner, outer, groups, flipped)
        else:
            rows = nested(samples, self._keys.one(x_shape[1]))
            x, y = Frame(rows, inner), Frame(rows, outer)
            # Matrices of w are scaled by nothing: those of x are already.
            plain = Key(samples.index, np.ones_like(samples.scale))
            if flipped:
                w = Frame(nested(plain, outer), inner.dual)
            else:
                w = Frame(nested(plain, inner.dual), outer)
        return _Map(forward, input_gradient, weight_gradient, x, w, y, flipped, x_shape, w_shape)


def _is_flipped(site: Site, w: torch.Tensor) -> bool:
    return not isinstance(site.map, Convolution) and not w.is_contiguous() and w.mT.is_contiguous()


def _flipped(map_: Dense | MatrixProduct | Any) -> tuple[Product, Product, Product]:
    """The three products where ``w`` is given with its last two dimensions exchanged."""
    rows = (True, not isinstance(map_, Dense))
    crossed, plain = Operation("matmul", {"transpose_b": True}), Operation("matmul")
    if isinstance(map_, Dense):
        return (
            Product(plain, rows),
            Product(crossed, rows),
            Product(Operation("matmul_weight"), (True, True), "sum"),
        )
    return (
        Product(crossed, rows),
        Product(plain, rows),
        Product(Operation("matmul", {"transpose_a": True}), (True, True)),
    )


def _y_shape(site: Site, x_shape: torch.Size, w_shape: torch.Size) -> tuple[int, ...]:
    if isinstance(site.map, Convolution):
        return (x_shape[0], w_shape[0], *site.map.space(x_shape, w_shape))
    return (*x_shape[:-1], w_shape[-1 if isinstance(site.map, MatrixProduct) else 0])


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
