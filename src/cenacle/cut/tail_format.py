"""The tail's file: what its manifest says, and what a reader believes of it.

A tail is a safetensors file, so that it is sealed, pinned and read like any model. Beside its
weights it holds three kinds of tensors of bytes:

* ``cenacle.tail/manifest``: canonical JSON, :class:`TailManifest`;
* ``cenacle.tail/graph``: the whole tail as an ONNX model; its weights are external;
* ``cenacle.tail/graph.<i>``: the same nodes in consecutive segments, whose weights are inputs.

The file's order is that of the segments, so that paging reads forward. Part of what the enclave
imports: numpy and pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Protocol, Self

from pydantic import Field, model_validator

from cenacle.cut.specs import NUMPY_DTYPES, TensorSpec
from cenacle.cut.tail_graph import MAX_GRAPH_BYTES
from cenacle.documents.base import Frozen, canonical_json, parse_json
from cenacle.errors import DataError, DocumentError
from cenacle.sealing.safetensors_format import TensorSpec as Stored

__all__ = [
    "GRAPH",
    "MANIFEST",
    "PREFIX",
    "TAIL_FORMAT",
    "Piece",
    "Segment",
    "TailManifest",
    "TailReader",
    "Value",
    "read_graph",
    "read_manifest",
    "segment_graph",
]

TAIL_FORMAT: Final = "cenacle.tail/1"
PREFIX: Final = "cenacle.tail/"
MANIFEST: Final = PREFIX + "manifest"
GRAPH: Final = PREFIX + "graph"

_MAX_SEGMENTS: Final = 8192
_MAX_TENSORS: Final = 65536

Text = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*$")]
Size = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


def segment_graph(index: int) -> str:
    """The name of the tensor that holds a segment's graph."""
    return f"{GRAPH}.{index}"


class TailReader(Protocol):
    """What the runtime needs of :class:`cenacle.sealing.TensorReader`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def cache_bytes(self) -> int: ...

    def spec(self, name: str) -> Stored: ...

    def read_raw(self, name: str) -> bytes: ...

    def readinto(
        self, name: str, buffer: Any, *, start: int = 0, stop: int | None = None
    ) -> None: ...


class Value(Frozen):
    """A tensor that enters or leaves the tail; fields as :class:`cenacle.cut.specs.TensorSpec`."""

    name: Text
    dtype: Text
    shape: Annotated[tuple[Size | None, ...], Field(max_length=64)]

    @classmethod
    def of(cls, spec: TensorSpec) -> Self:
        return cls(name=spec.name, dtype=spec.dtype, shape=spec.shape)

    def spec(self) -> TensorSpec:
        """Raises :class:`DataError` for what no tensor can be, or numpy has no type for."""
        found = TensorSpec(self.name, self.dtype, self.shape)
        _ = found.numpy_dtype
        return found


class Piece(Frozen):
    """A weight of a segment: a stored tensor, or some rows of one.

    Attributes:
        name: the segment's input that takes it.
        tensor: the stored tensor.
        start, stop: rows of it along its first axis; absent for all of it.
    """

    name: Text
    tensor: Text
    start: Size | None = None
    stop: Size | None = None

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if (self.start is None) != (self.stop is None):
            raise ValueError("start and stop come together")
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ValueError("rows begin before they end")
        return self

    def shape(self, stored: Stored) -> tuple[int, ...]:
        """The shape of the piece; raises :class:`DataError` if there are no such rows."""
        if self.start is None or self.stop is None:
            return stored.shape
        if not stored.shape or self.stop > stored.shape[0]:
            raise _bad(f"rows of {self.tensor[:80]!r} that are not there", "rows that are")
        return (self.stop - self.start, *stored.shape[1:])


class Segment(Frozen):
    """Consecutive nodes of the tail.

    Attributes:
        inputs: values that it takes, of the tail's inputs and of earlier segments' outputs.
        outputs: values that it makes for later segments or for the tail's user.
        weights: what it needs besides.
    """

    inputs: Annotated[tuple[Text, ...], Field(max_length=_MAX_TENSORS)]
    outputs: Annotated[tuple[Text, ...], Field(min_length=1, max_length=_MAX_TENSORS)]
    weights: Annotated[tuple[Piece, ...], Field(max_length=_MAX_TENSORS)]


class TailManifest(Frozen):
    """What a tail is made of.

    Attributes:
        inputs, outputs: of the tail, in the order of its ONNX graph.
        weights: the stored tensors, which the whole graph has as external initializers.
        segments: in the order in which they are computed.
        layers: the layers that lie in the tail, for people.
    """

    format: Literal["cenacle.tail/1"]
    inputs: Annotated[tuple[Value, ...], Field(min_length=1, max_length=1024)]
    outputs: Annotated[tuple[Value, ...], Field(min_length=1, max_length=1024)]
    weights: Annotated[tuple[Text, ...], Field(max_length=_MAX_TENSORS)]
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=_MAX_SEGMENTS)]
    layers: Annotated[tuple[Text, ...], Field(max_length=_MAX_TENSORS)]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [value.name for value in (*self.inputs, *self.outputs)]
        if len(set(names[: len(self.inputs)])) != len(self.inputs):
            raise ValueError("an input occurs twice")
        if len(set(names[len(self.inputs) :])) != len(self.outputs):
            raise ValueError("an output occurs twice")
        if len(set(self.weights)) != len(self.weights):
            raise ValueError("a weight occurs twice")
        if any(name.startswith(PREFIX) for name in self.weights):
            raise ValueError(f"a weight's name begins with {PREFIX}")
        return self

    @model_validator(mode="after")
    def _values_flow_forward(self) -> Self:
        made = {value.name for value in self.inputs}
        stored = set(self.weights)
        for segment in self.segments:
            pieces = [piece.name for piece in segment.weights]
            taken = [*segment.inputs, *pieces]
            if len(set(taken)) != len(taken):
                raise ValueError("a segment takes a value twice")
            if not set(segment.inputs) <= made:
                raise ValueError("a segment takes a value that no earlier one makes")
            if not {piece.tensor for piece in segment.weights} <= stored:
                raise ValueError("a segment takes a weight that is not listed")
            if len(set(segment.outputs)) != len(segment.outputs) or made & set(segment.outputs):
                raise ValueError("a value is made twice")
            made |= set(segment.outputs)
        if not {value.name for value in self.outputs} <= made:
            raise ValueError("an output is never made")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON; unbounded sizes are written as ``null``."""
        return canonical_json(self.model_dump(mode="json"))


