"""Inside the program's process: assets in, the program's own code, encoded outputs back."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy

from cenacle.crypto import SecretBytes
from cenacle.documents.asset import Asset
from cenacle.documents.base import canonical_json, unb64
from cenacle.enclave.assets import AssetReader, open_asset
from cenacle.enclave.context import JobContext
from cenacle.enclave.frames import send_frame
from cenacle.errors import InputError
from cenacle.sealing import PackageFinder, SealedReader, read_package

__all__ = ["encode_value", "run_program"]


def encode_value(name: str, kind: str, value: Any) -> bytes:
    """A value as the bytes that cross to the agent.

    Raises:
        InputError: the value is not what an output of this kind is made of.
    """
    if kind == "model" and isinstance(value, Mapping) and value:
        arrays = {str(n): np.ascontiguousarray(a) for n, a in value.items()}
        return bytes(safetensors.numpy.save(arrays))
    if kind == "metrics" and isinstance(value, Mapping):
        return canonical_json(dict(value))
    if kind == "table" and isinstance(value, pa.Table):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return bytes(sink.getvalue())
    if kind == "file" and isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise InputError(
        f"output {name} has a value of the wrong type",
        found=type(value).__name__,
        expected=f"what a {kind} is made of",
    )


def run_program(job: dict[str, Any], connection: socket.socket, paths: Mapping[str, Path]) -> None:
    """Open the assets, import the program from memory, call its entry point.

    Args:
        job: what the agent sent: manifests and keys of the assets, entry point, parameters.
        paths: the worker's readable mounts by name.
    """
    readers: dict[str, AssetReader] = {}
    for fields in job["assets"]:
        asset = Asset.from_fields(fields["manifest"])
        key = SecretBytes(bytearray(unb64(fields["key"])))
        readers[fields["alias"]] = open_asset(asset, paths[fields["mount"]], key)
        if fields["alias"] == job["program"]:
            package = asset.package
    program = readers.pop(job["program"])
    assert isinstance(program, SealedReader)
    kinds: dict[str, str] = job["outputs"]
    given: set[str] = set()

    def report(done: int, total: int) -> None:
        send_frame(connection, {"kind": "progress", "done": int(done), "total": int(total)})

    def emit(name: str, value: Any) -> None:
        if name not in kinds or name in given:
            raise InputError(
                "the contract expects no such output, or it was given already",
                found=name,
                expected=", ".join(sorted(set(kinds) - given)) or "no more outputs",
            )
        given.add(name)
        payload = encode_value(name, kinds[name], value)
        send_frame(connection, {"kind": "output", "name": name}, payload)

    context = JobContext(readers, job["parameters"], kinds, report, emit)
    module, _, function = job["entry"].partition(":")
    with PackageFinder(read_package(program), expected_digest=package):
        getattr(importlib.import_module(module), function)(context)
