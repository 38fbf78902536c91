"""Batches: tensors, and lists, tuples and dictionaries of them. Models: trees of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cenacle.training.privacy.refusals import GiveLossPerExampleError

__all__ = ["count_examples", "map_tensors", "slice_examples", "tensors_in", "trainable_ids"]


def tensors_in(*trees: Any) -> list[Tensor]:
    """Tensors among arguments, lists, tuples and dictionaries of them."""
    out: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            out.append(tree)
        elif isinstance(tree, (list, tuple)):
            out.extend(tensors_in(*tree))
        elif isinstance(tree, dict):
            out.extend(tensors_in(*tree.values()))
    return out


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        parts = [map_tensors(t, change) for t in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    return tree


def slice_examples(tree: Any, which: slice | Tensor) -> Any:
    """Some examples of a batch."""
    return map_tensors(tree, lambda t: t[which if isinstance(which, slice) else which.to(t.device)])


def count_examples(batch: Any) -> int:
    """The common first dimension of all tensors; 0 if there is none.

    Raises:
        GiveLossPerExampleError: they differ, or a tensor has no dimension.
    """
    lengths = {t.shape[0] if t.dim() else None for t in tensors_in(batch)}
    if not lengths:
        return 0
    if len(lengths) > 1 or None in lengths:
        raise GiveLossPerExampleError(
            "the tensors of the batch have different numbers of examples",
            found=", ".join(sorted(str(n) for n in lengths)),
            expected="the same first dimension",
            remedy="pass only what holds examples; let the loss capture the rest",
        )
    return int(lengths.pop() or 0)


def trainable_ids(model: nn.Module) -> list[int]:
    """Which parameters require gradients, at a tenth of the cost of ``named_parameters``."""
    found = []
    stack = [model]
    seen = set()
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        own = module._parameters.values()
        found += [id(p) for p in own if p is not None and p.requires_grad]
        stack += [child for child in module._modules.values() if child is not None]
    return found
