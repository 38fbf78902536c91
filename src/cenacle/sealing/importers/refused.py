"""Files that run code when they are loaded. They are refused, whatever kind is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cenacle.errors import DataError
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.writer import SealedWriter

__all__ = ["refuse_pickle"]


@importer("pickle", "", (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".p"))
def refuse_pickle(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:  # noqa: ARG001
    """Raises :class:`DataError`, always."""
    raise DataError(
        "a pickle is refused, because loading it can run any code",
        found=path.suffix,
        expected="tensors as .npz or .safetensors, tables as .csv or .parquet",
        remedy="save the content with safetensors.numpy.save_file, numpy.savez or to_parquet",
    )
