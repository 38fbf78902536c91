"""Evidence for the clients of an enclave that serves: made for each challenge, judged by them.

The same evidence that the broker saw, but fresh, over the client's own nonce, and over the key
that clients seal queries to. Whoever has the contract judges it by the contract's own reference
values, so a client needs to trust neither the host nor the broker: only those who signed the
contract, and the makers of the hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from cenacle.attestation.binding import report_data
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Attester, VerifierSet
from cenacle.broker.rules import evidence_clauses
from cenacle.crypto import HpkePublicKey, VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import Base64, Digest, Document, JsonObject, b64, unb64
from cenacle.documents.clauses import failed
from cenacle.documents.contract import Contract
from cenacle.errors import EvidenceError

__all__ = ["AttestedEnclave", "ClientEvidence", "attest_to_client", "verify_for_client"]


class ClientEvidence(Document):
    """What an enclave answers to a client's challenge.

    Attributes:
        hpke_key: base64; whom queries are sealed to, made by this enclave for serving.
        signing_key: base64; signs the receipt, and is named in the broker's log.
    """

    media_type = "application/vnd.cenacle.client-evidence+json"

    kind: Literal["client-evidence"] = "client-evidence"
    version: Literal[1] = 1
    contract: Digest
    nonce: Base64
    hpke_key: Base64
    signing_key: Base64
    evidence: JsonObject


@dataclass(frozen=True)
class AttestedEnclave:
    """What a client may believe of the enclave that answered its challenge."""

    contract: str
    hpke_key: HpkePublicKey
    signing_key: VerifyKey
    claims: Claims


def attest_to_client(
    attester: Attester,
    nonce: bytes,
    contract: str,
    keys: tuple[bytes, bytes],
    measurements: Mapping[str, str],
    layers: tuple[str, ...],
) -> ClientEvidence:
    """Evidence for one client; runs inside the enclave.

    Args:
        keys: the raw public keys: HPKE for queries, and the signing key of the session.

    Raises:
        UnavailableError: this machine cannot make evidence now.
    """
    data = report_data(nonce, contract, *keys)
    evidence = attester.attest(data, measurements, layers, datetime.now(UTC))
    return ClientEvidence(
        contract=contract,
        nonce=b64(nonce),
        hpke_key=b64(keys[0]),
        signing_key=b64(keys[1]),
        evidence=evidence.to_fields(),
    )


def verify_for_client(
    shown: ClientEvidence,
    nonce: bytes,
    digest: str,
    contract: Contract,
    assets: Mapping[str, Asset],
    verifiers: VerifierSet,
    now: datetime,
) -> AttestedEnclave:
    """Judge an enclave by the contract that the client knows.

    Args:
        nonce: the client's challenge.
        digest: of the contract, whose signatures the caller has verified.
        verifiers: kinds of evidence that the client accepts.

    Raises:
        EvidenceError: naming everything that is not what the contract demands.
    """
    if (unb64(shown.nonce), shown.contract) != (nonce, digest):
        raise EvidenceError(
            "the enclave answered another challenge, or serves under another contract",
            found=shown.contract,
            expected=digest,
            remedy="ask again; if it goes on, the server is not the one for this contract",
        )
    hpke_key, signing_key = HpkePublicKey(unb64(shown.hpke_key)), unb64(shown.signing_key)
    evidence = Evidence.from_fields(shown.evidence)
    bound = report_data(nonce, digest, hpke_key.raw, signing_key)
    claims = verifiers.for_kind(evidence.kind).authenticate(evidence, bound, now)
    if wrong := failed(evidence_clauses(contract, assets, claims)):
        raise EvidenceError(
            f"the enclave is not what the contract demands "
            f"({', '.join(clause.name for clause in wrong)})",
            found="; ".join(clause.found for clause in wrong),
            expected="; ".join(clause.demanded for clause in wrong),
            remedy="send it nothing; ask the parties which enclave they approved",
        )
    return AttestedEnclave(digest, hpke_key, VerifyKey(signing_key), claims)
