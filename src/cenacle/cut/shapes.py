"""Sizes of all tensors of a model, found by shape inference for two sizes of a batch.

ONNX's inference follows names of axes only through few operators, but numbers through nearly all.
So it is run with numbers, twice, with other numbers for each open axis: what differs, varies, and
an axis that equals the batch in both runs is the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from onnx import ModelProto, ValueInfoProto, helper, shape_inference

from cenacle.cut.folding import Folder
from cenacle.cut.onnx_checks import skeleton
from cenacle.cut.onnx_tensors import SAFETENSORS_NAMES
from cenacle.cut.specs import TensorSpec
from cenacle.errors import DataError, InputError
from cenacle.sealing.safetensors_format import DTYPE_BYTES

__all__ = ["BATCH", "Sizes", "infer_sizes"]

BATCH: Final = "batch"
_ROWS: Final = (7, 11)
# Open axes that are no batch: an image's sides or a text's length; some models halve them often.
_OPEN: Final = (224, 288)
_STEP: Final = 32
_MOST_ROUNDS: Final = 200

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Types and sizes of the tensors of a model.

    Attributes:
        types: ONNX element type by name.
        first, second: sizes by name, in the two runs; a tensor that inference could not follow
            is in neither.
        symbols: name of an open axis, ``batch`` or one of the model's own, to its size in the
            two runs.
        row: sizes for a batch of one row, with the open axes that were given, else as in
            ``first``.
    """

    types: Mapping[str, int]
    first: Mapping[str, Shape]
    second: Mapping[str, Shape]
    row: Mapping[str, Shape]
    symbols: Mapping[str, tuple[int, int]]

    def axes(self, name: str) -> tuple[int | str | None, ...] | None:
        """Each axis of a tensor: its size, the open axis that it equals, or ``None``."""
        first, second = self.first.get(name), self.second.get(name)
        if first is None or second is None or len(first) != len(second):
            return None
        by_sizes = {sizes: symbol for symbol, sizes in reversed(list(self.symbols.items()))}
        return tuple(
            a if a == b else by_sizes.get((a, b)) for a, b in zip(first, second, strict=True)
        )

    def spec(self, name: str) -> TensorSpec:
        """The tensor as it crosses from one part to another.

        Raises:
            DataError: its type cannot be handed over, or its sizes could not be found.
            InputError: the first axis varies with the batch but is not the batch.
        """
        dtype = SAFETENSORS_NAMES.get(self.types.get(name, 0))
        axes = self.axes(name)
        if dtype is None or axes is None:
            raise DataError(
                f"the {'type' if axes is not None else 'shape'} of tensor {name[:80]!r} is unknown",
                expected="a tensor of numbers whose shape can be inferred",
                remedy="cut elsewhere, or state the sizes of the inputs",
            )
        if axes and axes[0] is None:
            raise InputError(
                f"tensor {name[:80]!r} mixes the rows of a batch with another axis",
                expected="a first axis that counts rows",
                remedy="cut before or after the layer that reshapes it",
            )
        return TensorSpec(name, dtype, tuple(a if isinstance(a, int) else None for a in axes))

    def size(self, name: str) -> int | None:
        """Bytes of a tensor for one row; ``None`` if that is unknown."""
        return self._bytes.get(name)

    @cached_property
    def _bytes(self) -> dict[str, int]:
        found = {}
        for name, shape in self.row.items():
            dtype = SAFETENSORS_NAMES.get(self.types.get(name, 0))
            if dtype is not None:
                found[name] = math.prod(shape) * DTYPE_BYTES[dtype]
        return found


