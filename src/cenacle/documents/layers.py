"""Layers of a declarative graph: the allow-list from which a recipe may build a model.

Parameters are those of the ``torch.nn`` module of the same name, except that input sizes
are never written: they follow from what the node reads.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from cenacle.documents.base import Frozen

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationName",
    "AdaptiveAvgPool",
    "Add",
    "BatchNorm",
    "Concat",
    "Conv",
    "Dropout",
    "Embedding",
    "Epsilon",
    "Flatten",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "Mean",
    "Multiply",
    "Node",
    "NodeName",
    "Pad",
    "Pool",
    "Probability",
    "Reshape",
    "ScaleChannels",
    "Select",
    "Transpose",
    "Width",
]

Width = Annotated[int, Field(ge=1, le=65_536)]
Kernel = Annotated[int, Field(ge=1, le=64)]
Size = Kernel | tuple[Kernel, Kernel]
Padding = Annotated[int, Field(ge=0, le=64)]
Paddings = Padding | tuple[Padding, Padding]
Axis = Annotated[int, Field(ge=1, le=7)]
Probability = Annotated[float, Field(ge=0.0, le=0.95)]
Epsilon = Annotated[float, Field(gt=0.0, le=1.0)]
ActivationName = Literal[
    "relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hard_sigmoid", "hard_swish"
]

ACTIVATIONS: Final[tuple[str, ...]] = get_args(ActivationName)

NodeName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*$", max_length=120),
]
"""As in a torch state dict: ``head`` or ``layer1.0.conv1``."""


class _Node(Frozen):
    """One step of a graph. ``inputs`` left out means the node before it."""

    name: NodeName
    inputs: Annotated[tuple[NodeName, ...], Field(min_length=1, max_length=1)] | None = None


class _Join(Frozen):
    name: NodeName
    inputs: Annotated[tuple[NodeName, ...], Field(min_length=2, max_length=64)]


def _refuse_pairs(op: str, sizes: tuple[object, ...]) -> None:
    if op.endswith("1d") and any(isinstance(size, tuple) for size in sizes):
        raise ValueError(f"{op} takes one size, not a pair")


class Linear(_Node):
    """``torch.nn.Linear`` over the last axis."""

    op: Literal["linear"]
    out_features: Width
    bias: bool = True


class Conv(_Node):
    """``torch.nn.Conv1d`` or ``Conv2d``; the number of input channels follows from the input."""

    op: Literal["conv1d", "conv2d"]
    out_channels: Width
    kernel_size: Size
    stride: Size = 1
    padding: Paddings = 0
    dilation: Size = 1
    groups: Width = 1
    bias: bool = True

    @model_validator(mode="after")
    def _one_size_per_axis(self) -> Self:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        _refuse_pairs(self.op, sizes)
        return self


class Activation(_Node):
    op: ActivationName


class Pool(_Node):
    op: Literal["max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"]
    kernel_size: Size
    stride: Size | None = None
    padding: Paddings = 0

    @model_validator(mode="after")
    def _one_size_per_axis(self) -> Self:
        _refuse_pairs(self.op, (self.kernel_size, self.stride, self.padding))
        return self


class AdaptiveAvgPool(_Node):
    op: Literal["adaptive_avg_pool1d", "adaptive_avg_pool2d"]
    output_size: Annotated[int, Field(ge=1, le=1024)] = 1


class Flatten(_Node):
    """All axes from ``start_axis`` on become one; axis 0 is the batch."""

    op: Literal["flatten"]
    start_axis: Axis = 1


class Reshape(_Node):
    """Gives each sample another shape; the batch axis stays."""

    op: Literal["reshape"]
    shape: Annotated[tuple[Width, ...], Field(min_length=1, max_length=6)]


class Transpose(_Node):
    op: Literal["transpose"]
    axes: tuple[Axis, Axis]


class Pad(_Node):
    """Zeros around the last axis (before, after), or the last two (left, right, top, bottom), as
    ``torch.nn.functional.pad`` counts them."""

    op: Literal["pad"]
    padding: tuple[Padding, Padding] | tuple[Padding, Padding, Padding, Padding]


class Select(_Node):
    """One entry of an axis, which goes away: a transformer's class token."""

    op: Literal["select"]
    axis: Axis
    index: Annotated[int, Field(ge=0, le=65_535)]


class Mean(_Node):
    """The mean over one axis, which goes away."""

    op: Literal["mean"]
    axis: Axis


class Dropout(_Node):
    op: Literal["dropout"]
    p: Probability


class LayerNorm(_Node):
    """``torch.nn.LayerNorm`` over the last ``axes`` axes."""

    op: Literal["layer_norm"]
    axes: Annotated[int, Field(ge=1, le=6)] = 1
    eps: Epsilon = 1e-5


class GroupNorm(_Node):
    op: Literal["group_norm"]
    groups: Width
    eps: Epsilon = 1e-5


class BatchNorm(_Node):
    """``torch.nn.BatchNorm1d`` or ``BatchNorm2d``, by the rank of its input."""

    op: Literal["batch_norm"]
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    eps: Epsilon = 1e-5


class Embedding(_Node):
    """``torch.nn.Embedding``; reads the graph's integer ``input``."""

    op: Literal["embedding"]
    num_embeddings: Annotated[int, Field(ge=1, le=10_000_000)]
    embedding_dim: Width


class Add(_Join):
    """The sum of its inputs: a residual connection."""

    op: Literal["add"]


class Multiply(_Join):
    op: Literal["multiply"]


class ScaleChannels(Frozen):
    """The first input, (channels, ...), times the second, one number a channel with ones for the
    other axes, (channels, 1, ...): squeeze and excitation."""

    name: NodeName
    op: Literal["scale_channels"]
    inputs: Annotated[tuple[NodeName, ...], Field(min_length=2, max_length=2)]


class Concat(_Join):
    op: Literal["concat"]
    axis: Axis = 1


Node = Annotated[
    Linear
    | Conv
    | Activation
    | Pool
    | AdaptiveAvgPool
    | Flatten
    | Reshape
    | Transpose
    | Pad
    | Select
    | Mean
    | Dropout
    | LayerNorm
    | GroupNorm
    | BatchNorm
    | Embedding
    | Add
    | Multiply
    | ScaleChannels
    | Concat,
    Field(discriminator="op"),
]
