"""A model as an ONNX graph with all its weights, from a file that is not trusted."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, ValueInfoProto

from cenacle.cut.graph import GraphIndex
from cenacle.cut.normal import normalize
from cenacle.cut.onnx_checks import check_model, inline_functions, parse, used_domains
from cenacle.cut.onnx_tensors import (
    SAFETENSORS_NAMES,
    embed,
    file_digest,
    graph_tensors,
    read_external,
    tensor_bytes,
)
from cenacle.cut.specs import TensorSpec
from cenacle.errors import DataError
from cenacle.sealing.disk import AtomicFile, disk_errors, open_source, pread_into, pwrite_all

__all__ = ["OnnxModel"]

_EMBED_AT_MOST: Final = 1 << 30
_DIGEST_KEY: Final = "cenacle.weights"


@dataclass(frozen=True)
class OnnxModel:
    """A checked model. All its weights are initializers with their bytes in ``raw_data``.

    Attributes:
        proto: the model; not to be changed.
    """

    proto: ModelProto

    @classmethod
    def from_proto(cls, proto: ModelProto) -> OnnxModel:
        """Check a model that is in memory whole, and bring it into the one form.

        Functions are inlined, ``Constant`` nodes become initializers, initializers are no longer
        inputs. The given message is not changed.

        Raises:
            DataError: see :func:`cenacle.cut.onnx_checks.check_model`.
        """
        model = ModelProto()
        model.CopyFrom(proto)
        model.DiscardUnknownFields()
        return cls._normal(model, None)

    @classmethod
    def from_bytes(cls, content: bytes) -> OnnxModel:
        """The same, from an ONNX file's bytes, which hold all weights.

        Raises:
            InputError: a pickle or an archive.
            DataError: not a model that is taken.
        """
        return cls._normal(parse(content), None)

    @classmethod
    def load(cls, path: Path) -> OnnxModel:
        """Read an ONNX file, and the files of its weights beside it.

        Raises:
            InputError: no such file; a pickle or an archive; weights outside the file's folder
                or behind links.
            DataError: not a model that is taken, or weights that are not what it says.
            UnavailableError: the disk fails.
        """
        fd = open_source(path)
        try:
            with disk_errors(f"read {path}"):
                content = bytearray(os.fstat(fd).st_size)
                length = pread_into(fd, memoryview(content), 0)
        finally:
            os.close(fd)
        del content[length:]
        return cls._normal(parse(content), path.resolve().parent)

    @classmethod
    def _normal(cls, model: ModelProto, folder: Path | None) -> OnnxModel:
        model = inline_functions(model)
        digest = next((p.value for p in model.metadata_props if p.key == _DIGEST_KEY), None)
        tensors = list(graph_tensors(model.graph))
        apart = [t for t in tensors if t.data_location == TensorProto.EXTERNAL]
        for tensor in [t for t in tensors if t.data_location != TensorProto.EXTERNAL]:
            embed(tensor)
        if apart and folder is None:
            raise DataError(
                f"weight {apart[0].name[:80]!r} lies outside the model",
                expected="a model that holds its weights, or a path to load it from",
            )
        if folder is not None:
            read_external(apart, folder, digest)
        _drop_metadata(model, _DIGEST_KEY)
        stored = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in stored]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        # Before version 4 initializers had to be inputs too.
        model.ir_version = max(model.ir_version, 4)
        check_model(model)
        normalize(model)
        _keep_used_domains(model)
        check_model(model)
        return cls(model)

    @cached_property
    def index(self) -> GraphIndex:
        """Nodes, tensors and weights by name and position."""
        return GraphIndex.of(self.proto)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weights that were learned; see :class:`cenacle.cut.graph.Weight`."""
        return self.index.parameters

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a query gives."""
        return tuple(_spec(value) for value in self.proto.graph.input)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a query gets."""
        return tuple(_spec(value) for value in self.proto.graph.output)

    def layers(self) -> tuple[str, ...]:
        """Names of all layers at every depth, in the order in which they begin."""
        from cenacle.cut.layers import Layers  # noqa: PLC0415  layers reads models

        return Layers.of(self).names

    def to_bytes(self) -> bytes:
        """The model as one ONNX file; equal models have equal bytes.

        Raises:
            DataError: more than a file can hold; :meth:`save` puts the weights beside it.
        """
        try:
            return bytes(self.proto.SerializeToString(deterministic=True))
        except (EncodeError, ValueError):
            raise DataError(
                "the model is too large for one ONNX file",
                expected="less than 2 GiB",
                remedy="save it to a path, with its weights beside it",
            ) from None

    @property
    def digest(self) -> str:
        """``sha256:`` of :meth:`to_bytes`."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"

    def save(self, path: Path) -> str:
        """Write the model; beyond 1 GiB its weights go into ``<name>.data`` beside it.

        The file states the digest of its weights, so that its own digest stands for both.

        Returns:
            ``sha256:`` and the digest of the file at ``path``.

        Raises:
            InputError, UnavailableError: it cannot be written; nothing is left half-written.
        """
        if sum(tensor_bytes(t) for t in self.proto.graph.initializer) <= _EMBED_AT_MOST:
            content = self.to_bytes()
        else:
            content = self._save_weights(path.with_name(f"{path.name}.data"))
        with AtomicFile(path) as file:
            with disk_errors(f"write {path}"):
                pwrite_all(file.fd, content, 0)
            file.commit()
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def _save_weights(self, path: Path) -> bytes:
        slim = ModelProto()
        for descriptor, value in self.proto.ListFields():
            if descriptor.name != "graph":
                _copy_field(slim, descriptor.name, value)
        for descriptor, value in self.proto.graph.ListFields():
            if descriptor.name != "initializer":
                _copy_field(slim.graph, descriptor.name, value)
        position = 0
        with AtomicFile(path) as file:
            for tensor in self.proto.graph.initializer:
                with disk_errors(f"write {path}"):
                    pwrite_all(file.fd, tensor.raw_data, position)
                outside = slim.graph.initializer.add()
                outside.name, outside.data_type = tensor.name, tensor.data_type
                outside.dims.extend(tensor.dims)
                outside.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", path.name),
                    ("offset", str(position)),
                    ("length", str(tensor_bytes(tensor))),
                ):
                    outside.external_data.add(key=key, value=value)
                position += tensor_bytes(tensor)
            slim.metadata_props.add(key=_DIGEST_KEY, value=file_digest(file.fd))
            file.commit()
        return bytes(slim.SerializeToString(deterministic=True))


def _copy_field(target: Any, name: str, value: Any) -> None:
    field = getattr(target, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(target, name, value)


def _drop_metadata(model: ModelProto, key: str) -> None:
    kept = [entry for entry in model.metadata_props if entry.key != key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def _copy(node: Any) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    return copied


def _keep_used_domains(model: ModelProto) -> None:
    used = used_domains(model.graph)
    kept = [_copy(entry) for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _spec(value: ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = SAFETENSORS_NAMES.get(kind.elem_type)
    if dtype is None:
        raise DataError(
            f"tensor {value.name[:80]!r} is of a type that cannot be handed over",
            found=TensorProto.DataType.Name(kind.elem_type)
            if kind.elem_type in TensorProto.DataType.values()
            else kind.elem_type,
            expected=", ".join(SAFETENSORS_NAMES.values()),
        )
    if not kind.HasField("shape"):
        raise DataError(
            f"the number of axes of tensor {value.name[:80]!r} is unknown",
            expected="a shape, in which sizes may be left open",
            remedy="export the model with shapes of its inputs and outputs",
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return TensorSpec(value.name, dtype, shape)
