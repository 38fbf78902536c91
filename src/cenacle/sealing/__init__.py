"""The sealed container: streaming writer, random-access reader, tensors, tables, programs.

The byte format is specified in ``docs/sealed-container.md``. Names are imported at their first
use, so that commands which touch no data do not wait for pyarrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.sealing.digest import compute_digest, verify_digest
    from cenacle.sealing.info import SealedInfo
    from cenacle.sealing.package import PackageFinder, pack, package_digest, package_files
    from cenacle.sealing.reader import SealedFile, SealedReader
    from cenacle.sealing.seal import read_package, seal_bytes, seal_path, unseal_path
    from cenacle.sealing.tables import TableReader, TableWriter
    from cenacle.sealing.tensor_reader import TensorReader, open_tensors
    from cenacle.sealing.tensors import (
        RawTensor,
        SealedBuffer,
        seal_tensors,
        seal_tensors_into,
        sealed_tensors_size,
    )
    from cenacle.sealing.writer import SealedWriter

__all__ = [
    "PackageFinder",
    "RawTensor",
    "SealedBuffer",
    "SealedFile",
    "SealedInfo",
    "SealedReader",
    "SealedWriter",
    "TableReader",
    "TableWriter",
    "TensorReader",
    "compute_digest",
    "open_tensors",
    "pack",
    "package_digest",
    "package_files",
    "read_package",
    "seal_bytes",
    "seal_path",
    "seal_tensors",
    "seal_tensors_into",
    "sealed_tensors_size",
    "unseal_path",
    "verify_digest",
]

__getattr__ = lazy_names(
    __name__,
    {
        "PackageFinder": "package",
        "RawTensor": "tensors",
        "SealedBuffer": "tensors",
        "SealedFile": "reader",
        "SealedInfo": "info",
        "SealedReader": "reader",
        "SealedWriter": "writer",
        "TableReader": "tables",
        "TableWriter": "tables",
        "TensorReader": "tensor_reader",
        "compute_digest": "digest",
        "open_tensors": "tensor_reader",
        "pack": "package",
        "package_digest": "package",
        "package_files": "package",
        "read_package": "seal",
        "seal_bytes": "seal",
        "seal_path": "seal",
        "seal_tensors": "tensors",
        "seal_tensors_into": "tensors",
        "sealed_tensors_size": "tensors",
        "unseal_path": "seal",
        "verify_digest": "digest",
    },
)
