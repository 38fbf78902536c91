from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.tpm import TpmVerifier
from cenacle.attestation.tpm_attester import TpmAttester
from cenacle.attestation.tpm_device import TpmDevice
from cenacle.crypto import VerifyKey
from tests.support.swtpm import LocalIssuer, Manufacturer, Tpm, require_swtpm, run_swtpm

NOW = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)  # certificates are made now
REPORT = bytes(range(64))


@pytest.fixture(scope="session")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    require_swtpm()
    return Manufacturer(tmp_path_factory.mktemp("manufacturer"))


@pytest.fixture(scope="session")
def states(manufacturer: Manufacturer) -> dict[str, Path]:
    """Two TPMs of one manufacturer, switched off."""
    return {name: manufacturer.make(name) for name in ("one", "two")}


@pytest.fixture
def tpm(manufacturer: Manufacturer, states: dict[str, Path]) -> Iterator[Tpm]:
    """A TPM just switched on; each test has its own."""
    with run_swtpm(manufacturer, states["one"]) as running:
        yield running


@pytest.fixture
def other_tpm(manufacturer: Manufacturer, states: dict[str, Path]) -> Iterator[Tpm]:
    """Another TPM of the same manufacturer."""
    with run_swtpm(manufacturer, states["two"]) as running:
        yield running


@dataclass
class Quoted:
    """Evidence of a software TPM, and who judges it; tests change a part."""

    evidence: Evidence
    issuer: LocalIssuer
    tpm: Tpm
    now: datetime = NOW
    measurements: dict[str, str] = field(default_factory=dict)

    def verifier(self, *issuers: VerifyKey) -> TpmVerifier:
        return TpmVerifier(issuers or (self.issuer.key.verify_key,), self.issuer.roots)

    def authenticate(self, evidence: Evidence | None = None, now: datetime | None = None) -> Claims:
        return self.verifier().authenticate(evidence or self.evidence, REPORT, now or self.now)

    def altered(self, **fields: Any) -> Evidence:
        """The evidence with fields of its quote replaced."""
        body = {**self.evidence.body, "quote": {**self.evidence.body["quote"], **fields}}
        return Evidence(kind="tpm", body=body)


@pytest.fixture(scope="session")
def quoted(manufacturer: Manufacturer, states: dict[str, Path]) -> Quoted:
    """Evidence of registers 0 to 9, made once."""
    issuer = LocalIssuer(manufacturer.root, now=NOW)
    with run_swtpm(manufacturer, states["one"]) as tpm:
        attester = TpmAttester(tpm.tcti, issuer=issuer, authorities=tpm.authorities)
        return Quoted(attester.attest(REPORT, {}, (), NOW), issuer, tpm)


@pytest.fixture
def device(tpm: Tpm) -> Iterator[TpmDevice]:
    with TpmDevice(tpm.tcti) as opened:
        yield opened


@pytest.fixture
def opened() -> Callable[[Tpm], Any]:
    """Context manager of a connection to a TPM."""

    @contextmanager
    def open_one(tpm: Tpm) -> Iterator[TpmDevice]:
        with TpmDevice(tpm.tcti) as device:
            yield device

    return open_one
