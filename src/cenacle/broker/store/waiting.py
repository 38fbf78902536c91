"""Nonces, runs and reservations of a batch that wait to be inserted together.

Many closures of one batch do little else. What they would insert is checked against what waits
already, and reaches the database in one batched insert a table. If a row then turns out to exist,
which is rare, the whole batch is done again closure by closure (:class:`CollisionError`).
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from cenacle.broker.store.session import Session
from cenacle.errors import ConflictError, InputError

__all__ = ["INSERT_NONCE", "INSERT_RUN", "CollisionError", "Waiting"]

INSERT_NONCE: Final = (
    "INSERT INTO nonces (nonce, used_at) VALUES (:nonce, :used_at) ON CONFLICT DO NOTHING"
)
INSERT_RUN: Final = (
    "INSERT INTO runs (id, contract, open_contract, state, created_at, releases, enclave_key,"
    " job_secret_wrapped, checkpoint_version) VALUES (:run, :contract, :contract, 'open',"
    " :created_at, :releases, :enclave_key, :secret, 0) ON CONFLICT DO NOTHING"
)
_INSERT_RESERVATION: Final = (
    "INSERT INTO reservations (run, asset, uses, epsilon, delta, event, state)"
    " VALUES (:run, :asset, :uses, :epsilon, :delta, :event, 'reserved') ON CONFLICT DO NOTHING"
)


class CollisionError(Exception):
    """What waited does not fit the database; whose fault it is, is not known."""


class Waiting:
    """Rows by their keys, in the order in which they came."""

    __slots__ = ("_nonces", "_open", "_reservations", "_runs")

    def __init__(self) -> None:
        self._nonces: dict[bytes, dict[str, Any]] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._open: dict[str, str] = {}  # the run that waits, by its contract
        self._reservations: dict[tuple[str, str], dict[str, Any]] = {}

    def nonce(self, nonce: bytes, used_at: str) -> bool:
        """Whether a nonce is new here; if so, it waits now."""
        if nonce in self._nonces:
            return False
        self._nonces[nonce] = {"nonce": nonce, "used_at": used_at}
        return True

    def run(self, row: dict[str, Any]) -> bool:
        """Whether neither a run's id nor its contract is here; if so, it waits now."""
        run, contract = row["run"], row["contract"]
        if run in self._runs or contract in self._open:
            return False
        self._runs[run] = row
        self._open[contract] = run
        return True

    def has_run(self, run: str) -> bool:
        return run in self._runs

    def reservation(self, row: dict[str, Any]) -> bool:
        """Whether a run has not reserved this asset here; if so, the row waits now."""
        key = row["run"], row["asset"]
        if key in self._reservations:
            return False
        self._reservations[key] = row
        return True

    def mark(self) -> tuple[int, int, int]:
        return len(self._nonces), len(self._runs), len(self._reservations)

    def beyond(self, mark: tuple[int, int, int]) -> Waiting:
        """Take out what came since ``mark``."""
        later = Waiting()
        nonces, runs, reservations = mark
        for nonce in list(islice(self._nonces, nonces, None)):
            later._nonces[nonce] = self._nonces.pop(nonce)
        for run in list(islice(self._runs, runs, None)):
            row = later._runs[run] = self._runs.pop(run)
            later._open[row["contract"]] = self._open.pop(row["contract"])
        for key in list(islice(self._reservations, reservations, None)):
            later._reservations[key] = self._reservations.pop(key)
        return later

    def flush(self, session: Session) -> None:
        """Insert everything, and wait for nothing any more.

        Raises:
            CollisionError: something exists already, or refers to what does not exist.
        """
        try:
            for statement, kept in (
                (INSERT_NONCE, self._nonces),
                (INSERT_RUN, self._runs),
                (_INSERT_RESERVATION, self._reservations),
            ):
                if session.run_many(statement, [*kept.values()]) != len(kept):
                    raise CollisionError
        except (ConflictError, InputError):
            raise CollisionError from None
        self._nonces.clear()
        self._runs.clear()
        self._open.clear()
        self._reservations.clear()
