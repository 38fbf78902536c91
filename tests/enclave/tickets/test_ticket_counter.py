"""The broker as a desk's counter, and the desk as a serving enclave opens it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.broker.messages import StateAnswer, StateRecord
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.serving import ServeJob
from cenacle.enclave import session as session_module
from cenacle.enclave.session import Session
from cenacle.enclave.ticket_counter import BrokerStateCounter
from cenacle.enclave.ticket_journal import NOTHING, State
from cenacle.enclave.tickets import open_ticket_desk
from cenacle.errors import ConflictError, EnclaveError, RefusedError, SealError, UnavailableError


class Broker:
    """Its record of one contract, as :class:`cenacle.broker.states.States` keeps it."""

    def __init__(self, contract: str) -> None:
        self.contract = contract
        self.state, self.previous = NOTHING, NOTHING
        self.runs = 0
        self.away = 0  # so many calls are recorded, and their answers lost
        self.asset_key = bytes(range(32))

    def advance_state(self, record: StateRecord, key: SigningKey) -> StateAnswer:
        state = State(record.number, record.content)
        before = State(record.number - 1, record.previous) if record.previous else NOTHING
        if record.run != f"run-{self.runs}":
            raise RefusedError("another enclave holds the run")
        if (state, before) != (self.state, self.previous):
            if before != self.state:
                raise ConflictError("a contract's state does not follow the newest one")
            self.state, self.previous = state, before
        if self.away:
            self.away -= 1
            raise UnavailableError("the broker cannot be reached")
        return StateAnswer(number=record.number, time="2027-01-31T12:00:00Z")

    def session(self) -> Session:
        """A release to the next enclave."""
        self.runs += 1
        nothing: Any = SimpleNamespace()
        client: Any = self
        release: Any = SimpleNamespace(
            run=f"run-{self.runs}",
            state_number=self.state.number,
            state_digest=self.state.digest,
        )
        return Session(
            contract=self.contract,
            client=client,
            signing_key=SigningKey.generate(),
            binding=nothing,
            evidence=nothing,
            measurements={},
            release=release,
            asset_keys={"net": SecretBytes(bytearray(self.asset_key))},
            job_secret=SecretBytes.random(32),
        )


@pytest.fixture
def broker(shop: Any) -> Broker:
    return Broker(shop.contract)


def _opened(shop: Any, **job: Any) -> Any:
    fields = {"type": "serve", "model": "net", "outputs": {"form": "label"}, **job}
    contract = SimpleNamespace(job=ServeJob.from_fields(fields))
    return SimpleNamespace(contract=contract, parties={"vendor": shop.issuer})


def test_a_state_is_advanced_and_told_to_the_next_enclave(broker: Broker) -> None:
    counter = BrokerStateCounter(broker.session())
    assert counter.newest() == NOTHING
    first, second = (State(n, "sha256:" + str(n) * 64) for n in (1, 2))
    told = counter.advance(first, NOTHING)
    assert told == datetime(2027, 1, 31, 12, tzinfo=UTC)
    assert counter.advance(first, NOTHING) == told
    counter.advance(second, first)
    assert BrokerStateCounter(broker.session()).newest() == second
    with pytest.raises(RefusedError, match="another enclave"):
        counter.advance(State(3, "sha256:" + "3" * 64), second)


def test_a_broker_that_is_away_is_waited_for(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_PAUSE_S", 0.001)
    state = State(1, "sha256:" + "1" * 64)
    broker.away = 3
    BrokerStateCounter(broker.session()).advance(state, NOTHING)
    broker.away = 10**9
    with pytest.raises(UnavailableError):
        BrokerStateCounter(broker.session(), patience=0.01).advance(state, NOTHING)
    assert broker.state == state


def test_a_serving_enclave_opens_the_desk_of_its_contract(
    shop: Any, broker: Broker, tmp_path: Path
) -> None:
    ticket = shop.ticket(queries=2)
    opened = _opened(shop, tickets="vendor")
    for _ in range(2):  # runs of the contract, whose job secrets differ
        with open_ticket_desk(tmp_path / "t", broker.session(), opened) as desk:
            shop.admit_one(desk, shop.present(ticket))
    with open_ticket_desk(tmp_path / "t", broker.session(), opened) as desk:
        with pytest.raises(RefusedError, match="found 0 of 2"):
            shop.admit_one(desk, shop.present(ticket))
        assert desk.report()["state"] == broker.state.number == 5


def test_the_key_is_the_models_and_the_contracts(shop: Any, broker: Broker, tmp_path: Path) -> None:
    opened = _opened(shop, tickets="vendor")
    open_ticket_desk(tmp_path / "t", broker.session(), opened).close()
    broker.asset_key = bytes(32)
    with pytest.raises(SealError, match="does not decrypt"):
        open_ticket_desk(tmp_path / "t", broker.session(), opened)


def test_a_contract_without_tickets_has_no_desk(shop: Any, broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(EnclaveError, match="takes no tickets"):
        open_ticket_desk(tmp_path / "t", broker.session(), _opened(shop))
    assert not (tmp_path / "t").exists()
