"""Normalization within an example, and the refusal of normalization across examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.gradients import Formed
from cenacle.training.privacy.refusals import ReplaceBatchNormError
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Target, rules

__all__ = [
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "refuse_batch_norm",
    "rms_norm",
]


def refuse_batch_norm(name: str) -> ReplaceBatchNormError:
    """The refusal of a layer whose statistics are taken over the batch."""
    return ReplaceBatchNormError(
        f"{name} normalizes over the batch, so every example changes every other's gradient",
        remedy=(
            "use GroupNorm, e.g. torch.nn.GroupNorm(min(32, channels), channels), or put the "
            "layer into eval() with frozen statistics"
        ),
    )


def _parts(tape: Tape, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    return tape.target(weight), tape.target(bias), tape.plain(weight), tape.plain(bias)


@rules(functional.group_norm, torch.group_norm)
def group_norm(
    tape: Tape,
    func: Any,  # noqa: ARG001
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    """GroupNorm. The batch becomes channels of one picture, with a copy of the parameters for
    each example: the library's kernel then gives per-example gradients in its one pass."""
    w, b, plain_w, plain_b = _parts(tape, weight, bias)
    target = w or b
    if target is None:
        return functional.group_norm(input, num_groups, weight, bias, eps)
    where = f"group_norm of '{target.name}'"
    tape.rows(where, input)
    n, c = input.shape[:2]
    tape.see(where, input)
    wide = input.reshape(1, n * c, *input.shape[2:])

    def copies(plain: Tensor | None, found: Target | None) -> Tensor | None:
        if plain is None:
            return None
        many = plain.expand(n, c).reshape(-1)
        return many if found is None else tape.source(where, many, found)

    scale = copies(plain_w if plain_w is not None else input.new_ones(c), w)
    shift = copies(plain_b if plain_b is not None else input.new_zeros(c), b)
    out = functional.group_norm(wide, n * num_groups, scale, shift, eps)
    return out.view(input.shape)


@rules(functional.instance_norm, torch.instance_norm)
def instance_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    """InstanceNorm: GroupNorm with as many groups as channels."""
    if func is torch.instance_norm:  # the builtin has weight and bias before the statistics
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    if running_mean is not None:
        if use_input_stats:
            raise refuse_batch_norm("InstanceNorm with track_running_stats=True")
        return _affine(tape, input, running_mean, running_var, weight, bias, eps)
    if tape.target(weight) is None and tape.target(bias) is None:
        return functional.instance_norm(input, None, None, weight, bias, eps=eps)
    return group_norm(tape, functional.group_norm, input, input.shape[1], weight, bias, eps)  # type: ignore[no-any-return]


instance_norm.always = True  # type: ignore[attr-defined]


@rules(functional.batch_norm, torch.batch_norm)
def batch_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    """BatchNorm: refused, but for fixed statistics, with which it is an affine map."""
    if func is torch.batch_norm:
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    if training or running_mean is None:
        target = tape.target(weight) or tape.target(bias)
        raise refuse_batch_norm(f"the BatchNorm of '{target.name}'" if target else "BatchNorm")
    return _affine(tape, input, running_mean, running_var, weight, bias, eps)


batch_norm.always = True  # type: ignore[attr-defined]


def _affine(
    tape: Tape,
    x: Tensor,
    mean: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    out = functional.batch_norm(x, mean, var, None, None, training=False, eps=eps)
    shape = (-1, *(1,) * (x.dim() - 2))
    with tape:
        if weight is not None:
            out = tape.tag(out) * weight.view(shape)
        if bias is not None:
            out = tape.tag(out) + bias.view(shape)
    return out


def _scaled(
    tape: Tape,
    where: str,
    x: Tensor,
    shape: Sequence[int],
    parts: tuple[Any, ...],
    forward: Any,
    normalized: Any,
) -> Tensor:
    """LayerNorm and RMSNorm: gradients are sums over positions of D and of D times x-hat."""
    w, b, *_ = parts
    tape.rows(where, x)
    if torch.is_grad_enabled():
        tape.expect(w, b)

    def take(gradient: Tensor) -> None:
        size = (tape.examples, -1, *shape)
        d = gradient.reshape(size)
        tape.use(w, lambda: Formed((d * normalized().reshape(size)).sum(1)))
        tape.use(b, lambda: Formed(d.sum(1)))

    return tape.run(where, [x], forward, take)


@rules(functional.layer_norm, torch.layer_norm)
def layer_norm(
    tape: Tape,
    func: Any,  # noqa: ARG001
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_cudnn: bool,
) -> Tensor:
    """LayerNorm."""
    parts = w, b, plain_w, plain_b = _parts(tape, weight, bias)
    target = w or b
    if target is None or input.dim() <= len(normalized_shape):
        tape.refuse("layer_norm", target)
    x = input.detach()
    return _scaled(
        tape,
        f"layer_norm of '{(w or b).name}'",
        input,
        normalized_shape,
        parts,
        lambda: functional.layer_norm(input, normalized_shape, plain_w, plain_b, eps),
        lambda: functional.layer_norm(x, normalized_shape, None, None, eps),
    )


@rules(functional.rms_norm, torch.rms_norm)
def rms_norm(
    tape: Tape,
    func: Any,  # noqa: ARG001
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMSNorm."""
    parts = w, _, plain, _ = _parts(tape, weight, None)
    if input.dim() <= len(normalized_shape):
        tape.refuse("rms_norm", w)
    x = input.detach()
    return _scaled(
        tape,
        f"rms_norm of '{w.name}'",
        input,
        normalized_shape,
        parts,
        lambda: functional.rms_norm(input, normalized_shape, plain, eps),
        lambda: functional.rms_norm(x, normalized_shape, None, eps),
    )
