"""A tail in consecutive segments, each with few weights, so that one at a time can be in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, shape_inference

from cenacle.cut.graph import captured_names
from cenacle.cut.onnx_tensors import SAFETENSORS_NAMES, tensor_bytes
from cenacle.cut.specs import NUMPY_DTYPES
from cenacle.cut.split_weights import Unit, split_node
from cenacle.cut.tail_format import Piece, Segment
from cenacle.errors import DataError

__all__ = ["make_segments", "needed_nodes", "stored_weights"]

_INLINE_BYTES: Final = 1024
_FLOATS: Final = {TensorProto.FLOAT, TensorProto.DOUBLE}
_FRACTIONS: Final = {*_FLOATS, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def stored_weights(graph: GraphProto) -> dict[str, TensorProto]:
    """The initializers that are stored beside the graph.

    In the graph stay shapes, axes and other small constants, which ONNX Runtime reads before it
    has any weights, and tensors of types that numpy lacks.
    """
    found = {}
    for tensor in graph.initializer:
        small = tensor_bytes(tensor) <= _INLINE_BYTES
        scalar = not tensor.dims or list(tensor.dims) == [1]
        if small and (scalar or tensor.data_type not in _FRACTIONS):
            continue
        if SAFETENSORS_NAMES.get(tensor.data_type) in NUMPY_DTYPES:
            found[tensor.name] = tensor
    return found


def _bare(node: NodeProto) -> NodeProto:
    """A copy of a node without what only people read, which may hold paths of its maker's."""
    made = NodeProto()
    made.CopyFrom(node)
    made.ClearField("doc_string")
    del made.metadata_props[:]
    for attribute in made.attribute:
        attribute.ClearField("doc_string")
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            nodes = [_bare(inner) for inner in graph.node]
            del graph.node[:], graph.value_info[:], graph.metadata_props[:]
            del graph.quantization_annotation[:]
            graph.ClearField("doc_string")
            graph.node.extend(nodes)
            for tensor in graph.initializer:
                tensor.ClearField("doc_string")
            for value in (*graph.input, *graph.output):
                value.ClearField("doc_string")
                del value.metadata_props[:]
        for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
            tensor.ClearField("doc_string")
    return made


def _reads(node: NodeProto) -> list[str]:
    inner = [
        name
        for attribute in node.attribute
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for name in captured_names(graph)
    ]
    return [name for name in (*node.input, *inner) if name]


def _types(model: ModelProto) -> dict[str, TypeProto]:
    """Types of values as ONNX's own rules infer them, without looking at weights."""
    light = ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.graph.name = "tail"
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) <= _INLINE_BYTES:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    try:
        graph = shape_inference.infer_shapes(light).graph
    except (shape_inference.InferenceError, ValueError, RuntimeError):
        graph = light.graph  # then fewer places are known where the tail can be cut
    return {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}


def _plain_type(found: TypeProto | None) -> TypeProto | None:
    """Element type and fixed sizes; ``None`` unless it is a tensor of a type that numpy has."""
    if found is None or not found.HasField("tensor_type"):
        return None
    kind = found.tensor_type
    if SAFETENSORS_NAMES.get(kind.elem_type) not in NUMPY_DTYPES:
        return None
    if not kind.HasField("shape"):
        return helper.make_tensor_type_proto(kind.elem_type, None)
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    return helper.make_tensor_type_proto(kind.elem_type, sizes)


def _transposed(nodes: list[NodeProto], weights: Mapping[str, TensorProto]) -> list[NodeProto]:
    """``MatMul(x, Transpose(weight))`` in one operator, so that no copy of the weight is made.

    ONNX Runtime does the same where the weight is a constant, which it is not when it is paged.
    """
    uses = Counter(name for node in nodes for name in _reads(node))
    turned: dict[str, str] = {}
    for node in nodes:
        weight = weights.get(node.input[0]) if node.op_type == "Transpose" else None
        if weight is None or weight.data_type not in _FLOATS or len(weight.dims) != 2:
            continue
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])
        if order == [1, 0]:
            turned[node.output[0]] = weight.name
    made = []
    for node in nodes:
        if node.op_type == "MatMul" and node.domain == "" and node.input[1] in turned:
            uses[node.input[1]] -= 1
            made.append(
                helper.make_node(
                    "FusedMatMul",
                    [node.input[0], turned[node.input[1]]],
                    list(node.output),
                    name=node.name,
                    domain="com.microsoft",
                    transB=1,
                )
            )
        else:
            made.append(node)
    return [n for n in made if not (n.output[0] in turned and uses[n.output[0]] == 0)]


