"""A vendor who sells queries, its clients, and a counter that a test can break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64, format_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.ticket import Ticket, TicketUse, new_request, new_serial, sign_use
from cenacle.enclave.ticket_journal import NOTHING, State
from cenacle.enclave.tickets import Presented, TicketDesk
from cenacle.errors import CenacleError, ConflictError, UnavailableError

START = datetime(2027, 1, 31, 12, tzinfo=UTC)
CONTRACT = "sha256:" + hashlib.sha256(b"contract").hexdigest()


def digest_of(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Counter:
    """What a broker keeps of one contract. ``holder`` is the enclave that may advance it.

    ``faults`` holds, for each next call of ``advance``, ``None``, ``"before"`` (nothing is
    recorded) or ``"after"`` (it is, and the answer is lost).
    """

    def __init__(self) -> None:
        self.state, self.previous = NOTHING, NOTHING
        self.holder = 0
        self.now = START
        self.faults: list[str | None] = []
        self.advances = 0

    def taken(self) -> Hold:
        self.holder += 1
        return Hold(self, self.holder, self.state)


class Hold:
    """One enclave's view of the counter (:class:`cenacle.enclave.ticket_counter.StateCounter`)."""

    def __init__(self, counter: Counter, number: int, newest: State) -> None:
        self.counter, self.number, self._newest = counter, number, newest

    def newest(self) -> State:
        return self._newest

    def advance(self, state: State, previous: State) -> datetime:
        counter = self.counter
        fault = counter.faults.pop(0) if counter.faults else None
        if fault == "before":
            raise UnavailableError("the broker is away")
        if counter.holder != self.number:
            raise ConflictError("another enclave holds the run")
        again = (state, previous) == (counter.state, counter.previous)
        if not again:
            if previous != counter.state or state.number != previous.number + 1:
                raise ConflictError("a contract's state does not follow the newest one")
            counter.state, counter.previous = state, previous
            counter.advances += 1
        if fault == "after":
            raise UnavailableError("the broker's answer was lost")
        return counter.now


class Shop:
    """A vendor's keys, tickets and uses of them, over one folder and one counter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counter = Counter()
        self.contract = CONTRACT
        self.key = bytes(range(32))
        self.signing = SigningKey.from_seed(SecretBytes(b"vendor".ljust(32, b".")))
        self.client = SigningKey.from_seed(SecretBytes(b"client".ljust(32, b".")))
        self.issuer = self.party("vendor", self.signing)

    def party(self, name: str, key: SigningKey) -> Party:
        hpke = HpkePrivateKey(SecretBytes(name.encode().ljust(96, b".")))
        return Party(
            name=name,
            signing_key=b64(key.verify_key.raw),
            hpke_key=b64(hpke.public_key.raw),
            created=format_time(START),
        )

    def terms(self, **changes: Any) -> Ticket:
        fields = {
            "issuer": "vendor",
            "contract": self.contract,
            "serial": new_serial(),
            "client": b64(self.client.verify_key.raw),
            "queries": 10,
            "not_before": format_time(START),
            "expires": format_time(START + timedelta(days=30)),
        }
        return Ticket.from_fields({**fields, **changes})

    def ticket(self, signer: SigningKey | None = None, **changes: Any) -> Envelope:
        return Envelope.sign(self.terms(**changes), signer or self.signing)

    def use(
        self,
        ticket: Envelope,
        rows: int = 1,
        data: str = "x",
        request: bytes | None = None,
        *,
        sealed: bool = True,
        key: SigningKey | None = None,
    ) -> TicketUse:
        return sign_use(
            ticket,
            key or self.client,
            request=request or new_request(),
            rows=rows,
            input_digest=digest_of(data) if sealed else None,
        )

    def present(self, ticket: Envelope, rows: int = 1, data: str = "x", **rest: Any) -> Presented:
        return Presented(self.use(ticket, rows, data, **rest), rows, digest_of(data))

    def desk(self, folder: Path | None = None, hold: Hold | None = None) -> TicketDesk:
        """As a new enclave opens it."""
        return TicketDesk(
            folder or self.folder,
            hold or self.counter.taken(),
            self.issuer,
            self.contract,
            SecretBytes(bytearray(self.key)),
        )

    @staticmethod
    def admit_one(desk: TicketDesk, presented: Presented) -> None:
        """Raises the refusal of one use."""
        [problem] = desk.admit([presented])
        if problem is not None:
            raise problem

    @staticmethod
    def outcome(problem: CenacleError | None) -> str:
        return "admitted" if problem is None else type(problem).__name__


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "tickets")


@pytest.fixture
def make_shop() -> Callable[[Path], Shop]:
    return Shop
