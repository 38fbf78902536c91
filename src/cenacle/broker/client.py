"""Talking to a broker: pinned TLS, typed answers, errors as the broker raised them.

Used by parties (over TCP) and by enclaves (over the one unix socket they have); the TLS
session ends inside the enclave either way, so the host relays ciphertext only.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyChallenge,
    AttestationKeyRequest,
)
from cenacle.broker.attestation import NONCE_BYTES, AttestationRequest, verify_broker
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.log import TreeHead, parse_and_verify_head, verify_consistency
from cenacle.broker.messages import (
    AssetDeposit,
    AssetUpload,
    BudgetView,
    CheckpointRecord,
    ContractView,
    Invitation,
    PartyRequest,
    Registration,
    ReleaseRequest,
    ReleaseResponse,
    ReviewView,
    Settlement,
    SignatureUpload,
)
from cenacle.broker.receipts import OpenedContract, open_contract, verify_inclusion
from cenacle.broker.tls import client_context
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64, format_time, unb64
from cenacle.documents.contract import Contract, EnclaveRequirements, Veto
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.receipt import LogInclusion
from cenacle.errors import CenacleError, InputError, ProofError, UnavailableError

__all__ = ["BrokerClient"]


class BrokerClient:
    """A connection to one broker, whose identity was pinned beforehand.

    Args:
        identity: the broker's public identity; its certificate is the only one accepted.
        socket: a unix socket whose other end is relayed to the broker, instead of TCP.
        timeout: seconds until a request fails.

    Raises (every method): the broker's own error, rebuilt; :class:`UnavailableError` when it
    cannot be reached.
    """

    def __init__(
        self, identity: BrokerIdentity, *, socket: Path | None = None, timeout: float = 60.0
    ) -> None:
        if identity.url is None or identity.tls_certificate is None:
            raise InputError(
                "a broker's identity has no address",
                found=f"keys of {identity.origin} alone",
                expected="the file that `cenacle broker start` writes",
            )
        self.identity = identity
        self._http = httpx.Client(
            base_url=identity.url,
            timeout=timeout,
            transport=httpx.HTTPTransport(
                verify=client_context(identity.tls_certificate),
                uds=None if socket is None else str(socket),
                retries=2,  # of connecting only: nothing is sent twice
            ),
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ transport

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
            fields = response.json()
        except httpx.HTTPError as error:
            raise UnavailableError(
                "the broker cannot be reached",
                found=f"{type(error).__name__} at {self.identity.url}",
                expected="a broker that shows the pinned certificate",
                remedy="start it with `cenacle broker start`, or check the address",
            ) from None
        except (ValueError, RecursionError):
            raise UnavailableError(
                "the broker's answer is not JSON", found=f"HTTP {response.status_code}"
            ) from None
        if response.status_code != httpx.codes.OK:
            raise CenacleError.from_dict(fields if isinstance(fields, dict) else {})
        return fields

    def _get(self, *path: str) -> Any:
        return self._call("GET", "/v1/" + "/".join(quote(part, safe="") for part in path))

    def _post(self, body: Any, *path: str) -> Any:
        return self._call("POST", "/v1/" + "/".join(quote(part, safe="") for part in path), body)

    def check_identity(self) -> None:
        """Ask the broker who it is and compare its keys with the pinned ones."""
        found = BrokerIdentity.from_fields(self._get("identity"))
        if found.digest != self.identity.digest:
            raise ProofError(
                "the broker has other keys than pinned",
                found=found.digest,
                expected=self.identity.digest,
                remedy="do not use it; ask its operator what happened",
            )

    def require_attested(
        self, reference: EnclaveRequirements, verifiers: VerifierSet, now: datetime | None = None
    ) -> Claims:
        """Have the broker prove what it runs, on this very TLS session, before it gets a secret.

        Raises:
            EvidenceError: naming everything that is not as the reference values demand.
            UnavailableError: it does not attest.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        evidence = self.evidence(nonce)
        moment = now or datetime.now(UTC)
        return verify_broker(evidence, nonce, self.identity, reference, verifiers, moment)

    def evidence(self, nonce: bytes) -> Evidence:
        """The broker's evidence for a nonce of 32 bytes; not verified."""
        sent = AttestationRequest(nonce=b64(nonce))
        return Evidence.from_fields(self._post(sent.to_fields(), "attestation"))

    # ------------------------------------------------------------------ parties

    def register(self, party: Envelope, token: str) -> str:
        """Register with a one-time token; returns the party document's digest."""
        sent = Registration(party=party.to_fields(), token=token)
        return _text(self._post(sent.to_fields(), "parties"), "digest")

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
        return [(_text(item, "digest"), _text(item, "name")) for item in _list(found)]

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
        return _text(self._post(upload.to_fields(), "assets"), "digest")

    def propose(self, contract: Contract, proposer: SigningKey) -> str:
        """Propose a contract; returns its digest. Proposing is not yet signing."""
        body = Envelope.sign(contract, proposer).to_fields()
        return _text(self._post(body, "contracts"), "digest")

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
        return _text(self._post(upload.to_fields(), "contracts", digest, "signatures"), "party")

    def veto(self, digest: str, party: str, reason: str, key: SigningKey) -> None:
        veto = Veto(contract=digest, party=party, reason=reason)
        self._post(Envelope.sign(veto, key).to_fields(), "vetoes")

    # ------------------------------------------------------------------ enclaves

    def nonce(self, contract: str) -> bytes:
        return unb64(_text(self._get("contracts", contract, "nonce"), "nonce"))

    def release(self, request: ReleaseRequest) -> ReleaseResponse:
        """Ask for the keys; the answer's log inclusion is checked before it is returned."""
        answer = ReleaseResponse.from_fields(self._post(request.to_fields(), "releases"))
        verify_inclusion(answer.log, self.identity)
        return answer

    def checkpoint(self, record: CheckpointRecord, key: SigningKey) -> None:
        self._post(Envelope.sign(record, key).to_fields(), "checkpoints")

    def settle(self, settlement: Envelope) -> LogInclusion:
        """Close a run; ``settlement`` is signed by the run's enclave. Safe to repeat."""
        settlement.peek(Settlement)
        answer = LogInclusion.from_fields(self._post(settlement.to_fields(), "settlements"))
        verify_inclusion(answer, self.identity)
        return answer

    def open_run(self, contract: str) -> str | None:
        answer = self._get("contracts", contract, "open-run")
        return None if answer == {"run": None} else _text(answer, "run")

    def abandon(self, run: str, key: SigningKey, party: str) -> None:
        self._post(self._request(key, party, "abandon", run), "abandonments")

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        """A challenge for a TPM; see :mod:`cenacle.attestation.tpm_credential`."""
        answer = self._post(request.to_fields(), "attestation", "keys")
        return AttestationKeyChallenge.from_fields(answer)

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        """The certificate of an attestation key; checked to be this broker's."""
        fields = self._post(answer.to_fields(), "attestation", "keys", "activate")
        envelope = Envelope.from_fields(fields)
        envelope.verify_signature(self.identity.verify_key)
        return envelope

    # ------------------------------------------------------------------ the log

    def head(self, earlier: TreeHead | None = None) -> tuple[str, TreeHead]:
        """The newest signed head; with ``earlier``, proved to extend it.

        Raises:
            ProofError: the broker's log was rewritten or shortened.
        """
        origin, key = self.identity.origin, self.identity.verify_key
        if earlier is None or earlier.size == 0:
            text = _text(self._get("log", "head"), "head")
            return text, parse_and_verify_head(text, origin, key)
        answer = self._get("log", "consistency", str(earlier.size))
        text = _text(answer, "head")
        newest = parse_and_verify_head(text, origin, key)
        verify_consistency(earlier, newest, _octets(answer, "path"))
        return text, newest

    def entries(self, size: int) -> list[bytes]:
        """The bodies of the first ``size`` entries."""
        found: list[bytes] = []
        while len(found) < size:
            page = _octets(self._get("log", "entries", str(len(found))), "entries")
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


def _wrong_form(answer: Any, expected: str) -> ProofError:
    return ProofError(
        "the broker's answer has another form than expected",
        found=type(answer).__name__,
        expected=expected,
        remedy="use the same version of cenacle as the broker",
    )


def _list(answer: Any) -> list[Any]:
    if not isinstance(answer, list):
        raise _wrong_form(answer, "a list")
    return answer


def _text(answer: Any, name: str) -> str:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, str):
        raise _wrong_form(answer, f"an object with a text named {name}")
    return found


def _octets(answer: Any, name: str) -> tuple[bytes, ...]:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _wrong_form(answer, f"an object with a list of texts named {name}")
    return tuple(unb64(item) for item in found)
