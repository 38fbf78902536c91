"""The broker proves what it runs, to a party that has not given it anything yet."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation import (
    Evidence,
    InstallationKey,
    SimulatedAttester,
    SimulatedVerifier,
    VerifierSet,
)
from cenacle.broker.attestation import SelfAttestation, broker_report_data, verify_broker
from cenacle.broker.identity import BrokerIdentity, BrokerKeys
from cenacle.broker.tls import ensure_certificate
from cenacle.crypto import SigningKey
from cenacle.documents.contract import EnclaveRequirements
from cenacle.errors import CenacleError, EvidenceError, InputError

NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
PACKAGE = "sha256:" + "1" * 64
OTHER = "sha256:" + "2" * 64


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> tuple[BrokerIdentity, BrokerIdentity]:
    """Two brokers' public identities, each with a certificate of its own."""
    made = []
    for name in ("acme", "other"):
        folder: Path = tmp_path_factory.mktemp(name)
        folder.chmod(0o700)
        keys = BrokerKeys.create(folder / "broker", f"{name}/broker")
        files = ensure_certificate(folder / "broker")
        made.append(keys.published_at("https://localhost:1", files.certificate_pem))
    return made[0], made[1]


@dataclass
class Check:
    """One appraisal that succeeds; tests change a part."""

    identity: BrokerIdentity
    shown_to: BrokerIdentity
    key: InstallationKey = field(default_factory=lambda: InstallationKey(SigningKey.generate()))
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    measurements: dict[str, str] = field(default_factory=lambda: {"package": PACKAGE})
    reference: dict[str, Any] = field(default_factory=dict)
    now: datetime = NOW

    def evidence(self, nonce: bytes | None = None) -> Evidence:
        own = SelfAttestation(SimulatedAttester(self.key), lambda: self.measurements)
        return own.evidence(nonce or self.nonce, self.identity, NOW)

    def verify(self, evidence: Evidence | None = None) -> object:
        values = {"package": [PACKAGE], "installation": [self.key.measurement], **self.reference}
        wanted = EnclaveRequirements.from_fields({"reference": {"simulated": values}})
        return verify_broker(
            evidence or self.evidence(),
            self.nonce,
            self.shown_to,
            wanted,
            VerifierSet.of_development(SimulatedVerifier()),
            self.now,
        )


@pytest.fixture
def check(identities: tuple[BrokerIdentity, BrokerIdentity]) -> Check:
    return Check(identities[0], identities[0])


def test_the_broker_that_was_pinned(check: Check) -> None:
    assert check.verify()


def _measuring(**changes: str) -> Callable[[Check], None]:
    return lambda c: c.measurements.update(changes)


def _reference(**changes: Any) -> Callable[[Check], None]:
    return lambda c: c.reference.update(changes)


def _another_key(c: Check) -> None:
    c.reference["installation"] = [OTHER]


@pytest.mark.parametrize(
    ("said", "change"),
    [
        pytest.param("measurement package", _measuring(package=OTHER), id="another package"),
        pytest.param("measurement extra", _measuring(extra=OTHER), id="something more"),
        pytest.param("measurement kernel", _reference(kernel=[OTHER]), id="not shown"),
        pytest.param("measurement installation", _another_key, id="another machine"),
        pytest.param(
            "not fresh", lambda c: setattr(c, "now", NOW + timedelta(minutes=6)), id="stale"
        ),
    ],
)
def test_what_is_not_as_pinned(check: Check, said: str, change: Callable[[Check], None]) -> None:
    change(check)
    with pytest.raises(EvidenceError, match=said) as caught:
        check.verify()
    assert caught.value.found
    assert caught.value.expected


def test_evidence_for_another_nonce_is_a_replay(check: Check) -> None:
    with pytest.raises(EvidenceError, match="another nonce"):
        check.verify(check.evidence(b"o" * 32))


def test_evidence_of_another_broker_is_relayed(
    check: Check, identities: tuple[BrokerIdentity, BrokerIdentity]
) -> None:
    """A genuine enclave's evidence, shown by somebody who holds other keys."""
    check.shown_to = identities[1]
    with pytest.raises(EvidenceError, match="another nonce"):
        check.verify()


def test_evidence_is_bound_to_the_tls_certificate(
    check: Check, identities: tuple[BrokerIdentity, BrokerIdentity]
) -> None:
    """The right keys behind a certificate that the enclave does not hold: a man in the middle."""
    mixed = identities[0].model_copy(update={"tls_certificate": identities[1].tls_certificate})
    check.shown_to = mixed
    with pytest.raises(EvidenceError, match="another nonce"):
        check.verify()
    moved = identities[0].model_copy(update={"url": "https://elsewhere:2"})
    check.shown_to = moved  # an address may change: the certificate is what counts
    assert check.verify()


@pytest.mark.parametrize("pem", [None, "", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_an_identity_without_a_certificate(check: Check, pem: str | None) -> None:
    identity = check.identity.model_copy(update={"tls_certificate": pem})
    with pytest.raises(InputError, match="certificate"):
        broker_report_data(b"n" * 32, identity)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_nonces_have_one_length(check: Check, size: int) -> None:
    with pytest.raises(InputError, match="nonce"):
        SelfAttestation(SimulatedAttester(check.key), dict).evidence(
            bytes(size), check.identity, NOW
        )


def test_it_measures_itself_once(check: Check) -> None:
    taken = []

    def measure() -> dict[str, str]:
        taken.append(1)
        return {"package": PACKAGE}

    own = SelfAttestation(SimulatedAttester(check.key), measure)
    for _ in range(3):
        own.evidence(check.nonce, check.identity, NOW)
    assert taken == [1]
    assert own.kind == "simulated"


def test_another_kind_than_pinned(check: Check) -> None:
    wanted = EnclaveRequirements.from_fields({"reference": {"snp": {"package": [PACKAGE]}}})
    with pytest.raises(EvidenceError, match="another kind") as caught:
        verify_broker(
            check.evidence(),
            check.nonce,
            check.identity,
            wanted,
            VerifierSet.of_development(SimulatedVerifier()),
            NOW,
        )
    assert (caught.value.found, caught.value.expected) == ("simulated", "snp")


def test_a_party_s_production_set_takes_no_simulated_broker(check: Check) -> None:
    wanted = EnclaveRequirements.from_fields({"reference": {"simulated": {"package": [PACKAGE]}}})
    with pytest.raises(CenacleError, match="no verifier"):
        verify_broker(
            check.evidence(),
            check.nonce,
            check.identity,
            wanted,
            VerifierSet.of_production(),
            NOW,
        )
