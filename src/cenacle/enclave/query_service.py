"""From a query to its answer, inside the enclave: open, queue, compute, limit, burn, seal.

Three threads meet here. One accepts what the host sends; one computes batches; where tickets
pay, a third burns them for all batches that are computed meanwhile, and only then answers. The
contract's output policy is applied before anything reaches the third.

What the host can learn is when queries come, how large they are, how long they take, and which
fail, in the words below, which never change. A sealed query that opened gets its error sealed.
Rows of several clients are computed together, so a model in which rows influence each other
would tell one client of another: with such a model, state ``max_batch: 1``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from cenacle.crypto import HpkePrivateKey
from cenacle.cut.runtime import check_inputs
from cenacle.cut.specs import TensorSpec
from cenacle.documents.serving import ServeJob
from cenacle.documents.ticket import TicketUse
from cenacle.enclave.batching import Batcher
from cenacle.enclave.output_policy import apply_policy, outputs_under
from cenacle.enclave.rows import answer_bytes, can_join, group_of, join, split
from cenacle.enclave.sealed_query import (
    OVERHEAD_BYTES,
    AnswerKey,
    open_query,
    padded_size,
    read_query,
    seal_answer,
)
from cenacle.enclave.serving_messages import (
    Failure,
    FailureCode,
    FromEnclave,
    Infer,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.serving_wire import MAX_HEADER_BYTES
from cenacle.enclave.tensor_bytes import Tensors, input_digest
from cenacle.enclave.tickets import Presented
from cenacle.enclave.usage import Usage
from cenacle.errors import (
    CenacleError,
    DataError,
    EnclaveError,
    RefusedError,
    SealError,
    UnavailableError,
)

__all__ = ["Desk", "Model", "QueryService"]

_FREE_SIZES: Final = 64 << 20  # of a query, where the model's inputs have sizes that vary
_LEAST_WAITING: Final = 64
_WAITING_BYTES: Final = 256 << 20
_AT_ONCE: Final = 4096

_WORDS: Final[Mapping[FailureCode, tuple[type[CenacleError], str, str]]] = {
    "malformed": (DataError, "a query cannot be read", "send it as this version of cenacle does"),
    "input": (DataError, "the query's tensors are not the model's", "send those it takes"),
    "too-large": (DataError, "a query has too many rows or bytes", "split it"),
    "busy": (UnavailableError, "too many queries wait already", "ask again in a moment"),
    "draining": (UnavailableError, "the service ends", "ask its operator for the next one"),
    "sealed-only": (
        RefusedError,
        "the contract allows sealed queries alone",
        "seal it to the enclave's key: `cenacle infer --sealed`",
    ),
    "ticket": (
        RefusedError,
        "the contract demands the use of a ticket with each query",
        "ask the issuer that the contract names for a ticket",
    ),
    "failed": (EnclaveError, "the model failed on this query", "try the model on it outside"),
}


class Model(Protocol):
    """What computes: :class:`cenacle.cut.runtime.TailRuntime`."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        ...


class Desk(Protocol):
    """Who burns tickets: :class:`cenacle.enclave.tickets.TicketDesk`."""

    def admit(self, presented: Sequence[Presented]) -> list[CenacleError | None]:
        """``None`` for each use that was burned, durably."""
        ...

    @property
    def failure(self) -> CenacleError | None:
        """Why it admits nothing any more, for good."""
        ...


@dataclass(frozen=True, slots=True)
class _Query:
    """A query that was accepted; ``key`` is None where it came in plain."""

    id: int
    tensors: Tensors
    rows: int
    size: int
    presented: Presented | None
    key: AnswerKey | None


_Computed = tuple[_Query, dict[str, NDArray[Any]]]


def _error(code: FailureCode) -> CenacleError:
    kind, what, remedy = _WORDS[code]
    return kind(what, remedy=remedy)


