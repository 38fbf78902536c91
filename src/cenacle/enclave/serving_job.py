"""The serving job: answer queries with a sealed model until the host asks for the end.

The job's stage ``running`` lasts as long as it serves, and says nothing else: progress would tell
the host in another place when queries are answered. The host ends it with ``drain``; the queries
that wait are answered, the connection is closed, and the job goes on to its outputs and receipt.
A host that closes the connection means the same, only that nobody hears the answers: queries that
wait are forgotten, before a ticket pays for them.

A frame that cannot be read gets an error and harms nobody. A stream that cannot be read any
further is a connection that has ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from cenacle.attestation.registry import Attester
from cenacle.broker.receipts import OpenedContract
from cenacle.crypto import HpkePrivateKey
from cenacle.cut.runtime import TailRuntime
from cenacle.documents.contract import ServeJob
from cenacle.documents.receipt import ServingRecord
from cenacle.enclave.assets import asset_path
from cenacle.enclave.client_evidence import attest_to_client
from cenacle.enclave.query_service import QueryService
from cenacle.enclave.readers import open_asset
from cenacle.enclave.sandbox.base import SERVING_SOCKET
from cenacle.enclave.sandbox.entry import AgentConfig
from cenacle.enclave.serving_link import ServingLink
from cenacle.enclave.serving_messages import (
    Attest,
    Drain,
    Evidence,
    Failure,
    Infer,
    Malformed,
    Message,
    Ready,
    Sealed,
)
from cenacle.enclave.session import Session
from cenacle.enclave.tickets import TicketDesk, open_ticket_desk
from cenacle.enclave.usage import Usage
from cenacle.errors import EnclaveError, InputError, UnavailableError
from cenacle.sealing import TensorReader

__all__ = ["TICKETS_FOLDER", "Served", "run_serving", "serve_queries"]

TICKETS_FOLDER: Final = "tickets"
"""The host's writable mount where the journal of burned tickets is kept from run to run."""

_MIB: Final = 1 << 20
_ATTESTATIONS: Final = 16  # that wait; a TPM makes about two a second
_ATTESTATIONS_PER_S: Final = 8.0


@dataclass(frozen=True)
class Served:
    """What a serving job leaves.

    Attributes:
        values: the job's outputs: a usage report each.
        record: for the receipt.
    """

    values: dict[str, dict[str, Any]]
    record: ServingRecord


def run_serving(
    opened: OpenedContract, session: Session, config: AgentConfig, attester: Attester
) -> Served:
    """Serve the contract's model until the host ends it.

    When this returns, the key that queries were sealed to is wiped and the model is closed; what
    ONNX Runtime freed of its parameters is not overwritten.

    Args:
        attester: makes the evidence that clients ask for.

    Raises:
        InputError: the asset is no tail, or the contract's policy does not fit its outputs.
        EnclaveError: the host's server cannot be reached.
        SealError: the sealed model, or the journal of tickets, is not the one it should be.
    """
    job = opened.contract.job
    assert isinstance(job, ServeJob)
    usage = Usage()
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_model(opened, job, session, config))
        key = HpkePrivateKey.generate()
        stack.callback(key.seed().wipe)
        desk = _desk(opened, job, session, config)
        if desk is not None:
            stack.enter_context(desk)
        link: ServingLink | None = None

        def send(message: Message) -> None:
            assert link is not None
            link.send(message)

        service = QueryService(model, job, session.contract, key, send, usage, desk)
        path = config.paths.get(SERVING_SOCKET)
        if path is None:
            raise EnclaveError(
                "a contract that serves was started without a server",
                remedy="start the job with `cenacle serve`",
            )
        link = ServingLink.connect(path, service.max_payload)
        stack.callback(link.close)
        public = (key.public_key.raw, session.signing_key.verify_key.raw)

        def evidence(nonce: bytes) -> bytes:
            shown = attest_to_client(
                attester, nonce, session.contract, public, session.measurements, config.layers
            )
            usage.attested()
            return shown.canonical_bytes()

        link.send(
            Ready(
                session.contract,
                model.inputs,
                service.outputs,
                *public,
                job.max_batch,
                service.max_payload,
                service.max_waiting,
            )
        )
        serve_queries(service, link, evidence)
        report = usage.report()
        if desk is not None:
            report["tickets"] = desk.report()
    return Served({output.name: report for output in opened.contract.outputs}, usage.record())


