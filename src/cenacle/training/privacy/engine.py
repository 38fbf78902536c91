"""Differentially private gradients for any PyTorch model, in one backward pass.

::

    private = make_private(model, clip=1.0, noise_multiplier=1.1, expected_batch=256)
    for x, y in batches:
        private.backward(lambda x, y: cross_entropy(model(x), y, reduction="none"), x, y)
        optimizer.step()

The model stays what it is: no wrapper, no hook, the same class, parameters and state. The
engine is DP-SGD (Abadi et al. 2016, arXiv:1607.00133) with book-keeping (Bu et al. 2023,
arXiv:2210.00038): autograd computes gradients of activations alone; rules take per-example
norms and, once the clip factors are known, the clipped sum.

Formal guarantee: each ``release`` adds Gaussian noise of standard deviation
``noise_multiplier * clip`` to a sum in which every example's share has an L2 norm of at
most ``clip``, and divides by the *expected* batch size. What that amounts to over steps
and sampling is for an accountant, from :attr:`Private.record`. The losses that
``backward`` returns and the model's buffers are not protected.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cenacle.training.privacy.rules  # noqa: F401 - registers the rules
from cenacle.training.privacy.checks import backpropagate, check_losses, check_model, probe
from cenacle.training.privacy.clipping import AdaptiveClip, clip_factors, positive
from cenacle.training.privacy.distributed import Ranks
from cenacle.training.privacy.noise import Noise
from cenacle.training.privacy.outside import outside_of
from cenacle.training.privacy.precision import exact_products
from cenacle.training.privacy.record import Event, Record, Sampling
from cenacle.training.privacy.refusals import PrivacyError
from cenacle.training.privacy.shares import (
    Share,
    Sums,
    are_small,
    clip_groups,
    clip_together,
    join_small,
    shares_of,
    square_norms,
)
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Target, fold_transposes
from cenacle.training.privacy.trees import (
    count_examples,
    slice_examples,
    tensors_in,
    trainable_ids,
)

__all__ = ["Private", "make_private"]

LossFunction = Callable[..., Tensor]


def make_private(
    model: nn.Module,
    *,
    clip: float,
    noise_multiplier: float,
    expected_batch: float,
    per_layer: bool = False,
    adaptive: AdaptiveClip | None = None,
    micro_batch: int | None = None,
    sampling: Sampling | None = None,
    noise: Noise | None = None,
    norm_dtype: torch.dtype = torch.float32,
    group: Any = None,
) -> Private:
    """Make the gradients of a model's trainable parameters private.

    Args:
        model: any module; parameters that do not require gradients stay frozen.
        clip: C, the largest L2 norm of an example's gradient.
        noise_multiplier: standard deviation of the noise divided by C.
        expected_batch: the expected number of examples of a step; sums are divided by it,
            whatever number came.
        per_layer: clip each module's own parameters separately, by C / sqrt(modules).
        adaptive: let the clipping norm follow a quantile of the norms (flat clipping only).
        micro_batch: work on so many examples at a time; the result is the same.
        sampling: how the caller chooses examples, for the record.
        noise: a generator; by default one with a fresh key.
        norm_dtype: ``torch.bfloat16`` lets norms of dense layers over many positions be
            upper bounds from bfloat16 products, where the hardware has them: faster, and
            clips some percent more than need be (:mod:`precision`).
        group: a process group of ``torch.distributed``: every process clips examples of its
            own, and the sum is noised once (:mod:`distributed`). ``expected_batch`` is that
            of all processes together; ``sampling`` is of this one's data.

    Raises:
        PrivacyError: a number cannot be used, or nothing is trainable.
        ReplaceBatchNormError: the model normalizes over the batch.
        ReplaceOperationError: a module has no rule.
    """
    return Private(
        model,
        clip=clip,
        noise_multiplier=noise_multiplier,
        expected_batch=expected_batch,
        per_layer=per_layer,
        adaptive=adaptive,
        micro_batch=micro_batch,
        sampling=sampling,
        noise=noise,
        norm_dtype=norm_dtype,
        group=group,
    )


class Private:
    """Computes private gradients of one model; see :func:`make_private`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        clip: float,
        noise_multiplier: float,
        expected_batch: float,
        per_layer: bool = False,
        adaptive: AdaptiveClip | None = None,
        micro_batch: int | None = None,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        norm_dtype: torch.dtype = torch.float32,
        group: Any = None,
    ) -> None:
        self.clip = positive("clip", clip)
        self.noise_multiplier = positive("noise_multiplier", noise_multiplier, zero=True)
        self.expected_batch = positive("expected_batch", expected_batch)
        if micro_batch is not None and micro_batch < 1:
            raise PrivacyError(
                "micro_batch cannot be used", found=micro_batch, expected="1 or more"
            )
        if adaptive is not None and per_layer:
            raise PrivacyError(
                "the clipping norm adapts with flat clipping only",
                remedy="use per_layer=False, or a fixed clipping norm",
            )
        if norm_dtype not in (torch.float32, torch.bfloat16):
            raise PrivacyError(
                "norm_dtype cannot be used",
                found=norm_dtype,
                expected="torch.float32 or torch.bfloat16",
            )
        check_model(model)
        self.model = model
        self.norm_dtype = norm_dtype
        self.per_layer = per_layer
        self.adaptive = adaptive
        self.micro_batch = micro_batch
        self.sampling = sampling or Sampling()
        self.noise = noise or Noise()
        self._ranks = None if group is None else Ranks(group)
        if self._ranks is not None:
            self.sampling = self._ranks.start(model, self.sampling)
        self.record = Record()
        self.norms = torch.zeros(0)
        self._norms: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._within = 0.0
        self._probed: set[Any] = set()
        self._parameters: dict[str, nn.Parameter] = {}
        self._ids: list[int] = []
        self._groups: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}

    # ------------------------------------------------------------------ the step

    def backward(self, loss: LossFunction, *batch: Any) -> Tensor:
        """One private step: clip, sum, add noise, and write every parameter's ``.grad``.

        Args:
            loss: called with (parts of) ``batch``; gives one loss per example, shape (B,).
            batch: tensors, or lists and dictionaries of tensors, whose first dimension is
                the examples. None at all, or none of length above zero, makes a step of
                noise alone, as an empty Poisson batch must.

        Returns:
            The losses, detached. They are not private.
        """
        losses = self.accumulate(loss, *batch)
        self.release()
        return losses

    def accumulate(self, loss: LossFunction, *batch: Any) -> Tensor:
        """Add the clipped gradients of some examples to the sum of this step.

        An example must come once in a step: what comes twice counts twice.
        """
        self._refresh()
        examples = count_examples(batch)
        for p in self._parameters.values():
            p.grad = None  # not needed any more, and as large as the model
        size = self.micro_batch or max(examples, 1)
        losses = []
        for begin in range(0, examples, size):
            part = batch if size >= examples else slice_examples(batch, slice(begin, begin + size))
            losses.append(self._pass(loss, part, min(size, examples - begin)))
        return torch.cat(losses) if losses else torch.zeros(0)

    def release(self) -> None:
        """Noise the sum and write ``(sum + noise) / expected_batch`` into every ``.grad``."""
        self._refresh()
        scale = self.noise_multiplier * self.clip
        self.norms = torch.cat(self._norms) if self._norms else torch.zeros(0).double()
        self._norms = []
        sums, self._sums = self._sums, {}
        pairs = [(p, sums.get(name)) for name, p in self._parameters.items()]
        secure = self.noise.secure
        if self._ranks is None:
            self.noise.release(pairs, scale=scale, divisor=self.expected_batch)
        else:
            self._within, secure = self._ranks.release(
                self.noise,
                pairs,
                self._within,
                settings=(self.clip, self.noise_multiplier, self.expected_batch),
            )
        self.record.add(
            Event(
                sampling=self.sampling,
                clipping="per_layer" if self.per_layer else "flat",
                clip=self.clip,
                group_clips=self._group_clips(),
                noise_multiplier=self.noise_multiplier,
                count_noise_multiplier=self.adaptive.count_noise if self.adaptive else None,
                secure=secure,
            )
        )
        if self.adaptive is not None:
            noised = self._within + self.noise.number() * self.adaptive.count_noise
            self.clip = self.adaptive.next(self.clip, noised, self.expected_batch)
            if self._ranks is not None:
                self.clip = self._ranks.same_number(self.clip)
        self._within = 0.0

    # ------------------------------------------------------------------ one pass

    def _refresh(self) -> None:
        """Which parameters are trainable may change between steps, not within one."""
        if self._parameters and trainable_ids(self.model) == self._ids:
            return
        found = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self._sums:
            raise PrivacyError("the trainable parameters changed within a step")
        if not found:
            raise PrivacyError("the model has no trainable parameter")
        for name, p in found.items():
            if not p.is_floating_point():
                raise PrivacyError(f"the parameter '{name}' is not of a real type")
        self._parameters, self._ids = found, trainable_ids(self.model)
        self._groups = {name: name.rpartition(".")[0] for name in found}
        self._members = {}
        for name, group in self._groups.items():
            self._members.setdefault(group, []).append(name)

    def _group_clips(self) -> tuple[float, ...]:
        count = len(self._members) if self.per_layer else 1
        return (self.clip / math.sqrt(count),) * count

    def _pass(self, loss: LossFunction, batch: Any, examples: int) -> Tensor:
        step = _Pass(self, loss, batch, examples)
        if examples > 1 and step.signature not in self._probed:
            # The probe may move buffers that this pass saved: begin again after it.
            signature = step.signature
            step.tape.close()
            del step
            if probe(self._parameters, self.model, self._watched(loss), batch, examples):
                self._probed.add(signature)
            step = _Pass(self, loss, batch, examples)
        return step.finish()

    def _watched(self, loss: LossFunction) -> Callable[[Tape, Any], Tensor]:
        def run(tape: Tape, batch: Any) -> Tensor:
            with torch.enable_grad(), outside_of(self.model).inside(), tape:
                losses = loss(*batch)
            losses = check_losses(losses, tape)
            backpropagate(losses, self._parameters)
            return losses.detach()

        return run


