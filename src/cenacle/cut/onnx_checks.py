"""Which ONNX models are taken: what is refused in a file that somebody else wrote, and why.

A model is data here, never code: ONNX's own operators compute and do nothing else, and of other
domains only those operators of ONNX Runtime are taken that do the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions

from cenacle.cut.graph import subgraphs
from cenacle.cut.onnx_tensors import tensor_bytes
from cenacle.cut.operators import CONTRIBUTED
from cenacle.errors import DataError, InputError

__all__ = [
    "CONTRIBUTED",
    "MAX_NODES",
    "check_model",
    "inline_functions",
    "parse",
    "skeleton",
    "used_domains",
]

MAX_NODES: Final = 50_000
_MAX_BYTES: Final = (1 << 31) - 1  # protobuf's own bound
_MAX_DEPTH: Final = 16
_MAX_DIMENSIONS: Final = 64
_LARGE: Final = 4096

_PICKLE: Final = tuple(bytes((0x80, version)) for version in range(2, 6))


def parse(content: bytes | bytearray) -> ModelProto:
    """A model from the bytes of its file, without anything that ONNX does not know.

    Raises:
        InputError: a pickle, or an archive that may hold one: never opened.
        DataError: too large, or not a model in ONNX's format.
    """
    if content.startswith((*_PICKLE, b"PK\x03\x04")):
        raise InputError(
            "the file is no ONNX model",
            found="a pickle or an archive, which could run code when loaded",
            expected="an ONNX file",
            remedy="export the model to ONNX, or give a .pt2 or .keras file under its own name",
        )
    if len(content) > _MAX_BYTES:
        raise DataError(
            "the ONNX file is too large",
            found=f"{len(content)} bytes",
            expected=f"at most {_MAX_BYTES}",
            remedy="save its weights as external data beside it",
        )
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, RecursionError):
        raise _malformed("bytes that are no protobuf message of a model") from None
    model.DiscardUnknownFields()
    if not model.HasField("graph") or not model.graph.output:
        raise _malformed("no graph with an output")
    return model


def _malformed(found: str) -> DataError:
    return DataError(
        "the file is no usable ONNX model",
        found=found,
        expected="a model that onnx.checker accepts",
        remedy="export the model again",
    )


def inline_functions(model: ModelProto) -> ModelProto:
    """The model with each call of its own functions replaced by the function's nodes.

    Raises:
        DataError: functions that call each other in a circle, or too many nodes.
    """
    _count(model.graph, {}, (), {})
    if not model.functions:
        return model
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    _count(model.graph, functions, (), {})
    try:
        inlined = inline_local_functions(model)
    except Exception:
        raise _malformed("functions that cannot be put in place of their calls") from None
    if inlined.functions:
        raise _malformed("functions that cannot be put in place of their calls")
    return inlined


_Key = tuple[str, str, str]


def _count(
    graph: GraphProto | FunctionProto,
    functions: Mapping[_Key, FunctionProto],
    within: tuple[_Key, ...],
    known: dict[_Key, tuple[int, int]],
) -> tuple[int, int]:
    """Nodes and bytes of a graph once functions are inlined; without doing it."""
    nodes = size = 0
    for node in graph.node:
        parts = [(1, 0)] + [_count(g, functions, within, known) for g in subgraphs(node)]
        key = (node.domain, node.op_type, node.overload)
        if key in functions:
            if key in within or len(within) > _MAX_DEPTH:
                raise _malformed("functions that call each other in a circle or too deep")
            if key not in known:
                known[key] = _count(functions[key], functions, (*within, key), known)
            parts.append(known[key])
        if functions:
            parts.append((0, node.ByteSize()))
        nodes += sum(part[0] for part in parts)
        size += sum(part[1] for part in parts)
        if nodes > MAX_NODES or size > _MAX_BYTES:
            raise DataError(
                "the model's graph is too large",
                found=f"more than {MAX_NODES} nodes, or {_MAX_BYTES} bytes besides its weights",
                expected=f"at most {MAX_NODES} nodes",
                remedy="simplify the graph, for example with onnxslim, before it is cut",
            )
    return nodes, size


def used_domains(graph: GraphProto) -> set[str]:
    """The domains of all operators in a graph, and ONNX's own."""
    return {"", "ai.onnx"} | {node.domain for _, node in _walk(graph)}


def _walk(graph: GraphProto, depth: int = 0) -> Iterator[tuple[GraphProto, NodeProto]]:
    if depth > _MAX_DEPTH:
        raise _malformed(f"graphs nested deeper than {_MAX_DEPTH}")
    for node in graph.node:
        yield graph, node
        for inner in subgraphs(node):
            yield from _walk(inner, depth + 1)


def check_model(model: ModelProto) -> None:
    """Refuse a model that cannot be cut, run everywhere, or trusted to be only data.

    Weights must have been brought into the model before.

    Raises:
        DataError: operators of other domains, training graphs, sparse weights, text, inputs
            that are no tensors; or what ``onnx.checker`` does not accept.
    """
    if model.training_info:
        raise _malformed("a graph for training beside the model's own")
    known = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in {"", "ai.onnx"} and not 1 <= entry.version <= known:
            raise _malformed(f"operators of version {entry.version} of ONNX, not of 1 to {known}")
    if model.ir_version > onnx.IR_VERSION:
        raise _malformed(f"version {model.ir_version} of the format, not up to {onnx.IR_VERSION}")
    for graph, node in _walk(model.graph):
        if graph.sparse_initializer:
            raise _malformed("sparse weights")
        contributed = node.domain == "com.microsoft" and node.op_type in CONTRIBUTED
        if node.domain not in {"", "ai.onnx"} and not contributed:
            raise DataError(
                "the model needs an operator that is not ONNX's own",
                found=f"{node.domain[:60]}.{node.op_type[:60]}",
                expected="operators of ONNX, and those of ONNX Runtime that only compute",
                remedy="export the model without custom operators",
            )
    if model.graph.sparse_initializer:
        raise _malformed("sparse weights")
    for value in [*model.graph.input, *model.graph.output]:
        if not value.type.HasField("tensor_type"):
            raise _malformed(f"{value.name[:60]!r}, which is no tensor")
        if len(value.type.tensor_type.shape.dim) > _MAX_DIMENSIONS:
            raise _malformed(f"{value.name[:60]!r} with more than {_MAX_DIMENSIONS} axes")
    _unique_names(model.graph)
    try:
        onnx.checker.check_model(skeleton(model))
    except (onnx.checker.ValidationError, EncodeError, ValueError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise _malformed(lines[0][:200] if lines else "what onnx.checker refuses") from None


def _unique_names(graph: GraphProto) -> None:
    names = [value.name for value in graph.input] + [t.name for t in graph.initializer]
    names += [name for node in graph.node for name in node.output if name]
    if len(set(names)) != len(names) or "" in names[: len(graph.input)]:
        raise _malformed("a tensor that has no name of its own")
    known = set(names)
    outputs = [value.name for value in graph.output]
    if len(set(outputs)) != len(outputs) or not known.issuperset(outputs):
        raise _malformed("an output that occurs twice or that nothing makes")


def skeleton(model: ModelProto) -> ModelProto:
    """The model without its large weights, which become inputs of their type and shape.

    For tools that look at a graph alone, and that would copy gigabytes otherwise.
    """
    found = ModelProto()
    found.ir_version = max(model.ir_version, 4)
    found.opset_import.extend(model.opset_import)
    graph = found.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) <= _LARGE:
            graph.initializer.append(tensor)
        else:
            graph.input.append(_as_input(tensor))
    return found


def _as_input(tensor: TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
