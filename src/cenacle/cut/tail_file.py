"""Writing the tail's file: see :mod:`cenacle.cut.tail_format` for what lies in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from onnx import ModelProto, TensorProto

from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.onnx_tensors import SAFETENSORS_NAMES, tensor_bytes
from cenacle.cut.segments import make_segments, needed_nodes, stored_weights
from cenacle.cut.tail_format import (
    GRAPH,
    MANIFEST,
    PREFIX,
    TAIL_FORMAT,
    TailManifest,
    Value,
    segment_graph,
)
from cenacle.cut.tail_graph import LOCATION, MAX_GRAPH_BYTES, check_graph
from cenacle.errors import DataError, InputError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all
from cenacle.sealing.safetensors_format import check_name, place_tensors

__all__ = ["SEGMENT_BYTES", "write_tail"]

SEGMENT_BYTES: Final = 1 << 24
"""Weights of a segment. Paging holds two segments at a time, and calls ONNX Runtime for each."""

_LEAST_SEGMENT: Final = 1 << 10


def write_tail(tail: OnnxModel, path: Path, *, segment_bytes: int = SEGMENT_BYTES) -> str:
    """Write a tail as one safetensors file: equal tails make equal bytes.

    Args:
        tail: the confidential part of a model.
        path: the file; it appears whole or not at all, and replaces another.
        segment_bytes: most bytes of weights of a segment, which is what paging reads at once.
            Large matrices, convolutions and tables are split; what cannot be split is a segment
            of its own.

    Returns:
        ``sha256:`` and the digest of the file's bytes.

    Raises:
        InputError: the file cannot be written there, or segments that are too small.
        DataError: a tail that cannot be served: weights that have no name, or graphs that are
            too large, for example through constants of types that numpy lacks.
        UnavailableError: the disk fails or is full.
    """
    if segment_bytes < _LEAST_SEGMENT:
        raise InputError(
            "the segments of a tail are too small",
            found=f"{segment_bytes} bytes",
            expected=f"at least {_LEAST_SEGMENT}",
        )
    weights = stored_weights(tail.proto.graph)
    for name in weights:
        check_name(name)
        if name.startswith(PREFIX):
            raise DataError(
                "a weight has a name that tails keep for themselves",
                found=name[:80],
                expected=f"a name that does not begin with {PREFIX}",
                remedy="rename it",
            )
    segments = make_segments(tail.proto, weights, segment_bytes)
    used = dict.fromkeys(piece.tensor for one, _ in segments for piece in one.weights)
    manifest = TailManifest(
        format=TAIL_FORMAT,
        inputs=tuple(Value.of(spec) for spec in tail.inputs),
        outputs=tuple(Value.of(spec) for spec in tail.outputs),
        weights=tuple(used),
        segments=tuple(segment for segment, _ in segments),
        layers=tail.layers(),
    )
    stored = {name: weights[name] for name in used}
    blobs = {MANIFEST: manifest.to_bytes(), GRAPH: _whole(tail.proto, stored)}
    check_graph(blobs[GRAPH], external=used)
    for index, (_, model) in enumerate(segments):
        graph = model.SerializeToString(deterministic=True)
        check_graph(graph)
        blobs[segment_graph(index)] = graph
    for name, blob in blobs.items():
        if len(blob) > MAX_GRAPH_BYTES:
            raise DataError(
                "the graph of the tail is too large",
                found=f"{name} with {len(blob)} bytes",
                expected=f"at most {MAX_GRAPH_BYTES}",
                remedy="store large constants as weights of a type that numpy has",
            )
    return _write(path, stored, blobs)


def _whole(model: ModelProto, stored: dict[str, TensorProto]) -> bytes:
    """The tail's graph, in which stored weights have a type and a shape and no bytes."""
    made = ModelProto()
    made.ir_version = model.ir_version
    for each in model.opset_import:
        made.opset_import.add(domain=each.domain, version=each.version)
    graph = made.graph
    graph.name = "tail"
    graph.node.extend(needed_nodes(model.graph))
    for value in model.graph.input:
        graph.input.add(name=value.name).type.CopyFrom(value.type)
    for value in model.graph.output:
        graph.output.add(name=value.name).type.CopyFrom(value.type)
    left = stored_weights(model.graph)
    for tensor in model.graph.initializer:
        if tensor.name in left and tensor.name not in stored:
            continue  # no node that matters reads it
        copied = graph.initializer.add()
        if tensor.name not in stored:
            copied.CopyFrom(tensor)
            copied.ClearField("doc_string")
            continue
        copied.name, copied.data_type = tensor.name, tensor.data_type
        copied.dims.extend(tensor.dims)
        copied.data_location = TensorProto.EXTERNAL
        entries = {"location": LOCATION, "offset": "0", "length": str(tensor_bytes(tensor))}
        for key, text in entries.items():
            copied.external_data.add(key=key, value=text)
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def _header(stored: dict[str, TensorProto], blobs: dict[str, bytes]) -> bytes:
    """As :func:`cenacle.sealing.safetensors_format.build_header`, in the order of the segments."""
    sizes: list[tuple[str, str, Sequence[int], int]] = [
        (name, SAFETENSORS_NAMES[tensor.data_type], list(tensor.dims), tensor_bytes(tensor))
        for name, tensor in stored.items()
    ]
    sizes += [(name, "U8", [len(blob)], len(blob)) for name, blob in blobs.items()]
    return place_tensors(sizes)


def _write(path: Path, stored: dict[str, TensorProto], blobs: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    position = 0
    with AtomicFile(path) as file:
        with disk_errors(f"write {path}"):
            for content in _contents(stored, blobs):
                digest.update(content)
                pwrite_all(file.fd, content, position)
                position += len(content)
        file.commit()
    return f"sha256:{digest.hexdigest()}"


def _contents(stored: dict[str, TensorProto], blobs: dict[str, bytes]) -> Iterator[bytes]:
    yield _header(stored, blobs)
    for tensor in stored.values():
        yield tensor.raw_data
    yield from blobs.values()
