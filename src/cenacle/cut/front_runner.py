"""A front in ONNX, run on this machine: for training at home and for measuring models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.onnx_runtime import Session
from cenacle.cut.specs import TensorSpec

__all__ = ["OnnxFront"]


class OnnxFront:
    """What :func:`cenacle.training.train` and ``predict`` take as a front.

    Args:
        model: the front.
        threads: how many compute; by default one a core.

    Raises:
        InputError: ONNX Runtime is not installed.
        EnclaveError: ONNX Runtime does not take the model.
    """

    def __init__(self, model: OnnxModel, *, threads: int | None = None) -> None:
        self._session = Session(model.to_bytes(), threads=threads)
        self.inputs: tuple[TensorSpec, ...] = model.inputs
        self.outputs: tuple[TensorSpec, ...] = model.outputs

    @classmethod
    def load(cls, path: Path, *, threads: int | None = None) -> Self:
        """From ``front.onnx``, with the checks and errors of :meth:`OnnxModel.load`."""
        return cls(OnnxModel.load(path), threads=threads)

    def run(self, inputs: Mapping[str, NDArray[Any]], /) -> dict[str, NDArray[Any]]:
        """All outputs by name; raises EnclaveError if an operator fails."""
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(inputs, names), strict=True))