@contextlib.contextmanager
def _model(
    opened: OpenedContract, job: ServeJob, session: Session, config: AgentConfig
) -> Iterator[TailRuntime]:
    index = list(opened.assets).index(job.model)
    asset = opened.assets[job.model]
    with open_asset(asset, asset_path(config.paths, index), session.asset_key(job.model)) as reader:
        if not isinstance(reader, TensorReader):
            raise InputError(
                "the asset that is to be served holds no tensors",
                found=asset.content,
                expected="the tail of a model, as `cenacle cut` writes it",
            )
        limit = None if job.memory_mb is None else job.memory_mb * _MIB
        threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
        with contextlib.closing(TailRuntime(reader, memory_limit=limit, threads=threads)) as model:
            yield model


def _desk(
    opened: OpenedContract, job: ServeJob, session: Session, config: AgentConfig
) -> TicketDesk | None:
    if job.tickets is None:
        return None
    folder = config.paths.get(TICKETS_FOLDER)
    if folder is None:
        raise InputError(
            "a contract that asks for tickets was started without a folder for their journal",
            expected=f"a writable mount {TICKETS_FOLDER}",
            remedy="start the job with `cenacle serve`, with the same --out as before",
        )
    return open_ticket_desk(folder, session, opened)


def serve_queries(
    service: QueryService, link: ServingLink, evidence: Callable[[bytes], bytes]
) -> None:
    """Serve one connection until the host drains the service or goes away.

    When this returns, everything that waits is answered and the connection has ended; closing the
    link is the caller's.

    Args:
        evidence: makes a document for a client's nonce.
    """
    notary = _Notary(evidence, link.send)

    def receive() -> None:
        try:
            for message in link.messages():
                match message:
                    case Infer() | Sealed():
                        service.accept(message)
                    case Attest():
                        notary.accept(message)
                    case Drain():
                        service.drain()
                    case Malformed():
                        service.refuse(message.id)
        finally:  # whatever ends this thread, nobody would hear of an answer any more
            service.abandon()

    receiver = threading.Thread(target=receive, name="cenacle-queries", daemon=True)
    receiver.start()
    notary.start()
    try:
        service.serve()
    finally:
        notary.stop()
        link.end()
        receiver.join()


class _Notary:
    """Makes evidence for clients, one after the other, and not more than hardware can make.

    Evidence is made anew for every challenge, and no answer is kept.
    """

    def __init__(self, evidence: Callable[[bytes], bytes], send: Callable[[Message], None]) -> None:
        self._evidence, self._send = evidence, send
        self._waiting: queue.Queue[Attest | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="cenacle-evidence", daemon=True)
        self._tokens = float(_ATTESTATIONS)
        self._since = time.monotonic()

    def accept(self, message: Attest) -> None:
        """Take a challenge, or say at once that there are too many."""
        now = time.monotonic()
        refilled = self._tokens + (now - self._since) * _ATTESTATIONS_PER_S
        self._tokens, self._since = min(float(_ATTESTATIONS), refilled), now
        if self._tokens < 1 or self._waiting.qsize() >= _ATTESTATIONS:
            self._send(Failure(message.id, "busy", _TOO_MANY))
            return
        self._tokens -= 1
        self._waiting.put(message)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer those that wait, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                answer: Message = Evidence(message.id, self._evidence(message.nonce))
            except Exception:  # hardware that fails now may answer the next client
                answer = Failure(message.id, "busy", _NO_EVIDENCE)
            self._send(answer)


_TOO_MANY: Final = UnavailableError(
    "too many clients ask for evidence at once", remedy="ask again in a moment"
)
_NO_EVIDENCE: Final = UnavailableError(
    "the enclave cannot make evidence now", remedy="ask again in a moment"
)
