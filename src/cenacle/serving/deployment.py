"""One contract that is served: its enclave, the public front before it, and its documents."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from cenacle.broker.messages import ContractView
from cenacle.cut.specs import TensorSpec
from cenacle.documents.base import parse_json
from cenacle.documents.serving import ServeJob
from cenacle.errors import EnclaveError, InputError, RefusedError, VerificationError
from cenacle.serving.backend import QueryError, Tail
from cenacle.serving.batching import Arrays, Batcher
from cenacle.serving.front import Front
from cenacle.serving.metrics import Metrics
from cenacle.serving.open_inference import InferRequest, check_outputs, fit

__all__ = ["Deployment", "Served"]

PLATFORM: Final = "cenacle_onnxruntime"


@dataclass(frozen=True)
class Served:
    """What is served: the contract's digest, its job, and the documents that clients verify.

    Attributes:
        view: the contract with its signatures, parties and manifests, as the broker keeps them.
    """

    contract: str
    job: ServeJob
    view: ContractView


class Deployment:
    """Answers requests for one contract.

    Args:
        front: of a model that was cut; without one, the whole model is in the enclave.

    Raises:
        VerificationError: enclave, front and contract do not belong together.
    """

    def __init__(
        self, served: Served, tail: Tail, front: Front | None, metrics: Metrics | None = None
    ) -> None:
        self.served = served
        self.tail = tail
        self.front = front
        self._metrics = metrics or Metrics()
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        ready = tail.ready
        if ready.contract != served.contract:
            raise VerificationError(
                "the enclave serves another contract",
                found=ready.contract,
                expected=served.contract,
            )
        crossing = ready.inputs if front is None else front.outputs
        if crossing != ready.inputs:
            raise VerificationError(
                "the front's outputs are not what the enclave takes",
                found=", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in crossing),
                expected=", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in ready.inputs),
                remedy="use the front that was cut with this tail",
            )
        self.inputs: tuple[TensorSpec, ...] = ready.inputs if front is None else front.inputs
        self.outputs: tuple[TensorSpec, ...] = ready.outputs
        # One thread: batches run after each other, and each has the front's own threads.
        self._pool = ThreadPoolExecutor(1, "front")
        self._batcher: Batcher | None = None
        if front is not None and front.joinable and all(s.batched for s in ready.outputs):
            self._batcher = Batcher(self._cross, self._answer, ready.max_batch, self._metrics.batch)

    @property
    def name(self) -> str:
        """The model's name in addresses."""
        return self.served.job.model

    @property
    def version(self) -> str:
        """The model's version in addresses: the contract's digest."""
        return self.served.contract

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While a request is with this deployment, it does not end."""
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if self._open == 0:
                self._idle.set()

    async def end(self) -> None:
        """Wait for the requests that are here, then have the enclave end its job."""
        await self._idle.wait()
        await self.tail.drain()
        self._pool.shutdown(wait=False)

    # ------------------------------------------------------------------ requests

    async def infer(self, request: InferRequest) -> Arrays:
        """Outputs for plain inputs, through the front.

        A request under a ticket runs alone from its first step on: asked again, it brings the
        same bits to the enclave, which knows it by them.

        Raises:
            InputError, RefusedError: the request cannot be answered.
            QueryError: the enclave does not answer it.
        """
        job = self.served.job
        if job.sealed_only:
            raise QueryError(
                "sealed-only",
                RefusedError(
                    "the contract takes sealed queries alone",
                    found="a query that the operator can read",
                    expected="a sealed query",
                    remedy="use SealedClient, or `cenacle infer --sealed`",
                ),
            )
        if (request.ticket is None) != (job.tickets is None):
            raise QueryError("ticket", _ticket_words(job))
        ticket = _ticket(request.ticket)
        rows = fit(request.inputs, self.inputs, max_rows=self.tail.ready.max_batch)
        check_outputs(request, (spec.name for spec in self.outputs))
        if self._batcher is not None and ticket is None:
            return self._checked(await self._batcher.submit(request.inputs, rows), rows)
        crossing = await self._cross(request.inputs)
        return self._checked(await self.tail.infer(crossing, ticket), rows)

    async def _cross(self, inputs: Arrays) -> Arrays:
        if self.front is None:
            return inputs
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self.front.run, inputs)

    async def _answer(self, crossing: Arrays) -> Arrays:
        return await self.tail.infer(crossing)

    def _checked(self, outputs: Arrays, rows: int) -> Mapping[str, NDArray[Any]]:
        """The outputs in the model's order, once they are what the enclave said it gives."""
        right = set(outputs) == {spec.name for spec in self.outputs} and all(
            outputs[spec.name].ndim == len(spec.shape)
            and (not spec.batched or outputs[spec.name].shape[0] == rows)
            and outputs[spec.name].dtype == spec.numpy_dtype
            for spec in self.outputs
        )
        if not right:
            raise QueryError(
                "failed", EnclaveError("the enclave's answer is not of the form that it announced")
            )
        return {spec.name: outputs[spec.name] for spec in self.outputs}


def _ticket(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    fields = parse_json(text.encode("utf-8", "replace"))
    if not isinstance(fields, dict):
        raise InputError("the use of a ticket is no JSON object")
    return fields


def _ticket_words(job: ServeJob) -> RefusedError:
    if job.tickets is None:
        return RefusedError(
            "the contract asks for no tickets", found="the use of a ticket", expected="none"
        )
    return RefusedError(
        "each query needs a ticket",
        found="no use of a ticket",
        expected=f"a ticket that {job.tickets} signed",
        remedy=f"ask {job.tickets} for one, and use it with Client(ticket=...)",
    )
