from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cenacle.attestation import Claims, Evidence
from cenacle.attestation.result import (
    EAR_PROFILE,
    attestation_result,
    trust_vector,
    verify_result,
)
from cenacle.crypto import SigningKey
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Protection
from cenacle.errors import EvidenceError, InputError

NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
KEY = SigningKey.generate()
NONCE = b"n" * 64
DIGEST = "sha256:" + "1" * 64


def claims(protection: Protection = "tee", kind: str = "tdx") -> Claims:
    return Claims(
        kind=kind,
        protection=protection,
        measurements={"mrtd": "sha384:" + "2" * 96},
        properties={"tcb_status": "UpToDate"},
        layers=(),
        issued=NOW,
    )


def clauses(measured: bool = True, policy: bool = True) -> list[Clause]:
    return [
        check("contract", "measurement mrtd", measured, "a", "b", "c"),
        check("contract", "TCB status", policy, "UpToDate", "UpToDate", "update"),
    ]


EVIDENCE = Evidence(kind="tdx", body={"quote": "AAAA"})


def token(**options: Any) -> str:
    given = {"key": KEY, "verifier": "acme/broker", "now": NOW, "nonce": NONCE, **options}
    return attestation_result(claims(), EVIDENCE, given.pop("clauses", clauses()), **given)


def test_a_token_says_how_the_evidence_was_judged() -> None:
    found = verify_result(token(policy=DIGEST), KEY.verify_key, now=NOW, nonce=NONCE)
    assert found["eat_profile"] == EAR_PROFILE
    assert found["iat"] == int(NOW.timestamp())
    assert found["exp"] - found["iat"] == 300
    assert found["ear.verifier-id"]["developer"] == "acme/broker"
    (enclave,) = found["submods"].values()
    assert enclave["ear.status"] == "affirming"
    assert enclave["ear.appraisal-policy-id"] == DIGEST
    assert enclave["ear.trustworthiness-vector"] == {
        "instance-identity": 2,
        "configuration": 2,
        "executables": 3,
        "hardware": 2,
        "runtime-opaque": 2,
    }
    assert enclave["cenacle.measurements"] == {"mrtd": "sha384:" + "2" * 96}
    assert enclave["cenacle.evidence"] == EVIDENCE.digest


def test_any_library_can_verify_it() -> None:
    """By RFC 7515 and 8032 alone, without the library that made it."""
    header, payload, signature = token().split(".")
    assert json.loads(urlsafe_b64decode(header + "=="))["alg"] == "Ed25519"
    Ed25519PublicKey.from_public_bytes(KEY.verify_key.raw).verify(
        urlsafe_b64decode(signature + "=="), f"{header}.{payload}".encode()
    )


@pytest.mark.parametrize(
    ("protection", "measured", "policy", "status"),
    [
        ("tee", True, True, "affirming"),
        ("measured", True, True, "warning"),  # the host can read the memory
        ("simulated", True, True, "contraindicated"),
        ("tee", False, True, "contraindicated"),
        ("tee", True, False, "contraindicated"),
    ],
)
def test_the_status_is_that_of_the_worst(
    protection: Protection, measured: bool, policy: bool, status: str
) -> None:
    text = attestation_result(
        claims(protection),
        EVIDENCE,
        clauses(measured, policy),
        key=KEY,
        verifier="v",
        now=NOW,
    )
    (enclave,) = verify_result(text, KEY.verify_key, now=NOW)["submods"].values()
    assert enclave["ear.status"] == status


@pytest.mark.parametrize(
    ("protection", "status"),
    [("tee", "none"), ("measured", "none"), ("simulated", "contraindicated")],
)
def test_what_was_compared_with_nothing_affirms_nothing(
    protection: Protection, status: str
) -> None:
    text = attestation_result(claims(protection), EVIDENCE, None, key=KEY, verifier="v", now=NOW)
    (enclave,) = verify_result(text, KEY.verify_key, now=NOW)["submods"].values()
    assert enclave["ear.status"] == status
    assert "executables" not in enclave["ear.trustworthiness-vector"]


def test_no_clauses_at_all_are_no_approval() -> None:
    assert trust_vector(claims(), [])["executables"] == 33


def test_what_runs_is_vouched_for_only_by_kinds_that_see_it() -> None:
    assert trust_vector(claims("measured", "ima"), clauses())["executables"] == 2
    assert trust_vector(claims("measured", "tpm"), clauses())["executables"] == 3


def _altered(text: str) -> str:
    header, payload, signature = text.split(".")
    fields = json.loads(urlsafe_b64decode(payload + "=="))
    fields["submods"]["enclave"]["ear.status"] = "affirming"
    fields["submods"]["enclave"]["cenacle.protection"] = "tee!"
    changed = urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")
    return f"{header}.{changed}.{signature}"


def _unsigned(text: str) -> str:
    _, payload, _ = text.split(".")
    header = urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    return f"{header}.{payload}."


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(_altered, id="altered"),
        pytest.param(_unsigned, id="alg none"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text[:-8], id="cut"),
        pytest.param(lambda text: "a.b.c", id="no token"),
        pytest.param(lambda text: text.replace(".", "", 1), id="two parts"),
    ],
)
def test_forged_tokens(attack: Any) -> None:
    with pytest.raises(EvidenceError, match="not accepted") as caught:
        verify_result(attack(token()), KEY.verify_key, now=NOW)
    assert caught.value.found


def test_another_verifier_s_token() -> None:
    with pytest.raises(EvidenceError, match="not accepted"):
        verify_result(token(), SigningKey.generate().verify_key, now=NOW)


@pytest.mark.parametrize("after", [timedelta(seconds=301), timedelta(days=30)])
def test_an_expired_token(after: timedelta) -> None:
    with pytest.raises(EvidenceError, match="not accepted"):
        verify_result(token(), KEY.verify_key, now=NOW + after)


@pytest.mark.parametrize("nonce", [b"m" * 64, b"", b"n" * 63])
def test_a_token_for_somebody_else(nonce: bytes) -> None:
    with pytest.raises(EvidenceError, match="another nonce"):
        verify_result(token(), KEY.verify_key, now=NOW, nonce=nonce)
    with pytest.raises(EvidenceError, match="another nonce"):
        verify_result(token(nonce=None), KEY.verify_key, now=NOW, nonce=NONCE)


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(days=30), -timedelta(seconds=1)])
def test_no_token_lives_for_long(lifetime: timedelta) -> None:
    with pytest.raises(InputError, match="lifetime"):
        token(lifetime=lifetime)
