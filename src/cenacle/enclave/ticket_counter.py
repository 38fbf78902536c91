"""Where a journal's newest number and head are kept, out of the host's reach."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from cenacle.enclave.session import Session
from cenacle.enclave.ticket_journal import State

__all__ = ["BrokerStateCounter", "StateCounter"]


class StateCounter(Protocol):
    """Number and digest of a state, kept where the host cannot turn them back; and the time."""

    def newest(self) -> State:
        """As it was when this enclave became the one that may go on from it."""
        ...

    def advance(self, state: State, previous: State) -> datetime:
        """Make ``state`` the newest, durably; ``previous`` is the one before.

        The newest once more, with the same one before, changes nothing.

        Returns:
            The time now, which never goes back.

        Raises:
            UnavailableError: no answer. It may have been recorded.
            CenacleError: of another class: refused, for good.
        """
        ...


class BrokerStateCounter:
    """The state of a session's contract at its broker, across the contract's runs.

    The broker takes it from the enclave that holds the contract's open run, and tells the next
    one of it with the keys. So an enclave whose place another one took cannot advance it, and the
    next one begins from the newest.

    Args:
        patience: seconds to wait for a broker that is away.
    """

    def __init__(self, session: Session, *, patience: float = 10.0) -> None:
        self._session = session
        self._patience = patience

    def newest(self) -> State:
        release = self._session.release
        return State(release.state_number, release.state_digest)

    def advance(self, state: State, previous: State) -> datetime:
        assert state.digest is not None
        return self._session.advance_state(
            state.number, state.digest, previous.digest, self._patience
        )
