"""The desk that burns tickets, before any answer leaves the enclave.

A batch of uses is admitted in this order: signatures, times, what is left of each ticket; one
batch appended to the journal and on the disk; its number and head recorded outside, by a counter
that only grows; and only then are the uses admitted. A crash between any two steps leaves a
journal that is where the counter says, or one batch ahead, and no answer for that batch. The
client asks again under the same name, which is admitted without a second burn.

So no row is answered that no ticket paid for, and none is paid for that cannot be answered:

=============================  ==================================================
the host brings back           what happens
=============================  ==================================================
an old journal, or none        refused: the counter knows of a newer one
an old broker's counter        refused: the journal is ahead of it
a second enclave               the counter goes on with one of them alone
an old request                 answered again if it is the very same, else refused
an old time                    nothing: times are the counter's
=============================  ==================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from cenacle.broker.receipts import OpenedContract
from cenacle.crypto import SecretBytes, derive_key
from cenacle.documents.base import b64, canonical_json, format_time, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.serving import ServeJob
from cenacle.documents.ticket import Ticket, TicketUse, open_ticket
from cenacle.enclave.session import Session
from cenacle.enclave.ticket_counter import BrokerStateCounter, StateCounter
from cenacle.enclave.ticket_index import (
    RECORD_BYTES,
    Burn,
    BurnIndex,
    pack_burns,
    pack_totals,
    unpack_burns,
    unpack_totals,
)
from cenacle.enclave.ticket_journal import SNAPSHOT, Journal, State
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EnclaveError,
    RefusedError,
    UnavailableError,
)

__all__ = ["Presented", "TicketDesk", "open_ticket_desk"]

_AT_ONCE: Final = 4096  # burns in one batch of the journal
_TICKETS: Final = 4096  # opened tickets that are remembered
_ASK_TIME_S: Final = 1.0
_LOADED_AT_ONCE: Final = 1 << 22
_WORTH_BYTES: Final = 1 << 22  # a smaller journal is not worth a snapshot
_SMALL_BATCH: Final = 16  # records; opening larger ones anew is as quick as opening a snapshot


@dataclass(frozen=True)
class Presented:
    """The use of a ticket, and what came with it.

    Attributes:
        rows: of the tensors that reached the enclave.
        input: digest of those tensors (``sha256:...``), as the enclave computed it: for plain
            requests too, or their uses could be repeated with other inputs.
    """

    use: TicketUse
    rows: int
    input: str


@dataclass
class _Asked:
    """What one call presents, with what is known of it without the journal."""

    uses: list[tuple[Presented, Ticket | CenacleError]]
    results: list[CenacleError | None] | None = None


class TicketDesk:
    """Admits the uses of one contract's tickets. A context manager; safe for many threads.

    Uses that several threads present at the same time share one batch, hence one ``fsync`` and one
    journey to the counter.

    Args:
        folder: the host's, where the journal is kept from run to run.
        issuer: the party whose tickets count, as the contract pins it.
        contract: its digest.
        key: of the journal; the same in every run of the contract.

    Raises:
        SealError: the folder's journal is old, cut short, altered, missing or another's.
        ConflictError: another process has it open; or the counter went on with another enclave.
        UnavailableError: the disk or the counter fails.
    """

    def __init__(
        self, folder: Path, counter: StateCounter, issuer: Party, contract: str, key: SecretBytes
    ) -> None:
        self._counter, self._issuer, self._contract = counter, issuer, contract
        self._index = BurnIndex()
        self._tickets: OrderedDict[bytes, Ticket] = OrderedDict()
        self._gate = threading.Lock()  # of tickets and queue
        self._queue: list[_Asked] = []
        self._guard = threading.Lock()  # of everything else
        self._dead: CenacleError | None = None
        self._unconfirmed = False
        self._now = datetime.min.replace(tzinfo=UTC)
        self._heard = 0.0
        self._journal = Journal(folder, contract, key)
        try:
            self._open(counter.newest())
        except BaseException:
            self._journal.close()
            raise

    # ------------------------------------------------------------------ opening

    def _open(self, known: State) -> None:
        kept, batches, waiting = [], 0, bytearray()
        for batch in self._journal.replay(known):
            batches += 1
            if batch.kind == SNAPSHOT:
                self._index.burned, plain = unpack_totals(batch.plain)
                self._index.add_all(unpack_burns(plain), counted=False)
                kept.append(plain)
                continue
            waiting += batch.plain
            if len(waiting) > _LOADED_AT_ONCE:
                kept.append(bytes(waiting))
                self._index.add_all(unpack_burns(kept[-1]))
                waiting.clear()
        kept.append(bytes(waiting))
        self._index.add_all(unpack_burns(kept[-1]))
        self._index.sort_in()
        if self._journal.state.number > known.number:
            self._must(self._confirm(unconfirmed=True))
        # An empty batch: it tells the time, and that this enclave is the one that goes on.
        self._journal.append(0, b"")
        self._must(self._confirm(unconfirmed=True))
        self._sum_up(kept, batches)

    def _sum_up(self, kept: list[bytes], batches: int) -> None:
        """Write the journal anew if much of it need not be read again."""
        count, now = self._index.count, int(self._now.timestamp())
        if self._journal.size < _WORTH_BYTES:
            return
        # Nothing is admitted under a ticket that has expired, so its requests are forgotten.
        chunks = [unpack_burns(plain) for plain in kept]
        live = [chunk["expires"] > now for chunk in chunks]
        records = sum(int(np.count_nonzero(which)) for which in live)
        small = batches * _SMALL_BATCH > count
        if (small or 2 * records < count) and self._journal.can_hold(records * RECORD_BYTES):
            totals = pack_totals(self._index.burned)
            parts = (chunk[which].tobytes() for chunk, which in zip(chunks, live, strict=True))
            self._journal.replace(records, b"".join([totals, *parts]))
            self._must(self._confirm(unconfirmed=True))

    @staticmethod
    def _must(problem: CenacleError | None) -> None:
        if problem is not None:
            raise problem

    # ------------------------------------------------------------------ admitting

    def admit(self, presented: Sequence[Presented]) -> list[CenacleError | None]:
        """Burn uses; each is admitted (``None``), durably, or refused by an error that says why.

        A refusal burns nothing. :class:`UnavailableError` says that it is not known yet whether a
        use was burned: asked again under the same name, it is not burned twice.
        """
        asked = _Asked([(one, self._check(one)) for one in presented])
        with self._gate:
            self._queue.append(asked)
        with self._guard:
            if asked.results is None:
                with self._gate:
                    group, self._queue = self._queue, []
                self._settle(group)
        assert asked.results is not None
        return asked.results

    def _check(self, one: Presented) -> Ticket | CenacleError:
        """Everything that can be known of a use without the journal."""
        try:
            ticket = self._ticket(one.use)
            one.use.verify(ticket)
        except CenacleError as error:
            return error
        if one.use.rows != one.rows:
            return RefusedError(
                "the use of a ticket states another number of rows than came with it",
                found=f"{one.rows} rows",
                expected=f"{one.use.rows}",
            )
        if one.use.input not in {None, one.input}:
            return RefusedError(
                "the use of a ticket was signed for another input",
                found=one.input,
                expected=one.use.input,
            )
        return ticket

    def _ticket(self, use: TicketUse) -> Ticket:
        name = hashlib.sha256(canonical_json(use.ticket)).digest()
        with self._gate:
            if name in self._tickets:
                self._tickets.move_to_end(name)
                return self._tickets[name]
        ticket = open_ticket(Envelope.from_fields(use.ticket), self._issuer, self._contract)
        with self._gate:
            self._tickets[name] = ticket
            if len(self._tickets) > _TICKETS:
                self._tickets.popitem(last=False)
        return ticket

    def _settle(self, group: list[_Asked]) -> None:
        uses = [use for asked in group for use in asked.uses]
        results: list[CenacleError | None] = []
        try:
            for start in range(0, len(uses), _AT_ONCE):
                results += self._decide(uses[start : start + _AT_ONCE])
        finally:
            # Should it fail unforeseen, nobody is admitted by mistake, and nobody waits forever.
            missing = UnavailableError("a ticket could not be burned", remedy="ask again")
            results += [missing] * (len(uses) - len(results))
            for asked in group:
                asked.results = results[: len(asked.uses)]
                del results[: len(asked.uses)]

    def _decide(
        self, uses: list[tuple[Presented, Ticket | CenacleError]]
    ) -> list[CenacleError | None]:
        """One batch: judge every use, burn those that are new, and only then admit."""
        problem = self._confirm()
        results: list[CenacleError | None] = []
        fresh: dict[bytes, Burn] = {}
        pending: dict[bytes, int] = {}  # what they cost, by serial
        for one, ticket in uses:
            found = ticket if isinstance(ticket, CenacleError) else problem
            if found is None and isinstance(ticket, Ticket):
                try:
                    self._judge(one, ticket, fresh, pending)
                except CenacleError as error:
                    found = error
            results.append(found)
        burned = self._burn(list(fresh.values())) if fresh else None
        for at, (one, ticket) in enumerate(uses):
            if results[at] is None and isinstance(ticket, Ticket):
                if burned is not None and _name(one, ticket) in fresh:
                    results[at] = burned
                    continue
                try:  # by the time that was told after the burn
                    ticket.require_not_expired(self._now)
                except RefusedError as error:
                    results[at] = error
        return results

    def _judge(
        self,
        one: Presented,
        ticket: Ticket,
        fresh: dict[bytes, Burn],
        pending: dict[bytes, int],
    ) -> None:
        """Raise why a use is refused, or put it among those that are to be burned."""
        serial, request = ticket.serial_bytes, one.use.request_bytes
        digest = bytes.fromhex(one.input.removeprefix("sha256:"))
        name = serial + request
        ticket.require_not_expired(self._now)
        before = fresh.get(name)
        known = self._index.find(serial, request)
        if before is not None:
            known = before.rows, before.digest
        if known is not None:
            if known != (one.rows, digest):
                raise ConflictError(
                    "a request of this name was made with another input",
                    found=f"{one.rows} rows, {one.input}",
                    expected="the same input as before",
                    remedy="name every new request anew",
                )
            return
        if self._now < parse_time(ticket.not_before):
            self._ask_time()
        ticket.require_begun(self._now)
        spent = pending.get(serial, 0)
        left = ticket.queries - self._index.burned.get(serial, 0) - spent
        if one.rows > left:
            raise RefusedError(
                "a ticket has not enough queries left",
                found=f"{max(left, 0)} of {ticket.queries}",
                expected=f"{one.rows}, one for each row",
                remedy=f"ask {ticket.issuer} for a new ticket",
            )
        expires = int(parse_time(ticket.expires).timestamp())
        pending[serial] = spent + one.rows
        fresh[name] = Burn(serial, request, one.rows, expires, digest)

    def _burn(self, burns: list[Burn]) -> CenacleError | None:
        """Journal, disk, counter; what went wrong, if something did."""
        try:
            self._journal.append(len(burns), pack_burns(burns))
        except CenacleError as error:
            return error
        # It will be confirmed before anything else is burned, so it counts from here on.
        for burn in burns:
            self._index.add(burn)
        return self._confirm(unconfirmed=True)

    def _confirm(self, *, unconfirmed: bool = False) -> CenacleError | None:
        """Have the counter know of the journal's last batch; what went wrong, if something did."""
        self._unconfirmed |= unconfirmed
        if self._dead is None and self._unconfirmed:
            try:
                self._hear(self._counter.advance(self._journal.state, self._journal.previous))
            except UnavailableError as error:
                return error
            except CenacleError as error:
                if type(error) is not CenacleError:  # the broker failed unforeseen: ask again
                    self._dead = error
                return error
            self._unconfirmed = False
        return self._dead

    def _hear(self, now: datetime) -> None:
        self._now, self._heard = max(self._now, now), time.monotonic()

    def _ask_time(self) -> None:
        """The counter's time anew, at most once a second; if it fails, the old one stays."""
        if time.monotonic() - self._heard >= _ASK_TIME_S:
            with contextlib.suppress(CenacleError):
                self._hear(self._counter.advance(self._journal.state, self._journal.previous))

    # ------------------------------------------------------------------ afterwards

    @property
    def failure(self) -> CenacleError | None:
        """Why nothing is admitted any more: another enclave went on, or the run was ended."""
        return self._dead

    def report(self) -> dict[str, Any]:
        """For the usage report: the state, the time, and queries burned by serial (base64)."""
        with self._guard:
            burned = {b64(serial): rows for serial, rows in self._index.burned.items()}
            return {
                "state": self._journal.state.number,
                "time": format_time(self._now),
                "burned": dict(sorted(burned.items())),
            }

    def close(self) -> None:
        """Let the journal go; nothing is admitted afterwards. Safe to call twice."""
        with self._guard:
            self._dead = self._dead or UnavailableError("the desk for tickets is closed")
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_ticket_desk(folder: Path, session: Session, opened: OpenedContract) -> TicketDesk:
    """The desk of the contract that a session holds, with its broker as the counter.

    The journal's key follows from the model's, so every enclave that serves this contract has it.
    """
    job = opened.contract.job
    if not isinstance(job, ServeJob) or job.tickets is None:
        raise EnclaveError(
            "a contract takes no tickets", expected="a job that serves, with tickets"
        )
    context = session.contract.encode()
    with derive_key(session.asset_key(job.model), "enclave/ticket-journal", context) as key:
        issuer = opened.parties[job.tickets]
        return TicketDesk(folder, BrokerStateCounter(session), issuer, session.contract, key)


def _name(one: Presented, ticket: Ticket) -> bytes:
    return ticket.serial_bytes + one.use.request_bytes
