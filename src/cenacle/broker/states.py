"""The state of a contract, number by number, across its runs; see the messages for what it is.

A state comes from the enclave that holds the contract's open run now, and follows the newest one;
so of two enclaves, or of an enclave and an old copy of its folder, one alone goes on. It is
durable before the answer. The very same record once more is answered again, so that a lost
answer costs nothing.

The answer tells the time, for whoever judges by it that something has expired. That time never
goes back: should the broker's clock be set back a little, the newest time told is told again;
should it be set back further than clocks are ever corrected, nothing is recorded until it is
right.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from cenacle.broker.messages import StateAnswer, StateRecord
from cenacle.broker.release import ReleaseDesk
from cenacle.broker.store import Transaction
from cenacle.documents.base import format_time, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.errors import ConflictError, InputError, UnavailableError

__all__ = ["States"]

_SET_BACK: Final = timedelta(minutes=5)


class States:
    """What enclaves record of their contracts' states.

    Args:
        desk: tells which enclave holds a run.
    """

    def __init__(self, desk: ReleaseDesk) -> None:
        self._desk = desk
        self._broker = desk.broker

    def advance(self, envelope: Envelope) -> StateAnswer:
        """Make a state its contract's newest.

        Raises:
            SignatureError: the run's current enclave did not sign it.
            ConflictError: the run is not open, or the state does not follow the newest one.
            InputError: there is no such run, or it is another contract's.
            UnavailableError: the broker's clock was set back.
        """
        stated = envelope.peek(StateRecord)
        return self._broker.write(lambda tx: self._change(tx, envelope, stated))

    def _change(self, tx: Transaction, envelope: Envelope, stated: StateRecord) -> StateAnswer:
        row = self._desk.reattestation.kept_run(tx, stated.run, envelope)
        if row.contract != stated.contract:
            raise InputError(
                "a state names another contract", found=stated.contract, expected=row.contract
            )
        if row.state != "open":
            raise ConflictError(
                "a run is not open", found=f"{row.id}: {row.state}", expected="an open run"
            )
        known = tx.state(stated.contract)
        told = self._time(None if known is None else known.told_at)
        tx.advance_state(stated.contract, stated.number, stated.content, stated.previous, told)
        return StateAnswer(number=stated.number, time=told)

    def _time(self, told: str | None) -> str:
        """Now, and never before what was told."""
        now = self._broker.clock()
        if told is None or parse_time(told) <= now:
            return format_time(now)
        if parse_time(told) - now > _SET_BACK:
            raise UnavailableError(
                "the broker's clock was set back",
                found=format_time(now),
                expected=f"{told} or later",
                remedy="its operator corrects the clock; nothing was recorded",
            )
        return told
