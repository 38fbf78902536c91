"""Checking weights that the enclave does not see: their secret contractions, kept up to date.

Freivalds' check of Y = X W^T needs W^T r, not W. Where a weight lives with a worker and every
update of it is linear (SGD with momentum and weight decay), its contractions follow from those
of the gradients, which the enclave computes from both operands without ever forming dW = G^T X:

    dW^T r = X^T (G r),    dW q = G^T (X q),    (a V + b W)^T r = a V^T r + b W^T r

So a worker that updates with another gradient, another rate, or not at all is found out by the
next product with the weight. Workers round in every step and the recursion here does not, so
each :class:`Tracked` carries the variance that this may amount to (``docs/integrity.md``).

Shapes, for R repetitions: ``r`` (R, out), ``q`` (R, in); of a dense weight ``forward`` (in, R) and
``backward`` (out, R); of a convolution's (R, in, *kernel) and (out, R, *kernel). All float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.errors import IntegrityError
from cenacle.offload.contractions import Contracted
from cenacle.offload.maps import Convolution, Dense

__all__ = ["SLACK", "Tracked", "Vectors", "begin", "gradient", "known"]

SLACK: Final = 16.0
"""Standard deviations that the worker's roundings may amount to."""

Signs = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Vectors:
    """The secret of one weight: over its output and its input features."""

    map: Dense | Convolution
    r: torch.Tensor
    q: torch.Tensor

    def contract(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a weight, or of what has its shape: two passes over it."""
        r, q = self.r.to(w.dtype), self.q.to(w.dtype)
        if isinstance(self.map, Dense):
            # Vector by vector: a product with few columns runs at a tenth of memory's speed.
            forward = torch.stack([torch.mv(w.t(), one) for one in r], -1)
            backward = torch.stack([torch.mv(w, one) for one in q], -1)
        else:
            kernel = w.shape[2:]
            forward = torch.matmul(r, w.flatten(1)).view(len(r), w.shape[1], *kernel)
            backward = torch.matmul(q, w.flatten(2)).view(w.shape[0], len(q), *kernel)
        return forward.double(), backward.double()

    def contract_gradient(
        self, gy: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the weight's gradient, from what it is the product of."""
        r, q = self.r.to(gy.dtype), self.q.to(x.dtype)
        if isinstance(self.map, Dense):
            over_out = [torch.mv(x.t(), torch.mv(gy, one)) for one in r]
            over_in = [torch.mv(gy.t(), torch.mv(x, one)) for one in q]
            return torch.stack(over_out, -1).double(), torch.stack(over_in, -1).double()
        narrow_g = torch.matmul(r, gy.flatten(2)).view(len(gy), len(r), *gy.shape[2:])
        narrow_x = torch.matmul(q, x.flatten(2)).view(len(x), len(q), *x.shape[2:])
        forward = self.map.weight_gradient((len(r), *shape[1:])).operation
        backward = self.map.weight_gradient((shape[0], len(q), *shape[2:])).operation
        return execute(forward, (narrow_g, x)).double(), execute(backward, (gy, narrow_x)).double()

    def energies(
        self, forward: torch.Tensor, backward: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms, (R,) each."""
        return (
            forward.square().flatten(1).sum(1 if isinstance(self.map, Convolution) else 0),
            backward.square().flatten(2).sum((0, 2))
            if isinstance(self.map, Convolution)
            else backward.square().sum(0),
        )


@dataclass(frozen=True)
class Tracked:
    """What a weight, a gradient or a momentum at a worker has to be, contracted.

    Attributes:
        noise: (2, R): variance of the worker's roundings so far, in squared unit roundoffs.
    """

    vectors: Vectors
    forward: torch.Tensor
    backward: torch.Tensor
    noise: torch.Tensor

    def combined(self, other: Tracked, scale: float, alpha: float) -> Tracked:
        """Of scale self + alpha other, of the same secret."""
        assert self.vectors is other.vectors
        forward = scale * self.forward + alpha * other.forward
        backward = scale * self.backward + alpha * other.backward
        noise = scale**2 * self.noise + alpha**2 * other.noise
        # The multiplication rounds, and the sum.
        for found in ((forward, backward), (scale * self.forward, scale * self.backward)):
            noise = noise + torch.stack(self.vectors.energies(*found))
        return Tracked(self.vectors, forward, backward, noise)

    def contracted(
        self, operation: Operation, repetitions: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Contracted]:
        """For the check of a product with the weight: the secret, and the weight under it."""
        back = operation.name == "conv_input" or (
            operation.name == "matmul" and not operation.attributes.get("transpose_b")
        )
        convolution = operation.name.startswith("conv")
        value = self.backward if back else self.forward
        energy = self.vectors.energies(self.forward, self.backward)[back] + self.noise[int(back)]
        if convolution:
            value = value[:, :repetitions] if back else value[:repetitions]
        else:
            value = value[:, :repetitions]
        secret = self.vectors.q if back else self.vectors.r
        return secret[:repetitions], Contracted(value.to(dtype), energy[:repetitions])

    def verify(self, found: torch.Tensor, site: str) -> None:
        """Raise :class:`IntegrityError` if ``found``, from a worker, is not what it has to be."""
        u = torch.finfo(found.dtype).eps / 2
        energies = torch.stack(self.vectors.energies(self.forward, self.backward))
        # The contraction itself sums as many terms as the weight has features.
        bound = SLACK * u * (self.noise + energies * (1 + math.prod(found.shape[:2]) / 9)).sqrt()
        wants = (self.forward, self.backward)
        for got, want, limit in zip(self.vectors.contract(found), wants, bound, strict=True):
            # One number of each repetition is allowed what all of them may amount to.
            error = (got - want).abs()
            along = self._along(error, want is self.backward)
            if not bool((error <= limit.view(along)).all()):  # NaN is wrong
                raise IntegrityError(
                    f"a weight for {site} is not what its updates make of it",
                    found="contractions beyond what rounding can explain",
                )

    def _along(self, value: torch.Tensor, back: bool) -> list[int]:
        """The shape in which one number for each repetition meets ``value``."""
        where = (1 if back else 0) if isinstance(self.vectors.map, Convolution) else value.dim() - 1
        return [-1 if dim == where else 1 for dim in range(value.dim())]


def begin(map_: Dense | Convolution, w: torch.Tensor, repetitions: int, signs: Signs) -> Tracked:
    """Start with a weight that the enclave has."""
    vectors = Vectors(map_, signs(repetitions, w.shape[0]), signs(repetitions, w.shape[1]))
    return known(vectors, w)


def known(vectors: Vectors, w: torch.Tensor) -> Tracked:
    """Of a tensor that the enclave has, e.g. a momentum."""
    forward, backward = vectors.contract(w)
    return Tracked(vectors, forward, backward, torch.zeros(2, len(vectors.r), dtype=torch.float64))


def gradient(
    vectors: Vectors, gy: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]
) -> Tracked:
    """Of a weight gradient that a worker computes from both operands."""
    forward, backward = vectors.contract_gradient(gy, x, shape)
    terms = gy.shape[0] * math.prod(gy.shape[2:])
    noise = torch.stack(vectors.energies(forward, backward)) * (1 + terms / 9)
    return Tracked(vectors, forward, backward, noise)