def _bad(found: str, expected: str) -> DataError:
    return DataError(
        "the file is no tail of a model, or a damaged one",
        found=found,
        expected=expected,
        remedy="write the tail again with cenacle cut",
    )


def read_manifest(reader: TailReader) -> TailManifest:
    """The manifest of a tail, after everything it says of the file was found to be so.

    Raises:
        DataError: no tail, or tensors that are missing, too many, of types that numpy lacks,
            or of other shapes than the manifest says.
        SealError: a chunk is damaged or forged.
    """
    names = set(reader.names)
    try:
        raw = parse_json(_bytes(reader, names, MANIFEST))
        manifest = TailManifest.from_fields(raw)
    except DocumentError as error:
        raise _bad(error.what[:400], f"a manifest of format {TAIL_FORMAT}") from None
    for value in (*manifest.inputs, *manifest.outputs):
        value.spec()
    graphs = {GRAPH, *(segment_graph(index) for index in range(len(manifest.segments)))}
    expected = {MANIFEST, *graphs, *manifest.weights}
    if names != expected:
        odd = min(names ^ expected)
        raise _bad(f"a tensor {odd[:80]!r} missing or too many", "the tensors of its manifest")
    for name in manifest.weights:
        if reader.spec(name).dtype not in NUMPY_DTYPES:
            raise _bad(f"type {reader.spec(name).dtype}", ", ".join(NUMPY_DTYPES))
    for segment in manifest.segments:
        for piece in segment.weights:
            piece.shape(reader.spec(piece.tensor))
    return manifest


def read_graph(reader: TailReader, name: str) -> bytes:
    """The bytes of a graph of a tail, not yet looked into.

    Raises:
        DataError: no such graph, or one that is too large.
        SealError: a chunk is damaged or forged.
    """
    return _bytes(reader, {name} & set(reader.names), name)


def _bytes(reader: TailReader, names: set[str], name: str) -> bytes:
    if name not in names:
        raise _bad(f"no tensor {name}", "a file that cenacle cut wrote")
    spec = reader.spec(name)
    if spec.dtype != "U8" or len(spec.shape) != 1 or spec.shape[0] > MAX_GRAPH_BYTES:
        raise _bad(f"tensor {name} of {spec.dtype}{list(spec.shape)}", "a row of bytes")
    return reader.read_raw(name)
