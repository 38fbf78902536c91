"""Binding an attestation key to the TPM that an endorsement certificate names.

An attestation key (AK) signs quotes; the endorsement key (EK), which the vendor certified, never
signs. That both are in one TPM is proved by credential activation (TPM 2.0 Part 1, section 24):
a secret is encrypted to the EK together with the AK's Name, and a TPM decrypts it only while it
holds that very AK. ``make_credential`` is TPM2_MakeCredential without a TPM (Part 1, sections
11.4.10, 24.4 and 24.5, annexes B.10.4 and C.6.4).

Who returned the secret gets an :class:`AttestationKeyCertificate`, signed by the issuer.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pydantic import Field, StringConstraints

from cenacle.attestation.tpm_endorsement import Endorsement
from cenacle.attestation.tpm_keys import (
    SIGNING_SCHEMES,
    ObjectAttributes,
    Public,
    Symmetric,
    same_key,
)
from cenacle.attestation.tpm_structures import digest_of, hash_name, hasher, tpm2b
from cenacle.crypto import SigningKey, VerifyKey
from cenacle.documents.base import (
    Base64,
    Digest,
    Document,
    Frozen,
    Timestamp,
    format_time,
    parse_time,
)
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, EvidenceError

__all__ = [
    "CERTIFICATE_LIFETIME",
    "AttestationKeyAnswer",
    "AttestationKeyCertificate",
    "AttestationKeyChallenge",
    "AttestationKeyRequest",
    "Credential",
    "certify_key",
    "check_attestation_key",
    "check_endorsement_key",
    "make_credential",
    "open_certificate",
]

CERTIFICATE_LIFETIME: Final = timedelta(days=1)
"""How long an attestation key counts before its TPM must prove itself again."""

_SKEW: Final = timedelta(minutes=5)
_LABEL: Final = b"IDENTITY"
_AES, _CFB = 0x0006, 0x0043  # TPM_ALG_ID
_BLOCK: Final = 16


class AttestationKeyRequest(Frozen):
    """What a host sends: its endorsement certificates, and both keys as TPMT_PUBLIC.

    Attributes:
        certificates: DER; the endorsement key's first, then any that lead to its root.
    """

    certificates: Annotated[tuple[Base64, ...], Field(min_length=1, max_length=8)]
    endorsement_key: Base64
    attestation_key: Base64


class AttestationKeyChallenge(Frozen):
    """What only the TPM with both keys can answer: inputs of TPM2_ActivateCredential.

    Attributes:
        challenge: the issuer's own token; sent back with the answer.
        credential: TPM2B_ID_OBJECT.
        secret: TPM2B_ENCRYPTED_SECRET.
    """

    challenge: Base64
    credential: Base64
    secret: Base64


class AttestationKeyAnswer(Frozen):
    """The request and challenge again, with the secret that the TPM decrypted."""

    request: AttestationKeyRequest
    challenge: Base64
    secret: Base64


class AttestationKeyCertificate(Document):
    """An issuer's signed word that a TPM of this endorsement key holds this attestation key.

    Attributes:
        key_name: the attestation key's Name, hexadecimal: its hash algorithm and digest.
        ek: SHA-256 of the endorsement key's SubjectPublicKeyInfo; names the TPM.
        root: SHA-256 of the root certificate that its chain ended in.
        manufacturer, model, tpm_version: as the endorsement certificate gives them.
    """

    media_type = "application/vnd.cenacle.tpm-attestation-key+json"

    kind: Literal["tpm-attestation-key"] = "tpm-attestation-key"
    version: Literal[1] = 1
    key_name: Annotated[
        str,
        StringConstraints(
            pattern=r"^(?:000b[0-9a-f]{64}|000c[0-9a-f]{96}|000d[0-9a-f]{128})$",
        ),
    ]
    ek: Digest
    root: Digest
    manufacturer: Annotated[str, StringConstraints(max_length=64)]
    model: Annotated[str, StringConstraints(max_length=64)]
    tpm_version: Annotated[str, StringConstraints(max_length=64)]
    issued: Timestamp
    expires: Timestamp


class Credential(NamedTuple):
    """Inputs of TPM2_ActivateCredential: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    blob: bytes
    secret: bytes


