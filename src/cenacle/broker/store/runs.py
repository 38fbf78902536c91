"""Changes to runs and to what they reserve.

Every method is one small step that either happens or raises. ``ConflictError`` means that
somebody else came first; nothing was changed then. Who may do a thing is not decided here
(:mod:`cenacle.broker.rules`), only that it is not done twice, lost or undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from cenacle.broker.ledger import (
    MAX_UNITS,
    Charge,
    LedgerView,
    Reservation,
    delta_units,
    epsilon_units,
    settled_charge,
)
from cenacle.broker.store.registry import RegistryWrites
from cenacle.broker.store.session import Session
from cenacle.broker.store.totals import Totals
from cenacle.broker.store.waiting import INSERT_RUN, Waiting
from cenacle.errors import ConflictError, InputError, RefusedError

__all__ = ["RunWrites"]

_TOGETHER: Final = 32


class RunWrites(RegistryWrites):
    """The part of a :class:`~cenacle.broker.store.Transaction` about runs and budgets."""

    __slots__ = ("_totals",)

    def __init__(self, session: Session, waiting: Waiting, totals: Totals) -> None:
        super().__init__(session, waiting)
        self._totals = totals

    def ledger(self, asset: str) -> LedgerView:
        known = self._totals.find(asset)
        if known is None:
            known = super().ledger(asset)
            self._totals.set(asset, known, changed=False)
        return known

    # Runs

    def create_run(
        self,
        run: str,
        contract: str,
        created_at: str,
        *,
        job_secret_wrapped: bytes | None = None,
        enclave_key: bytes | None = None,
    ) -> None:
        """Open a run; ConflictError if the id exists or the contract has an open run.

        With an ``enclave_key`` its first release is recorded too: see :meth:`record_release`.
        """
        row = {
            "run": run,
            "contract": contract,
            "created_at": created_at,
            "releases": 0 if enclave_key is None else 1,
            "enclave_key": enclave_key,
            "secret": job_secret_wrapped,
        }
        if self._session.untouched:
            new = self._waiting.run(row)
        else:
            new = bool(self._session.run(INSERT_RUN, **row))
        if not new:
            raise ConflictError(
                "a run is open already",
                found=contract,
                expected="one open run of a contract",
                remedy="resume it, or abandon it first",
            )

    def set_job_secret(self, run: str, job_secret_wrapped: bytes) -> None:
        """Give an open run its wrapped secret, once."""
        changed = self._session.run(
            "UPDATE runs SET job_secret_wrapped = :secret"
            " WHERE id = :run AND state = 'open' AND job_secret_wrapped IS NULL",
            run=run,
            secret=job_secret_wrapped,
        )
        if not changed:
            raise ConflictError("a run has its secret already, or is not open", found=run)

    def record_release(self, run: str, enclave_key: bytes) -> int:
        """Count a key release to an open run and make ``enclave_key`` its current enclave.

        Returns the number of releases, this one included; ConflictError if it is not open.
        """
        row = self._session.one(
            "UPDATE runs SET releases = releases + 1, enclave_key = :enclave_key"
            " WHERE id = :run AND state = 'open' RETURNING releases",
            run=run,
            enclave_key=enclave_key,
        )
        if row is None:
            raise self._not_open(run)
        releases: int = row[0]
        return releases

    def advance_checkpoint(self, run: str, version: int, digest: str) -> None:
        """Make a checkpoint the newest; versions only grow.

        Raises:
            ConflictError: the run is not open, or has this or a newer checkpoint.
        """
        changed = self._session.run(
            "UPDATE runs SET checkpoint_version = :version, checkpoint_digest = :digest"
            " WHERE id = :run AND state = 'open' AND checkpoint_version < :version",
            run=run,
            version=version,
            digest=digest,
        )
        if changed:
            return
        known = self.run(run)
        if known is None or known.state != "open":
            raise self._not_open(run)
        raise ConflictError(
            "a checkpoint is not newer than the last one",
            found=f"version {version}",
            expected=f"above {known.checkpoint_version}",
            remedy="resume from the newest checkpoint",
        )

    def advance_state(
        self, contract: str, number: int, digest: str, previous: str | None, told_at: str
    ) -> None:
        """Put a contract's state in place of the one before, number by number.

        Putting the newest one once more changes nothing but ``told_at``, which never goes back.

        Raises:
            ConflictError: it does not follow the newest one.
        """
        known = self.state(contract)
        if known is None and number == 1:
            self._session.run(
                "INSERT INTO states (contract, number, digest, previous, told_at)"
                " VALUES (:contract, 1, :digest, NULL, :told_at)",
                contract=contract,
                digest=digest,
                told_at=told_at,
            )
            return
        follows = known is not None and (number, previous) == (known.number + 1, known.digest)
        again = known is not None and (number, digest, previous) == (
            known.number,
            known.digest,
            known.previous,
        )
        if not (follows or again):
            raise ConflictError(
                "a contract's state does not follow the newest one",
                found=f"number {number} after {previous or 'nothing'}",
                expected="number 1 after nothing"
                if known is None
                else f"number {known.number + 1} after {known.digest}",
                remedy="another enclave went on, or an old copy of the state came back: resume "
                "from the newest state",
            )
        self._session.run(
            "UPDATE states SET number = :number, digest = :digest, previous = :previous,"
            " told_at = CASE WHEN told_at < :told_at THEN :told_at ELSE told_at END"
            " WHERE contract = :contract",
            contract=contract,
            number=number,
            digest=digest,
            previous=previous,
            told_at=told_at,
        )

    def settle_run(self, run: str, settled_at: str, receipt_digest: str | None = None) -> None:
        """Close a run that finished; ConflictError if it is not open."""
        self._close_run(run, "settled", settled_at, receipt_digest)

    def abandon_run(self, run: str, settled_at: str) -> None:
        """Close a run that will not finish; its reservations stay charged in full."""
        self._close_run(run, "abandoned", settled_at, None)

    # What a run has to prove again

    def watch_run(self, run: str, interval: int, due_at: str, hpke_key: bytes, facts: str) -> None:
        """From now on an open run has to prove itself; in place of what it had to before."""
        self._session.run(
            "INSERT INTO watches (run, interval_s, due_at, hpke_key, facts, rounds)"
            " VALUES (:run, :interval, :due, :hpke_key, :facts, 0)"
            " ON CONFLICT (run) DO UPDATE SET interval_s = excluded.interval_s,"
            " due_at = excluded.due_at, hpke_key = excluded.hpke_key, facts = excluded.facts,"
            " rounds = 0",
            run=run,
            interval=interval,
            due=due_at,
            hpke_key=hpke_key,
            facts=facts,
        )

    def prolong_watch(self, run: str, due_at: str) -> None:
        """The run proved itself again. The deadline never moves back."""
        self._session.run(
            "UPDATE watches SET rounds = rounds + 1, due_at = :due"
            " WHERE run = :run AND due_at <= :due",
            run=run,
            due=due_at,
        )

    def unwatch_run(self, run: str) -> None:
        """The run has nothing to prove any more."""
        self._session.run("DELETE FROM watches WHERE run = :run", run=run)

    def revoke_run(self, run: str, revoked_at: str, reason: str) -> None:
        """Close a run for good; its reservations stay charged in full.

        To the rest of the store it is abandoned, and why is kept apart.
        """
        self._close_run(run, "abandoned", revoked_at, None)
        self._session.run(
            "INSERT INTO revocations (run, revoked_at, reason) VALUES (:run, :at, :reason)",
            run=run,
            at=revoked_at,
            reason=reason,
        )

    def _close_run(self, run: str, state: str, at: str, receipt_digest: str | None) -> None:
        changed = self._session.run(
            "UPDATE runs SET state = :state, open_contract = NULL, settled_at = :moment,"
            " receipt_digest = :receipt WHERE id = :run AND state = 'open'",
            run=run,
            state=state,
            moment=at,
            receipt=receipt_digest,
        )
        if not changed:
            raise self._not_open(run)
        self.unwatch_run(run)

    def _not_open(self, run: str) -> ConflictError:
        found = self.run(run)
        return ConflictError(
            "a run is not open",
            found=f"{run}: {'unknown' if found is None else found.state}",
            expected="an open run",
        )

    # Reservations

    def reserve(self, run: str, asset: str, charge: Charge, event: str = "{}") -> None:
        """Charge an asset for an open run, in full and in advance.

        Whether the charge fits the owner's budget is for the rules to say, in the same
        transaction: ``tx.ledger(asset).require(budget, charge)``.

        Raises:
            ConflictError: the run is not open, has this asset reserved, or either is unknown.
            RefusedError: the asset's totals are beyond counting.
        """
        self.reserve_all(run, {asset: charge}, event)

    def reserve_all(self, run: str, charges: Mapping[str, Charge], event: str = "{}") -> None:
        """:meth:`reserve` several assets in few round trips to the database."""
        if self._session.untouched and self._waiting.has_run(run):
            self._reserve_later(run, charges, event)
        else:
            self._reserve_now(run, charges, event)
        for asset, charge in charges.items():
            self._set_totals(asset, self.ledger(asset).charged(charge))

    def _reserve_later(self, run: str, charges: Mapping[str, Charge], event: str) -> None:
        for asset, charge in charges.items():
            row = {
                "run": run,
                "asset": asset,
                "uses": charge.uses,
                "epsilon": _real(charge.epsilon),
                "delta": _real(charge.delta),
                "event": event,
            }
            if not self._waiting.reservation(row):
                raise _reserved_already(charges)

    def _reserve_now(self, run: str, charges: Mapping[str, Charge], event: str) -> None:
        changed = 0
        listed = list(charges.items())
        for start in range(0, len(listed), _TOGETHER):
            some = listed[start : start + _TOGETHER]
            parameters: dict[str, Any] = {"run": run, "event": event}
            for number, (asset, charge) in enumerate(some):
                parameters[f"asset{number}"] = asset
                parameters[f"uses{number}"] = charge.uses
                parameters[f"epsilon{number}"] = _real(charge.epsilon)
                parameters[f"delta{number}"] = _real(charge.delta)
            changed += self._session.run(_reservations(len(some)), **parameters)
        if changed != len(listed):
            known = self.run(run)
            if known is None or known.state != "open":
                raise self._not_open(run)
            raise _reserved_already(charges)

    def settle(
        self,
        run: str,
        asset: str,
        epsilon: float | None = None,
        delta: float | None = None,
        *,
        event: str | None = None,
    ) -> Charge:
        """Lower a reservation to the loss that was really spent; the uses stay.

        Args:
            event: in place of the reserved one, which it must not exceed; None leaves that.

        Returns what stays charged. None: the run states no loss and stays charged in full.

        Raises:
            InputError: there is no such reservation.
            ConflictError: it was settled before.
            RefusedError: more is reported than was reserved.
        """
        reservation = self.reservation(run, asset)
        if reservation is None:
            raise InputError("a run reserved no such asset", found=f"{run}, {asset}")
        if reservation.state != "reserved":
            raise ConflictError("a reservation was settled already", found=f"{run}, {asset}")
        charge = settled_charge(reservation.charge, epsilon, delta)
        self._session.run(
            "UPDATE reservations SET state = 'settled', epsilon = :epsilon, delta = :delta,"
            " event = :event WHERE run = :run AND asset = :asset",
            run=run,
            asset=asset,
            epsilon=_real(charge.epsilon),
            delta=_real(charge.delta),
            event=reservation.event if event is None else event,
        )
        self._set_totals(asset, _moved(self.ledger(asset), reservation, charge))
        return charge

    def _set_totals(self, asset: str, view: LedgerView) -> None:
        amounts = (
            view.uses_reserved,
            view.uses_settled,
            view.epsilon_reserved_units,
            view.epsilon_settled_units,
            view.delta_reserved_units,
            view.delta_settled_units,
        )
        if max(amounts) > MAX_UNITS or min(amounts) < 0:
            raise RefusedError(
                "an asset's charges are beyond counting",
                found=f"more than {MAX_UNITS} units",
                expected="epsilon below 4.6e9, delta below 4.6",
            )
        self._totals.set(asset, view, changed=True)


def _reserved_already(charges: Mapping[str, Charge]) -> ConflictError:
    return ConflictError("a run has reserved this asset already", found=", ".join(sorted(charges)))


def _real(amount: float | None) -> float | None:
    return None if amount is None else float(amount)


@cache
def _reservations(count: int) -> str:
    """One statement that reserves ``count`` assets for an open run."""
    row = (
        "SELECT id, CAST(:asset# AS TEXT), CAST(:uses# AS BIGINT),"
        " CAST(:epsilon# AS DOUBLE PRECISION), CAST(:delta# AS DOUBLE PRECISION),"
        " CAST(:event AS TEXT), 'reserved' FROM runs WHERE id = :run AND state = 'open'"
    )
    rows = " UNION ALL ".join(row.replace("#", str(number)) for number in range(count))
    return (
        "INSERT INTO reservations (run, asset, uses, epsilon, delta, event, state)"
        f" {rows} ON CONFLICT DO NOTHING"
    )


def _moved(view: LedgerView, reservation: Reservation, charge: Charge) -> LedgerView:
    """The totals with one reservation taken out and its settled charge put in."""
    before = reservation.charge
    lowered = LedgerView(
        uses_reserved=view.uses_reserved - before.uses,
        uses_settled=view.uses_settled,
        epsilon_reserved_units=view.epsilon_reserved_units - epsilon_units(before.epsilon or 0.0),
        epsilon_settled_units=view.epsilon_settled_units,
        delta_reserved_units=view.delta_reserved_units - delta_units(before.delta or 0.0),
        delta_settled_units=view.delta_settled_units,
        unbounded=view.unbounded - (before.epsilon is None or before.delta is None),
    )
    return lowered.charged(charge, settled=True)
