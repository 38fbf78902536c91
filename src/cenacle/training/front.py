"""Samples through a frozen front: computed once, kept as the features that a model trains on.

A front is any function of named arrays; who runs it is not this package's affair. The enclave
hands in a graph that it opened from a sealed asset, a user at home one from ``front.onnx``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cenacle.documents.base import Digest, Frozen, PositiveInt
from cenacle.documents.recipe import Recipe, TensorData
from cenacle.errors import DataError

__all__ = ["MAX_FEATURES", "FrontGraph", "FrontUse", "Port", "front_features"]

MAX_FEATURES: Final = 2**31
"""Numbers that all features of one asset may have (8 GiB of float32)."""

_ROWS: Final = 32
_MAX_RANK: Final = 6


class Port(Protocol):
    """An input or an output of a graph; ``None`` in a shape is the batch axis."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int | None, ...]: ...


class FrontGraph(Protocol):
    """What runs a front: :class:`cenacle.cut.runtime.TailRuntime`, or anything like it."""

    @property
    def inputs(self) -> Sequence[Port]: ...

    @property
    def outputs(self) -> Sequence[Port]: ...

    def run(self, inputs: Mapping[str, NDArray[Any]], /) -> Mapping[str, NDArray[Any]]: ...


class FrontUse(Frozen):
    """How a trained model's samples go through its front; a part of the model's metadata.

    Attributes:
        output: the tensor of the front's graph that the model reads.
        samples: name of the tensor of samples in the data.
        others: the front's other inputs, each with the tensor of the data that feeds it.
        shape: of one sample as the front reads it; None: as stored.
        scale: factor on every element of a sample.
        integers: samples stay integers.
        digest: of the front.onnx, as the recipe's parties stated it.
    """

    output: str
    samples: str
    others: dict[str, str] = Field(default_factory=dict)
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=5)] | None = None
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    integers: bool = False
    digest: Digest | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """What the recipe says; None without a front."""
        data, front = recipe.data, recipe.front
        if front is None or not isinstance(data, TensorData):
            return None
        return cls(
            output=front.output,
            samples=data.inputs,
            others=front.inputs or {},
            shape=data.shape,
            scale=data.scale,
            integers=data.integers,
            digest=front.digest,
        )


def front_features(
    graph: FrontGraph,
    use: FrontUse,
    samples: NDArray[Any],
    others: Mapping[str, NDArray[Any]] | None = None,
    *,
    what: str = "the input",
    alone: bool = False,
) -> NDArray[np.float32]:
    """The front's output for every sample, in evaluation and without gradients.

    Args:
        samples: (rows, *shape), checked, not yet scaled.
        others: by the front's input, (rows, ...).
        what: names the samples in errors.
        alone: one sample at a time, so that no row can reach another's features whatever the
            graph computes. A privacy plan rests on that.

    Returns:
        (rows, *feature shape), finite.

    Raises:
        DataError: the front has other inputs or no such output, a sample does not fit it, or
            what it gives is not one array of finite float32 a sample, or too much.
    """
    ports = _ports(graph, use)
    fed = {name: use.samples for name in ports if name not in use.others} | use.others
    arrays = {use.samples: samples}
    for name, tensor in use.others.items():
        arrays[tensor] = np.asarray((others or {})[name])
        if len(arrays[tensor]) != len(samples):
            raise DataError(
                f"{what} has another number of rows in tensor {tensor!r}",
                found=f"{len(arrays[tensor])} rows",
                expected=f"{len(samples)} rows",
            )
    rows = 1 if alone else _ROWS
    out: NDArray[np.float32] | None = None
    for start in range(0, len(samples), rows):
        ready = {
            name: _ready(arrays[tensor][start : start + rows], ports[name], use, what)
            for name, tensor in fed.items()
        }
        found = _checked(graph.run(ready), use, len(samples[start : start + rows]), what)
        if out is None:
            if found[0].size * len(samples) > MAX_FEATURES:
                raise DataError(
                    f"the front makes too much of {what} to keep",
                    found=f"{found[0].size} numbers a sample, {len(samples)} samples",
                    expected=f"a product <= {MAX_FEATURES}",
                    remedy="cut where less crosses, or bring fewer samples",
                )
            out = np.empty((len(samples), *found.shape[1:]), np.float32)
        if found.shape[1:] != out.shape[1:]:
            raise DataError(f"the front gives samples of {what} different shapes")
        out[start : start + rows] = found
        if not np.isfinite(found).all():
            good = np.isfinite(found).reshape(len(found), -1).all(axis=1)
            raise DataError(
                f"the front gives no finite numbers for row {start + int(np.argmin(good))} of "
                f"{what}",
                remedy="check data.scale, and that the samples are like those it was trained on",
            )
    assert out is not None
    return out


