"""A recipe's graph as a torch module whose tensors are named by its nodes.

Built on torch's meta device first: shapes, the number of parameters and the size of the
activations are checked before any memory is taken, and a graph that does not fit its data
is refused with the node that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cenacle.documents import layers
from cenacle.documents.layers import Node
from cenacle.documents.recipe import MAX_PARAMETERS
from cenacle.errors import DataError, DocumentError
from cenacle.training._torch import functional, nn, torch

__all__ = ["MAX_ACTIVATIONS", "Graph"]

MAX_ACTIVATIONS = 2**30
"""Numbers that one batch may leave between layers (4 GiB of float32)."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": functional.hardsigmoid,
    "hard_swish": functional.hardswish,
}
_POOLS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "max_pool1d": (functional.max_pool1d, 3),
    "max_pool2d": (functional.max_pool2d, 4),
    "avg_pool1d": (functional.avg_pool1d, 3),
    "avg_pool2d": (functional.avg_pool2d, 4),
}
_ADAPTIVE: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "adaptive_avg_pool1d": (functional.adaptive_avg_pool1d, 3),
    "adaptive_avg_pool2d": (functional.adaptive_avg_pool2d, 4),
}


class Graph(nn.Module):
    """Interprets declared nodes in order. Parameters are float32 and live on the CPU.

    Args:
        nodes: a recipe's nodes, already known to be acyclic; the last one is the output.
        shape: of one sample.
        integers: samples are integers, for embeddings.

    Raises:
        DocumentError: a node does not fit its input, or the model is too large.

    Attributes:
        generator: draws the masks of dropout; None uses torch's global generator.
        output_shape: of one sample's output.
        shapes: of one sample at every node, by name, and at ``input``.
        activations: numbers that all nodes hold for one sample.
    """

    def __init__(
        self, nodes: Sequence[Node], shape: Sequence[int], *, integers: bool = False
    ) -> None:
        super().__init__()
        self.nodes = tuple(nodes)
        self.shape = tuple(shape)
        self.integers = integers
        self.generator: torch.Generator | None = None
        self.activations = 0
        self.shapes: dict[str, tuple[int, ...]] = {"input": self.shape}
        with torch.device("meta"):
            self.output_shape = self._build()
        parameters = self.count_parameters()
        if parameters > MAX_PARAMETERS:
            raise DocumentError(
                "the model is too large",
                found=f"{parameters} parameters",
                expected=f"<= {MAX_PARAMETERS}",
            )
        self._allocate()
        self.reset(None)

    def _allocate(self) -> None:
        """Give every meta tensor memory: ``to_empty("cpu")`` without its Python detour."""
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(blank))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))

    def count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def evaluation_rows(self) -> int:
        """How many rows to evaluate at once within :data:`MAX_ACTIVATIONS`."""
        return max(1, min(1024, MAX_ACTIVATIONS // self.activations))

    # --- construction --------------------------------------------------------------------

    def _build(self) -> tuple[int, ...]:
        kind = torch.int64 if self.integers else torch.float32
        # Two rows: batch normalization refuses to train on one.
        values = {"input": torch.empty((2, *self.shape), dtype=kind)}
        for node, sources in self._steps():
            read = [values[source] for source in sources]
            try:
                module = _make_module(node, read[0])
                if module is not None:
                    self._place(node.name, module)
                values[node.name] = _apply(node, module, read, None)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
                raise DocumentError(
                    f"node {node.name!r} ({node.op}) does not fit what it reads: "
                    f"{str(error).splitlines()[0][:200]}",
                    found="samples of shape "
                    + " and ".join(str(tuple(value.shape[1:])) for value in read),
                    remedy="change the node, or the nodes before it",
                ) from None
            result = values[node.name]
            if result.numel() == 0 or result.shape[0] != 2:
                raise DocumentError(
                    f"node {node.name!r} leaves nothing of a sample",
                    found=f"shape {tuple(result.shape[1:])}",
                )
            self.shapes[node.name] = tuple(result.shape[1:])
            self.activations += result.numel() // 2
            if self.activations > MAX_ACTIVATIONS:
                raise DocumentError(
                    f"node {node.name!r} makes the model's activations too large",
                    expected=f"<= {MAX_ACTIVATIONS} numbers",
                )
        return tuple(values[self.nodes[-1].name].shape[1:])

    def _steps(self) -> Iterator[tuple[Node, tuple[str, ...]]]:
        previous = "input"
        for node in self.nodes:
            yield node, node.inputs or (previous,)
            previous = node.name

    def _place(self, name: str, module: nn.Module) -> None:
        """Add under a dotted name, so that state dict keys read as declared."""
        scope: nn.Module = self
        *parents, last = name.split(".")
        for part in parents:
            if part not in scope._modules:
                scope.add_module(part, nn.Module())
            scope = scope.get_submodule(part)
        scope.add_module(last, module)

    # --- running -------------------------------------------------------------------------

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Outputs, shape (rows, *output_shape), for samples of shape (rows, *shape)."""
        values = {"input": samples}
        result = samples
        for node, sources in self._steps():
            module = self.get_submodule(node.name) if node.op in _WITH_MODULE else None
            generator = self.generator if self.training else None
            read = [values[source] for source in sources]
            if node.op == "dropout" and not self.training:
                result = read[0]
            else:
                result = _apply(node, module, read, generator)
            values[node.name] = result
        return result

    def check_integers(self, samples: NDArray[np.int64]) -> None:
        """Refuse indices that no embedding row stands for.

        Raises:
            DataError: naming the row of the first such index.
        """
        for node, sources in self._steps():
            if isinstance(node, layers.Embedding) and sources == ("input",):
                wrong = (samples < 0) | (samples >= node.num_embeddings)
                if wrong.any():
                    row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
                    raise DataError(
                        f"row {row} holds an index outside the embedding {node.name!r}",
                        expected=f"0 <= index < {node.num_embeddings}",
                    )

    # --- weights -------------------------------------------------------------------------

    def reset(self, generator: torch.Generator | None) -> None:
        """Draw fresh weights, distributed as torch's own defaults.

        Linear and convolution: uniform within 1/sqrt(fan in) (He et al. 2015 with a =
        sqrt(5)); embeddings: standard normal; norms: weight 1, bias 0. None leaves out the
        drawing and sets such weights to 0, for a model that is about to be loaded.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    for parameter in (module.weight, module.bias):
                        if parameter is not None:
                            _draw(parameter, generator, bound)
                elif isinstance(module, nn.Embedding):
                    if generator is None:
                        module.weight.zero_()
                    else:
                        module.weight.normal_(generator=generator)
                elif isinstance(
                    module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d
                ):
                    module.reset_parameters()


def _draw(parameter: torch.Tensor, generator: torch.Generator | None, bound: float) -> None:
    if generator is None:
        parameter.zero_()
    else:
        parameter.uniform_(-bound, bound, generator=generator)


_WITH_MODULE = frozenset(
    {"linear", "conv1d", "conv2d", "layer_norm", "group_norm", "batch_norm", "embedding"}
)


def _make_module(  # noqa: PLR0911 - one return a kind of node
    node: Node, read: torch.Tensor
) -> nn.Module | None:
    """The node's module on the current device, sized for ``read`` (rows, *sample shape)."""
    if isinstance(node, layers.Embedding):
        if read.dtype != torch.int64:
            raise ValueError("an embedding reads integers; set integers in the recipe's data")
        # Given a table it draws none, which on the meta device would import torch._dynamo.
        blank = torch.empty((node.num_embeddings, node.embedding_dim), dtype=torch.float32)
        return nn.Embedding(node.num_embeddings, node.embedding_dim, _weight=blank)
    if read.dtype != torch.float32:
        raise ValueError("only an embedding reads integers")
    if isinstance(node, layers.Linear):
        _demand_rank(read, 2, None)
        return nn.Linear(read.shape[-1], node.out_features, node.bias, dtype=torch.float32)
    if isinstance(node, layers.Conv):
        kind, rank = (nn.Conv1d, 3) if node.op == "conv1d" else (nn.Conv2d, 4)
        _demand_rank(read, rank, rank)
        return kind(
            read.shape[1],
            node.out_channels,
            node.kernel_size,  # type: ignore[arg-type]
            node.stride,  # type: ignore[arg-type]
            node.padding,  # type: ignore[arg-type]
            node.dilation,  # type: ignore[arg-type]
            node.groups,
            node.bias,
            dtype=torch.float32,
        )
    if isinstance(node, layers.LayerNorm):
        _demand_rank(read, node.axes + 1, None)
        return nn.LayerNorm(tuple(read.shape[-node.axes :]), node.eps, dtype=torch.float32)
    if isinstance(node, layers.GroupNorm):
        _demand_rank(read, 2, None)
        return nn.GroupNorm(node.groups, read.shape[1], node.eps, dtype=torch.float32)
    if isinstance(node, layers.BatchNorm):
        _demand_rank(read, 2, 4)
        norm = nn.BatchNorm2d if read.ndim == 4 else nn.BatchNorm1d
        return norm(read.shape[1], node.eps, node.momentum, dtype=torch.float32)
    return None


def _demand_rank(read: torch.Tensor, least: int, most: int | None) -> None:
    if read.ndim < least or (most is not None and read.ndim > most):
        wanted = f"{least - 1}" if most == least else f"{least - 1} or more"
        raise ValueError(f"samples have rank {read.ndim - 1}, this layer needs {wanted}")


def _run(module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module(value)
    return result


def _blank(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    # Not new_empty or empty_like: on the meta device torch writes those in Python, too.
    return torch.empty(tuple(shape), dtype=value.dtype, device=value.device)


def _shape_only(module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """What ``module`` would give, without computing it.

    torch decomposes these modules in Python on the meta device, and imports all of
    ``torch._dynamo`` to do so; their shapes need no such help.
    """
    if isinstance(module, nn.Linear):
        return _blank(value, (*value.shape[:-1], module.out_features))
    if isinstance(module, nn.Embedding):
        shape = (*value.shape, module.embedding_dim)
        return torch.empty(shape, dtype=module.weight.dtype, device=value.device)
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
        return _blank(value, value.shape)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        left = _windows(value, module.kernel_size, module.stride, module.padding, module.dilation)
        if min(left) > 0:
            return _blank(value, (value.shape[0], module.out_channels, *left))
    return _run(module, value)


def _windows(value: torch.Tensor, *sizes: Any) -> list[int]:
    """How often a window of kernel, stride, padding and dilation fits into each axis."""
    lengths = value.shape[2:]
    each = [(size,) * len(lengths) if isinstance(size, int) else size for size in sizes]
    return [
        (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, padding, dilation in zip(lengths, *each, strict=True)
    ]


def _apply(  # noqa: PLR0911, PLR0912 - one case a kind of node
    node: Node,
    module: nn.Module | None,
    read: list[torch.Tensor],
    generator: torch.Generator | None,
) -> torch.Tensor:
    value = read[0]
    if module is not None:
        return _shape_only(module, value) if value.is_meta else _run(module, value)
    match node:
        case layers.Activation():
            return _blank(value, value.shape) if value.is_meta else _ACTIVATIONS[node.op](value)
        case layers.Pool():
            pool, rank = _POOLS[node.op]
            _demand_rank(value, rank, rank)
            if value.is_meta and node.padding == 0:
                stride = node.kernel_size if node.stride is None else node.stride
                left = _windows(value, node.kernel_size, stride, 0, 1)
                if min(left) > 0:
                    return _blank(value, (*value.shape[:2], *left))
            return pool(value, node.kernel_size, node.stride, node.padding)
        case layers.AdaptiveAvgPool():
            adaptive, rank = _ADAPTIVE[node.op]
            _demand_rank(value, rank, rank)
            if value.is_meta:
                return _blank(value, (*value.shape[:2], *(node.output_size,) * (rank - 2)))
            return adaptive(value, node.output_size)
        case layers.Flatten():
            return value.flatten(node.start_axis)
        case layers.Reshape():
            return value.reshape(value.shape[0], *node.shape)
        case layers.Transpose():
            return value.transpose(*node.axes)
        case layers.Pad():
            _demand_rank(value, 2 + len(node.padding) // 2, None)
            if value.is_meta:
                return _blank(value, _padded(value.shape, node.padding))
            return functional.pad(value, node.padding)
        case layers.Select():
            if value.is_meta:
                if node.index >= value.shape[node.axis]:
                    raise ValueError(f"axis {node.axis} has {value.shape[node.axis]} entries")
                kept_axes = list(value.shape)
                del kept_axes[node.axis]
                return _blank(value, kept_axes)
            return value.select(node.axis, node.index)
        case layers.Mean():
            if value.is_meta:
                kept_axes = list(value.shape)
                del kept_axes[node.axis]
                return _blank(value, kept_axes)
            return value.mean(node.axis)
        case layers.Dropout():
            if value.is_meta:
                return _blank(value, value.shape)
            kept = torch.rand(value.shape, generator=generator, device=value.device) >= node.p
            return value * kept / (1 - node.p)
        case layers.Add():
            return _same_shapes(read, torch.add)
        case layers.Multiply():
            return _same_shapes(read, torch.mul)
        case layers.ScaleChannels():
            if read[1].shape != (*value.shape[:2], *(1 for _ in value.shape[2:])):
                raise ValueError("the second input is not one number a channel")
            return _blank(value, value.shape) if value.is_meta else value * read[1]
        case layers.Concat():
            return torch.cat(read, node.axis)
        case _:
            raise ValueError(f"unknown operation {node.op}")


def _padded(shape: Sequence[int], padding: Sequence[int]) -> list[int]:
    sizes = list(shape)
    for pair in range(len(padding) // 2):
        sizes[-1 - pair] += padding[2 * pair] + padding[2 * pair + 1]
    return sizes


def _same_shapes(
    read: list[torch.Tensor], join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    # Broadcasting would let a wrong graph pass.
    if len({value.shape for value in read}) > 1:
        raise ValueError("inputs have different shapes")
    return reduce(join, read)
