"""The process in which a program runs: a second one, made before any key exists.

The agent holds the enclave's signing key; a program never shares its memory. It runs in a
process forked at the very start, confined more tightly than the agent: no writable folder, no
socket of any kind but the one connection to the agent. It receives the keys of the contract's
assets, decrypts what the program reads, and hands values back over the connection.
"""

from __future__ import annotations

import errno
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
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.errors import EnclaveError, InputError
from cenacle.sealing import PackageFinder, SealedReader, read_package

__all__ = ["close_sockets", "encode_value", "work"]


def close_sockets(plan: SandboxPlan) -> None:
    """Refuse every new socket, for good: a second seccomp filter on top of the agent's.

    Raises:
        EnclaveError: the plan has seccomp, and a socket can be made all the same.
    """
    if "seccomp" not in plan.layers:
        return
    from cenacle.enclave.sandbox import linux  # noqa: PLC0415

    with linux.libraries_by_soname():
        api = importlib.import_module("pyseccomp")
    chosen = api.SyscallFilter(api.ALLOW)
    for name in ("socket", "socketpair", "connect", "bind", "listen"):
        chosen.add_rule(api.ERRNO(errno.EPERM), name)
    chosen.load()
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
    except PermissionError:
        return
    raise EnclaveError("the program's process can still open sockets", expected="EPERM")


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


def work(connection: socket.socket, plan: SandboxPlan, paths: Mapping[str, Path]) -> None:
    """Serve one job: read it, run the program, send its outputs.

    Whatever the program raises crosses as its class name alone: a message may quote a record.
    """
    close_sockets(plan)
    send_frame(connection, {"kind": "ready"})
    job, _ = read_frame(connection)
    try:
        _run(job, connection, paths)
    except BaseException as error:
        send_frame(connection, {"kind": "failed", "class": type(error).__name__[:100]})
    else:
        send_frame(connection, {"kind": "done"})


def _run(job: dict[str, Any], connection: socket.socket, paths: Mapping[str, Path]) -> None:
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
