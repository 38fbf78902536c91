"""The broker's own evidence: parties check it before they hand over a key.

Bound to a nonce of the party's, to the broker's keys and to the certificate of the TLS session
that the evidence comes through. TLS 1.3 proves that the other end holds that certificate's key,
so evidence, session and keys belong to one process: what RA-TLS does with evidence inside the
certificate, but fresh for each connection.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.measure import measure_enclave
from cenacle.attestation.policies import appraise
from cenacle.attestation.registry import Attester, VerifierSet
from cenacle.broker.identity import BrokerIdentity
from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import Base64, Digest, Frozen, unb64
from cenacle.documents.clauses import all_met, failed
from cenacle.documents.contract import EnclaveRequirements
from cenacle.errors import EvidenceError, InputError

__all__ = [
    "NONCE_BYTES",
    "AttestationRequest",
    "SelfAttestation",
    "broker_report_data",
    "verify_broker",
]

NONCE_BYTES: Final = 32


class AttestationRequest(Frozen):
    """A party's nonce, base64 of 32 bytes."""

    nonce: Base64


def broker_report_data(nonce: bytes, identity: BrokerIdentity) -> bytes:
    """64 bytes: SHA-512 over the nonce, the broker's keys, and its TLS certificate (DER).

    Raises:
        InputError: the identity has no certificate, or one that cannot be read.
    """
    if identity.tls_certificate is None:
        raise InputError(
            "a broker's identity has no certificate that its evidence could be bound to",
            expected="the file that `cenacle broker start` writes",
        )
    try:
        certificate = x509.load_pem_x509_certificate(identity.tls_certificate.encode())
    except ValueError:
        raise InputError("a broker's TLS certificate cannot be read", expected="PEM") from None
    fields = encode_fields(
        b"cenacle/broker-report-data/v1",
        nonce,
        identity.digest.encode(),
        unb64(identity.hpke_key),
        unb64(identity.signing_key),
        certificate.public_bytes(Encoding.DER),
    )
    return hashlib.sha512(fields).digest()


class SelfAttestation:
    """Evidence of the process that the broker runs in.

    Args:
        attester: of the hardware, or the simulated one in a broker made for development.
        measure: what the broker takes of itself; taken once, at the first request.
    """

    def __init__(
        self,
        attester: Attester,
        measure: Callable[[], Mapping[str, Digest]] = measure_enclave,
    ) -> None:
        self._attester = attester
        self._measure = measure
        self._taken: Mapping[str, Digest] | None = None
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        return self._attester.kind

    def measurements(self) -> Mapping[str, Digest]:
        """What the broker states of itself.

        Raises:
            UnavailableError: a file of it cannot be read.
        """
        with self._lock:
            if self._taken is None:
                self._taken = dict(self._measure())
            return self._taken

    def evidence(self, nonce: bytes, identity: BrokerIdentity, now: datetime) -> Evidence:
        """Evidence for one party's nonce.

        Raises:
            InputError: the nonce has another length.
            UnavailableError: the hardware does not answer.
        """
        if len(nonce) != NONCE_BYTES:
            raise InputError(
                "a nonce has the wrong length",
                found=f"{len(nonce)} bytes",
                expected=f"{NONCE_BYTES} bytes",
            )
        bound = broker_report_data(nonce, identity)
        # One at a time: a TPM answers one at a time, and has few slots.
        measurements = self.measurements()
        with self._lock:
            return self._attester.attest(bound, measurements, (), now)


def verify_broker(
    evidence: Evidence,
    nonce: bytes,
    identity: BrokerIdentity,
    reference: EnclaveRequirements,
    verifiers: VerifierSet,
    now: datetime,
) -> Claims:
    """What a broker proved, for a nonce of ours and the certificate we speak to.

    Raises:
        EvidenceError: naming everything that is not as the reference values demand.
    """
    if evidence.kind not in reference.reference:
        raise EvidenceError(
            "the broker shows another kind of evidence than was pinned",
            found=evidence.kind,
            expected=" or ".join(reference.reference),
            remedy="do not hand it keys; ask its owner what changed",
        )
    bound = broker_report_data(nonce, identity)
    claims = verifiers.for_kind(evidence.kind).authenticate(evidence, bound, now)
    listed = reference.reference[claims.kind]
    clauses = appraise(claims, listed, reference.policy_for(claims.kind))
    if not all_met(clauses):
        wrong = failed(clauses)
        raise EvidenceError(
            "the broker runs something else than was pinned "
            f"({', '.join(clause.name for clause in wrong)})",
            found="; ".join(clause.found for clause in wrong),
            expected="; ".join(clause.demanded for clause in wrong),
            remedy="do not hand it keys; ask its owner what changed, then pin its new values "
            "with `cenacle broker pin --reference`",
        )
    return claims