def _kdfa(algorithm: int, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2): SP 800-108 in counter mode with HMAC."""
    made, counter = b"", 0
    while len(made) * 8 < bits:
        counter += 1
        block = counter.to_bytes(4, "big") + label + b"\x00" + context + bits.to_bytes(4, "big")
        made += hmac.digest(key, block, hash_name(algorithm))
    return made[: bits // 8]


def _kdfe(algorithm: int, z: bytes, label: bytes, u: bytes, v: bytes, bits: int) -> bytes:
    """KDFe (Part 1, 11.4.10.3): SP 800-56A, for a seed from a Diffie-Hellman secret."""
    made, counter = b"", 0
    while len(made) * 8 < bits:
        counter += 1
        made += digest_of(algorithm, counter.to_bytes(4, "big"), z, label, b"\x00", u, v)
    return made[: bits // 8]


def _cfb(key: bytes, plaintext: bytes) -> bytes:
    """AES-CFB from a zero initialization vector; the key encrypts this one message only."""
    encrypt = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - CFB is below
    before, made = bytes(_BLOCK), b""
    for start in range(0, len(plaintext), _BLOCK):
        part = plaintext[start : start + _BLOCK]
        stream = encrypt.update(before)
        before = bytes(a ^ b for a, b in zip(part, stream, strict=False))
        made += before
    return made


def _seed(ek: Public) -> tuple[bytes, bytes]:
    """A fresh seed of the EK's Name algorithm's size, and the bytes that carry it to the EK."""
    algorithm = hasher(ek.name_alg)
    key = ek.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        seed = secrets.token_bytes(algorithm.digest_size)
        oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, _LABEL + b"\x00")
        return seed, tpm2b(key.encrypt(seed, oaep))
    size = (key.curve.key_size + 7) // 8
    ephemeral = ec.generate_private_key(key.curve)
    z = ephemeral.exchange(ec.ECDH(), key)
    ours, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    u, v = ours.x.to_bytes(size, "big"), theirs.x.to_bytes(size, "big")
    seed = _kdfe(ek.name_alg, z, _LABEL, u, v, algorithm.digest_size * 8)
    return seed, tpm2b(tpm2b(u) + tpm2b(ours.y.to_bytes(size, "big")))


def make_credential(ek: Public, key_name: bytes, value: bytes) -> Credential:
    """Encrypt ``value`` so that only the EK's TPM, holding the named key, can read it.

    Args:
        ek: see :func:`check_endorsement_key`.
        key_name: the attestation key's Name.
        value: the secret; no longer than the digest of the EK's Name algorithm.

    Raises:
        EvidenceError: the EK's algorithms are unknown or too weak.
    """
    algorithm = hasher(ek.name_alg)
    if not 1 <= len(value) <= algorithm.digest_size:
        raise EvidenceError(
            "a credential has a wrong length",
            found=len(value),
            expected=f"1 to {algorithm.digest_size} bytes",
        )
    bits = _symmetric(ek).key_bits
    seed, carried = _seed(ek)
    encrypted = _cfb(_kdfa(ek.name_alg, seed, b"STORAGE", key_name, bits), tpm2b(value))
    integrity = _kdfa(ek.name_alg, seed, b"INTEGRITY", b"", algorithm.digest_size * 8)
    tag = hmac.digest(integrity, encrypted + key_name, algorithm.name)
    return Credential(tpm2b(tpm2b(tag) + encrypted), carried)


def _symmetric(ek: Public) -> Symmetric:
    found = ek.symmetric
    if found is None or (found.algorithm, found.mode) != (_AES, _CFB):
        raise EvidenceError(
            "an endorsement key protects with an unknown cipher",
            found=str(found),
            expected="AES in CFB mode",
        )
    if found.key_bits not in {128, 192, 256}:
        raise EvidenceError(
            "an endorsement key protects with an unknown cipher",
            found=f"AES with {found.key_bits} bits",
            expected="128, 192 or 256",
        )
    return found


_FIXED: Final = (
    ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.RESTRICTED
)


def _check_attributes(what: str, public: Public, needed: ObjectAttributes) -> None:
    other = (ObjectAttributes.SIGN | ObjectAttributes.DECRYPT) & ~needed
    if missing := needed & ~public.attributes:
        raise EvidenceError(
            f"{what} has other attributes than it needs",
            found=f"without {_words(missing)}",
            expected=_words(needed),
            remedy="make it with the template for such keys, inside the TPM",
        )
    if surplus := public.attributes & other:
        raise EvidenceError(
            f"{what} may do more than it should",
            found=_words(surplus),
            expected=_words(needed),
        )


def _words(attributes: ObjectAttributes) -> str:
    return ", ".join((a.name or "?").lower().replace("_", "-") for a in attributes)


def check_attestation_key(public: Public) -> None:
    """Raises :class:`EvidenceError` unless only a TPM can have made what the key signs.

    It must have been made inside the TPM, never leave it, and sign nothing but the TPM's own
    structures: restricted, in one scheme.
    """
    _check_attributes("an attestation key", public, _FIXED | ObjectAttributes.SIGN)
    if (
        public.scheme is None
        or public.scheme.algorithm not in SIGNING_SCHEMES
        or public.symmetric is not None
    ):
        raise EvidenceError(
            "an attestation key has no signing scheme of its own",
            found=str(public.scheme),
            expected="RSASSA, RSAPSS or ECDSA with SHA-256, SHA-384 or SHA-512",
        )
    hasher(public.scheme.hash)
    public.public_key()


def check_endorsement_key(public: Public, endorsement: Endorsement) -> None:
    """Raises :class:`EvidenceError` unless ``public`` is the certified, decrypting key."""
    if not same_key(public.public_key(), endorsement.key):
        raise EvidenceError(
            "the endorsement certificate is for another key than the one shown",
            found=public.name.hex()[:16],
            expected=f"the key of {endorsement.digest}",
            remedy="send the certificate that this very TPM holds",
        )
    _check_attributes("an endorsement key", public, _FIXED | ObjectAttributes.DECRYPT)
    _symmetric(public)


def certify_key(
    key: Public, endorsement: Endorsement, signer: SigningKey, now: datetime
) -> Envelope:
    """Sign that the endorsed TPM holds ``key``; call it only after the TPM proved that."""
    certificate = AttestationKeyCertificate(
        key_name=key.name.hex(),
        ek=endorsement.digest,
        root=endorsement.root,
        manufacturer=endorsement.manufacturer,
        model=endorsement.model,
        tpm_version=endorsement.version,
        issued=format_time(now),
        expires=format_time(now + CERTIFICATE_LIFETIME),
    )
    return Envelope.sign(certificate, signer)


def open_certificate(
    fields: Any, issuers: Sequence[VerifyKey], now: datetime
) -> AttestationKeyCertificate:
    """The certificate in a DSSE envelope, if an issuer signed it and it is valid now.

    Raises:
        EvidenceError: it is malformed, by a stranger, expired or not yet valid.
    """
    try:
        envelope = Envelope.from_fields(fields)
        if envelope.to_fields() != fields:
            raise EvidenceError(
                "an attestation key's certificate is not in canonical form",
                expected="the fields that its issuer sent, unaltered",
            )
        signers = [key for key in issuers if key.keyid in envelope.signatures]
        if len(envelope.signatures) != 1 or len(signers) != 1:
            raise EvidenceError(
                "an attestation key's certificate is not by a trusted issuer",
                found=f"signatures by {[keyid[:16] for keyid in envelope.signatures]}",
                expected=f"one by {' or '.join(key.keyid[:16] for key in issuers) or 'an issuer'}",
                remedy="have the key certified by this broker",
            )
        certificate = envelope.open(AttestationKeyCertificate, signers[0])
    except EvidenceError:
        raise
    except CenacleError as error:
        raise EvidenceError(
            "an attestation key's certificate is not genuine", found=error.diagnostics()
        ) from None
    issued, expires = parse_time(certificate.issued), parse_time(certificate.expires)
    if not issued - _SKEW <= now <= expires or expires - issued > CERTIFICATE_LIFETIME:
        raise EvidenceError(
            "an attestation key's certificate is not valid now",
            found=f"{certificate.issued} to {certificate.expires}",
            expected=f"valid at {format_time(now)}, for at most a day",
            remedy="have the attestation key certified again",
        )
    return certificate
