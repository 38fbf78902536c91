"""The agent's side of re-attestation: prove the enclave again, or end it.

While the job runs, a thread makes fresh evidence with the keys and the statement of the release
and has the broker judge it. Another thread watches the clock and depends on nobody: where no
evidence was accepted for twice the contract's interval, it ends the enclave, whatever the host
does to messages in the meantime. The broker holds the same deadline by its own clock.

To end means: keys wiped, the process gone, in the middle of whatever it did.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Final, NoReturn, Self

from cenacle.attestation.binding import report_data
from cenacle.attestation.registry import Attester
from cenacle.broker.client import BrokerClient
from cenacle.documents.base import unb64
from cenacle.enclave.channel import Channel
from cenacle.enclave.session import Session
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EnclaveError,
    InputError,
    ProofError,
    RefusedError,
    SignatureError,
)

__all__ = ["EXIT_REVOKED", "Reattestation", "boot_clock", "end_enclave"]

EXIT_REVOKED: Final = 71
_GRACE: Final = 2  # as the broker's
_PAUSE_S: Final = 5.0
_TELL_S: Final = 2.0
_LEAST_S: Final = 1.0
_TRIES: Final = 2  # the second where the broker restarted and wants the whole list
# The run is over for this enclave: revoked, closed, or another one's.
_FINAL: Final = (RefusedError, ConflictError, InputError, SignatureError, ProofError)


def boot_clock() -> float:
    """Seconds since the machine started, sleep included; no clock that anybody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def end_enclave(session: Session, channel: Channel, error: BaseException) -> NoReturn:
    """Wipe the keys, tell the host why if it listens, and end this process at once.

    A program's process and its accelerators' sockets end with it.
    """
    session.close()
    # A host that reads nothing must not keep the process alive.
    telling = threading.Thread(target=channel.failed, args=(error,), daemon=True)
    telling.start()
    telling.join(_TELL_S)
    os._exit(EXIT_REVOKED)


class Reattestation:
    """Use as a context manager around everything that the enclave does with its keys.

    Args:
        interval: seconds between two proofs; None or 0: none is asked for, and nothing happens.
        since: what ``clock`` said before the evidence of the release was made.
        connect: makes a connection to the broker whose requests take at most ``timeout`` seconds.
        end: called once, from a thread of its own, with the reason: it ends the enclave.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        session: Session,
        attester: Attester,
        layers: tuple[str, ...],
        interval: float | None,
        *,
        since: float,
        connect: Callable[..., AbstractContextManager[BrokerClient]],
        end: Callable[[BaseException], object],
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._session = session
        self._attester = attester
        self._layers = layers
        self._interval = interval or 0.0
        self._accepted = since
        self._connect = connect
        self._end = end
        self._clock = clock
        self._changed = threading.Condition()
        self._asked = 0  # proofs that were asked for, and up to which of them one answers
        self._answered = 0
        self._rounds = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=task, name=f"reattest-{task.__name__}", daemon=True)
            for task in (self._prove_again, self._watch_clock)
            if interval
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._failure is not None:
            # Whatever else went wrong did so because the keys were wiped meanwhile.
            raise self._failure

    @property
    def rounds(self) -> int:
        """How often evidence was accepted since the release."""
        return self._rounds

    def close(self) -> None:
        """Prove nothing any more. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def confirm(self) -> None:
        """Prove the enclave now, before something leaves it; returns once that was accepted.

        Raises:
            CenacleError: why the enclave is being ended.
        """
        if not self._threads:
            return
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            while self._answered < mine and not self._closed and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._answered < mine:
                raise EnclaveError("an enclave that proves nothing any more was asked to")

    # ------------------------------------------------------------------ the threads

    def _prove_again(self) -> None:
        pause, asked = self._interval, 0
        while True:
            with self._changed:
                until = self._clock() + pause
                while not self._over and self._asked == asked and self._clock() < until:
                    self._changed.wait(max(until - self._clock(), 0.0))
                if self._over:
                    return
                asked, begun = self._asked, self._clock()
                left = self._accepted + _GRACE * self._interval - begun
            accepted = False
            try:
                accepted = self._round(max(_LEAST_S, left))
            except _FINAL as error:
                self._fail(error)
                return
            except CenacleError:
                pass  # the nonce was late, or nobody answers: again, until the deadline
            except BaseException as error:
                self._fail(error)
                return
            with self._changed:
                if accepted:
                    self._accepted, self._answered = begun, asked
                    self._rounds += 1
                    self._changed.notify_all()
            pause = self._interval if accepted else min(_PAUSE_S, self._interval / 4)

    @property
    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _round(self, left: float) -> bool:
        """One proof, in at most about ``left`` seconds; whether it was accepted."""
        session = self._session
        public = (unb64(session.binding.hpke_key), unb64(session.binding.signing_key))
        with self._connect(timeout=left) as client:
            for _ in range(_TRIES):
                nonce, entries = client.run_nonce(session.release.run)
                made = self._attester.attest(
                    report_data(nonce, session.contract, *public),
                    session.measurements,
                    self._layers,
                    datetime.now(UTC),
                )
                if made.kind == "ima":
                    # Imported here: of no use to an enclave that is not watched.
                    from cenacle.attestation.ima import since  # noqa: PLC0415

                    made = since(made, entries)
                answer = client.reattest(nonce, made, session.release.run, session.signing_key)
                if answer.accepted:
                    return True
        return False

    def _watch_clock(self) -> None:
        while True:
            with self._changed:
                due = self._accepted + _GRACE * self._interval
                left = due - self._clock()
                if self._over:
                    return
                if left > 0:
                    self._changed.wait(left)
                    continue
            self._fail(
                EnclaveError(
                    "the enclave ended itself: it could not prove itself again in time",
                    found=f"no evidence accepted for {_GRACE * self._interval:g} s",
                    expected=f"every {self._interval:g} s",
                    remedy="see that the host lets it reach the broker and its hardware answers; "
                    "then start a new run",
                )
            )
            return

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._over:
                return
            self._failure = error
            self._changed.notify_all()
        try:
            raise error  # so that it is known to come from here
        except BaseException:
            self._end(error)
