"""``masked`` (Slalom): workers see uniformly random numbers; for inference.

A layer's weight and input become integers W and X (fixed point), and the worker gets
X + R modulo p for a mask R that is used once and then never again. It answers (X + R) W, from
which the enclave takes R W, computed before the input was there. Since R is uniform, X + R is
uniform and independent of X. See ``docs/schemes/masked.md``.

Source: Tramer and Boneh, Slalom: Fast, Verifiable and Private Execution of Neural Networks in
Trusted Hardware (ICLR 2019), section 3; the check is their preprocessed variant of Freivalds'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.operations import PRIME
from cenacle.accelerators.protocol import Operation
from cenacle.crypto import SecretBytes
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError, IntegrityError
from cenacle.offload.field import FieldStream, fix_weight, row_scales
from cenacle.offload.field_kernels import kernels
from cenacle.offload.fleet import Fleet
from cenacle.offload.maps import Product
from cenacle.offload.mask_store import Mask, MaskPlan, MaskStore
from cenacle.offload.schemes.base import (
    Fused,
    Gradients,
    Needs,
    Scheme,
    Site,
    add_bias,
    register,
)
from cenacle.offload.schemes.masked_layers import (
    Check,
    Layer,
    Traced,
    digest_of,
    plan_for,
    product_of,
)

__all__ = ["Masked"]

_LOWEST: Final = np.float32(-np.inf)
_CACHED: Final = 8 << 20  # bytes; a larger tensor is not in the cache when it is read again
_WIDE: Final = 2**36  # sums of weights above this need limbs in the check's preparation


@register
class Masked(Scheme):
    """Inference on workers that see nothing but random numbers, and the weights.

    Args:
        store: where masks come from; without one, masks live in this process alone and are
            lost with it. A store that is given stays open when the session ends.
        refill: samples to prepare more masks for, inside the enclave, when the store is used
            up; 0: raise :class:`UnavailableError` then.
    """

    name: ClassVar[str] = "masked"
    fuses_relu: ClassVar[bool] = True
    fuses_pool: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = False
    verified: ClassVar[bool] = False  # it checks while it unmasks

    def __init__(self, store: MaskStore | None = None, *, refill: int = 0) -> None:
        super().__init__()
        self._given, self._store = store, store
        self._refill = refill
        self._model: nn.Module | None = None
        self._layers: dict[str, Layer] = {}
        self._known: dict[str, Traced] = {}
        self._tracing = False
        self._buffers = Buffers()
        self._secrets = SecretBytes.random(64)
        self._drawn = 0

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="hidden",
            weights="plaintext",
            activations="hidden",
            gradients="hidden",
            labels="hidden",
            note=(
                "Workers get inputs and activations plus masks that are used once: uniform "
                "numbers modulo 2^31 - 1, independent of the data as long as AES-256 in "
                "counter mode cannot be told from random. They know the weights (in fixed "
                "point), the model's layers, shapes, batch sizes and timing. No gradient or "
                "label is sent. Products of two activations (attention) stay in the enclave."
            ),
        )

    @property
    def store(self) -> MaskStore:
        """Where masks come from; ``store.remaining`` tells how many."""
        if self._store is None:
            self._store = MaskStore()
        return self._store

    @property
    def hinders_privacy(self) -> str:
        return "it is for inference, and private steps train; use permuted or lowrank"

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        super().attach(fleet, model)
        self._model = model

    def detach(self) -> None:
        self._layers.clear()
        self._known.clear()
        self._model = None
        if self._store is not None and self._given is None:
            self._store.close()
            self._store = None

    # ------------------------------------------------------------------ offline

    def prepare(self, model: nn.Module, example: Any, count: int) -> None:
        """Make masks for ``count`` samples; what is left in the store is given up.

        It computes every layer in the enclave, once for each mask, before inputs are there.

        Args:
            model: the session's model.
            example: an input of the model (a tensor, or a tuple or mapping of arguments) with
                one sample or more; only its shape counts.
            count: samples.

        Raises:
            InputError: not within the session's block, or the model has no layer to send.
            UnavailableError: no room for the masks.
        """
        if self._model is None or model is not self._model:
            raise InputError(
                "masks are prepared for the model of an open session",
                remedy="call session.scheme.prepare(model, ...) within the `with` block",
            )
        self._known.clear()
        self._tracing = True
        try:
            with torch.no_grad():
                samples = _run(model, example)
        finally:
            self._tracing = False
        self._fill(samples, count)

    def _fill(self, samples: int, count: int) -> None:
        plans = [plan_for(name, one, samples) for name, one in self._known.items() if one.rows]
        if not plans:
            raise InputError("the model has no layer that the scheme masked can send")
        for one in self._known.values():
            if one.shape not in one.layer.checks:
                one.layer.checks[one.shape] = self._check(one.site, one.layer, one.shape)
        self._samples = samples
        self.store.fill(plans, count, self._correct)

    def _correct(self, plan: MaskPlan, mask: torch.Tensor) -> torch.Tensor:
        traced = self._known[plan.name]
        rows = mask.view(-1, *traced.shape)
        return product_of(traced.site).compute(rows, traced.layer.fixed.values).flatten(1)

    # ------------------------------------------------------------------ online

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return self._forward(site, x, w, bias, _LOWEST)

    def forward_relu(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return self._forward(site, x, w, bias, np.float32(0))

    def forward_fused(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        pool: int | None,
    ) -> tuple[torch.Tensor, Any, Any]:
        y, saved = self.forward_relu(site, x, w, bias)
        if pool is None:
            return y, None, saved  # no gradient is ever asked for
        if y.dtype != torch.float32 or not y.is_contiguous():
            return functional.max_pool2d(y, 2), None, saved
        small = self._buffers.empty((*y.shape[:2], y.shape[2] // 2, pool // 2))
        kernels().pool(y.detach().view(-1).numpy(), pool, small.view(-1).numpy())
        return small, None, saved

    def _forward(
        self,
        site: Site,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        lowest: np.float32,
    ) -> tuple[torch.Tensor, Any]:
        """max(B(x, w) + bias, lowest)."""
        if not site.weight or not len(x):
            if not site.weight:
                self.stays(f"{site.name}, a product without a weight of the model,")
            return _inside(site, x, w, bias, lowest), None
        layer = self._layer(site, w)
        shape = tuple(x.shape[1:])
        name = f"{site.name} {'x'.join(map(str, shape))}"
        traced = self._known.setdefault(name, Traced(site, shape, layer))
        traced.layer = layer
        if self._tracing:
            traced.rows.append(len(x))
            return _inside(site, x, w, bias, lowest), None
        check = layer.checks.get(shape)
        if check is None:
            check = layer.checks[shape] = self._check(site, layer, shape)
        plain = x.detach().to(torch.float32).contiguous()
        y = self._masked(site, name, layer, check, plain, bias, lowest)
        return y.to(x.dtype), None

    def _masked(
        self,
        site: Site,
        name: str,
        layer: Layer,
        check: Check,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        lowest: np.float32,
    ) -> torch.Tensor:
        rows, fixed = len(x), layer.fixed
        flat = x.view(rows, -1)
        inverse, back = row_scales(flat, fixed.steps)
        mask = self._take(name, rows, digest_of(fixed, x.shape[1:]))
        sent = self.fleet.empty(*x.shape, dtype=torch.int32)
        source, target = flat.view(-1).numpy(), sent.view(-1).numpy()
        expected = np.zeros(rows, np.uint64)
        passes, row, past = kernels(), flat.shape[1], sent.nbytes > _CACHED
        for at, words in mask.consume():
            piece = slice(at, at + len(words))
            passes.blind(
                source[piece], inverse, words, check.z, row, at, expected, target[piece], past
            )
        parcel = self.fleet.send(sent, site.role, site.name)
        job = self.fleet.product(product_of(site), parcel, layer.weight, site=site.name)

        y = self._buffers.empty((rows, *check.shape))
        result = y.view(rows, -1).numpy()
        scale = fixed.scale.numpy()
        offset = np.zeros_like(scale) if bias is None else bias.detach().float().numpy()
        space, size, past = len(check.r), result.shape[1], y.nbytes > _CACHED

        def unmask(part: slice, found: torch.Tensor) -> None:
            if found.dtype != torch.int32 or found.numel() != size * (part.stop - part.start):
                raise IntegrityError(f"a result for {site.name} has the wrong form")
            values = found.contiguous().view(-1).numpy()
            out = result[part].reshape(-1)
            seen, outside = np.zeros(part.stop - part.start, np.uint64), False
            factors = back[part]
            for at, correction in mask.corrections(part.start, part.stop):
                start = at - part.start * size
                piece = slice(start, start + len(correction))
                outside |= passes.unblind(
                    values[piece], correction, check.r, check.s, factors, scale, offset,
                    lowest, space, start, seen, out[piece], past,
                )  # fmt: skip
            if outside or not np.array_equal(seen, expected[part]):
                raise IntegrityError(
                    f"a result for {site.name} is wrong",
                    found="a product that fails Freivalds' check",
                )

        job.collect(unmask)
        return y

    def backward(
        self,
        site: Site,
        saved: Any,  # noqa: ARG002
        gy: torch.Tensor,  # noqa: ARG002
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,  # noqa: ARG002
        needs: Needs,  # noqa: ARG002
    ) -> Gradients:
        raise InputError(
            f"masked training needs two workers (layer {site.name})",
            expected="inference alone under the scheme masked",
            remedy="train under the scheme masked-training",
        )

    def backward_fused(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        fused: Fused,  # noqa: ARG002
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        return self.backward(site, saved, gy, x, w, needs)

    # ------------------------------------------------------------------ parts

    def _take(self, name: str, rows: int, digest: str) -> Mask:
        if self._refill and self._known[name].rows and self.store.lacks(name, rows):
            self._fill(self._samples, self._refill)
        return self.store.take(name, rows, digest)

    def _layer(self, site: Site, w: torch.Tensor) -> Layer:
        """Quantised and sent once for each of its values."""
        known = self._layers.get(site.name)
        if known is None or known.key != site.key:
            fixed = fix_weight(w, site.map)
            known = Layer(site.key, fixed, self.fleet.send(fixed.values, "weights", site.name))
            self._layers[site.name] = known
        return known

    def _check(self, site: Site, layer: Layer, shape: tuple[int, ...]) -> Check:
        weight = layer.fixed.values
        one = torch.empty((1, *shape), device="meta", dtype=torch.float64)
        form = tuple(site.map.forward().compute(one, weight.to("meta", torch.float64)).shape[1:])
        s, r = self._draw(form[0]), self._draw(math.prod(form[1:]))
        vector = (s.long().unsqueeze(1) * r.long()) % PRIME
        wide = int(weight.long().abs().sum()) >= _WIDE
        forward = site.map.input_gradient((1, *shape)).operation
        attributes = {**forward.attributes, "split": [True, wide]}
        transposed = Product(Operation(f"{forward.name}_mod", attributes), (True, False))
        z = transposed.compute(vector.view(1, *form), weight).view(-1)
        words = [t.contiguous().numpy().view(np.uint32) for t in (r, s, z)]
        return Check(words[0], words[1], words[2], form)

    def _draw(self, count: int) -> torch.Tensor:
        first, self._drawn = self._drawn, self._drawn + count
        return FieldStream(self._secrets).tensor(first, (count,))


def _inside(
    site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, lowest: np.float32
) -> torch.Tensor:
    y = add_bias(site.map.forward().compute(x, w), bias)
    return y if lowest == _LOWEST else y.clamp_min_(float(lowest))


def _run(model: nn.Module, example: Any) -> int:
    """Run the model on an example; returns its number of samples."""
    if isinstance(example, torch.Tensor):
        model(example)
        values: list[Any] = [example]
    elif isinstance(example, Mapping):
        model(**example)
        values = list(example.values())
    else:
        model(*example)
        values = list(example)
    samples = [len(v) for v in values if isinstance(v, torch.Tensor) and v.dim() > 0]
    if not samples or samples[0] < 1:
        raise InputError("an example has no samples", expected="a tensor with one or more")
    return samples[0]
