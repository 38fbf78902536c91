"""Verifying a receipt offline: from pinned broker keys to the enclave's signed statement.

Pure: no network, no store, no clock. Each step raises with what was found and expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.broker.entries import ReleaseEntry, SettlementEntry
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.log import LogEntryProof, TreeHead, parse_and_verify_head
from cenacle.broker.losses import Losses, until_accounted
from cenacle.broker.messages import SettledOutput
from cenacle.broker.rules import Facts, decide, require
from cenacle.crypto.signing import VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import parse_json, parse_time, unb64
from cenacle.documents.contract import Contract
from cenacle.documents.dsse import Envelope
from cenacle.documents.offload import EnclavePlan, MeasuredPlan
from cenacle.documents.party import Party
from cenacle.documents.privacy import PrivacyRecord
from cenacle.documents.receipt import LogInclusion, Receipt, ReceiptBundle, Statement
from cenacle.documents.serving import ServeJob
from cenacle.errors import ProofError

__all__ = [
    "OpenedContract",
    "VerifiedReceipt",
    "open_contract",
    "read_bundle",
    "verify_inclusion",
    "verify_receipt",
]


@dataclass(frozen=True)
class OpenedContract:
    """A contract with everything it names, all signatures checked."""

    contract: Contract
    parties: Mapping[str, Party]
    assets: Mapping[str, Asset]
    signed: frozenset[str]


@dataclass(frozen=True)
class VerifiedReceipt:
    """What a verified receipt vouches for."""

    receipt: Receipt
    opened: OpenedContract
    claims: Claims
    released: datetime
    head: TreeHead


def _must(condition: bool, what: str, found: object, expected: object) -> None:
    if not condition:
        raise ProofError(
            what,
            found=found,
            expected=expected,
            remedy="ask for the receipt again; this one does not hold together",
        )


def _must_be_same(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    shown, named = ", ".join(sorted(found)), ", ".join(sorted(expected))
    _must(shown == named, f"the {what} that came are not those of the contract", shown, named)


def open_contract(
    digest: str | None,
    contract: dict[str, Any],
    parties: tuple[dict[str, Any], ...],
    assets: Mapping[str, dict[str, Any]],
) -> OpenedContract:
    """Check a contract's signatures against the party documents that it pins by digest.

    Nothing here trusts whoever delivered the envelopes.

    Raises:
        SignatureError: a party document, manifest or contract signature is wrong.
        ProofError: something is not what the contract names by digest.
    """
    envelope = Envelope.from_fields(contract)
    if digest is not None:
        _must(envelope.digest == digest, "another contract was delivered", envelope.digest, digest)
    document = envelope.peek(Contract)
    found: dict[str, Party] = {}
    for fields in parties:
        signed = Envelope.from_fields(fields)
        party = signed.open(Party, signed.peek(Party).verify_key)
        _must(party.name not in found, "a party's document came twice", party.name, "one each")
        found[party.name] = party
    _must_be_same("parties", found, document.parties)
    _must_be_same("assets", assets, document.assets)
    for name, pinned in document.parties.items():
        got = found[name].digest
        _must(got == pinned, f"party {name} is not the one in the contract", got, pinned)
    keys = {party.verify_key.keyid: name for name, party in found.items()}
    _must(len(keys) == len(found), "two parties have the same key", len(keys), len(found))
    for keyid in envelope.signatures:
        _must(keyid in keys, "a stranger signed the contract", keyid[:16], "its parties only")
        envelope.verify_signature(found[keys[keyid]].verify_key)
    manifests = {}
    for alias, ref in document.assets.items():
        signed = Envelope.from_fields(assets[alias])
        manifest = signed.open(Asset, found[ref.owner].verify_key)
        _must(manifest.digest == ref.digest, "another manifest", manifest.digest, ref.digest)
        manifests[alias] = manifest
    return OpenedContract(
        document,
        found,
        manifests,
        frozenset(keys[keyid] for keyid in envelope.signatures),
    )


def verify_inclusion(inclusion: LogInclusion, broker: BrokerIdentity) -> tuple[bytes, TreeHead]:
    """The entry's bytes and the signed head that includes it.

    Raises:
        ProofError, SignatureError: the entry is not in the broker's log.
    """
    head = parse_and_verify_head(inclusion.head, broker.origin, broker.verify_key)
    body = unb64(inclusion.entry)
    path = tuple(unb64(step) for step in inclusion.path)
    LogEntryProof(inclusion.index, head.size, path).verify(body, head)
    return body, head


def verify_receipt(
    bundle: ReceiptBundle, *, broker_digest: str, verifiers: VerifierSet
) -> VerifiedReceipt:
    """Verify a receipt against nothing but the pinned broker keys.

    Checked, in this order: the broker's identity; the contract, its parties, signatures and
    manifests; the release's log entry; the evidence, bound to contract, nonce and keys, as of
    the moment of release; every clause of the contract and of all terms but the ledger's; the
    enclave's signature over the statement; the settlement's log entry naming this statement.

    Args:
        broker_digest: digest of the broker's keys, from a source that the caller trusts.
        verifiers: evidence kinds that the caller accepts.

    Raises:
        ProofError, SignatureError, EvidenceError, RefusedError: with what does not hold.
    """
    broker = BrokerIdentity.from_fields(bundle.broker)
    _must(broker.digest == broker_digest, "another broker", broker.digest, broker_digest)
    statement_envelope = Envelope.from_fields(bundle.statement)
    binding = bundle.binding
    enclave_key = VerifyKey(unb64(binding.signing_key))
    receipt = statement_envelope.open(Statement, enclave_key).predicate
    _must(receipt.broker == broker_digest, "another broker", receipt.broker, broker_digest)
    opened = open_contract(receipt.contract, bundle.contract, bundle.parties, bundle.assets)

    body, _ = verify_inclusion(receipt.release, broker)
    release = ReleaseEntry.from_canonical(body)
    evidence = Evidence.from_fields(bundle.evidence)
    bound = report_data(
        unb64(binding.nonce), receipt.contract, unb64(binding.hpke_key), enclave_key.raw
    )
    for what, found, expected in (
        ("contract", release.contract, receipt.contract),
        ("run", release.run, receipt.run),
        ("evidence", release.evidence, evidence.digest),
        ("evidence", receipt.evidence, evidence.digest),
        ("evidence kind", receipt.evidence_kind, evidence.kind),
        ("enclave key", release.enclave_key, enclave_key.keyid),
        ("resumption count", release.resumed, receipt.resumed),
    ):
        _must(found == expected, f"the log's release entry is of another {what}", found, expected)
    _must(
        receipt.resumed > 0 or receipt.started == release.time,
        "the statement's start is not that of the release",
        receipt.started,
        release.time,
    )
    released = parse_time(release.time)
    _must(
        (release.privacy or ()) == opened.contract.privacy_events,
        "the log's release entry charges another privacy loss",
        [event.to_fields() for event in release.privacy or ()],
        [event.to_fields() for event in opened.contract.privacy_events],
    )
    # Of this job alone: what others were charged is in the broker's ledger, not in a receipt.
    accountant = Losses()
    promised, losses = until_accounted(
        accountant, lambda: accountant.compose(opened.contract, opened.assets, lambda _: ())
    )
    claims = verifiers.for_kind(evidence.kind).authenticate(evidence, bound, released)
    # The verifier adds what only the platform vouches for, e.g. the installation.
    shown = {name: claims.measurements.get(name) for name in receipt.measurements}
    _must(
        (shown, claims.protection, claims.layers)
        == (receipt.measurements, receipt.protection, receipt.layers),
        "the statement's measurements are not the evidence's",
        receipt.measurements,
        shown,
    )
    require(
        decide(
            Facts(
                broker=broker_digest,
                contract=opened.contract,
                assets=opened.assets,
                signed=opened.signed,
                now=released,
                # The ledger is the broker's; its state at that moment is not in a receipt.
                uses=dict.fromkeys(opened.assets, 0),
                promised=promised,
                losses=losses,
                claims=claims,
            )
        )
    )
    _check_statement(receipt, opened)

    body, head = verify_inclusion(bundle.settlement, broker)
    settled = SettlementEntry.from_canonical(body)
    outputs = tuple(
        SettledOutput(name=o.name, kind=o.kind, recipient=o.recipient, content=o.content)
        for o in receipt.outputs
    )
    links: tuple[tuple[str, object, object], ...] = (
        ("run", settled.run, receipt.run),
        ("contract", settled.contract, receipt.contract),
        ("receipt", settled.receipt, statement_envelope.digest),
        ("set of outputs", settled.outputs, outputs),
        (
            "privacy loss",
            settled.privacy,
            None if isinstance(receipt.privacy, str) else receipt.privacy.events,
        ),
    )
    for what, shown_there, stated_here in links:
        _must(
            shown_there == stated_here,
            f"the log's settlement is of another {what}",
            shown_there,
            stated_here,
        )
    _must(
        bundle.settlement.index > receipt.release.index and settled.time >= release.time,
        "the settlement does not follow the release",
        f"entry {bundle.settlement.index} at {settled.time}",
        f"after entry {receipt.release.index} at {release.time}",
    )
    return VerifiedReceipt(receipt, opened, claims, released, head)


def _check_statement(receipt: Receipt, opened: OpenedContract) -> None:
    """The statement speaks of exactly the contract's inputs and outputs."""
    inputs = {
        alias: (asset.digest, asset.container.digest, asset.owner)
        for alias, asset in opened.assets.items()
    }
    stated = {a: (r.asset, r.content, r.owner) for a, r in receipt.inputs.items()}
    _must(stated == inputs, "the statement's inputs are not the contract's", stated, inputs)
    outputs = [(o.name, o.kind, o.recipient) for o in opened.contract.outputs]
    listed = [(o.name, o.kind, o.recipient) for o in receipt.outputs]
    _must(listed == outputs, "the statement's outputs are not the contract's", listed, outputs)
    _must(
        receipt.offload.scheme == opened.contract.offload.scheme,
        "the statement names another offload scheme",
        receipt.offload.scheme,
        opened.contract.offload.scheme,
    )
    _check_serving(receipt, opened.contract)
    _check_accelerators(receipt, opened.contract)
    _check_privacy(receipt, opened.contract)


