"""What crosses the wire between parties, enclaves and the broker.

Everything that changes something carries a signature of its author over a document, so the
transport adds confidentiality and nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cenacle.documents.base import (
    Base64,
    Digest,
    Document,
    Frozen,
    Name,
    Natural,
    NonEmpty,
    Timestamp,
)
from cenacle.documents.clauses import Clause
from cenacle.documents.privacy import PrivacyEvent
from cenacle.documents.receipt import LogInclusion
from cenacle.documents.terms import OutputKind

__all__ = [
    "AssetDeposit",
    "AssetUpload",
    "BudgetView",
    "CheckpointRecord",
    "ContractView",
    "EvidenceRecord",
    "EvidenceUpload",
    "Invitation",
    "PartyRequest",
    "Reattested",
    "Registration",
    "ReleaseRequest",
    "ReleaseResponse",
    "ReviewView",
    "SettledOutput",
    "Settlement",
    "SignatureUpload",
    "StateAnswer",
    "StateRecord",
    "release_context",
]

EnvelopeFields = dict[str, Any]


class Registration(Frozen):
    """A party's self-signed document and the one-time token that admits it."""

    party: EnvelopeFields
    token: NonEmpty


class PartyRequest(Document):
    """A signed request that no other document covers, bound to one broker and moment."""

    media_type = "application/vnd.cenacle.party-request+json"

    kind: Literal["party-request"] = "party-request"
    version: Literal[1] = 1
    broker: Digest
    party: Name
    action: Literal["invite", "list-contracts", "abandon", "budget"]
    subject: str = ""
    issued: Timestamp
    nonce: Base64


class Invitation(Frozen):
    """A one-time token for one more party."""

    token: NonEmpty
    expires: Timestamp


class AssetDeposit(Document):
    """The owner's signed hand-over of an asset's key, wrapped to the broker."""

    media_type = "application/vnd.cenacle.asset-deposit+json"

    kind: Literal["asset-deposit"] = "asset-deposit"
    version: Literal[1] = 1
    asset: Digest
    broker: Digest
    wrapped_key: Base64


class AssetUpload(Frozen):
    manifest: EnvelopeFields
    deposit: EnvelopeFields


class SignatureUpload(Frozen):
    keyid: NonEmpty
    signature: Base64


class ContractView(Frozen):
    """A contract with everything needed to check it without trusting the broker."""

    contract: EnvelopeFields
    parties: tuple[EnvelopeFields, ...]
    assets: dict[Name, EnvelopeFields]
    vetoes: tuple[EnvelopeFields, ...]
    replaced_by: Digest | None = None


class BudgetView(Frozen):
    """What jobs have cost the data of an asset.

    Attributes:
        epsilon, delta: the asset's budget; ``None``: it is unbounded.
        spent: the epsilon of all jobs at ``delta``; ``None`` if one of them had no plan, or if
            the budget is unbounded.
        jobs: that were charged under a plan.
        unbounded: that were charged without one.
        events: all that plans were charged for, with how often.
    """

    asset: Digest
    name: Name
    epsilon: float | None = None
    delta: float | None = None
    spent: float | None = None
    jobs: Natural
    unbounded: Natural
    events: tuple[PrivacyEvent, ...] = ()


class ReviewView(Frozen):
    """Every clause as it stands now, before an enclave asks."""

    clauses: tuple[Clause, ...]


class ReleaseRequest(Frozen):
    """An enclave asks for the keys of a contract.

    Attributes:
        nonce: the broker's nonce for this contract, used once.
        evidence: an Evidence document; its report data binds all other fields but ``resume``.
        resume: the run to take over after a crash.
    """

    contract: Digest
    nonce: Base64
    evidence: dict[str, Any]
    hpke_key: Base64
    signing_key: Base64
    resume: NonEmpty | None = None


class ReleaseResponse(Frozen):
    """The keys, sealed to the enclave, and the log entry that was durable before they left.

    ``sealed_keys`` opens to canonical JSON ``{"assets": {alias: base64}, "job": base64}``.
    ``state_number`` and ``state_digest`` are the newest that any run of the contract recorded.
    """

    run: NonEmpty
    resumed: Natural
    started: Timestamp
    checkpoint_version: Natural
    checkpoint_digest: Digest | None = None
    state_number: Natural = 0
    state_digest: Digest | None = None
    sealed_keys: Base64
    log: LogInclusion


class CheckpointRecord(Document):
    """The enclave's signed statement that a newer checkpoint exists; older ones are void."""

    media_type = "application/vnd.cenacle.checkpoint+json"

    kind: Literal["checkpoint"] = "checkpoint"
    run: NonEmpty
    number: Annotated[int, Field(ge=1)]
    content: Digest


class EvidenceRecord(Document):
    """The enclave's signed statement that it made this evidence for this nonce of its run."""

    media_type = "application/vnd.cenacle.evidence-record+json"

    kind: Literal["evidence-record"] = "evidence-record"
    version: Literal[1] = 1
    run: NonEmpty
    nonce: Base64
    evidence: Digest


class EvidenceUpload(Frozen):
    """Fresh evidence of a running enclave.

    Attributes:
        record: the signed :class:`EvidenceRecord`.
        evidence: what it names; its report data binds the nonce and the keys of the release.
    """

    record: EnvelopeFields
    evidence: dict[str, Any]


class Reattested(Frozen):
    """The broker's answer to evidence that did not drift.

    Attributes:
        accepted: whether it counts. If not, nothing was held against it: it continues a list at
            another place than the broker's, who restarted; ``entries`` tells where.
        entries: how many entries of the kernel's list were judged (``ima``).
        due: until when the next evidence must come.
    """

    accepted: bool
    entries: Natural
    due: Timestamp


class StateRecord(Document):
    """The enclave's signed statement that its contract's state is a newer one.

    A contract's state is something that outlives its runs, of which the broker keeps the number
    and digest alone, such as the journal of tickets. It never goes back.

    Attributes:
        number: one more than that of the state before.
        content: digest of the new state.
        previous: digest of the state before; absent for the first one.
    """

    media_type = "application/vnd.cenacle.state+json"

    kind: Literal["state"] = "state"
    version: Literal[1] = 1
    contract: Digest
    run: NonEmpty
    number: Annotated[int, Field(ge=1, lt=1 << 53)]
    content: Digest
    previous: Digest | None = None

    @model_validator(mode="after")
    def _follows_something(self) -> Self:
        if (self.number == 1) != (self.previous is None):
            raise ValueError("every state but the first names the one before")
        return self


class StateAnswer(Frozen):
    """The broker's word that a state is durable and the newest.

    ``time`` is the broker's clock: never earlier than it told of this contract before.
    """

    number: Natural
    time: Timestamp


class SettledOutput(Frozen):
    name: Name
    kind: OutputKind
    recipient: Name
    content: Digest


class Settlement(Document):
    """The enclave's signed account of a finished run: what left, for whom.

    ``receipt`` is the digest of the signed statement; ``privacy`` is what was spent under the
    contract's privacy plan.
    """

    media_type = "application/vnd.cenacle.settlement+json"

    kind: Literal["settlement"] = "settlement"
    version: Literal[1] = 1
    run: NonEmpty
    contract: Digest
    receipt: Digest
    outputs: Annotated[tuple[SettledOutput, ...], Field(min_length=1)]
    privacy: tuple[PrivacyEvent, ...] | None = None


def release_context(contract: str, run: str, nonce: bytes) -> tuple[bytes, ...]:
    """What the sealed keys of a release are bound to."""
    return (b"cenacle/release", contract.encode(), run.encode(), nonce)
