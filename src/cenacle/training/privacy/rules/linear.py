"""Products with a matrix: ``linear``, ``addmm`` (GPT-2's Conv1D), ``mm``, ``matmul``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.gradients import Formed, Outer
from cenacle.training.privacy.outside import Waiting
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Target, operation_name, rules

__all__ = ["addmm", "linear", "matmul", "product"]


def _by_example(tape: Tape, where: str, tensor: Tensor) -> Tensor:
    """``(B*n, ..., c)`` as ``(B, T, c)``."""
    tape.rows(where, tensor)
    return tensor.reshape(tape.examples, -1, tensor.shape[-1])


def product(
    tape: Tape,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """``x @ weight.T + bias``, or ``x @ weight + bias`` where the weight is transposed."""
    w, b = tape.target(weight), tape.target(bias)
    if b is not None and b.value.dim() > 1:
        tape.refuse(where, b)
    plain, offset = tape.plain(weight), tape.plain(bias)

    def forward() -> Tensor:
        return functional.linear(x, plain.t() if transposed else plain, offset)

    if torch.is_grad_enabled():
        tape.expect(w, b)
    kept = _by_example(tape, where, x.detach())
    waiting: list[Waiting] = []

    def take(gradient: Tensor) -> None:
        d = _by_example(tape, where, gradient)
        theirs = waiting.pop() if waiting else None
        tape.use(w, lambda: Outer(kept, d, transposed=transposed, waiting=theirs))
        tape.use(b, lambda: Formed(d.sum(1).expand(-1, b.value.numel()) if b else d))

    if x.dim() == 1:
        tape.refuse(where, w or b)
    return tape.run(where, [x], tape.product(forward, waiting), take)


@rules(functional.linear)
def linear(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.linear``."""
    name = _name(tape, "linear", weight, bias)
    if weight.dim() != 2 or tape.target(input) is not None:
        tape.refuse(func, tape.target(weight))
    return product(tape, name, input, weight, bias, transposed=False)


@rules(torch.addmm, Tensor.addmm)
def addmm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    **scales: Any,
) -> Tensor:
    """``input + mat1 @ mat2`` with parameters as the bias and ``mat2``."""
    name = _name(tape, "addmm", mat2, input)
    if scales or not tape.is_data(mat1) or tape.is_data(mat2) or input.dim() != 1:
        tape.refuse(func, tape.target(mat2) or tape.target(input) or tape.target(mat1))
    return product(tape, name, mat1, mat2, input, transposed=True)


@rules(
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.__matmul__, Tensor.__rmatmul__,
)  # fmt: skip
def matmul(tape: Tape, func: Any, left: Tensor, right: Tensor) -> Tensor:
    """A product of data and a parameter, on either side."""
    if func is Tensor.__rmatmul__:
        left, right = right, left
    name = _name(tape, "matmul", left, right)
    if tape.target(left) is None and right.dim() == 2 and tape.target(right) is not None:
        return product(tape, name, left, right, None, transposed=True)
    for this, other in ((left, right), (right, left)):
        target = tape.target(this)
        if target is not None and (this.dim() == 1 or other.dim() <= this.dim()):
            tape.refuse(func, target)
    dims = max(left.dim(), right.dim())
    rows = tape.rows(name, left if tape.target(left) is None else right)
    left, right = (tape.expanded(name, t, dims, rows) for t in (left, right))
    return left @ right


def _name(tape: Tape, func: Any, *tensors: Tensor | None) -> str:
    found: list[Target] = [t for t in map(tape.target, tensors) if t is not None]
    name = func if isinstance(func, str) else operation_name(func)
    return f"{name} of '{found[0].name}'" if found else name
