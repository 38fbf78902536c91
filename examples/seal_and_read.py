"""Seal tensors and a table, then read one tensor, some rows and one column of them.

Only what is asked for is read and decrypted; every byte of it is authenticated::

    python examples/seal_and_read.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cenacle.crypto import SecretBytes
from cenacle.errors import SealError
from cenacle.sealing import TableReader, TensorReader, seal_path, seal_tensors


def tensors(folder: Path, key: SecretBytes) -> float:
    """Seal an embedding matrix and read ten rows of its million numbers."""
    random = np.random.default_rng(7)
    weights = {"embedding": random.random((10_000, 100)), "bias": np.zeros(100)}
    info = seal_tensors(weights, folder / "weights.sealed", key)
    print(f"sealed {info.plaintext_bytes:,} bytes of tensors, digest {info.digest[:19]}...")
    # Whoever pins the digest gets this very file or an error.
    with TensorReader(folder / "weights.sealed", key, expected_digest=info.digest) as reader:
        rows = np.asarray(reader.rows("embedding", 5000, 5010))
    assert np.array_equal(rows, weights["embedding"][5000:5010])
    return float(rows.mean())


def table(folder: Path, key: SecretBytes) -> int:
    """Seal a Parquet file and read one column of some rows."""
    ages = pa.table({"age": np.arange(100_000) % 90, "name": [f"p{i}" for i in range(100_000)]})
    pq.write_table(ages, folder / "patients.parquet")
    info = seal_path(folder / "patients.parquet", folder / "patients.sealed", key)
    print(f"sealed a table: {info.schema['rows']:,} rows of {info.schema['columns']}")
    with TableReader(folder / "patients.sealed", key) as reader:
        some = reader.read(["age"], 40_000, 40_100)
    assert some.column_names == ["age"]
    return int(some.column("age").to_numpy().max())


def forged(folder: Path, key: SecretBytes) -> str:
    """One flipped bit is an error, not a wrong number."""
    data = bytearray((folder / "weights.sealed").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "forged.sealed").write_bytes(data)
    try:
        with TensorReader(folder / "forged.sealed", key) as reader:
            reader.read("embedding")
    except SealError as error:
        return error.what
    raise AssertionError("a forged file was read")


def main(folder: Path) -> None:
    with SecretBytes.random(32) as key:
        print(f"mean of ten rows: {tensors(folder, key):.4f}")
        print(f"oldest of a hundred: {table(folder, key)}")
        print(f"one bit flipped: {forged(folder, key)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="cenacle-")))
