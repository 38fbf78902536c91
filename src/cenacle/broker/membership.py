"""Who belongs to a broker: its owner, the parties it admits, the requests they sign.

The ground that :class:`cenacle.broker.service.Broker` stands on: keys, store, clock and log.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.broker.attestation import SelfAttestation
from cenacle.broker.entries import LogRecord, PartyEntry
from cenacle.broker.identity import BrokerIdentity, BrokerKeys
from cenacle.broker.log import TransparencyLog
from cenacle.broker.losses import Losses
from cenacle.broker.messages import Invitation, PartyRequest, Registration
from cenacle.broker.nonces import NonceKey
from cenacle.broker.records import load_party
from cenacle.broker.store import Store, Transaction
from cenacle.crypto import derive_key
from cenacle.documents.base import canonical_json, format_time, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import (
    ConflictError,
    EvidenceError,
    RefusedError,
    SignatureError,
    UnavailableError,
)

__all__ = ["Membership", "now"]

T = TypeVar("T")

_INVITATION_LIFETIME: Final = timedelta(days=7)
_REQUEST_AGE: Final = timedelta(minutes=5)
# Longer than any nonce or request is fresh, clocks that differ included.
_NONCES_KEPT: Final = timedelta(days=1)


def now() -> datetime:
    """The broker's clock: UTC, whole seconds, as every time in a document."""
    return datetime.now(UTC).replace(microsecond=0)


def _hash(token: str) -> str:
    return hashlib.sha256(b"cenacle/token\x00" + token.encode()).hexdigest()


class Membership:
    """Keys, store, clock and log of one broker, and its parties."""

    def __init__(
        self,
        store: Store,
        keys: BrokerKeys,
        verifiers: VerifierSet,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self.store = store
        self.keys = keys
        self.verifiers: Final = verifiers
        self.clock = clock
        self.log = TransparencyLog(keys.identity.origin, keys.signing_key, clock)
        self.losses: Final = Losses()
        self.nonces = NonceKey(derive_key(keys.signing_key.seed(), "broker/nonce"))
        self.digest: Final = keys.identity.digest  # of the keys, so no address changes it
        self.attestation: SelfAttestation | None = None

    @property
    def identity(self) -> BrokerIdentity:
        """The public half of the keys, with the address once it is served."""
        return self.keys.identity

    def attest(self, nonce: bytes) -> Evidence:
        """Evidence of this broker, for a party's nonce.

        Raises:
            UnavailableError: the broker has no attester, or its hardware does not answer.
        """
        if self.attestation is None:
            raise UnavailableError(
                "this broker does not attest",
                found="no evidence kind",
                expected="a broker started with --evidence",
                remedy="ask its operator, or use a broker that you run yourself",
            )
        return self.attestation.evidence(nonce, self.identity, self.clock())

    # ------------------------------------------------------------------ helpers

    def write(self, change: Callable[[Transaction], T]) -> T:
        """Run a change in the store's one writer; returns when it is durable."""
        return self.store.run(change)

    def record(self, tx: Transaction, entry: LogRecord) -> tuple[int, bytes]:
        """Append to the transparency log within a change; returns the entry's place and bytes."""
        fields = entry.to_fields()
        body = canonical_json(fields)
        return tx.append_entry(fields["kind"], body), body

    def time(self) -> str:
        """Now, as documents write it."""
        return format_time(self.clock())

    # ------------------------------------------------------------------ parties

    def owner_token(self) -> str | None:
        """A new one-time token for the broker's owner; ``None`` once there is one.

        Each start makes a new token and voids the one before, until an owner registers: so the
        first stranger to connect does not own the broker.
        """
        token = secrets.token_urlsafe(32)

        def change(tx: Transaction) -> bool:
            if tx.meta("owner") is not None:
                return False
            tx.set_meta("owner-token", _hash(token))
            return True

        return token if self.write(change) else None

    def register(self, registration: Registration) -> Party:
        """Admit a party that shows its self-signed document and a one-time token."""
        envelope = Envelope.from_fields(registration.party)
        party = envelope.open(Party, envelope.peek(Party).verify_key)
        token = _hash(registration.token)

        def change(tx: Transaction) -> None:
            at = self.time()
            if tx.meta("owner") is None and secrets.compare_digest(
                token, tx.meta("owner-token") or ""
            ):
                tx.add_meta("owner", party.name)
            else:
                tx.use_invitation(token, party.name, at)
            tx.add_party(party.name, party.digest, envelope.to_json(), at)
            self.record(tx, PartyEntry(time=at, party=party.name, document=party.digest))

        self.write(change)
        return party

    def party(self, name: str) -> Envelope:
        with self.store.read() as tx:
            load_party(tx, name)
            row = tx.party(name)
            assert row is not None
            return Envelope.from_json(row.envelope)

    def invite(self, request: Envelope) -> Invitation:
        """A token for one more party, at the signed request of the broker's owner."""
        asked = self.party_request(request, "invite")
        token = secrets.token_urlsafe(32)
        expires = format_time(self.clock() + _INVITATION_LIFETIME)

        def change(tx: Transaction) -> None:
            if tx.meta("owner") != asked.party:
                raise RefusedError(
                    "only the broker's owner invites parties",
                    found=asked.party,
                    expected=tx.meta("owner"),
                    remedy="ask the owner for an invitation",
                )
            self.once(tx, asked)
            tx.add_invitation(_hash(token), self.time(), expires)

        self.write(change)
        return Invitation(token=token, expires=expires)

    def party_request(self, envelope: Envelope, action: str) -> PartyRequest:
        """A fresh request for this broker, signed by the party that it names."""
        request = envelope.peek(PartyRequest)
        with self.store.read() as tx:
            envelope.verify_signature(load_party(tx, request.party).verify_key)
        if (request.broker, request.action) != (self.digest, action):
            raise SignatureError(
                "a request was signed for something else",
                found=f"{request.action} at {request.broker}",
                expected=f"{action} at {self.digest}",
            )
        if abs(self.clock() - parse_time(request.issued)) > _REQUEST_AGE:
            raise SignatureError(
                "a request is not fresh",
                found=f"signed at {request.issued}",
                expected=f"within {_REQUEST_AGE.seconds} s of {self.time()}",
                remedy="check both clocks and try again",
            )
        return request

    def once(self, tx: Transaction, request: PartyRequest) -> None:
        """Raise :class:`ConflictError` if this very request was carried out before."""
        nonce = hashlib.sha256(request.canonical_bytes()).digest()
        try:
            tx.consume_nonce(b"request" + nonce, self.time())
        except EvidenceError:
            raise ConflictError(
                "a request was carried out already",
                found=f"{request.action} by {request.party}",
                expected="a request that is sent once",
                remedy="sign a new one",
            ) from None

    def tidy(self) -> int:
        """Forget spent nonces that have long expired; returns how many."""
        before = format_time(self.clock() - _NONCES_KEPT)
        return self.write(lambda tx: tx.forget_nonces(before))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.store.close()
