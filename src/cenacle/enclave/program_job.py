"""The program job, from the agent's side: hand over, collect, trust nothing that comes back."""

from __future__ import annotations

import builtins
import json
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cenacle import errors
from cenacle.broker.receipts import OpenedContract
from cenacle.documents.base import b64, canonical_json, parse_json
from cenacle.documents.contract import ProgramJob
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.outputs import OutputValue
from cenacle.enclave.session import Session
from cenacle.errors import EnclaveError
from cenacle.sealing.safetensors_format import parse_header
from cenacle.sealing.tables import check_columns, check_types

if TYPE_CHECKING:
    from cenacle.enclave.program_products import ProgramProducts
    from cenacle.training.offloading import Offloading

__all__ = ["run_program"]


# The program chooses name and phase, so only words that say nothing of its data are passed on.
_TOLD = frozenset(n for n in dir(builtins) if n.endswith(("Error", "Exception"))) | set(
    errors.__all__
)
_PHASES = {"loading": "while it was loaded", "running": "while it ran"}


def _broken(found: str) -> EnclaveError:
    return EnclaveError(
        "the program's process broke the protocol",
        found=found,
        expected="progress, the contract's outputs once each, and an end",
    )


def run_program(
    opened: OpenedContract,
    session: Session,
    connection: socket.socket,
    progress: Callable[[int, int], None],
    offloading: Offloading | None = None,
) -> dict[str, OutputValue]:
    """Run the contract's sealed program in its own process and return its outputs.

    Args:
        offloading: the contract's plan on the launcher's accelerators, which the program's
            process has no way to: it asks for products here.

    Raises:
        EnclaveError: the program failed (the class of its error is all that is told), ended
            early, left out an output or gave one twice, or its process broke the protocol.
    """
    job = opened.contract.job
    assert isinstance(job, ProgramJob)
    kinds = {output.name: output.kind for output in opened.contract.outputs}
    header, _ = read_frame(connection, 0)
    if header != {"kind": "ready"}:
        raise _broken("no ready message")
    told = {
        "program": job.program,
        "entry": job.entry,
        "parameters": job.parameters,
        "outputs": kinds,
        "assets": [
            {
                "alias": alias,
                "mount": f"asset-{index}",
                "manifest": asset.to_fields(),
                "key": b64(bytes(session.asset_key(alias).view())),
            }
            for index, (alias, asset) in enumerate(opened.assets.items())
        ],
    }
    if offloading is None:
        send_frame(connection, {"kind": "job"}, json.dumps(told).encode())
        return _collect(connection, kinds, progress, None)
    from cenacle.enclave.program_products import ProgramProducts  # noqa: PLC0415 - torch

    told["offload"] = {
        "plan": opened.contract.offload.model_dump(mode="json"),
        "secret": offloading.program_secret,
    }
    send_frame(connection, {"kind": "job"}, json.dumps(told).encode())
    products = ProgramProducts(offloading)
    try:
        return _collect(connection, kinds, progress, products)
    finally:
        products.close()


def _collect(
    connection: socket.socket,
    kinds: Mapping[str, str],
    progress: Callable[[int, int], None],
    products: ProgramProducts | None,
) -> dict[str, OutputValue]:
    values: dict[str, OutputValue] = {}
    while True:
        header, payload = read_frame(connection)
        match header:
            case {"kind": "progress", "done": int(done), "total": int(total)} if total >= 1:
                progress(done, total)
            case {"kind": "output", "name": str(name)} if name in kinds and name not in values:
                values[name] = _decode(name, kinds[name], bytes(payload))
            case {"kind": "output"}:
                raise _broken("an output that the contract lacks, or one given twice")
            case {"kind": "offload"} if products is not None:
                send_frame(connection, *products.answer(header, payload))
            case {"kind": "done"}:
                return values
            case {"kind": "failed", "class": str(name), "phase": str(phase)} if phase in _PHASES:
                raise EnclaveError(
                    f"the program failed {_PHASES[phase]}",
                    found=name if name in _TOLD else "an error of its own",
                    expected="its end without an error",
                    remedy="run it on made-up data outside the enclave to see the whole message",
                )
            case _:
                raise _broken("a message of unknown kind")


def _decode(name: str, kind: str, payload: bytes) -> OutputValue:
    """The value in a payload; nothing of a payload's content stands in the error for a bad one."""
    try:
        match kind:
            case "metrics":
                value: Any = parse_json(payload)
                if not isinstance(value, dict):
                    raise _broken(f"metrics {name} that are no mapping")
                canonical_json(value)
                return value
            case "table":
                table = pa.ipc.open_stream(payload).read_all()
                table.validate(full=True)
                check_columns(table.schema.names)
                check_types(table.schema)
                return table
            case "model":
                size = int.from_bytes(payload[:8], "little")
                parse_header(payload[:8], payload[8 : 8 + size], len(payload))
                return payload
            case _:
                return payload
    except MemoryError:
        raise
    except Exception:  # Arrow raises much more than its own classes for bytes that are no table
        raise _broken(f"an output {name} that is no {kind}") from None