def _ports(graph: FrontGraph, use: FrontUse) -> dict[str, Port]:
    """The front's inputs by name, of which exactly one is left for the samples."""
    ports = {port.name: port for port in graph.inputs}
    left = [name for name in ports if name not in use.others]
    unknown = [name for name in use.others if name not in ports]
    if unknown or len(left) != 1:
        raise DataError(
            "the front has other inputs than the recipe feeds",
            found=", ".join(sorted(ports)),
            expected=", ".join([*sorted(use.others), "one for the samples"]),
            remedy="name a tensor for each further input under data.front.inputs",
        )
    outputs = [port.name for port in graph.outputs]
    if use.output not in outputs:
        raise DataError(
            f"the front has no output {use.output!r}",
            found=", ".join(sorted(outputs)[:8]),
            remedy="name the tensor that crosses, as `cenacle cut` prints it",
        )
    return ports


_KINDS: Final = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


def _ready(chunk: NDArray[Any], port: Port, use: FrontUse, what: str) -> NDArray[Any]:
    kind = _KINDS.get(port.dtype)
    whole = np.issubdtype(chunk.dtype, np.integer) or chunk.dtype.kind == "b"
    if kind is None or (kind is not np.float32 and not (whole and use.integers)):
        raise DataError(
            f"{what} does not fit the front's input {port.name!r}",
            found=f"{chunk.dtype}" + ("" if use.integers else ", read as numbers"),
            expected=port.dtype,
            remedy="set data.integers where the front reads integers",
        )
    if use.shape is not None and not use.others and chunk.shape[1:] != use.shape:
        chunk = chunk.reshape(len(chunk), *use.shape)
    wanted = port.shape[1:]
    if len(wanted) + 1 != chunk.ndim or any(
        size is not None and size != found
        for size, found in zip(wanted, chunk.shape[1:], strict=True)
    ):
        raise DataError(
            f"{what} does not fit the front's input {port.name!r}",
            found=f"samples of shape {chunk.shape[1:]}",
            expected=f"{tuple(wanted)}",
            remedy="set data.shape, or prepare the samples as the front reads them",
        )
    if kind is np.float32:
        return (chunk.astype(np.float64) * use.scale).astype(np.float32)
    ready = chunk.astype(kind)
    if (ready != chunk).any():
        raise DataError(f"{what} holds integers beyond the front's {port.dtype}")
    return ready


def _checked(
    outputs: Mapping[str, NDArray[Any]], use: FrontUse, rows: int, what: str
) -> NDArray[Any]:
    found = np.asarray(outputs[use.output])
    if found.dtype != np.float32 or not 2 <= found.ndim <= _MAX_RANK or len(found) != rows:
        raise DataError(
            f"the front's {use.output!r} is not one array of numbers a sample of {what}",
            found=f"{found.dtype} of shape {found.shape} for {rows} samples",
            expected="float32 with the samples along the first axis",
            remedy="cut where one such tensor crosses",
        )
    if found[0].size == 0:
        raise DataError(f"the front leaves nothing of a sample of {what}")
    return found