def _check_privacy(receipt: Receipt, contract: Contract) -> None:
    """What was spent is what the contract's plan allows, and is described as such."""
    stated, plan, planned = receipt.privacy, contract.privacy, contract.privacy_events
    if plan is None or isinstance(stated, str):
        _must(
            plan is None and isinstance(stated, str),
            "the statement's privacy is not the contract's",
            "no differential privacy" if isinstance(stated, str) else "a guarantee",
            "no privacy plan" if plan is None else f"epsilon <= {plan.epsilon:g}",
        )
        return
    _must(
        stated == PrivacyRecord.of(plan, stated.events),
        "the statement describes another guarantee than the contract's plan",
        stated.description,
        PrivacyRecord.of(plan, planned).description,
    )
    _must(
        len(stated.events) == len(planned)
        and all(p.covers(s) for p, s in zip(planned, stated.events, strict=True)),
        "the job spent more privacy than its contract allows",
        [event.to_fields() for event in stated.events],
        [event.to_fields() for event in planned],
    )


def _check_serving(receipt: Receipt, contract: Contract) -> None:
    """Queries are counted exactly if the job serves, and none came in plain that must not."""
    job, counted = contract.job, receipt.serving
    serves = isinstance(job, ServeJob)
    _must(
        (counted is not None) == serves,
        "the statement's count of queries is not the contract's job's",
        "no count" if counted is None else f"{counted.queries} queries",
        "a count" if serves else "no count",
    )
    if isinstance(job, ServeJob) and job.sealed_only and counted is not None:
        _must(
            counted.sealed == counted.queries,
            "queries were answered in plain that the contract wants sealed",
            f"{counted.sealed} of {counted.queries} sealed",
            "all of them",
        )