@dataclass
class _Group:
    """A segment in the making."""

    units: list[Unit] = field(default_factory=list)
    tensors: dict[tuple[str, int | None], int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(self.tensors.values())


def _sizes(unit: Unit, weights: Mapping[str, TensorProto]) -> dict[tuple[str, int | None], int]:
    found = {}
    for piece in unit.pieces.values():
        size = tensor_bytes(weights[piece.tensor])
        if piece.start is not None and piece.stop is not None:
            size = size // weights[piece.tensor].dims[0] * (piece.stop - piece.start)
        found[piece.tensor, piece.start] = size
    return found


def make_segments(
    model: ModelProto, weights: Mapping[str, TensorProto], segment_bytes: int
) -> list[tuple[Segment, ModelProto]]:
    """Segments in the order of computation, with their graphs, whose weights are inputs.

    Args:
        model: the tail; nodes in topological order, small constants as initializers.
        weights: what :func:`stored_weights` returned for it.
        segment_bytes: most bytes of weights in a segment, except where a single operator that
            cannot be split needs more.

    Raises:
        DataError: an output that no node makes.
    """
    graph = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    units: list[Unit] = []
    for node in _transposed(needed_nodes(graph), weights):
        parts = split_node(node, weights, most=segment_bytes, opset=opset)
        whole = {n: Piece(name=n, tensor=n) for n in _reads(node) if n in weights}
        units += [Unit([node], whole)] if parts is None else parts
    types = _types(model)
    kinds = {name: kind for name, found in types.items() if (kind := _plain_type(found))}
    for unit in units:
        for name, element in unit.types.items():
            kinds.setdefault(name, helper.make_tensor_type_proto(element, None))
    groups = _group(units, weights, kinds, segment_bytes, [v.name for v in graph.output])
    return _build(model, groups, weights, kinds)


def needed_nodes(graph: GraphProto) -> list[NodeProto]:
    """Copies of the nodes that an output depends on, without what only people read.

    Raises:
        DataError: an output that no node makes.
    """
    wanted = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(_bare(node))
            wanted |= set(_reads(node))
    made = {name for node in kept for name in node.output} | {v.name for v in graph.input}
    for value in graph.output:
        if value.name not in made:
            raise DataError(
                "an output of the tail is computed by no operator",
                found=value.name[:80],
                expected="outputs that depend on an operator",
                remedy="cut the model at an earlier layer",
            )
    if not kept:
        raise DataError(
            "the tail computes nothing",
            found="no operator",
            remedy="cut the model at an earlier layer",
        )
    return kept[::-1]


def _group(
    units: list[Unit],
    weights: Mapping[str, TensorProto],
    kinds: Mapping[str, TypeProto],
    segment_bytes: int,
    outputs: Iterable[str],
) -> list[_Group]:
    closed = _closed_places(units, kinds, set(outputs))
    groups = [_Group()]
    for index, unit in enumerate(units):
        sizes = _sizes(unit, weights)
        joined = sum({**groups[-1].tensors, **sizes}.values())
        if groups[-1].tensors and sizes and joined > segment_bytes and index not in closed:
            groups.append(_Group())
        groups[-1].units.append(unit)
        groups[-1].tensors.update(sizes)
    return groups


def _closed_places(
    units: list[Unit], kinds: Mapping[str, TypeProto], outputs: set[str]
) -> set[int]:
    """Units before which the tail cannot be cut, for a value of an unknown type would cross."""
    made: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, unit in enumerate(units):
        for node in unit.nodes:
            for name in _reads(node):
                last[name] = index
            for name in node.output:
                made.setdefault(name, index)
                if name in outputs:
                    last[name] = len(units)
    closed: set[int] = set()
    for name, index in made.items():
        if name not in kinds:
            closed.update(range(index + 1, min(last.get(name, index), len(units) - 1) + 1))
    return closed


def _build(
    model: ModelProto,
    groups: list[_Group],
    weights: Mapping[str, TensorProto],
    kinds: Mapping[str, TypeProto],
) -> list[tuple[Segment, ModelProto]]:
    constants = {t.name: t for t in model.graph.initializer if t.name not in weights}
    reads = [{n for u in g.units for node in u.nodes for n in _reads(node)} for g in groups]
    finals = {value.name for value in model.graph.output}
    later: list[set[str]] = []
    after: set[str] = set(finals)
    for names in reversed(reads):
        later.append(set(after))
        after |= names
    later.reverse()
    built = []
    for group, names, wanted in zip(groups, reads, later, strict=True):
        nodes = [node for unit in group.units for node in unit.nodes]
        own = dict.fromkeys(n for node in nodes for n in node.output if n)
        pieces = {n: p for unit in group.units for n, p in unit.pieces.items()}
        inner = {t.name: t for unit in group.units for t in unit.constants}
        inner.update((n, constants[n]) for n in sorted(names) if n in constants)
        ordered = dict.fromkeys(n for node in nodes for n in _reads(node))
        inputs = [n for n in ordered if n not in own and n not in pieces and n not in inner]
        outputs = [n for n in own if n in wanted]
        if not outputs:
            continue
        segment = Segment(
            inputs=tuple(inputs), outputs=tuple(outputs), weights=tuple(pieces.values())
        )
        built.append((segment, _segment_model(model, nodes, segment, inner, weights, kinds)))
    return built


def _segment_model(
    model: ModelProto,
    nodes: list[NodeProto],
    segment: Segment,
    constants: Mapping[str, TensorProto],
    weights: Mapping[str, TensorProto],
    kinds: Mapping[str, TypeProto],
) -> ModelProto:
    made = ModelProto()
    made.ir_version = model.ir_version
    for each in model.opset_import:
        made.opset_import.add(domain=each.domain, version=each.version)
    if not any(each.domain == "com.microsoft" for each in model.opset_import):
        made.opset_import.add(domain="com.microsoft", version=1)
    made.graph.name = "segment"
    made.graph.node.extend(nodes)
    for tensor in constants.values():
        copied = made.graph.initializer.add()
        copied.CopyFrom(tensor)
        copied.ClearField("doc_string")
    for name in segment.inputs:
        made.graph.input.append(helper.make_value_info(name, kinds[name]))
    for piece in segment.weights:
        weight = weights[piece.tensor]
        shape = list(weight.dims)
        if piece.start is not None and piece.stop is not None:
            shape[0] = piece.stop - piece.start
        made.graph.input.append(helper.make_tensor_value_info(piece.name, weight.data_type, shape))
    for name in segment.outputs:
        kind = kinds.get(name)
        made.graph.output.append(helper.make_value_info(name, kind or TypeProto()))
    return made
