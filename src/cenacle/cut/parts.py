"""Build one part of a model: some of its nodes, with the weights that they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from cenacle.cut.layers import CLASSES, SCOPES
from cenacle.cut.neutral import Replacement
from cenacle.cut.onnx_checks import check_model
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.specs import TensorSpec

__all__ = ["build_part"]

# Exporters also leave lines of source code and paths of files of whoever exported the model, and
# beside the whole graph the names of all its weights: the front is given to anybody.
_KEPT: Final = {SCOPES, CLASSES}
_EXPORTER: Final = "pkg.torch."


def build_part(
    model: OnnxModel,
    nodes: Sequence[int],
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    types: Mapping[str, int],
    added: Mapping[int, Replacement] | None = None,
) -> OnnxModel:
    """A model of some nodes of another, checked by ``onnx.checker``.

    Opsets, names, layers beside the nodes and the model's own metadata stay; nodes keep their
    order, so that equal cuts of equal models have equal bytes.

    Args:
        nodes: positions, ascending.
        inputs, outputs: of the part; those that the model has too stay as the model states them.
        types: ONNX element type by name.
        added: what takes the place of a node.

    Raises:
        DataError: the part is no valid model.
    """
    whole = model.proto
    part = ModelProto()
    part.ir_version = whole.ir_version
    part.opset_import.extend(whole.opset_import)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if whole.HasField(name):
            setattr(part, name, getattr(whole, name))
    part.metadata_props.extend(p for p in whole.metadata_props if not p.key.startswith(_EXPORTER))
    graph = part.graph
    graph.name = whole.graph.name or "graph"
    stated = {value.name: value for value in [*whole.graph.input, *whole.graph.output]}
    graph.input.extend(_value(spec, stated, types) for spec in inputs)
    graph.output.extend(_value(spec, stated, types) for spec in outputs)
    made: set[str] = set()
    read: set[str] = set()
    for i in nodes:
        replacement = (added or {}).get(i)
        if replacement is None:
            graph.node.append(_bare(model.index.nodes[i]))
            read.update(model.index.reads[i])
            made.update(model.index.nodes[i].output)
        else:
            graph.node.extend(replacement.nodes)
            graph.initializer.extend(replacement.constants)
    graph.initializer.extend(t for t in whole.graph.initializer if t.name in read)
    known = {value.name for value in [*graph.input, *graph.output]}
    for value in whole.graph.value_info:
        if value.name in made and value.name not in known:
            graph.value_info.add(name=value.name, type=value.type)
    for note in whole.graph.quantization_annotation:
        if note.tensor_name in made | read:
            graph.quantization_annotation.append(note)
    check_model(part)
    return OnnxModel(part)


def _value(
    spec: TensorSpec, stated: Mapping[str, ValueInfoProto], types: Mapping[str, int]
) -> ValueInfoProto:
    found = stated.get(spec.name)
    if found is not None:
        return ValueInfoProto(name=found.name, type=found.type)
    batch = next(
        (
            value.type.tensor_type.shape.dim[0].dim_param
            for value in stated.values()
            if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_param
        ),
        "batch",
    )
    shape = [
        size if size is not None else batch if axis == 0 else None
        for axis, size in enumerate(spec.shape)
    ]
    return helper.make_tensor_value_info(spec.name, types[spec.name], shape)


def _bare(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("doc_string")
    kept = [entry for entry in node.metadata_props if entry.key in _KEPT]
    del copy.metadata_props[:]
    copy.metadata_props.extend(kept)
    return copy
