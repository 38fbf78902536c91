"""What the transparency log says, entry by entry; each is canonical JSON naming its kind.

Entries hold names, digests and times: nothing of any asset's content.
"""

from __future__ import annotations

from typing import Literal

from cenacle.broker.messages import SettledOutput
from cenacle.documents.base import Digest, Document, Name, Natural, NonEmpty, Timestamp
from cenacle.documents.privacy import PrivacyEvent
from cenacle.documents.protection import Protection

__all__ = [
    "AbandonmentEntry",
    "AssetEntry",
    "CheckpointEntry",
    "ContractEntry",
    "LogRecord",
    "PartyEntry",
    "ReleaseEntry",
    "RevocationEntry",
    "SettlementEntry",
    "SignatureEntry",
    "VetoEntry",
]


class LogRecord(Document):
    """Base of the entries."""

    media_type = "application/vnd.cenacle.log-entry+json"

    version: Literal[1] = 1
    time: Timestamp


class PartyEntry(LogRecord):
    kind: Literal["party"] = "party"
    party: Name
    document: Digest


class AssetEntry(LogRecord):
    kind: Literal["asset"] = "asset"
    asset: Digest
    owner: Name
    replaces: Digest | None = None


class ContractEntry(LogRecord):
    kind: Literal["contract"] = "contract"
    contract: Digest
    proposer: Name
    replaces: Digest | None = None


class SignatureEntry(LogRecord):
    kind: Literal["signature"] = "signature"
    contract: Digest
    party: Name


class VetoEntry(LogRecord):
    kind: Literal["veto"] = "veto"
    contract: Digest
    party: Name


class ReleaseEntry(LogRecord):
    """Durable before any key leaves.

    ``enclave_key`` is the key id of the enclave's signing key; ``uses`` gives, per asset
    manifest, how many runs are charged now, this one counted; ``privacy``, what a contract with
    a privacy plan may cost the records at most.
    """

    kind: Literal["release"] = "release"
    contract: Digest
    run: NonEmpty
    resumed: Natural
    evidence: Digest
    evidence_kind: Name
    protection: Protection
    enclave_key: NonEmpty
    uses: dict[Digest, Natural]
    privacy: tuple[PrivacyEvent, ...] | None = None


class CheckpointEntry(LogRecord):
    kind: Literal["checkpoint"] = "checkpoint"
    run: NonEmpty
    number: Natural
    content: Digest


class AbandonmentEntry(LogRecord):
    """A party gave up an open run; what it was charged stays charged."""

    kind: Literal["abandonment"] = "abandonment"
    run: NonEmpty
    contract: Digest
    party: Name


class RevocationEntry(LogRecord):
    """A run ended because its enclave no longer proved what its contract demands.

    ``reason``: its evidence drifted, or none came in time. ``found`` names what: measurements,
    files by their paths, the deadline. What it was charged stays charged.
    """

    kind: Literal["revocation"] = "revocation"
    run: NonEmpty
    contract: Digest
    reason: Literal["drift", "deadline"]
    found: NonEmpty
    evidence: Digest | None = None


class SettlementEntry(LogRecord):
    kind: Literal["settlement"] = "settlement"
    run: NonEmpty
    contract: Digest
    receipt: Digest
    outputs: tuple[SettledOutput, ...]
    privacy: tuple[PrivacyEvent, ...] | None = None