def infer_sizes(
    model: ModelProto, given: Mapping[str, Sequence[int | None]] | None = None
) -> Sizes:
    """Infer the sizes of all tensors.

    Args:
        given: shapes of inputs by name: sizes of open axes for :attr:`Sizes.row`.

    Raises:
        InputError: a given shape does not fit the model's input.
    """
    bare = skeleton(model)
    known = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in bare.graph.input if value.name not in known]
    for name in given or {}:
        if name not in {value.name for value in inputs}:
            raise InputError(
                "a shape is given for an input that the model does not have",
                found=name[:80],
                expected=", ".join(value.name for value in inputs),
            )
    symbols: dict[str, tuple[int, int]] = {}
    named: dict[str, str] = {}  # the model's own names of open axes
    asked: dict[str, int] = {BATCH: 1}
    places: list[tuple[ValueInfoProto, int, str]] = []
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        fixed = list((given or {}).get(value.name, [None] * len(dims)))
        _fit(value, fixed)
        for axis, (dim, size) in enumerate(zip(dims, fixed, strict=True)):
            if dim.HasField("dim_value"):
                continue
            symbol = BATCH if axis == 0 else dim.dim_param or f"{value.name}.{axis}"
            if symbol not in symbols:
                step = _STEP * len(symbols)
                symbols[symbol] = _ROWS if symbol == BATCH else (_OPEN[0] + step, _OPEN[1] + step)
            if axis and size is not None:
                asked[symbol] = size
            if dim.dim_param:
                named[dim.dim_param] = symbol
            places.append((value, axis, symbol))
    runs = []
    types: dict[str, int] = {}
    for run in (0, 1, 2):
        sizes = {
            symbol: asked.get(symbol, pair[0]) if run == 2 else pair[run]
            for symbol, pair in symbols.items()
        }
        for value, axis, symbol in places:
            value.type.tensor_type.shape.dim[axis].dim_value = sizes[symbol]
        stated = _stated(model, {name: sizes[symbol] for name, symbol in named.items()})
        runs.append(_run(bare, stated, types))
    return Sizes(types, runs[0], runs[1], runs[2], symbols)


def _stated(model: ModelProto, sizes: Mapping[str, int]) -> dict[str, ValueInfoProto]:
    """What the model itself says of its tensors, with numbers for names of axes."""
    found: dict[str, ValueInfoProto] = {}
    for value in [*model.graph.value_info, *model.graph.output]:
        kind = value.type.tensor_type
        axes = [
            d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param)
            for d in kind.shape.dim
        ]
        if kind.elem_type and kind.HasField("shape") and None not in axes:
            found[value.name] = helper.make_tensor_value_info(value.name, kind.elem_type, axes)
    return found


def _fit(value: ValueInfoProto, fixed: list[int | None]) -> None:
    dims = value.type.tensor_type.shape.dim
    agree = len(fixed) == len(dims) and all(
        size is None or not dim.HasField("dim_value") or dim.dim_value == size
        for dim, size in zip(dims, fixed, strict=True)
    )
    if not agree:
        raise InputError(
            f"the shape given for input {value.name!r} does not fit the model",
            found=" x ".join("?" if size is None else str(size) for size in fixed),
            expected=" x ".join(
                str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in dims
            ),
        )


def _run(
    bare: ModelProto, stated: Mapping[str, ValueInfoProto], types: dict[str, int]
) -> dict[str, Shape]:
    content = ModelProto()
    content.CopyFrom(bare)
    for value in content.graph.output:
        value.type.tensor_type.ClearField("shape")  # names of axes would stand against numbers
    folder = Folder(content)
    shapes: dict[str, Shape] = {}
    for _ in range(_MOST_ROUNDS):
        try:
            # Without its data propagation: a few nodes can make that fill any memory.
            found = shape_inference.infer_shapes(content, data_prop=False)
        except (shape_inference.InferenceError, ValueError, RuntimeError):
            found = content
        _collect(found, types, shapes)
        if folder.fold(shapes):
            continue
        # Only now is the model believed: what it says may be wrong, and would stop the inference.
        unknown = [value for name, value in stated.items() if name not in shapes]
        if not unknown:
            break
        own = {value.name: value for value in content.graph.output}
        for value in unknown:
            if value.name in own:
                own[value.name].type.CopyFrom(value.type)
            else:
                content.graph.value_info.append(value)
            shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            types.setdefault(value.name, value.type.tensor_type.elem_type)
    return shapes


def _collect(found: ModelProto, types: dict[str, int], shapes: dict[str, Shape]) -> None:
    for tensor in found.graph.initializer:
        types[tensor.name] = tensor.data_type
        shapes[tensor.name] = tuple(tensor.dims)
    for value in [*found.graph.input, *found.graph.value_info, *found.graph.output]:
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = kind.elem_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
