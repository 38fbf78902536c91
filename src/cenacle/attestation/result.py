"""Attestation results for other relying parties: EAR tokens (draft-ietf-rats-ear), as JWT.

The trustworthiness vector is that of AR4SI (draft-ietf-rats-ar4si, section 2.3): 2 to 31
affirms, 32 to 95 warns, from 96 on contraindicates. What was not looked at is not claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

import cenacle
from cenacle.attestation.binding import REPORT_DATA_BYTES
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import MAX_AGE
from cenacle.crypto import SigningKey, VerifyKey
from cenacle.documents.base import Digest
from cenacle.documents.clauses import Clause, all_met
from cenacle.documents.protection import Protection
from cenacle.errors import EvidenceError, InputError

__all__ = ["EAR_PROFILE", "attestation_result", "trust_vector", "verify_result"]

EAR_PROFILE: Final = "tag:github.com,2023:veraison/ear"
_ALGORITHM: Final = "Ed25519"  # RFC 9864
_SUBMODULE: Final = "enclave"
_TIERS: Final = ((96, "contraindicated"), (32, "warning"), (2, "affirming"))

# Hardware and opacity of memory to the host, for what each protection is worth.
_BY_PROTECTION: Final[Mapping[Protection, tuple[int, int]]] = {
    "tee": (2, 2),
    "measured": (2, 32),
    "simulated": (97, 96),
}


def trust_vector(claims: Claims, clauses: Sequence[Clause] | None) -> dict[str, int]:
    """AR4SI's vector for claims and what they were compared with.

    Args:
        clauses: ``None`` where nothing was compared; then software is not vouched for.
    """
    hardware, opaque = _BY_PROTECTION[claims.protection]
    vector = {"instance-identity": 0, "hardware": hardware, "runtime-opaque": opaque}
    if clauses is None:
        return vector
    measured = [c for c in clauses if c.name.startswith("measurement ")]
    others = [c for c in clauses if not c.name.startswith("measurement ")]
    # IMA and agents measure what is loaded after the boot too; registers alone do not.
    running = claims.kind in {"ima", "simulated"}
    vector["executables"] = (2 if running else 3) if all_met(measured) else 33
    vector["configuration"] = 2 if not others or all_met(others) else 96
    vector["instance-identity"] = 2 if all_met(clauses) else 97
    return vector


def _status(vector: Mapping[str, int], compared: bool) -> str:
    worst = max(vector.values())
    if not compared:
        return "contraindicated" if worst >= 96 else "none"
    return next((name for least, name in _TIERS if worst >= least), "none")


def attestation_result(
    claims: Claims,
    evidence: Evidence,
    clauses: Sequence[Clause] | None,
    *,
    key: SigningKey,
    verifier: str,
    now: datetime,
    policy: Digest | None = None,
    nonce: bytes | None = None,
    lifetime: timedelta = MAX_AGE,
) -> str:
    """A signed token (JWS compact) that says how evidence was judged.

    Args:
        clauses: of reference values and policy; ``None`` where nothing was compared.
        key: the verifier's, a local one.
        verifier: the verifier's name.
        policy: digest of what the evidence was compared with.
        nonce: what the relying party asked for (64 bytes of report data); becomes ``eat_nonce``.
        lifetime: until the token expires; the relying party decides on fresh evidence.

    Raises:
        InputError: the lifetime is longer than a day, or the key is held by another device.
    """
    if not timedelta(0) < lifetime <= timedelta(days=1):
        raise InputError(
            "an attestation result has an unusable lifetime",
            found=f"{lifetime.total_seconds():.0f} s",
            expected="at most a day",
        )
    vector = trust_vector(claims, clauses)
    submodule: dict[str, Any] = {
        "ear.status": _status(vector, clauses is not None),
        "ear.trustworthiness-vector": vector,
        "cenacle.kind": claims.kind,
        "cenacle.protection": claims.protection,
        "cenacle.evidence": evidence.digest,
        "cenacle.measurements": claims.measurements,
        "cenacle.properties": claims.properties,
    }
    if policy is not None:
        submodule["ear.appraisal-policy-id"] = policy
    payload: dict[str, Any] = {
        "eat_profile": EAR_PROFILE,
        "iat": int(now.timestamp()),
        "exp": int((now + lifetime).timestamp()),
        "ear.verifier-id": {"developer": verifier, "build": f"cenacle {cenacle.__version__}"},
        "submods": {_SUBMODULE: submodule},
    }
    if nonce is not None:
        payload["eat_nonce"] = nonce.hex()
    header = {"alg": _ALGORITHM, "kid": key.verify_key.keyid}
    return jwt.encode(header, payload, _private(key), algorithms=[_ALGORITHM])


def verify_result(
    token: str, key: VerifyKey, *, now: datetime, nonce: bytes | None = None
) -> dict[str, Any]:
    """The claims of a token by this verifier.

    Args:
        nonce: what must be in ``eat_nonce``: without it the token may be of any enclave at any
            time before it expires.

    Raises:
        EvidenceError: another key signed it, it expired, or it answers to another nonce.
    """
    try:
        found = jwt.decode(token, _public(key), algorithms=[_ALGORITHM])
        rules = jwt.JWTClaimsRegistry(
            now=int(now.timestamp()),
            leeway=0,
            iat={"essential": True},
            exp={"essential": True},
            eat_profile={"essential": True, "value": EAR_PROFILE},
        )
        rules.validate(found.claims)
    except (JoseError, ValueError, TypeError) as error:
        raise EvidenceError(
            "an attestation result is not accepted",
            found=str(error) or type(error).__name__,
            expected=f"a token of key {key.keyid[:16]} that has not expired",
            remedy="ask the verifier for a new one",
        ) from None
    if nonce is not None and (
        len(nonce) != REPORT_DATA_BYTES or found.claims.get("eat_nonce") != nonce.hex()
    ):
        raise EvidenceError(
            "an attestation result answers to another nonce",
            found=str(found.claims.get("eat_nonce", "none"))[:24],
            expected=nonce.hex()[:24],
        )
    return dict(found.claims)


def _private(key: SigningKey) -> OKPKey:
    with key.seed().view() as seed:
        return OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(bytes(seed)))


def _public(key: VerifyKey) -> OKPKey:
    return OKPKey.import_key(Ed25519PublicKey.from_public_bytes(key.raw))
