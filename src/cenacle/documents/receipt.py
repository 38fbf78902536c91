"""Receipt: an in-toto Statement (v1) about one finished job, signed by the enclave.

The statement's subjects are the sealed outputs. The signing key is vouched for by the
evidence that travels with the receipt, so anyone can verify it offline (see
``cenacle.broker.receipts``).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from cenacle.documents.base import (
    Base64,
    Digest,
    Document,
    Frozen,
    JsonObject,
    Name,
    Natural,
    NonEmpty,
    Timestamp,
)
from cenacle.documents.offload import AcceleratorKind
from cenacle.documents.privacy import PrivacyRecord
from cenacle.documents.protection import Protection
from cenacle.documents.terms import OutputKind

__all__ = [
    "PREDICATE_TYPE",
    "AcceleratorRecord",
    "Binding",
    "DroppedAccelerator",
    "InputRecord",
    "LeakageRecord",
    "LogInclusion",
    "OffloadRecord",
    "OutputRecord",
    "Receipt",
    "ReceiptBundle",
    "ServingRecord",
    "Statement",
    "Subject",
]

PREDICATE_TYPE: Final = "https://cenacle.dev/receipt/v1"
Hidden = Literal["hidden", "obfuscated", "partial", "plaintext"]


class LeakageRecord(Frozen):
    """What leaves the enclave for accelerators under a scheme, part by part."""

    scheme: NonEmpty
    inputs: Hidden
    weights: Hidden
    activations: Hidden
    gradients: Hidden
    labels: Hidden
    note: Annotated[str, Field(min_length=1, max_length=2000)]


class AcceleratorRecord(Frozen):
    """One worker, as its launcher and it itself describe it: neither is believed."""

    name: Name
    kind: AcceleratorKind
    description: NonEmpty


class DroppedAccelerator(Frozen):
    """A worker that died, hung or answered wrongly, at which layer, and why."""

    name: Name
    layer: NonEmpty
    reason: NonEmpty


class OffloadRecord(Frozen):
    """What the enclave sent to accelerators and took back, since it started.

    Attributes:
        dropped: workers whose share was computed by others from then on.
        bytes_sent: to all of them. What a resumed run sent before is not in it.
        products: results that were taken from workers.
        checked: how many of these were verified and held.
        seconds_inside: that the enclave worked on its models, waiting left out.
        seconds_outside: that workers say they computed, added up.
        kept_inside: linear operations of the model that ran in the enclave.
    """

    accelerators: Annotated[tuple[AcceleratorRecord, ...], Field(min_length=1, max_length=64)]
    dropped: tuple[DroppedAccelerator, ...] = ()
    bytes_sent: Natural
    bytes_received: Natural
    products: Natural
    checked: Natural
    seconds_inside: Annotated[float, Field(ge=0.0, le=1e9)]
    seconds_outside: Annotated[float, Field(ge=0.0, le=1e9)]
    kept_inside: tuple[NonEmpty, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [one.name for one in self.accelerators]
        lost = [one.name for one in self.dropped]
        if len(set(names)) != len(names) or len(set(lost)) != len(lost):
            raise ValueError("an accelerator is named twice")
        if unknown := sorted(set(lost) - set(names)):
            raise ValueError(f"{', '.join(unknown)} was dropped, but is no accelerator of the job")
        if self.checked > self.products:
            raise ValueError("more results were checked than taken")
        return self


class InputRecord(Frozen):
    """An asset that the job read, by its manifest and by its verified ciphertext."""

    asset: Digest
    content: Digest
    owner: Name


class OutputRecord(Frozen):
    """A sealed output and its key, wrapped to the recipient alone."""

    name: Name
    kind: OutputKind
    recipient: Name
    header: Digest
    content: Digest
    size: Natural
    wrapped_key: Base64

    @staticmethod
    def wrapping_context(contract: str, name: str, header: str) -> tuple[bytes, ...]:
        """What the wrapped output key is bound to."""
        return (b"cenacle/output-key", contract.encode(), name.encode(), header.encode())


class ServingRecord(Frozen):
    """What an enclave answered, since it started: what was asked of one before it, which it took
    over from, is not counted. Which model, which part of its scores left and whose tickets paid
    stands in the contract.

    Attributes:
        queries: that were answered.
        rows: in them; what tickets are counted in.
        sealed: of the queries, those that the host could not read.
        refused: queries that got an error.
    """

    queries: Natural
    rows: Natural
    sealed: Natural
    refused: Natural

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sealed > self.queries or self.rows < self.queries:
            raise ValueError("more sealed queries than queries, or queries without a row")
        return self


class LogInclusion(Frozen):
    """A log entry with the proof that a signed tree head includes it (RFC 9162, 2.1.3)."""

    index: Natural
    entry: Base64
    path: Annotated[tuple[Base64, ...], Field(max_length=63)]
    head: Annotated[str, Field(min_length=1, max_length=4096)]


class Receipt(Frozen):
    """The predicate: what was done, where, on what, and what may have leaked."""

    contract: Digest
    run: NonEmpty
    broker: Digest
    evidence_kind: Name
    evidence: Digest
    protection: Protection
    measurements: Annotated[dict[str, Digest], Field(min_length=1)]
    layers: tuple[Name, ...]
    inputs: Annotated[dict[Name, InputRecord], Field(min_length=1)]
    outputs: Annotated[tuple[OutputRecord, ...], Field(min_length=1)]
    privacy: PrivacyRecord | Literal["none: the outputs are not differentially private"]
    offload: LeakageRecord
    accelerators: OffloadRecord | None = None
    serving: ServingRecord | None = None
    resumed: Natural
    started: Timestamp
    finished: Timestamp
    release: LogInclusion


class Subject(Frozen):
    """An in-toto ResourceDescriptor, reduced to name and SHA-256."""

    name: NonEmpty
    digest: dict[Literal["sha256"], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


class Statement(Document):
    """The in-toto Statement v1 whose predicate is a :class:`Receipt`."""

    media_type = "application/vnd.in-toto+json"

    type: Literal["https://in-toto.io/Statement/v1"] = Field(
        default="https://in-toto.io/Statement/v1", alias="_type"
    )
    subject: Annotated[tuple[Subject, ...], Field(min_length=1)]
    predicateType: Literal["https://cenacle.dev/receipt/v1"] = PREDICATE_TYPE  # noqa: N815
    predicate: Receipt

    def to_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)

    @classmethod
    def of(cls, receipt: Receipt) -> Self:
        """The statement whose subjects are the receipt's outputs."""
        return cls(
            subject=tuple(
                Subject(name=o.name, digest={"sha256": o.content.removeprefix("sha256:")})
                for o in receipt.outputs
            ),
            predicate=receipt,
        )

    @model_validator(mode="after")
    def _subjects_are_outputs(self) -> Self:
        named = [(s.name, f"sha256:{s.digest.get('sha256')}") for s in self.subject]
        if named != [(o.name, o.content) for o in self.predicate.outputs]:
            raise ValueError("the statement's subjects are not the receipt's outputs")
        return self


class Binding(Frozen):
    """What the evidence's report data was computed from, besides the contract."""

    nonce: Base64
    hpke_key: Base64
    signing_key: Base64


class ReceiptBundle(Document):
    """Everything that verifying a receipt needs, in one file.

    Envelopes are DSSE JSON fields. ``broker`` is the broker's public identity; whoever
    verifies compares its digest with the one that the parties pinned. The settlement's log
    entry names the digest of the statement, so it stands outside of it.
    """

    media_type = "application/vnd.cenacle.receipt-bundle+json"

    kind: Literal["receipt"] = "receipt"
    version: Literal[1] = 1
    statement: JsonObject
    binding: Binding
    settlement: LogInclusion
    evidence: JsonObject
    contract: JsonObject
    parties: tuple[JsonObject, ...]
    assets: dict[Name, JsonObject]
    broker: JsonObject
