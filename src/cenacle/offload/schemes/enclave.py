"""``enclave``: everything stays inside. The reference for every speed-up."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from cenacle.documents.receipt import LeakageRecord
from cenacle.offload.schemes.base import (
    Gradients,
    Needs,
    Scheme,
    Site,
    add_bias,
    bias_gradient,
    register,
)

__all__ = ["Enclave"]


@register
class Enclave(Scheme):
    """Computes every map in the enclave, and sends nothing."""

    name: ClassVar[str] = "enclave"

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="hidden",
            weights="hidden",
            activations="hidden",
            gradients="hidden",
            labels="hidden",
            note="Nothing leaves the enclave: all algebra is done inside.",
        )

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return add_bias(site.map.forward().compute(x, w), bias), None

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
        return Gradients(
            site.map.input_gradient(x.shape).compute(gy, w) if needs.x else None,
            site.map.weight_gradient(w.shape).compute(gy, x) if needs.w else None,
            bias_gradient(gy, site.map) if needs.bias else None,
        )
