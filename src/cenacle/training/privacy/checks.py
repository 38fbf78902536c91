"""Mistakes found before they cost privacy: layers refused by kind, and a probe for mixing.

The probe is an experiment, not a proof. It runs the loss on three examples of the first
batch of each structure, and again with one of them replaced: whatever a rule sees of the
*other* examples, inputs and gradients and losses, must stay equal to the bit. That finds
normalization over the batch, losses that compare examples, a first dimension that is not
the examples, and positions taken for examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cenacle.training.privacy.refusals import (
    GiveLossPerExampleError,
    KeepExamplesApartError,
    PrivacyError,
    ReplaceOperationError,
    UnprotectedGradientError,
)
from cenacle.training.privacy.rules.normalization import refuse_batch_norm
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Sight
from cenacle.training.privacy.trees import slice_examples, tensors_in

__all__ = ["backpropagate", "check_losses", "check_model", "probe"]

_EXAMPLES = 3


def check_model(model: nn.Module) -> None:
    """Refuse layers that no rule can make private.

    Raises:
        ReplaceBatchNormError: a layer normalizes over the batch.
        ReplaceOperationError: another layer without a rule has trainable parameters.
        PrivacyError: the model recomputes activations, or is spread by a wrapper.
    """
    for name, p in model.named_parameters():
        if type(p.data).__name__ == "DTensor":
            raise PrivacyError(
                f"the parameter '{name}' is spread over processes",
                remedy="keep the whole model in each, and pass group= to make_private",
            )
    for name, module in model.named_modules():
        shown = f"{type(module).__name__} '{name}'"
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise refuse_batch_norm(shown)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.track_running_stats and module.training
        ):
            raise refuse_batch_norm(f"{shown} with track_running_stats=True")
        if isinstance(module, (nn.EmbeddingBag, nn.Bilinear)) and trainable:
            raise ReplaceOperationError(
                f"no rule gives per-example gradients of {shown}",
                remedy="use Embedding with a mean or sum, or Linear layers; or freeze it",
            )
        if isinstance(module, (nn.DataParallel, torch.jit.ScriptModule)):
            raise PrivacyError(f"{shown} hides operations", remedy="use the plain module")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise PrivacyError(
                f"{shown} adds up gradients before they are clipped and noised",
                remedy="pass the plain module, and group=dist.group.WORLD to make_private",
            )
        if getattr(module, "gradient_checkpointing", False) is True and module.training:
            raise PrivacyError(
                f"{shown} recomputes activations, which hides operations",
                remedy="call model.gradient_checkpointing_disable(), and use micro_batch",
            )


def check_losses(losses: Any, tape: Tape) -> Tensor:
    """The losses, if they are one number per example that the parameters move.

    Raises:
        GiveLossPerExampleError: they are not.
    """
    if not isinstance(losses, Tensor) or losses.shape != (tape.examples,):
        raise GiveLossPerExampleError(
            "the loss is not one number per example",
            found=f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses),
            expected=f"shape ({tape.examples},)",
            remedy='use reduction="none", and the mean over everything but the first dimension',
        )
    if not losses.requires_grad:
        raise GiveLossPerExampleError(
            "the losses do not depend on any trainable parameter",
            remedy="compute them from the model's output, without no_grad or detach",
        )
    return losses


def backpropagate(losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """The one backward pass. No parameter may get a gradient from it.

    Raises:
        UnprotectedGradientError: one did; all gradients were discarded.
    """
    for p in parameters.values():
        p.grad = None
    try:
        losses.sum().backward()  # type: ignore[no-untyped-call]
        reached = [name for name, p in parameters.items() if p.grad is not None]
    finally:
        for p in parameters.values():
            p.grad = None
    if reached:
        raise UnprotectedGradientError(
            f"a gradient reached '{reached[0]}' past the rules, without protection",
            remedy=(
                "use parameters through torch functions; custom autograd functions and "
                "activation checkpointing hide them"
            ),
        )


def probe(
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    run: Any,
    batch: Any,
    examples: int,
) -> bool:
    """Replace one example by another, and see whether the others notice.

    Args:
        parameters: the trainable parameters by name.
        model: its buffers are put back afterwards.
        run: ``run(tape, batch)`` does forward and backward under a tape.
        batch: the arguments of the loss.
        examples: B.

    Returns:
        Whether the batch had two examples that differ, without which nothing was learned.

    Raises:
        KeepExamplesApartError: they noticed.
    """
    pair = _different(batch, examples)
    if pair is None:
        return False
    order = [*pair, *(i for i in range(examples) if i not in pair)][:_EXAMPLES]
    part = _picked(batch, order)
    changed = [_picked(part, [1, *range(1, len(order))])]
    changed.append(_picked(part, [*range(len(order) - 1), 0]))
    if len(order) == _EXAMPLES and _same_last(part):
        changed.pop()
    kept = {n: b.detach().clone() for n, b in model.named_buffers()}
    devices = sorted({t.device.index for t in tensors_in(batch) if t.is_cuda})

    def sights(of: Any) -> list[Sight]:
        with torch.random.fork_rng(devices=devices):
            tape = Tape(parameters, len(order), tensors_in(of), watch=True)
            try:
                losses = run(tape, of)
            finally:
                tape.close()
                with torch.no_grad():
                    for name, buffer in model.named_buffers():
                        if name in kept and not torch.equal(buffer, kept[name]):
                            buffer.copy_(kept[name])
            assert tape.sights is not None
            tape.sights.append(Sight("the loss", losses, data=True))
            return tape.sights

    before = sights(part)
    tolerance: float | None = None
    for place, other in zip((0, len(order) - 1), changed, strict=False):
        after = sights(other)
        found = _noticed(before, after, place, len(order), 0.0)
        if found and tolerance is None:
            # Kernels that add in no fixed order differ from themselves.
            steady = _noticed(before, sights(part), -1, len(order), 0.0) is None
            tolerance = 0.0 if steady else 1e-4
        if found and tolerance:
            found = _noticed(before, after, place, len(order), tolerance)
        if found:
            raise KeepExamplesApartError(
                f"an example changes what {found} sees of other examples",
                remedy=(
                    "put the examples first in every tensor, use no statistic over the batch, "
                    "and pass everything that holds examples as an argument of the loss"
                ),
            )
    return True


def _noticed(
    before: list[Sight], after: list[Sight], place: int, examples: int, tolerance: float
) -> str | None:
    """Where the examples other than ``place`` differ, or ``None``."""
    if [s.where for s in before] != [s.where for s in after]:
        return "the order of operations"
    for one, two in zip(before, after, strict=True):
        a, b = one.tensor, two.tensor
        if one.data:
            if a.shape != b.shape or a.dim() == 0 or a.shape[0] % examples:
                return one.where
            a, b = (t.reshape(examples, -1) for t in (a, b))
            others = [i for i in range(examples) if i != place]
            a, b = a[others], b[others]
        if a.shape != b.shape:
            return one.where
        if tolerance and a.is_floating_point():
            bound = tolerance * float(a.abs().amax()) if a.numel() else 0.0
            same = bool(((a - b).abs() <= bound).all())
        else:
            same = bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
        if not same:
            return one.where
    return None


def _different(batch: Any, examples: int) -> tuple[int, int] | None:
    tensors = [t.reshape(examples, -1) for t in tensors_in(batch) if t.numel()]
    for i in range(1, min(examples, 64)):
        if any(not torch.equal(t[0], t[i]) for t in tensors):
            return 0, i
    return None


def _same_last(part: Any) -> bool:
    return all(torch.equal(t[0], t[-1]) for t in tensors_in(part))


def _picked(tree: Any, order: list[int]) -> Any:
    return slice_examples(tree, torch.tensor(order))