def _check_accelerators(receipt: Receipt, contract: Contract) -> None:
    """They are as many as the contract says, of kinds that it allows, checked if it says so."""
    plan, used = contract.offload, receipt.accelerators
    if isinstance(plan, EnclavePlan) or used is None:
        _must(
            isinstance(plan, EnclavePlan) == (used is None),
            "the statement's accelerators are not the contract's",
            "none" if used is None else f"{len(used.accelerators)} accelerators",
            f"those of scheme {plan.scheme}",
        )
        return
    found = [one.kind for one in used.accelerators]
    _must(
        len(found) == plan.accelerators.count and set(found) <= set(plan.accelerators.kinds),
        "the statement's accelerators are not the contract's",
        ", ".join(found),
        f"{plan.accelerators.count} of kind {' or '.join(plan.accelerators.kinds)}",
    )
    trusted = isinstance(plan, MeasuredPlan) and contract.privacy is None
    checked = not trusted and (isinstance(plan, MeasuredPlan) or plan.check)
    _must(
        used.checked == (used.products if checked else 0),
        "the statement's results were not checked as the contract says",
        f"{used.checked} of {used.products}",
        "all" if checked else "none",
    )


def read_bundle(data: bytes) -> ReceiptBundle:
    """Parse a receipt file."""
    return ReceiptBundle.from_fields(parse_json(data))
