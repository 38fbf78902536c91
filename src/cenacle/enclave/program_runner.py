"""Inside the program's process: assets in, the program's own code, encoded outputs back."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray

from cenacle.crypto import SecretBytes
from cenacle.documents.asset import Asset
from cenacle.documents.base import canonical_json, unb64
from cenacle.enclave.context import JobContext
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.readers import AssetReader, open_asset
from cenacle.errors import InputError
from cenacle.sealing import PackageFinder, SealedReader, read_package
from cenacle.sealing.safetensors_format import check_name

__all__ = ["OutputRules", "Program", "encode_value", "load"]


def encode_value(name: str, kind: str, value: Any) -> bytes:
    """A value as the bytes that cross to the agent.

    Raises:
        InputError: the value is not what an output of this kind is made of.
    """
    if kind == "model" and isinstance(value, Mapping) and value:
        return bytes(safetensors.numpy.save({n: _array(n, array) for n, array in value.items()}))
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


def _array(name: object, value: Any) -> NDArray[Any]:
    if not isinstance(name, str):
        raise InputError("a tensor's name is not text", found=type(name).__name__)
    check_name(name)
    array = np.asarray(value, order="C")
    if array.dtype.kind not in "biufc":
        raise InputError(
            f"tensor {name[:80]!r} holds no numbers",
            found=array.dtype,
            expected="integers, floats or booleans",
        )
    return array


class OutputRules:
    """Each of a contract's outputs once, of its kind, and no other.

    Args:
        kinds: kind by name.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = dict(kinds)
        self._given: set[str] = set()

    def encode(self, name: str, value: Any) -> bytes:
        """The value as bytes; from then on the output counts as given.

        Raises:
            InputError: there is no such output, it was given already, or is of another kind.
        """
        if name not in self._kinds or name in self._given:
            raise InputError(
                "the contract expects no such output, or it was given already",
                found=name,
                expected=", ".join(sorted(set(self._kinds) - self._given)) or "no more outputs",
            )
        payload = encode_value(name, self._kinds[name], value)
        self._given.add(name)
        return payload


@dataclass(frozen=True)
class Program:
    """A program that is loaded: its entry point and the context that it gets."""

    entry: Callable[[JobContext], object]
    context: JobContext

    def run(self) -> None:
        """Raises whatever the program raises."""
        self.entry(self.context)


@contextlib.contextmanager
def load(
    payload: bytes | bytearray, connection: socket.socket, paths: Mapping[str, Path]
) -> Iterator[Program]:
    """Open the assets and import the program from memory; it stays importable in the block.

    Args:
        payload: JSON of the agent's: manifests and keys of the assets, entry point, parameters.
            A ``bytearray`` is wiped.
        connection: takes progress, outputs and requests for products.
        paths: the worker's readable mounts by name.
    """
    job = json.loads(payload)
    if isinstance(payload, bytearray):
        payload[:] = bytes(len(payload))
    readers: dict[str, AssetReader] = {}
    manifests: dict[str, Asset] = {}
    for fields in job.pop("assets"):
        alias, asset = fields["alias"], Asset.from_fields(fields["manifest"])
        key = SecretBytes(bytearray(unb64(fields["key"])))
        readers[alias] = open_asset(asset, paths[fields["mount"]], key)
        manifests[alias] = asset
    program = readers.pop(job["program"])
    assert isinstance(program, SealedReader)
    module, _, function = job["entry"].partition(":")
    approved = manifests[job["program"]].package
    with PackageFinder(read_package(program), expected_digest=approved):
        # First: code of the program may make a model while it is imported.
        context = _context(job, readers, connection)
        entry = getattr(importlib.import_module(module), function)
        yield Program(entry, context)


def _context(
    job: Mapping[str, Any], readers: Mapping[str, AssetReader], connection: socket.socket
) -> JobContext:
    rules = OutputRules(job["outputs"])
    turn = threading.Lock()  # a program may have threads, and an answer is due to who asked

    def report(done: int, total: int) -> None:
        with turn:
            send_frame(connection, {"kind": "progress", "done": int(done), "total": int(total)})

    def emit(name: str, value: Any) -> None:
        payload = rules.encode(name, value)
        with turn:
            send_frame(connection, {"kind": "output", "name": name}, payload)

    def ask(header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytearray]:
        with turn:
            send_frame(connection, header, payload)
            return read_frame(connection)

    offload = None
    if job.get("offload") is not None:
        from cenacle.enclave.program_scheme import program_offload  # noqa: PLC0415 - torch

        offload = program_offload(job["offload"], ask)
    return JobContext(readers, job["parameters"], job["outputs"], report, emit, offload)