class QueryService:
    """Answers queries with one model.

    Args:
        contract: digest of the contract.
        key: that queries are sealed to.
        send: to the host; called from several threads.
        desk: None where the contract asks for no tickets.

    Attributes:
        outputs: what clients get, after the contract's policy.
        max_payload: bytes that a frame of a query may hold.
        max_waiting: queries that may be under way at once.

    Raises:
        InputError: the contract's policy does not fit the model's outputs.
    """

    def __init__(
        self,
        model: Model,
        job: ServeJob,
        contract: str,
        key: HpkePrivateKey,
        send: Callable[[FromEnclave], None],
        usage: Usage,
        desk: Desk | None = None,
    ) -> None:
        self._model, self._job, self._contract, self._key = model, job, contract, key
        self._send, self._usage, self._desk = send, usage, desk
        self.outputs = outputs_under(job.outputs, model.outputs)
        self._joins = can_join(model.inputs, model.outputs)
        self._batcher: Batcher[_Query] = Batcher(job.max_batch, job.max_wait_ms / 1000)
        self._computed: queue.SimpleQueue[list[_Computed] | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        largest = answer_bytes(model.inputs, job.max_batch) or _FREE_SIZES
        self.max_payload = padded_size(largest + MAX_HEADER_BYTES) + OVERHEAD_BYTES
        self.max_waiting = max(_LEAST_WAITING, 4 * job.max_batch)
        self._budget = threading.Lock()
        self._waiting, self._bytes = 0, 0

    # ------------------------------------------------------------------ accepting

    def accept(self, message: Infer | Sealed) -> None:
        """Queue a query, or answer at once why not."""
        size = (
            memoryview(message.query).nbytes
            if isinstance(message, Sealed)
            else sum(array.nbytes for array in message.tensors.values())
        )
        with self._budget:
            most = max(_WAITING_BYTES, 2 * self.max_payload)
            busy = self._waiting >= self.max_waiting or self._bytes + size > most
            if not busy:
                self._waiting += 1
                self._bytes += size
        if busy:
            self._refuse(message.id, "busy")
        elif not (
            self._open(message, size) if isinstance(message, Sealed) else self._read(message, size)
        ):
            self._forget(size)

    def refuse(self, number: int | None) -> None:
        """Answer a message that could not be read."""
        self._refuse(number, "malformed")

    def _read(self, message: Infer, size: int) -> bool:
        if self._job.sealed_only:
            return self._refuse(message.id, "sealed-only")
        return self._queue(message.id, message.tensors, message.ticket, size, None)

    def _open(self, message: Sealed, size: int) -> bool:
        try:
            plaintext, key = open_query(self._key, self._contract, message.query)
        except SealError:
            return self._refuse(message.id, "malformed")
        try:
            query = read_query(plaintext)
        except DataError as error:
            return self._refuse(message.id, "malformed", error, key)
        return self._queue(message.id, query.tensors, query.ticket, size, key)

    def _queue(
        self,
        number: int,
        tensors: Tensors,
        ticket: Mapping[str, Any] | None,
        size: int,
        key: AnswerKey | None,
    ) -> bool:
        try:
            rows = check_inputs(self._model.inputs, tensors)
        except DataError as error:
            return self._refuse(number, "input", error, key)
        if rows > self._job.max_batch:
            return self._refuse(number, "too-large", None, key)
        presented = None
        if self._desk is not None:
            if ticket is None:
                return self._refuse(number, "ticket", None, key, rows)
            try:
                use = TicketUse.from_fields(dict(ticket))
            except CenacleError as error:
                # Its words quote what was sent, and the host is told no more than in _WORDS.
                told = None if key is None else error
                return self._refuse(number, "ticket", told, key, rows)
            presented = Presented(use, rows, input_digest(tensors))
        group = group_of(tensors) if self._joins else number
        query = _Query(number, tensors, rows, size, presented, key)
        if not self._batcher.put(query, rows, group):
            return self._refuse(number, "draining", None, key, rows)
        return True

    # ------------------------------------------------------------------ computing

    def serve(self) -> None:
        """Compute what is accepted, until :meth:`drain` or :meth:`abandon`, and all is answered.

        Raises:
            CenacleError: why the desk admits nothing any more: another enclave went on, or the
                broker revoked the run.
        """
        clerk = threading.Thread(target=self._burn, name="cenacle-tickets", daemon=True)
        if self._desk is not None:
            clerk.start()
        try:
            while batch := self._batcher.take():
                self._compute(batch)
        finally:
            if self._desk is not None:
                self._computed.put(None)
                clerk.join()
        if self._desk is not None and self._desk.failure is not None:
            raise self._desk.failure

    def drain(self) -> None:
        """Accept no more; what waits is still answered."""
        self._batcher.close()

    def abandon(self) -> None:
        """Nobody hears answers any more: forget what waits, so that no ticket pays for it."""
        self._gone.set()
        for query in self._batcher.clear():
            self._forget(query.size)

    def _compute(self, batch: list[_Query]) -> None:
        self._usage.batch()
        try:
            outputs = self._model.run(join([query.tensors for query in batch]))
            told = apply_policy(self._job.outputs, outputs)
            answers = [told] if len(batch) == 1 else split(told, [query.rows for query in batch])
        except Exception:  # whatever the model's runtime raises: the service goes on
            if len(batch) == 1:
                self._end(batch[0], "failed")
            else:  # one of them fails, perhaps; the others shall not
                for query in batch:
                    self._compute([query])
            return
        computed = list(zip(batch, answers, strict=True))
        if self._desk is not None:
            self._computed.put(computed)
            return
        for query, answer in computed:
            self._answer(query, answer)

    def _burn(self) -> None:
        """Burn tickets for what is computed, and answer."""
        assert self._desk is not None
        while (computed := self._computed.get()) is not None:
            ended = False
            while len(computed) < _AT_ONCE and not self._computed.empty():
                if (more := self._computed.get()) is None:
                    ended = True
                    break
                computed = [*computed, *more]
            if not self._gone.is_set():
                self._burn_all(self._desk, computed)
            if ended:
                return

    def _burn_all(self, desk: Desk, computed: list[_Computed]) -> None:
        uses = [query.presented for query, _ in computed if query.presented is not None]
        try:
            results = desk.admit(uses)
            if len(results) != len(computed):
                raise EnclaveError("the desk for tickets answered about other uses")
        except Exception:  # a desk that fails has admitted nobody
            results = [_error("busy") for _ in computed]
        for (query, answer), problem in zip(computed, results, strict=True):
            if problem is None:
                self._answer(query, answer)
            else:
                code: FailureCode = "busy" if isinstance(problem, UnavailableError) else "ticket"
                self._end(query, code, problem)
        if desk.failure is not None:
            self.drain()

    # ------------------------------------------------------------------ answering

    def _answer(self, query: _Query, answer: dict[str, NDArray[Any]]) -> None:
        try:
            if query.key is None:
                self._send(Result(query.id, answer))
            else:
                sealed = seal_answer(query.key, answer, at_least=self._size(query.rows))
                self._send(SealedResult(query.id, sealed))
        except DataError:  # tensors that have no form on the wire
            self._end(query, "failed")
            return
        self._usage.answered(query.rows, sealed=query.key is not None)
        self._settle(query)

    def _end(self, query: _Query, code: FailureCode, error: CenacleError | None = None) -> None:
        self._refuse(query.id, code, error, query.key, query.rows)
        self._settle(query)

    def _settle(self, query: _Query) -> None:
        self._batcher.answered(query.rows)
        self._forget(query.size)

    def _forget(self, size: int) -> None:
        with self._budget:
            self._waiting -= 1
            self._bytes -= size

    def _size(self, rows: int) -> int:
        return answer_bytes(self.outputs, rows)

    def _refuse(
        self,
        number: int | None,
        code: FailureCode,
        error: CenacleError | None = None,
        key: AnswerKey | None = None,
        rows: int = 1,
    ) -> bool:
        """Answer with an error, sealed if the query was; always False."""
        self._usage.refused(code)
        if key is not None and number is not None:
            told = error or _error(code)
            self._send(SealedResult(number, seal_answer(key, told, at_least=self._size(rows))))
        else:
            self._send(Failure(number, code, self._in_plain(code, error)))
        return False

    def _in_plain(self, code: FailureCode, error: CenacleError | None) -> CenacleError:
        """What the host may read: of a ticket the reason in fixed words, else no word of ours."""
        fixed = _error(code)
        if error is None or code not in {"ticket", "busy"}:
            return fixed
        return type(fixed)(error.what, remedy=fixed.remedy)
