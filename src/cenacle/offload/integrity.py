"""Freivalds' check of every product that a worker returns.

For Y = B(a, b) the enclave draws secret random vectors, contracts Y with them, contracts the
operands instead, and compares: about one pass over each tensor, whatever the product costs.
Operands lie in the enclave's own memory, so the check needs nothing from a scheme.

Real arithmetic has rounding errors, so there are two stages (``docs/integrity.md`` derives
both bounds and says what is caught with which probability):

1. The contraction has to agree within a *statistical* bound, which is tight. An honest worker
   exceeds it next to never; nothing happens to it if it does.
2. If it does not, the enclave computes the product itself in float64 and compares element by
   element. A worker is accused only of an element that no order of summation can explain:
   beyond gamma_n times the sum of the products' magnitudes (Higham, Accuracy and Stability of
   Numerical Algorithms, 2nd edition, SIAM 2002, sections 3.1 and 3.5). Elements between the
   two bounds are replaced by the enclave's own.

Field arithmetic is exact: a wrong result passes with probability at most 2 / p for each
repetition.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Final

import torch

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.errors import InputError, IntegrityError
from cenacle.offload.contractions import (
    BUNDLE,
    Contracted,
    Entropy,
    Expected,
    ExpectedProduct,
    Vectors,
    contract,
    depth,
    lengths,
    result_shape,
    secret_signs,
)
from cenacle.offload.expectations import contract_operand, expected, sketched
from cenacle.offload.matrix_passes import COUNT, Asked, MatrixSketch
from cenacle.offload.passes import Sketch, sketch_for
from cenacle.offload.residues import FieldCheck
from cenacle.offload.sketches import Sketches
from cenacle.offload.tolerance import Tolerance
from cenacle.offload.tracking import Tracked

__all__ = ["Check", "Doubt", "Verifier"]

SOFT: Final = 32.0
"""Statistical bound of stage 2, for single elements: SOFT sqrt(n) u, of at most n u."""

_GUARD: Final = 64
"""Roundings that are not sums: transforms of fast convolutions, conversions."""

_MANY: Final = 256
"""Images of so many positions are contracted once: each position is a number of its own."""

_FOLDS: Final = 2
"""Vectors with which channels of a convolution's operand are contracted while it is written."""

_BLOCK: Final = 1 << 23
"""Elements of the result that stage 2 computes at once."""


class Doubt(IntegrityError):  # noqa: N818 - it is none yet
    """A contraction does not agree: stage 2 has to decide. Not yet an accusation."""


