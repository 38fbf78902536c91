"""The public part of a cut model, run outside the enclave by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.onnx_runtime import onnxruntime
from cenacle.cut.specs import NUMPY_DTYPES, TensorSpec
from cenacle.documents.base import sha256_digest
from cenacle.errors import DataError, InputError, VerificationError
from cenacle.sealing.disk import disk_errors

__all__ = ["Front", "front_digest", "read_front"]

_MAX_BYTES: Final = (1 << 31) - 1
"""Of one ONNX file: protobuf's own limit."""

_TYPES: Final = {
    "bool": "BOOL",
    "float": "F32",
    "double": "F64",
    "float16": "F16",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def read_front(path: Path, digest: str) -> bytes:
    """The front's file, once its SHA-256 is the contract's.

    Raises:
        InputError: it is missing or too large.
        VerificationError: it is another file.
    """
    data = _read(path)
    found = sha256_digest(data)
    if found != digest:
        raise VerificationError(
            "the front is not the one that the contract names",
            found=found,
            expected=digest,
            remedy="get the file from the model's owner",
        )
    return data


def front_digest(path: Path) -> str:
    """``sha256:...`` of a front's file, as contracts name it."""
    return sha256_digest(_read(path))


def _read(path: Path) -> bytes:
    with disk_errors(f"read {path}"):
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError("a front is too large", found=f"{size} bytes", expected=_MAX_BYTES)
        return path.read_bytes()


class Front:
    """A graph that turns a model's inputs into the tensors that cross to the enclave.

    The same input gives the same bits each time it is run alone: the number of threads is fixed,
    and nothing of it is random. Files that the graph would refer to are not read.

    Args:
        data: an ONNX file; see :func:`read_front`.
        threads: for one run; default: as many as this process has processors.

    Raises:
        DataError: ONNX Runtime does not take the graph, or it has inputs or outputs that are no
            tensors of known types.
        InputError: ONNX Runtime is not installed.
    """

    def __init__(self, data: bytes, *, threads: int | None = None) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # its messages would name what strangers sent
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        # Bytes of another form (flatbuffers) would go to another parser.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DataError(
                "a front cannot be run",
                found=type(error).__name__,
                expected="an ONNX file of standard operators that holds its own weights",
            ) from None
        self.inputs = tuple(_spec(one) for one in self._session.get_inputs())
        self.outputs = tuple(_spec(one) for one in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    @classmethod
    def open(cls, path: Path, digest: str, *, threads: int | None = None) -> Self:
        """The front in a file that must have this digest."""
        return cls(read_front(path, digest), threads=threads)

    @property
    def joinable(self) -> bool:
        """Whether requests can be run together, row by row."""
        return all(spec.batched for spec in (*self.inputs, *self.outputs))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The crossing tensors; blocks until they are there.

        Raises:
            InputError: the graph fails on these inputs.
        """
        try:
            found = self._session.run(self._names, dict(inputs))
        except Exception as error:
            # ONNX Runtime's words may hold values.
            raise InputError("the model fails on this input", found=type(error).__name__) from None
        return {name: np.asarray(array) for name, array in zip(self._names, found, strict=True)}


def _spec(argument: Any) -> TensorSpec:
    """A tensor as ONNX Runtime describes it, e.g. ``tensor(float)``, ``['batch', 3]``."""
    kind = str(argument.type).removeprefix("tensor(").removesuffix(")")
    dtype = _TYPES.get(kind)
    if dtype is None or dtype not in NUMPY_DTYPES:
        raise DataError(
            "a front has an input or output that cannot cross",
            found=str(argument.type)[:80],
            expected="tensors of numbers or truth values",
        )
    sizes = tuple(size if isinstance(size, int) else None for size in argument.shape)
    return TensorSpec(argument.name, dtype, sizes)
