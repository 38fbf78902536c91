"""What opens a job's sealed files, once the enclave has their keys.

Apart from their checks (:mod:`cenacle.enclave.assets`), because it needs large libraries, and an
enclave that has no keys yet needs none of them.
"""

from __future__ import annotations

from pathlib import Path

from cenacle.crypto import SecretBytes
from cenacle.documents.asset import Asset
from cenacle.errors import SealError
from cenacle.sealing import SealedReader, TableReader, TensorReader

__all__ = ["AssetReader", "open_asset", "reader_for"]

AssetReader = TableReader | TensorReader | SealedReader


def open_asset(asset: Asset, path: Path, key: SecretBytes) -> AssetReader:
    """A lazy reader: plaintext appears only in this process, only of what is read.

    Raises:
        SealError: the file is not the one in the manifest, or its content does not open.
    """
    container = asset.container
    reader = SealedReader(
        path, key, expected_header=container.header, expected_digest=container.digest
    )
    if reader.kind != asset.content:
        raise SealError(
            "a sealed file is of another kind than its manifest says",
            found=reader.kind,
            expected=asset.content,
        )
    return reader_for(reader)


def reader_for(reader: SealedReader) -> AssetReader:
    """The reader that fits the content: of a table, of tensors, or the plain one."""
    match reader.kind:
        case "table":
            return TableReader(reader)
        case "tensors":
            return TensorReader(reader)
        case _:
            return reader