class Verifier:
    """Checks products. One serves one fleet.

    Args:
        repetitions: independent vectors; the probability that an error slips through is
            raised to this power. Images of many positions have one vector, and as many numbers
            to compare as positions.
        roundoff: unit roundoff of the workers' arithmetic; None: that of the operands' type
            (2^-24 for float32, 2^-53 for float64). TF32 tensor cores have 2^-11.
        entropy: secret random bytes; anything else than the default is for tests.

    Attributes:
        doubts: how often stage 2 had to decide. Much more than 0 with honest workers means
            that ``roundoff`` is smaller than theirs.

    Raises:
        InputError: ``repetitions`` or ``roundoff`` is out of range.
    """

    def __init__(
        self,
        *,
        repetitions: int = 2,
        roundoff: float | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        if repetitions < 1 or (roundoff is not None and not 0 < roundoff < 0.25):
            raise InputError(
                "a verifier's settings are out of range",
                found=f"repetitions {repetitions}, roundoff {roundoff}",
                expected="at least 1 repetition, a roundoff between 0 and 0.25",
            )
        self.repetitions = repetitions
        self.roundoff = roundoff
        self.doubts = 0
        self._entropy = entropy
        self._shared: weakref.WeakKeyDictionary[
            object, dict[tuple[str, str, int], tuple[torch.Tensor, Contracted]]
        ] = weakref.WeakKeyDictionary()
        self._sketches = Sketches()

    def expect(
        self,
        operation: Operation,
        operands: Sequence[torch.Tensor],
        *,
        owner: object | None = None,
        site: str = "",
    ) -> Check:
        """Prepare the check of one product; best done while the worker computes.

        Args:
            operation: what the worker was asked for.
            operands: as in the enclave's memory; rows of a part only.
            owner: what ``operands[1]`` belongs to if other products share it (a parcel): its
                contraction is kept for as long as the owner lives.
            site: for error messages.
        """
        return Check(self, operation, tuple(operands), owner, site)

    def sketch(
        self, operand: torch.Tensor, plane: int, buffers: Buffers, *, folded: bool
    ) -> Sketch | None:
        """Room to contract a convolution's operand while it is written.

        Checks of products with the very same ``operand`` use what they find there, for as long
        as it lives; so it must be written before they begin, and not changed after that.

        Args:
            operand: (rows, channels, *space), contiguous, in the enclave's memory; whole, not
                a part's rows.
            folded: contract channels too, for a weight gradient.

        Returns:
            None: not in this arithmetic, or not with so many repetitions.
        """
        rows, channels = operand.shape[:2]
        if operand.dtype != torch.float32 or self.repetitions > _FOLDS:
            return None
        bundle = min(BUNDLE, rows)
        s = self._samples(rows, bundle)
        q = self.signs(_FOLDS, channels)
        found = sketch_for(rows, channels, plane, s, q, bundle, buffers, folded=folded)
        self._sketches.keep(operand, found)
        return found

    def sketch_matrix(self, operand: torch.Tensor, asked: Asked) -> MatrixSketch | None:
        """Room to contract a matrix product's operand while it is written; as :meth:`sketch`.

        Args:
            operand: (rows, columns), or a batch (batch, rows, columns); contiguous.
            asked: what its products' checks need; of operands without a sketch nothing.
        """
        if self.repetitions != COUNT:
            return None
        return self._sketches.new_matrix(operand, asked, self.signs)

    def sketched(self, operand: torch.Tensor) -> Sketch | None:
        """What :meth:`sketch` was given for this operand."""
        return self._sketches.image(operand)

    def _samples(self, rows: int, bundle: int) -> torch.Tensor:
        if bundle == 1:
            return torch.ones(rows, dtype=torch.float64)
        return self._rows(rows, bundle)

    def expect_tracked(
        self,
        operation: Operation,
        operands: Sequence[torch.Tensor],
        tracked: Tracked,
        recall: Callable[[], torch.Tensor],
        *,
        site: str = "",
    ) -> Check:
        """As :meth:`expect` where a worker keeps the second operand.

        Args:
            operands: the second one on the ``meta`` device: only its shape is known.
            tracked: what it has to be, contracted.
            recall: fetches and verifies it, should stage 2 have to decide.
        """
        return Check(self, operation, tuple(operands), None, site, tracked, recall)

    def signs(self, *shape: int) -> torch.Tensor:
        """Secret numbers, float64; see :func:`cenacle.offload.contractions.secret_signs`."""
        return secret_signs(shape, self._entropy)

    def _rows(self, rows: int, bundle: int) -> torch.Tensor:
        """For samples. Not so balanced that samples which are all alike cancel: the scale of
        errors is estimated from what is left."""
        found = self.signs(rows)
        for part in found.split(bundle):  # type: ignore[no-untyped-call]
            while len(part) > 1 and float(part.sum().square() / part.square().sum()) < 1 / 16:
                part.copy_(self.signs(len(part)))
        return found

    def _vectors(
        self,
        operation: Operation,
        operands: Sequence[torch.Tensor],
        owner: object | None,
        tracked: Tracked | None,
        sketches: Sequence[Sketch | None],
    ) -> tuple[Vectors, Contracted | None]:
        features, rows, inputs = lengths(operation, operands)
        bundle = min(BUNDLE, rows) if rows else 1
        repetitions = self.repetitions
        if rows and -(-rows // bundle) * math.prod(operands[0].shape[2:]) >= _MANY:
            repetitions = 1
        shared: Contracted | None = None
        if tracked is not None:
            r, shared = tracked.contracted(operation, repetitions, operands[0].dtype)
        elif owner is None or inputs:
            r = self.signs(repetitions, features)
        else:
            key = operation.name, repr(sorted(operation.attributes.items())), repetitions
            kept = self._shared.setdefault(owner, {})
            if key not in kept:
                r = self.signs(repetitions, features)
                kept[key] = r, contract_operand(operation, operands, Vectors(r))
            r, shared = kept[key]
        s = None
        if rows:
            s = self._samples(rows, bundle) if sketches[0] is None else sketches[0].s
        q = self.signs(repetitions, inputs) if inputs else None
        if inputs and sketches[0] is not None and sketches[0].folds is not None:
            r = sketches[0].q[:repetitions]
        if inputs and sketches[1] is not None and sketches[1].folds is not None:
            q = sketches[1].q[:repetitions]
        return Vectors(r, s, q, bundle), shared


class Check:
    """The check of one worker's answer to one request.

    A kernel that reads the answer once anyway can accumulate the contraction by itself: with
    :attr:`vectors`, in the form that :func:`cenacle.offload.contractions.contract` documents,
    and hand it to :meth:`compare`. Everything else uses :meth:`verify`.

    Attributes:
        vectors: secret; ``None`` in field arithmetic.
        shape, dtype: what has to arrive.
    """

    def __init__(
        self,
        verifier: Verifier,
        operation: Operation,
        operands: tuple[torch.Tensor, ...],
        owner: object | None,
        site: str,
        tracked: Tracked | None = None,
        recall: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self._verifier = verifier
        self._operation = operation
        self._operands = operands
        self._site = site
        self._recall = recall
        self._settled = False
        self.shape = result_shape(operation, operands)
        exact = operation.name.endswith("_mod")
        self.dtype = torch.int32 if exact else operands[0].dtype
        self.vectors: Vectors | None = None
        self._expected: Expected | ExpectedProduct | None = None
        self._exact: FieldCheck | None = None
        if exact:
            sizes = lengths(operation, operands)
            self._exact = FieldCheck(
                operation, operands, sizes, verifier.repetitions, verifier._entropy
            )
            return
        known = verifier._sketches
        if not operation.name.startswith("conv"):
            found = sketched(operation, operands, [known.matrix(t) for t in operands])
            if found is not None:
                self.vectors, self._expected = Vectors(found[0]), found[1]
                return
        sketches = [known.image(t) for t in operands]
        self.vectors, shared = verifier._vectors(operation, operands, owner, tracked, sketches)
        with torch.no_grad():
            self._expected = expected(operation, operands, self.vectors, shared, sketches)

    @property
    def operation(self) -> Operation:
        return self._operation

    # ------------------------------------------------------------------ in one go

    def verify(self, y: torch.Tensor) -> torch.Tensor:
        """``y``, a copy in the enclave's memory, if it is right; or what it should be.

        Raises:
            IntegrityError: the worker's answer is wrong.
        """
        self.form(y)
        if self._exact is not None:
            self._exact.verify(y, self._site)
            return y
        assert self.vectors is not None
        found = contract(self._operation, y, self.vectors)
        try:
            self.compare(found)
        except Doubt:
            # The sums may have cancelled by chance, and their roundings not: once more with
            # the energy that was summed. A lie adds far more to a sum than to its rounding.
            try:
                self.compare(found, contract(self._operation, y * y, self.vectors.squared))
            except Doubt:
                return self.settle(y)
        self._settled = True
        return y

    # ------------------------------------------------------------------ step by step

    def form(self, y: torch.Tensor) -> None:
        """Raise :class:`IntegrityError` if shape, type or layout are not as promised."""
        if tuple(y.shape) != self.shape or y.dtype != self.dtype or y.layout != torch.strided:
            raise IntegrityError(
                f"a result for {self._site} has the wrong form",
                found=f"{_brief(y.shape)} of {y.dtype}",
                expected=f"{_brief(self.shape)} of {self.dtype}",
            )

    def compare(self, contracted: torch.Tensor, energy: torch.Tensor | None = None) -> None:
        """Stage 1. Raises :class:`Doubt` if the contraction is not what it has to be.

        ``energy``: the squares of the result contracted with the squares of the vectors; by
        default estimated by the squares of contractions, which are right on average.
        """
        if self._settled:
            return
        want = self._expected
        assert want is not None
        n = depth(self._operation, self._operands)
        tolerance = Tolerance(self.shape, self.dtype, n, self._roundoff)
        if energy is None and tolerance.agrees(contracted, want):
            return  # as nearly always; what follows can only allow more
        along = -2 if self._operation.name.startswith("matmul") else -1
        if wrong := tolerance.beyond(contracted, want, along, energy):
            raise Doubt(
                f"a result for {self._site} is not the product that was asked for",
                found=f"{wrong} of {want.value.numel()} contractions beyond their bound",
            )

    def settle(self, y: torch.Tensor) -> torch.Tensor:
        """Stage 2: compute the product here and judge every element of ``y``.

        Returns:
            ``y``, with elements that are not accurate replaced by the enclave's own.

        Raises:
            IntegrityError: an element is wrong by more than rounding can explain.
        """
        self.form(y)
        self._verifier.doubts += 1
        if self._recall is not None:
            self._operands = (self._operands[0], self._recall())
            self._recall = None
        found = y.clone()
        whole = self._operation.name.startswith("conv_weight")
        divided = not whole and y.dim() > 2
        size = y.shape[0] if whole or not divided else max(1, _BLOCK // max(1, y[0].numel()))
        for begin in range(0, max(1, y.shape[0] if divided else 1), size):
            rows = slice(begin, begin + size) if divided else slice(None)
            operands = [
                t[rows] if divided and t.dim() > 2 and self._split(i) else t
                for i, t in enumerate(self._operands)
            ]
            found[rows] = self._judge(y[rows], operands)
        self._settled = True
        return found

    def _split(self, number: int) -> bool:
        return number == 0 or self._operation.name.startswith("matmul")

    def _judge(self, y: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        exact = [t.double() for t in operands]
        tiny = torch.finfo(self.dtype).tiny
        truth = execute(self._operation, exact)
        size = execute(self._operation, [t.abs() for t in exact])
        flushed = execute(self._operation, [t.abs() + tiny for t in exact]) - size
        largest = size
        if self._operation.name.startswith("conv"):
            dims = tuple(range(2, y.dim()))
            largest = torch.where(torch.isfinite(size), size, 0).amax(dims, keepdim=True)
            flushed = torch.nan_to_num(flushed, 0.0, 0.0).amax(dims, keepdim=True)
        n = depth(self._operation, self._operands) + _GUARD
        u = self._roundoff
        # In float64 the enclave's own product has the same error again.
        twice = 2.0 if self.dtype == torch.float64 else 1.0
        gamma = n * u / (1 - n * u) if n * u < 1 else math.inf
        least = twice * flushed + (n + 1) * tiny
        hard = twice * gamma * largest + least
        soft = twice * min(gamma, SOFT * math.sqrt(n) * u) * largest + least
        got = y.double()
        error = (got - truth).abs()
        # Of operands that are not finite, and of sums that may overflow, nothing follows about
        # the worker: algorithms differ in where that shows. The enclave's own values are used.
        tainted = not all(bool(torch.isfinite(t).all()) for t in operands)
        overflow = ~(largest * (1 + min(gamma, 1.0)) < torch.finfo(self.dtype).max)
        unjudged = ~torch.isfinite(size) | ((overflow | tainted) & ~torch.isfinite(got))
        wrong = ~(error <= hard) & ~unjudged
        if wrong.any():
            raise IntegrityError(
                f"a result for {self._site} is wrong by more than rounding can explain",
                found=f"{int(wrong.sum())} of {wrong.numel()} elements beyond the error bound",
                expected=f"errors below {gamma:.3g} of the sum of magnitudes",
            )
        return torch.where(error <= soft, y, truth.to(self.dtype))

    @property
    def _roundoff(self) -> float:
        own = torch.finfo(self.dtype).eps / 2
        return max(own, self._verifier.roundoff or own)


def _brief(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[:8])) or "a scalar"
