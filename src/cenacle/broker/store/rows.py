"""Rows of the store as frozen dataclasses. Times are RFC 3339, UTC, whole seconds, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cenacle.broker import merkle
from cenacle.broker.ledger import Reservation

__all__ = [
    "AssetRow",
    "ContractRow",
    "InvitationRow",
    "LogEntry",
    "PartyRow",
    "Reservation",
    "RunRow",
    "RunState",
    "SignatureRow",
    "StateRow",
    "VetoRow",
    "WatchRow",
]

RunState = Literal["open", "settled", "abandoned"]


@dataclass(frozen=True, slots=True)
class PartyRow:
    """A registered party: its document's digest and the signed envelope (JSON text)."""

    name: str
    digest: str
    envelope: str
    registered_at: str


@dataclass(frozen=True, slots=True)
class InvitationRow:
    """A one-time token, kept as its hash only. ``used_by`` None: not used yet."""

    token_hash: str
    created_at: str
    expires_at: str
    used_by: str | None


@dataclass(frozen=True, slots=True)
class AssetRow:
    """A sealed asset: manifest envelope (JSON text) and its key, wrapped to the broker."""

    digest: str
    name: str
    owner: str
    envelope: str
    wrapped_key: bytes
    replaced_by: str | None


@dataclass(frozen=True, slots=True)
class ContractRow:
    """A proposed contract (envelope as JSON text) and its place in a chain of replacements."""

    digest: str
    name: str
    envelope: str
    proposer: str
    created_at: str
    replaces: str | None
    replaced_by: str | None


@dataclass(frozen=True, slots=True)
class SignatureRow:
    """One party's signature on a contract."""

    contract: str
    party: str
    keyid: str
    signature: bytes
    signed_at: str


@dataclass(frozen=True, slots=True)
class VetoRow:
    """One party's signed veto of a contract."""

    contract: str
    party: str
    envelope: str


@dataclass(frozen=True, slots=True)
class RunRow:
    """One execution of a contract.

    ``enclave_key`` is the current enclave's public signing key (32 bytes), None before the
    first release; ``checkpoint_version`` is 0 before the first checkpoint.
    """

    id: str
    contract: str
    state: RunState
    created_at: str
    releases: int
    enclave_key: bytes | None
    job_secret_wrapped: bytes | None
    checkpoint_version: int
    checkpoint_digest: str | None
    settled_at: str | None
    receipt_digest: str | None


@dataclass(frozen=True, slots=True)
class WatchRow:
    """What an open run has to prove again, and until when.

    ``hpke_key`` is the key that the evidence of its release was bound to (32 bytes or more),
    ``facts`` what may not change meanwhile (JSON text), ``rounds`` how often it was proved again.
    """

    run: str
    interval: int
    due_at: str
    hpke_key: bytes
    facts: str
    rounds: int


@dataclass(frozen=True, slots=True)
class StateRow:
    """A contract's newest state; ``told_at`` is the latest time that was told with one."""

    contract: str
    number: int
    digest: str
    previous: str | None
    told_at: str


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the transparency log; ``body`` is the leaf of the Merkle tree."""

    index: int
    kind: str
    body: bytes

    @property
    def leaf_hash(self) -> bytes:
        return merkle.leaf_hash(self.body)
