"""Talking to a broker: pinned TLS, typed answers, errors as the broker raised them.

Used by parties (over TCP) and by enclaves (over the one unix socket they have); the TLS
session ends inside the enclave either way, so the host relays ciphertext only.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.broker.connection import BrokerConnection, listed, octets_in, text_in, wrong_form
from cenacle.broker.log import TreeHead, parse_and_verify_head, verify_consistency
from cenacle.broker.messages import (
    AssetDeposit,
    AssetUpload,
    BudgetView,
    CheckpointRecord,
    ContractView,
    EvidenceRecord,
    EvidenceUpload,
    Invitation,
    PartyRequest,
    Reattested,
    Registration,
    ReleaseRequest,
    ReleaseResponse,
    ReviewView,
    Settlement,
    SignatureUpload,
    StateAnswer,
    StateRecord,
)
from cenacle.broker.receipts import OpenedContract, open_contract, verify_inclusion
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, format_time, unb64
from cenacle.documents.contract import Contract, EnclaveRequirements, Veto
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.receipt import LogInclusion
from cenacle.errors import ProofError

__all__ = ["BrokerClient"]


class BrokerClient(BrokerConnection):
    """What parties and enclaves ask a broker for.

    Raises (every method): the broker's own error, rebuilt; :class:`UnavailableError` when it
    cannot be reached.
    """

    def require_attested(
        self, reference: EnclaveRequirements, verifiers: VerifierSet, now: datetime | None = None
    ) -> Claims:
        """Have the broker prove what it runs, on this very TLS session, before it gets a secret.

        Raises:
            EvidenceError: naming everything that is not as the reference values demand.
            UnavailableError: it does not attest.
        """
        from cenacle.broker.attestation import NONCE_BYTES, verify_broker  # noqa: PLC0415

        nonce = secrets.token_bytes(NONCE_BYTES)
        evidence = self.evidence(nonce)
        moment = now or datetime.now(UTC)
        return verify_broker(evidence, nonce, self.identity, reference, verifiers, moment)

    def evidence(self, nonce: bytes) -> Evidence:
        """The broker's evidence for a nonce of 32 bytes; not verified."""
        from cenacle.broker.attestation import AttestationRequest  # noqa: PLC0415

        sent = AttestationRequest(nonce=b64(nonce))
        return Evidence.from_fields(self._post(sent.to_fields(), "attestation"))

    # ------------------------------------------------------------------ parties

    def register(self, party: Envelope, token: str) -> str:
        """Register with a one-time token; returns the party document's digest."""
        sent = Registration(party=party.to_fields(), token=token)
        return text_in(self._post(sent.to_fields(), "parties"), "digest")

    def party(self, name: str) -> Party:
        """A registered party's document; its own signature is checked."""
        envelope = Envelope.from_fields(self._get("parties", name))
        return envelope.open(Party, envelope.peek(Party).verify_key)

    def _request(self, key: SigningKey, party: str, action: Any, subject: str = "") -> Any:
        request = PartyRequest(
            broker=self.identity.digest,
            party=party,
            action=action,
            subject=subject,
            issued=format_time(datetime.now(UTC)),
            nonce=b64(secrets.token_bytes(16)),
        )
        return Envelope.sign(request, key).to_fields()

    def invite(self, key: SigningKey, party: str) -> Invitation:
        """A token for one more party; for the broker's owner."""
        body = self._request(key, party, "invite")
        return Invitation.from_fields(self._post(body, "invitations"))

    def contracts_of(self, key: SigningKey, party: str) -> list[tuple[str, str]]:
        """Digest and name of each contract that ``party`` is in."""
        body = self._request(key, party, "list-contracts")
        found = self._post(body, "contracts", "of-party")
        return [(text_in(item, "digest"), text_in(item, "name")) for item in listed(found)]

    def budget(self, key: SigningKey, party: str, asset: str) -> BudgetView:
        """What jobs have spent of the budget of an asset that ``party`` owns."""
        body = self._request(key, party, "budget", asset)
        return BudgetView.from_fields(self._post(body, "budgets"))

    # ------------------------------------------------------------------ assets and contracts

    def deposit(self, manifest: Envelope, key: SecretBytes, signer: SigningKey) -> str:
        """Hand over an asset's key, wrapped to the broker and bound to this manifest."""
        asset = manifest.peek(Asset)
        wrapped = self.identity.hpke_public.seal(key.view(), *asset.wrapping_context())
        deposit = AssetDeposit(
            asset=asset.digest, broker=self.identity.digest, wrapped_key=b64(wrapped)
        )
        upload = AssetUpload(
            manifest=manifest.to_fields(), deposit=Envelope.sign(deposit, signer).to_fields()
        )
        return text_in(self._post(upload.to_fields(), "assets"), "digest")

    def propose(self, contract: Contract, proposer: SigningKey) -> str:
        """Propose a contract; returns its digest. Proposing is not yet signing."""
        body = Envelope.sign(contract, proposer).to_fields()
        return text_in(self._post(body, "contracts"), "digest")

    def contract_view(self, digest: str) -> ContractView:
        return ContractView.from_fields(self._get("contracts", digest))

    def contract(self, digest: str) -> OpenedContract:
        """A contract with all it names, every signature and digest checked here."""
        view = self.contract_view(digest)
        return open_contract(digest, view.contract, view.parties, view.assets)

    def review(self, digest: str) -> ReviewView:
        return ReviewView.from_fields(self._get("contracts", digest, "review"))

    def sign(self, digest: str, key: SigningKey) -> str:
        """Sign a contract that was checked to be the one with this digest."""
        view = self.contract_view(digest)
        open_contract(digest, view.contract, view.parties, view.assets)
        envelope = Envelope.from_fields(view.contract).signed_by(key)
        keyid = key.verify_key.keyid
        upload = SignatureUpload(keyid=keyid, signature=b64(envelope.signatures[keyid]))
        return text_in(self._post(upload.to_fields(), "contracts", digest, "signatures"), "party")

    def veto(self, digest: str, party: str, reason: str, key: SigningKey) -> None:
        veto = Veto(contract=digest, party=party, reason=reason)
        self._post(Envelope.sign(veto, key).to_fields(), "vetoes")

    # ------------------------------------------------------------------ enclaves

    def nonce(self, contract: str) -> bytes:
        return unb64(text_in(self._get("contracts", contract, "nonce"), "nonce"))

    def release(self, request: ReleaseRequest) -> ReleaseResponse:
        """Ask for the keys; the answer's log inclusion is checked before it is returned."""
        answer = ReleaseResponse.from_fields(self._post(request.to_fields(), "releases"))
        verify_inclusion(answer.log, self.identity)
        return answer

    def checkpoint(self, record: CheckpointRecord, key: SigningKey) -> None:
        self._post(Envelope.sign(record, key).to_fields(), "checkpoints")

    def advance_state(self, record: StateRecord, key: SigningKey) -> StateAnswer:
        """Make a contract's state the newest; ``key`` is its enclave's. Safe to repeat."""
        return StateAnswer.from_fields(self._post(Envelope.sign(record, key).to_fields(), "states"))

    def run_nonce(self, run: str) -> tuple[bytes, int]:
        """A nonce for evidence of a run, and how many entries of its list were judged."""
        answer = self._get("runs", run, "nonce")
        entries = answer.get("entries") if isinstance(answer, dict) else None
        if type(entries) is not int or entries < 0:
            raise wrong_form(answer, "an object with a count of entries")
        return unb64(text_in(answer, "nonce")), entries

    def reattest(self, nonce: bytes, evidence: Evidence, run: str, key: SigningKey) -> Reattested:
        """Prove a running enclave again; ``key`` is the run's.

        Raises:
            RefusedError: the run was revoked.
        """
        record = EvidenceRecord(run=run, nonce=b64(nonce), evidence=evidence.digest)
        upload = EvidenceUpload(
            record=Envelope.sign(record, key).to_fields(), evidence=evidence.to_fields()
        )
        return Reattested.from_fields(self._post(upload.to_fields(), "runs", run, "evidence"))

    def settle(self, settlement: Envelope) -> LogInclusion:
        """Close a run; ``settlement`` is signed by the run's enclave. Safe to repeat."""
        settlement.peek(Settlement)
        answer = LogInclusion.from_fields(self._post(settlement.to_fields(), "settlements"))
        verify_inclusion(answer, self.identity)
        return answer

    def open_run(self, contract: str) -> str | None:
        answer = self._get("contracts", contract, "open-run")
        return None if answer == {"run": None} else text_in(answer, "run")

    def abandon(self, run: str, key: SigningKey, party: str) -> None:
        self._post(self._request(key, party, "abandon", run), "abandonments")

    # ------------------------------------------------------------------ the log

    def head(self, earlier: TreeHead | None = None) -> tuple[str, TreeHead]:
        """The newest signed head; with ``earlier``, proved to extend it.

        Raises:
            ProofError: the broker's log was rewritten or shortened.
        """
        origin, key = self.identity.origin, self.identity.verify_key
        if earlier is None or earlier.size == 0:
            text = text_in(self._get("log", "head"), "head")
            return text, parse_and_verify_head(text, origin, key)
        answer = self._get("log", "consistency", str(earlier.size))
        text = text_in(answer, "head")
        newest = parse_and_verify_head(text, origin, key)
        verify_consistency(earlier, newest, octets_in(answer, "path"))
        return text, newest

    def entries(self, size: int) -> list[bytes]:
        """The bodies of the first ``size`` entries."""
        found: list[bytes] = []
        while len(found) < size:
            page = octets_in(self._get("log", "entries", str(len(found))), "entries")
            if not page:
                raise ProofError(
                    "the broker withholds log entries", found=len(found), expected=size
                )
            found += page
        return found[:size]

    def inclusion(self, index: int) -> LogInclusion:
        answer = LogInclusion.from_fields(self._get("log", "inclusion", str(index)))
        verify_inclusion(answer, self.identity)
        return answer
