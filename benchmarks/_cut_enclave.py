"""A tail in a real enclave with all layers of the sandbox, and its front in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._cut_models import CutModel
from cenacle.cli.enclave import measure_here
from cenacle.cli.seal import seal_asset
from cenacle.crypto import HpkePublicKey
from cenacle.documents.terms import Terms
from cenacle.enclave.channel import Failed
from cenacle.enclave.launcher import ProcessLauncher, RunningEnclave
from cenacle.enclave.sandbox import plan
from cenacle.enclave.sealed_query import open_answer, seal_query
from cenacle.enclave.serving_messages import Ready
from cenacle.serving.link import EnclaveLink, LinkListener
from tests.support.house import TERMS, House, Sealed

__all__ = ["Served", "agree", "seal", "serve"]

Arrays = dict[str, NDArray[np.float32]]


@dataclass
class Served:
    """A tail that answers, and its enclave."""

    link: EnclaveLink
    ready: Ready
    enclave: RunningEnclave

    async def infer(self, crossing: Arrays) -> Arrays:
        """In plain, as the operator's server asks."""
        return dict(await self.link.infer(crossing))

    async def sealed(self, crossing: Arrays) -> Arrays:
        """Sealed to the enclave and opened again, as a client does."""
        enclave = HpkePublicKey(self.ready.hpke_key)
        query, key = seal_query(enclave, self.ready.contract, crossing, None)
        return dict(open_answer(key, bytes(await self.link.sealed(query))))

    def cpu_seconds(self) -> float:
        """What the enclave's processes have computed so far."""
        return sum(_cpu(pid) for pid in _family(self.enclave.pid))

    def rss_mb(self) -> float:
        """Resident memory of the enclave's largest process."""
        return max(_rss(pid) for pid in _family(self.enclave.pid)) / 1e6


def _family(root: int) -> list[int]:
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _rss(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
    return 0


def _cpu(pid: int) -> float:
    found = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


def seal(house: House, model: CutModel) -> Sealed:
    """The tail, sealed and deposited by its owner."""
    terms = {
        **TERMS,
        "recipes": [],
        "serving": {"outputs": {"form": "scores"}, "tickets": False},
    }
    name = house.fresh("tail")
    target = house.folder / f"{name}.sealed"
    made = seal_asset(
        house.parties["lab"],
        house.client,
        model.tail,
        target,
        Terms.from_fields(terms),
        name=name,
        type_="model",
    )
    return Sealed(made.asset, made.sealed)


def agree(house: House, model: CutModel, tail: Sealed, *, memory_mb: int | None = None) -> str:
    """A contract that serves the tail; its digest. A query waits for no other."""
    job = {
        "type": "serve",
        "model": "net",
        "front": model.front_digest,
        "outputs": {"form": "scores"},
        "max_batch": 64,
        "max_wait_ms": 0.0,
        **({} if memory_mb is None else {"memory_mb": memory_mb}),
    }
    contract = house.contract(
        {"net": tail},
        job,
        {"usage": "metrics"},
        enclave=measure_here(house.operator, plan(serving=True).layers, serving=True),
    )
    return house.agree(contract)


@contextlib.asynccontextmanager
async def serve(
    house: House, digest: str, tail: Sealed, out: Path, *, threads: int
) -> AsyncIterator[Served]:
    """Start the enclave and wait until it answers; drain it at the end."""
    listener = await LinkListener.open()
    request = house.request(digest, {"net": tail.path}, out, chosen=plan(serving=True))
    request = replace(request, serving=listener.path, threads=threads)
    enclave = await asyncio.to_thread(ProcessLauncher().launch, request)
    errors: list[Exception] = []

    def watch() -> None:
        try:
            last = list(enclave.messages())[-1]
            if isinstance(last, Failed):
                errors.append(last.to_error())
        except Exception as error:
            errors.append(error)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        while not listener.link.arrived.done():
            if errors:
                raise errors[0]
            await asyncio.wait([listener.link.arrived], timeout=0.1)
        yield Served(listener.link, listener.link.arrived.result(), enclave)
        await listener.link.drain()
    finally:
        listener.close()
        await asyncio.to_thread(enclave.kill)
        watcher.join()
