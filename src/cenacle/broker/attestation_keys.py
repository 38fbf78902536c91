"""The broker certifies attestation keys of TPMs: the issuer of a privacy CA's protocol.

A host sends its endorsement certificate and both public keys; the broker checks them and encrypts
a secret that only that TPM, holding that very attestation key, can read; whoever returns it gets
a certificate for a day. A challenge is a token that the broker recognises without having stored
it (as nonces are), bound to the whole request, and the secret is derived from it. So strangers
fill no table, a restart forgets nothing, and several brokers on one database serve one host. That
an answer counts once is enforced in the database.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

from cenacle.attestation.tpm import TpmVerifier
from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyChallenge,
    AttestationKeyRequest,
    certify_key,
    check_attestation_key,
    check_endorsement_key,
    make_credential,
)
from cenacle.attestation.tpm_endorsement import Endorsement, verify_endorsement
from cenacle.attestation.tpm_keys import Public
from cenacle.broker.membership import Membership
from cenacle.crypto import SecretBytes, derive_key
from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import b64, canonical_json, unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import ConflictError, EvidenceError

__all__ = ["CHALLENGE_LIFETIME", "AttestationKeys"]

CHALLENGE_LIFETIME: Final = timedelta(minutes=5)
_RANDOM: Final = 16
_EXPIRY: Final = 8
_TAG: Final = 16
_SECRET: Final = 32


class AttestationKeys:
    """Challenges hosts and certifies their attestation keys, for one broker.

    The trusted roots are those of the broker's TPM verifiers: without such a verifier nothing is
    certified, and no request can add a root.
    """

    def __init__(self, broker: Membership) -> None:
        seed = broker.keys.signing_key.seed()
        self._broker = broker
        self._token_key = derive_key(seed, "broker/attestation-key/token")
        self._secret_key = derive_key(seed, "broker/attestation-key/secret")

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        """A challenge that only a trusted TPM with the requested key can answer.

        Raises:
            EvidenceError: the endorsement is not trusted, or a key is not what it must be.
        """
        now = self._broker.clock()
        endorsement_key, attestation_key, _ = self._examine(request, now)
        expiry = int((now + CHALLENGE_LIFETIME).timestamp()).to_bytes(_EXPIRY, "big")
        head = secrets.token_bytes(_RANDOM) + expiry
        token = head + self._tag(head, request)
        credential = make_credential(endorsement_key, attestation_key.name, self._secret(token))
        return AttestationKeyChallenge(
            challenge=b64(token), credential=b64(credential.blob), secret=b64(credential.secret)
        )

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        """The certificate, for a challenge that was answered.

        Raises:
            EvidenceError: the challenge is not this broker's for this request, has expired, or
                the secret is wrong.
            ConflictError: it was answered before.
        """
        now = self._broker.clock()
        token = unb64(answer.challenge)
        head, tag = token[: _RANDOM + _EXPIRY], token[_RANDOM + _EXPIRY :]
        if not hmac.compare_digest(tag, self._tag(head, answer.request)):
            raise EvidenceError(
                "the challenge is not one that this broker gave for these keys",
                found=f"{len(token)} bytes from elsewhere",
                expected="this broker's challenge for this very request",
                remedy="ask for a new challenge",
            )
        expiry = datetime.fromtimestamp(int.from_bytes(head[_RANDOM:], "big"), UTC)
        if now > expiry:
            raise EvidenceError(
                "the challenge has expired",
                found=f"valid until {expiry:%Y-%m-%d %H:%M:%S}",
                expected=f"answered within {CHALLENGE_LIFETIME.seconds} s",
                remedy="ask for a new challenge",
            )
        if not hmac.compare_digest(unb64(answer.secret), self._secret(token)):
            raise EvidenceError(
                "the challenge was not solved",
                found="another secret",
                expected="the one that the TPM with both keys decrypts",
                remedy="answer with the TPM that holds the endorsement and attestation keys",
            )
        _, attestation_key, endorsement = self._examine(answer.request, now)
        self._once(token)
        return certify_key(attestation_key, endorsement, self._broker.keys.signing_key, now)

    def _once(self, token: bytes) -> None:
        try:
            self._broker.write(
                lambda tx: tx.consume_nonce(b"attestation-key" + token, self._broker.time())
            )
        except EvidenceError:
            raise ConflictError(
                "the challenge was answered already",
                expected="one answer to each challenge",
                remedy="ask for a new challenge",
            ) from None

    def _examine(
        self, request: AttestationKeyRequest, now: datetime
    ) -> tuple[Public, Public, Endorsement]:
        chain = [unb64(der) for der in request.certificates]
        endorsement = verify_endorsement(chain, self._roots(), now)
        endorsement_key = Public.parse(unb64(request.endorsement_key))
        check_endorsement_key(endorsement_key, endorsement)
        attestation_key = Public.parse(unb64(request.attestation_key))
        check_attestation_key(attestation_key)
        return endorsement_key, attestation_key, endorsement

    def _roots(self) -> Sequence[x509.Certificate]:
        verifiers = [self._broker.verifiers.for_kind(k) for k in self._broker.verifiers.kinds]
        roots = [
            root for v in verifiers if isinstance(v, TpmVerifier) for root in v.endorsement_roots
        ]
        if not roots:
            raise EvidenceError(
                "this broker certifies no attestation keys",
                found=f"verifiers of {', '.join(self._broker.verifiers.kinds) or 'no kind'}",
                expected="a verifier of TPM evidence with trusted roots",
                remedy="start the broker with the TPM roots that it should trust",
            )
        return roots

    def _tag(self, head: bytes, request: AttestationKeyRequest) -> bytes:
        return _mac(self._token_key, head, canonical_json(request.to_fields()))[:_TAG]

    def _secret(self, token: bytes) -> bytes:
        return _mac(self._secret_key, token)[:_SECRET]


def _mac(key: SecretBytes, *fields: bytes) -> bytes:
    with key.view() as view:
        return hmac.digest(view, encode_fields(*fields), "sha256")
