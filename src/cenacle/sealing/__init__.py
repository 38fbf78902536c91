"""The sealed container: streaming writer, random-access reader, tensors, tables, programs.

The byte format is specified in ``docs/sealed-container.md``.
"""

from cenacle.sealing.digest import compute_digest, verify_digest
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.package import PackageFinder, pack, package_digest, package_files
from cenacle.sealing.reader import SealedFile, SealedReader
from cenacle.sealing.seal import read_package, seal_bytes, seal_path, unseal_path
from cenacle.sealing.tables import TableReader, TableWriter
from cenacle.sealing.tensors import (
    RawTensor,
    SealedBuffer,
    TensorReader,
    open_tensors,
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
