"""The recipe: training that a contract may ask for without any custom code.

A recipe is data only. It names assets by the contract's aliases, says which columns or
tensors to read, which model to build from an allow-list of layers, and how to train it.
Everything is bounded, every number is finite, unknown fields are refused. What depends on
the data (shapes, the number of parameters) is checked in the enclave before training.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cenacle.documents.base import Digest, Frozen, Name, canonical_json, sha256_digest
from cenacle.documents.layers import ActivationName, Epsilon, Node, Probability, Width

__all__ = [
    "MAX_PARAMETERS",
    "Adam",
    "AdamW",
    "CnnModel",
    "ConstantSchedule",
    "CosineSchedule",
    "EarlyStopping",
    "Front",
    "GraphModel",
    "Holdout",
    "LinearModel",
    "LogisticModel",
    "MlpModel",
    "Recipe",
    "Sgd",
    "TableData",
    "TensorData",
]

MAX_PARAMETERS: Final = 50_000_000
"""The largest model a recipe may build (200 MB of float32)."""

Column = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Label = (
    Annotated[str, StringConstraints(min_length=1, max_length=200)]
    | Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
    | bool
)
Assets = Annotated[tuple[Name, ...], Field(min_length=1, max_length=256)]
Range = tuple[
    Annotated[float, Field(ge=-1e30, le=1e30)], Annotated[float, Field(ge=-1e30, le=1e30)]
]
Classes = Annotated[tuple[Label, ...], Field(min_length=2, max_length=10_000)]


def _refuse_repeats(values: tuple[object, ...], what: str) -> None:
    seen: set[tuple[type, object]] = set()
    for value in values:
        if (type(value), value) in seen:
            raise ValueError(f"{what} {value!r} is named twice")
        seen.add((type(value), value))


# --- models ------------------------------------------------------------------------------


class LogisticModel(Frozen):
    """Multinomial logistic regression (classification)."""

    type: Literal["logistic"]


class LinearModel(Frozen):
    """Least squares by gradient descent (regression)."""

    type: Literal["linear"]


class MlpModel(Frozen):
    """Dense layers of the given widths, each with activation and dropout, then the output."""

    type: Literal["mlp"]
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=32)]
    activation: ActivationName = "relu"
    dropout: Probability = 0.0


class CnnModel(Frozen):
    """Blocks of convolution (same padding), optional batch norm, activation and max pooling,
    then dense layers. Reads samples of shape (channels, height, width) or (height, width)."""

    type: Literal["cnn"]
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
    kernel_size: Literal[1, 3, 5, 7, 9, 11] = 3
    pool: Annotated[int, Field(ge=1, le=8)] = 2
    batch_norm: bool = False
    hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = ()
    activation: ActivationName = "relu"
    dropout: Probability = 0.0


class GraphModel(Frozen):
    """Any acyclic graph of the allowed layers; the last node is the output.

    A node reads ``input`` or earlier nodes, so there are no cycles. The trained tensors are
    named ``<node>.weight`` and so on, as in torch.

    Attributes:
        initial_weights: alias of an asset of tensors with exactly those names.
    """

    type: Literal["graph"]
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, max_length=1024)]
    initial_weights: Name | None = None

    @model_validator(mode="after")
    def _acyclic(self) -> Self:
        earlier = {"input"}
        scopes: set[str] = set()
        previous = "input"
        unread: dict[str, None] = {}
        for node in self.nodes:
            if node.name in earlier:
                raise ValueError(f"node {node.name!r} is named twice (or is called input)")
            parts = node.name.split(".")
            parents = {".".join(parts[:depth]) for depth in range(1, len(parts))}
            if node.name in scopes or parents & earlier:
                raise ValueError(f"node {node.name!r} and another node lie inside each other")
            for source in node.inputs or (previous,):
                if source not in earlier:
                    raise ValueError(
                        f"node {node.name!r} reads {source!r}, which is not an earlier node"
                    )
                if node.op == "embedding" and source != "input":
                    raise ValueError(f"node {node.name!r}: an embedding reads the input itself")
                unread.pop(source, None)
            earlier.add(node.name)
            scopes |= parents
            previous = node.name
            unread[node.name] = None
        unread.pop(self.nodes[-1].name)
        if unread:
            raise ValueError(f"node {next(iter(unread))!r} is read by no other node")
        return self


Model = Annotated[
    LogisticModel | LinearModel | MlpModel | CnnModel | GraphModel, Field(discriminator="type")
]

# --- data --------------------------------------------------------------------------------


class TableData(Frozen):
    """Rows of tables, one table an asset.

    Attributes:
        features: columns in this order, or ``all_but_target``: every column of the first
            table but the target and those in ``ignore``; all tables must have the same set.
        classes: labels of a classification, in the order of the model's outputs.
        standardize: subtract mean and divide by standard deviation, taken in the enclave
            over the training rows of all parties; both are part of the model.
        standardize_target: the same for the target of a regression.
        ranges: public bounds (low, high) of features: values are clamped to them and scaled to
            -1 .. 1. They tell nothing of the data, so a job with a privacy plan may use them.
    """

    form: Literal["table"]
    assets: Assets
    features: Literal["all_but_target"] | Annotated[tuple[Column, ...], Field(min_length=1)] = (
        "all_but_target"
    )
    ignore: tuple[Column, ...] = ()
    target: Column
    classes: Classes | None = None
    standardize: bool = True
    standardize_target: bool = False
    ranges: Annotated[dict[Column, Range], Field(min_length=1, max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if self.ranges is not None:
            if self.standardize:
                raise ValueError("ranges scale already: set standardize: false")
            for name, (low, high) in self.ranges.items():
                if not low < high:
                    raise ValueError(f"the range of {name!r} is empty: {low} to {high}")
        _refuse_repeats(self.ignore, "ignored column")
        if self.target in self.ignore:
            raise ValueError(f"the target {self.target!r} is also ignored")
        if self.features != "all_but_target":
            _refuse_repeats(self.features, "feature")
            if len(self.features) > 10_000:
                raise ValueError("a recipe names at most 10000 features")
            if self.target in self.features:
                raise ValueError(f"the target {self.target!r} is also a feature")
            if self.ignore:
                raise ValueError("ignore belongs to features: all_but_target only")
        return self


class Front(Frozen):
    """A frozen, public part of a network that every sample goes through before the model.

    The enclave computes it once a sample and without gradients: only the model behind it is
    trained. So all that training learns lies in the model, and the front may run anywhere.

    Attributes:
        asset: alias of an asset of tensors that holds the front, as `cenacle cut` packs it.
        output: the tensor that crosses from the front to the model, by its name in the graph.
        inputs: the front's inputs but one, each with the tensor of the data that feeds it; the
            one that is left reads ``data.inputs``.
        digest: of the front.onnx that the asset was packed from, for those who will run it. It
            is the parties' statement: the enclave runs the asset, and never sees that file.
    """

    asset: Name
    output: Column
    inputs: Annotated[dict[Column, Column], Field(min_length=1, max_length=15)] | None = None
    digest: Digest | None = None


class TensorData(Frozen):
    """Samples along the first axis of a tensor, such as MNIST's images and labels.

    Attributes:
        inputs: name of the tensor of samples.
        labels: name of the tensor of labels (classification) or targets (regression).
        shape: gives every sample this shape; left out, it stays as stored.
        scale: factor on every element, such as 1/255.
        standardize: mean and standard deviation per channel (first axis of a sample of rank
            3), or over all elements (rank 2), or per feature (rank 1).
        integers: keep inputs as integers, for a graph that begins with embeddings.
        front: what samples go through first. ``shape``, ``scale`` and ``integers`` are of what
            the front reads; ``standardize`` is of what it gives.
    """

    form: Literal["tensors"]
    assets: Assets
    inputs: Column
    labels: Column
    shape: Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)] | None = None
    classes: Classes | None = None
    scale: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    standardize: bool = False
    standardize_target: bool = False
    integers: bool = False
    front: Front | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        read = [self.inputs, *(self.front.inputs or {}).values()] if self.front else [self.inputs]
        if self.labels in read:
            raise ValueError(f"inputs and labels are both {self.labels!r}")
        standardized = self.standardize and self.front is None
        if self.integers and (standardized or self.scale != 1.0):
            raise ValueError("integer inputs are neither scaled nor standardized")
        return self

    @property
    def integer_samples(self) -> bool:
        """Whether the model itself reads integers; what a front gives are no integers."""
        return self.integers and self.front is None


Data = Annotated[TableData | TensorData, Field(discriminator="form")]

# --- optimization ------------------------------------------------------------------------

Rate = Annotated[float, Field(gt=0.0, le=100.0)]
Decay = Annotated[float, Field(ge=0.0, le=10.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Sgd(Frozen):
    type: Literal["sgd"]
    learning_rate: Rate
    momentum: Momentum = 0.0
    weight_decay: Decay = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class _AdamBase(Frozen):
    learning_rate: Rate = 1e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: Epsilon = 1e-8


class Adam(_AdamBase):
    """Adam; its weight decay is an L2 penalty."""

    type: Literal["adam"]
    weight_decay: Decay = 0.0


class AdamW(_AdamBase):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"]
    weight_decay: Decay = 0.01


Optimizer = Annotated[Sgd | Adam | AdamW, Field(discriminator="type")]


class ConstantSchedule(Frozen):
    type: Literal["constant"]


class CosineSchedule(Frozen):
    """Linear warm-up, then half a cosine down to ``final`` times the learning rate."""

    type: Literal["cosine"]
    warmup_epochs: Annotated[int, Field(ge=0, le=10_000)] = 0
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


Schedule = Annotated[ConstantSchedule | CosineSchedule, Field(discriminator="type")]


class Holdout(Frozen):
    """Rows kept from training to measure on, drawn from each party by ``seed``.

    Attributes:
        stratified: keep the proportion of classes (or tenths of the target) in each party.
    """

    fraction: Annotated[float, Field(ge=0.0, le=0.9)] = 0.2
    stratified: bool = True


class EarlyStopping(Frozen):
    """Stop when the loss on a part of the training rows no longer falls; keep the best.

    The validation rows come out of the training rows, never out of the holdout.
    """

    patience: Annotated[int, Field(ge=1, le=1000)] = 5
    min_delta: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    validation_fraction: Annotated[float, Field(ge=0.01, le=0.5)] = 0.1


class Recipe(Frozen):
    """What to train on which assets, and how.

    Attributes:
        compare_alone: also train the same recipe on each party's rows alone and measure it
            on the same pooled holdout.
        seed: the only source of randomness; the same seed gives the same weights.
    """

    task: Literal["classification", "regression"]
    data: Data
    model: Model
    optimizer: Optimizer
    schedule: Schedule = ConstantSchedule(type="constant")
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    holdout: Holdout = Holdout()
    compare_alone: bool = False
    early_stopping: EarlyStopping | None = None

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every asset alias that the recipe reads, data first."""
        weights = self.model.initial_weights if isinstance(self.model, GraphModel) else None
        others = (weights, self.front.asset if self.front is not None else None)
        return self.data.assets + tuple(alias for alias in others if alias is not None)

    @property
    def front(self) -> Front | None:
        """What samples go through before the model."""
        return self.data.front if isinstance(self.data, TensorData) else None

    def canonical_bytes(self) -> bytes:
        """RFC 8785 canonical JSON, defaults written out."""
        return canonical_json(self.to_fields())

    @property
    def digest(self) -> str:
        return sha256_digest(self.canonical_bytes())

    @model_validator(mode="after")
    def _labels(self) -> Self:
        data = self.data
        _refuse_repeats(self.aliases, "asset")
        if self.task == "classification":
            if data.classes is None:
                raise ValueError("a classification names its classes (data.classes)")
            if len({type(label) for label in data.classes}) > 1:
                raise ValueError("classes are all text, all integers or all booleans")
            if data.standardize_target:
                raise ValueError("standardize_target belongs to a regression")
            if data.form == "tensors" and isinstance(data.classes[0], str):
                raise ValueError("classes of tensors are integers or booleans")
            _refuse_repeats(data.classes, "class")
        elif data.classes is not None:
            raise ValueError("a regression has no classes; leave data.classes out")
        return self

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        data, model = self.data, self.model
        wrong = {"logistic": "regression", "linear": "classification"}
        if wrong.get(model.type) == self.task:
            raise ValueError(f"model {model.type!r} cannot do a {self.task}")
        if isinstance(data, TensorData) and data.integer_samples and model.type != "graph":
            raise ValueError("integer inputs need a graph model with embeddings")
        if self.front is not None and isinstance(model, GraphModel):
            for node in model.nodes:
                if node.op == "embedding":
                    raise ValueError(
                        f"node {node.name!r}: an embedding reads integers, which a front never "
                        "gives; cut the model after its embeddings"
                    )
        if isinstance(model, CnnModel) and data.form == "table":
            raise ValueError("a cnn reads tensors, not tables")
        if isinstance(model, MlpModel):
            pairs = zip(model.hidden, model.hidden[1:], strict=False)
            if sum(a * b for a, b in pairs) > MAX_PARAMETERS:
                raise ValueError(f"the model has more than {MAX_PARAMETERS} parameters")
        return self

    @model_validator(mode="after")
    def _plan_fits(self) -> Self:
        model = self.model
        batch_norm = (isinstance(model, CnnModel) and model.batch_norm) or (
            isinstance(model, GraphModel) and any(n.op == "batch_norm" for n in model.nodes)
        )
        if batch_norm and self.batch_size == 1:
            raise ValueError("batch normalization needs a batch_size above 1")
        if self.compare_alone and self.holdout.fraction == 0.0:
            raise ValueError("compare_alone needs a holdout fraction above 0")
        if isinstance(self.schedule, CosineSchedule) and self.schedule.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs is below epochs")
        return self