class _Pass:
    """Forward, backward, norms and clipped sums of one micro-batch."""

    def __init__(self, owner: Private, loss: LossFunction, batch: Any, examples: int) -> None:
        self.owner = owner
        self.clip = owner._group_clips()[0]
        outside = outside_of(owner.model)
        self.tape = Tape(
            owner._parameters,
            examples,
            tensors_in(batch),
            done=self._done if owner.per_layer else None,
            low=owner.norm_dtype == torch.bfloat16,
            outside=outside,
        )
        self.sums: Sums = {}
        self.clipped: set[str] = set()
        self.waiting: list[list[Share]] = []
        try:
            with torch.enable_grad(), outside.around(), self.tape:
                self.losses = loss(*batch)
        except BaseException:
            self.tape.close()
            raise
        self.signature = tuple(self.tape.signature)

    def finish(self) -> Tensor:
        tape, owner = self.tape, self.owner
        try:
            losses = check_losses(self.losses, tape)
            self.losses = losses.detach()
            backpropagate(losses, owner._parameters)
            del losses
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for kind in {p.device.type for p in owner._parameters.values()}:
                    stack.enter_context(exact_products(kind))
                self._conclude()
        finally:
            tape.close()
        with torch.no_grad():
            for name, total in self.sums.items():
                if name in owner._sums:
                    owner._sums[name] += total
                else:
                    owner._sums[name] = total
        return self.losses

    # Per-layer clipping concludes a group as soon as its last gradient came.
    def _done(self, target: Target) -> None:
        tape = self.tape
        group = self.owner._groups[target.name]
        names = self.owner._members[group]
        if any(tape.targets[n].expected != len(tape.targets[n].uses) for n in names):
            return
        if tape.derived and any(not d.sources.isdisjoint(names) for d in tape.derived):
            return
        if group not in self.clipped:
            self._clip(group, names)

    def _clip(self, group: str, names: Sequence[str]) -> None:
        self.clipped.add(group)
        shares = shares_of(self.tape, names)
        if are_small(shares):
            self.waiting.append(shares)
        else:
            self._add(clip_together(join_small(shares), self.tape.examples, self.clip))

    def _conclude(self) -> None:
        owner, tape = self.owner, self.tape
        fold_transposes(tape.targets, tape.derived)
        if owner.per_layer:
            for group, names in owner._members.items():
                if group not in self.clipped:
                    self._clip(group, names)
            self._add(clip_groups(self.waiting, tape.examples, self.clip))
            return
        shares = join_small(shares_of(tape, list(owner._parameters)))
        squares = square_norms(shares, tape.examples)
        owner._norms.append(squares.sqrt())
        inside = int((squares <= owner.clip**2).sum())
        owner._within += inside - tape.examples / 2
        factors = clip_factors(squares, self.clip)
        masked = bool((factors == 0).any())
        for share in shares:
            self._add(share.weighted(factors, masked=masked))

    def _add(self, sums: Sums) -> None:
        for name, total in sums.items():
            self.sums[name] = self.sums[name] + total if name in self.sums else total
