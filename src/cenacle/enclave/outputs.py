"""Outputs: sealed under a fresh key each, which is wrapped to the one recipient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cenacle.broker.receipts import OpenedContract
from cenacle.crypto import SecretBytes
from cenacle.documents.base import b64, canonical_json
from cenacle.documents.contract import Output
from cenacle.documents.receipt import OutputRecord
from cenacle.errors import DataError, DocumentError, EnclaveError
from cenacle.sealing import SealedInfo, SealedWriter, TableWriter, seal_bytes, seal_tensors

__all__ = ["OutputValue", "check_outputs", "output_file", "seal_outputs"]

OutputValue: TypeAlias = bytes | pa.Table | Mapping[str, NDArray[Any]] | Mapping[str, Any]
"""``model``: arrays by name, or the bytes of a safetensors file; ``metrics``: JSON values;
``table``: an Arrow table; ``file``: bytes."""


def output_file(name: str) -> str:
    """The file name of a sealed output."""
    return f"{name}.sealed"


def check_outputs(outputs: tuple[Output, ...], values: Mapping[str, OutputValue]) -> None:
    """Raises :class:`EnclaveError` unless there is a value of the right kind for each output."""
    wanted = {output.name for output in outputs}
    if set(values) != wanted:
        raise EnclaveError(
            "the job's outputs are not the contract's",
            found=", ".join(sorted(values)) or "none",
            expected=", ".join(sorted(wanted)),
            remedy="the program must give each output of the contract once, and no other",
        )
    for output in outputs:
        value = values[output.name]
        fits = {
            "model": isinstance(value, bytes)
            or (
                isinstance(value, Mapping)
                and all(isinstance(a, np.ndarray) for a in value.values())
            ),
            "metrics": isinstance(value, Mapping),
            "table": isinstance(value, pa.Table),
            "file": isinstance(value, bytes),
        }[output.kind]
        if not fits:
            raise EnclaveError(
                f"output {output.name} has a value of the wrong type",
                found=type(value).__name__,
                expected=f"what a {output.kind} is made of",
            )


def seal_outputs(
    opened: OpenedContract,
    digest: str,
    values: Mapping[str, OutputValue],
    folder: Path,
) -> tuple[OutputRecord, ...]:
    """Seal each value into ``folder`` for its recipient; returns the receipt's records.

    A file exists only when it is complete. The key of each is made here, wrapped to the
    recipient's HPKE key and bound to contract, output and container, then wiped.
    """
    check_outputs(opened.contract.outputs, values)
    records = []
    for output in opened.contract.outputs:
        recipient = opened.parties[output.recipient].hpke_public_key
        with SecretBytes.random(32) as key:
            info = _seal(output, values[output.name], folder / output_file(output.name), key)
            context = OutputRecord.wrapping_context(digest, output.name, info.header_digest)
            with key.view() as view:
                wrapped = recipient.seal(view, *context)
        records.append(
            OutputRecord(
                name=output.name,
                kind=output.kind,
                recipient=output.recipient,
                header=info.header_digest,
                content=info.digest,
                size=info.size,
                wrapped_key=b64(wrapped),
            )
        )
    return tuple(records)


def _seal(output: Output, value: OutputValue, path: Path, key: SecretBytes) -> SealedInfo:
    try:
        return _SEAL[output.kind](value, path, key)
    except (DataError, DocumentError):
        # Their words quote names and values that a program may have taken from a record.
        raise EnclaveError(
            f"output {output.name} cannot be sealed",
            found="content that does not fit",
            expected=f"what a {output.kind} is made of",
        ) from None


def _seal_model(value: Any, path: Path, key: SecretBytes) -> SealedInfo:
    if isinstance(value, bytes):
        return seal_bytes(value, path, key, kind="tensors")
    return seal_tensors(value, path, key)


def _seal_metrics(value: Any, path: Path, key: SecretBytes) -> SealedInfo:
    return seal_bytes(canonical_json(dict(value)), path, key)


def _seal_table(value: Any, path: Path, key: SecretBytes) -> SealedInfo:
    with SealedWriter(path, key, "table") as writer:
        table = TableWriter(writer, value.schema)
        for batch in value.to_batches():
            table.write(batch)
        writer.set_schema(table.finish())
    return writer.info


def _seal_file(value: Any, path: Path, key: SecretBytes) -> SealedInfo:
    return seal_bytes(value, path, key)


_SEAL: dict[str, Callable[[Any, Path, SecretBytes], SealedInfo]] = {
    "model": _seal_model,
    "metrics": _seal_metrics,
    "table": _seal_table,
    "file": _seal_file,
}
