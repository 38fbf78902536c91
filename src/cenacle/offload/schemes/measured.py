"""``measured`` (Perun): no blinding. The accelerators' host is attested, and counts as enclave.

The contract accepts the host's evidence (TPM and IMA, or GPU confidential computing), so what
its workers see does not leave the attested platform. Measured is not confidential: whoever has
the host's memory has the data. Results are not checked, because the host is trusted with them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from cenacle.documents.receipt import LeakageRecord
from cenacle.offload.fleet import Parcel
from cenacle.offload.schemes.base import (
    Gradients,
    Needs,
    Scheme,
    Site,
    add_bias,
    bias_gradient,
    register,
)

__all__ = ["Measured"]


@register
class Measured(Scheme):
    """Sends every operand as it is."""

    name: ClassVar[str] = "measured"
    verified: ClassVar[bool] = False
    # The parcel is x itself where memory is not shared: torch is to notice if it is overwritten.
    keeps_input: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[str, tuple[tuple[int, int], Parcel]] = {}

    @property
    def leakage(self) -> LeakageRecord:
        return LeakageRecord(
            scheme=self.name,
            inputs="plaintext",
            weights="plaintext",
            activations="plaintext",
            gradients="plaintext",
            labels="plaintext",
            note=(
                "Nothing is disguised: the accelerators' host sees all of it and is trusted "
                "because its software was measured. Measured is not confidential. Labels are "
                "not sent, but the gradients of the last layer tell them."
            ),
        )

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        sent = self.fleet.send(x, site.role, site.name)
        weight = self._weight(site, w)
        job = self.fleet.product(site.map.forward(), sent, weight, site=site.name)
        return add_bias(job.result(), bias), (sent, weight, x.shape)

    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,  # noqa: ARG002
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        sent, weight, shape = saved
        gradient = self.fleet.send(gy, "gradients", site.name)
        first = second = None
        if needs.x:
            product = site.map.input_gradient(shape)
            first = self.fleet.product(product, gradient, weight, site=site.name)
        if needs.w:
            product = site.map.weight_gradient(w.shape)
            second = self.fleet.product(product, gradient, sent, site=site.name)
        return Gradients(
            first.result() if first else None,
            second.result() if second else None,
            bias_gradient(gy, site.map) if needs.bias else None,
        )

    def _weight(self, site: Site, w: torch.Tensor) -> Parcel:
        """Sent once for each of its values."""
        if not site.weight:
            return self.fleet.send(w, "activations", site.name)
        known = self._weights.get(site.name)
        if known is None or known[0] != site.key:
            # A copy: the optimizer changes the weight in place while the worker may read it.
            known = site.key, self.fleet.send(w.clone(), "weights", site.name)
            self._weights[site.name] = known
        return known[1]

    def detach(self) -> None:
        self._weights.clear()
