"""The end of a job: the signed statement, the settlement, and the receipt file.

The statement and the enclave's signed account are written to the host's disk before the run
is settled. So if anything dies after that, the host finishes with :func:`finish` and no output
is lost; before that, the run is still open and resumes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cenacle.broker.client import BrokerClient
from cenacle.broker.entries import ReleaseEntry
from cenacle.broker.messages import ContractView, SettledOutput, Settlement
from cenacle.broker.receipts import OpenedContract
from cenacle.documents.base import (
    Frozen,
    canonical_json,
    format_time,
    parse_json,
    unb64,
)
from cenacle.documents.dsse import Envelope
from cenacle.documents.privacy import NOT_PRIVATE, PrivacyEvent, PrivacyRecord
from cenacle.documents.receipt import (
    Binding,
    InputRecord,
    LeakageRecord,
    OffloadRecord,
    OutputRecord,
    Receipt,
    ReceiptBundle,
    ServingRecord,
    Statement,
)
from cenacle.enclave.outputs import output_file
from cenacle.enclave.session import Session, patiently
from cenacle.errors import CenacleError, SealError
from cenacle.sealing import verify_digest
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

__all__ = [
    "DRAFT_FILE",
    "NOTHING_OFFLOADED",
    "RECEIPT_FILE",
    "draft_contract",
    "finish",
    "write_draft",
]

DRAFT_FILE: Final = "receipt.draft.json"
RECEIPT_FILE: Final = "receipt.json"

NOTHING_OFFLOADED: Final = LeakageRecord(
    scheme="enclave",
    inputs="hidden",
    weights="hidden",
    activations="hidden",
    gradients="hidden",
    labels="hidden",
    note="nothing was sent to any accelerator",
)


class _Draft(Frozen):
    """All of a receipt bundle but the settlement's log inclusion, and how to get that."""

    statement: dict[str, Any]
    binding: Binding
    evidence: dict[str, Any]
    contract: dict[str, Any]
    parties: tuple[dict[str, Any], ...]
    assets: dict[str, dict[str, Any]]
    settlement: dict[str, Any]


def write_draft(
    session: Session,
    view: ContractView,
    opened: OpenedContract,
    outputs: tuple[OutputRecord, ...],
    layers: tuple[str, ...],
    folder: Path,
    *,
    leakage: LeakageRecord = NOTHING_OFFLOADED,
    offloaded: OffloadRecord | None = None,
    events: tuple[PrivacyEvent, ...] = (),
    serving: ServingRecord | None = None,
) -> None:
    """Sign the statement and the settlement, and make both durable as a draft.

    Args:
        leakage: what accelerators learnt under the contract's offload plan.
        offloaded: the account of what went to them, if anything could.
        events: what was spent under the contract's privacy plan.
        serving: what was answered, if the job serves.
    """
    release, plan = session.release, opened.contract.privacy
    receipt = Receipt(
        contract=session.contract,
        run=release.run,
        broker=session.client.identity.digest,
        evidence_kind=session.evidence.kind,
        evidence=session.evidence.digest,
        # What the broker made of the evidence: a TPM in software is of kind tpm, and simulated.
        protection=ReleaseEntry.from_canonical(unb64(release.log.entry)).protection,
        measurements=dict(session.measurements),
        layers=layers,
        inputs={
            alias: InputRecord(
                asset=asset.digest, content=asset.container.digest, owner=asset.owner
            )
            for alias, asset in opened.assets.items()
        },
        outputs=outputs,
        privacy=NOT_PRIVATE if plan is None else PrivacyRecord.of(plan, events),
        offload=leakage,
        accelerators=offloaded,
        serving=serving,
        resumed=release.resumed,
        started=release.started,
        finished=format_time(datetime.now(UTC)),
        release=release.log,
    )
    statement = Envelope.sign(Statement.of(receipt), session.signing_key)
    settlement = Settlement(
        run=release.run,
        contract=session.contract,
        receipt=statement.digest,
        outputs=tuple(
            SettledOutput(name=o.name, kind=o.kind, recipient=o.recipient, content=o.content)
            for o in outputs
        ),
        privacy=events or None,
    )
    draft = _Draft(
        statement=statement.to_fields(),
        binding=session.binding,
        evidence=session.evidence.to_fields(),
        contract=view.contract,
        parties=view.parties,
        assets=view.assets,
        settlement=Envelope.sign(settlement, session.signing_key).to_fields(),
    )
    _write(folder / DRAFT_FILE, canonical_json(draft.to_fields()))


def draft_contract(folder: Path) -> str | None:
    """The contract whose finished job lies in this folder without its receipt, if any."""
    path = folder / DRAFT_FILE
    if not path.is_file():
        return None
    return Envelope.from_fields(_read_draft(path).settlement).peek(Settlement).contract


def _read_draft(path: Path) -> _Draft:
    with disk_errors(f"read {path}"):
        return _Draft.from_fields(parse_json(path.read_bytes()))


def _check_output(path: Path, output: SettledOutput) -> None:
    try:
        verify_digest(path, output.content)
    except CenacleError as error:
        raise SealError(
            f"the sealed output {output.name} of the finished job is not whole",
            found=error.diagnostics(),
            expected=output.content,
            remedy=f"remove {DRAFT_FILE} beside it and resume: the end of the job is repeated",
        ) from None


def finish(client: BrokerClient, folder: Path) -> Path:
    """Settle the run of a draft and write its receipt; safe to repeat, on either side.

    Returns the path of the receipt. Raises what the broker raises, and SealError if a sealed
    output is missing or damaged; the draft stays until the receipt is durable.
    """
    path = folder / DRAFT_FILE
    draft = _read_draft(path)
    settlement = Envelope.from_fields(draft.settlement)
    for output in settlement.peek(Settlement).outputs:
        # A settled run cannot be repeated, an open one can: never settle what was lost.
        _check_output(folder / output_file(output.name), output)
    inclusion = patiently(lambda: client.settle(settlement))
    bundle = ReceiptBundle(
        statement=draft.statement,
        binding=draft.binding,
        settlement=inclusion,
        evidence=draft.evidence,
        contract=draft.contract,
        parties=draft.parties,
        assets=draft.assets,
        broker=client.identity.to_fields(),
    )
    receipt = folder / RECEIPT_FILE
    _write(receipt, canonical_json(bundle.to_fields()))
    path.unlink(missing_ok=True)
    return receipt


def _write(path: Path, data: bytes) -> None:
    with AtomicFile(path) as file, disk_errors(f"write {path}"):
        pwrite_all(file.fd, data, 0)
        file.commit()
