from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from cenacle.attestation import (
    Claims,
    Evidence,
    InstallationKey,
    SimulatedAttester,
    SimulatedVerifier,
    report_data,
)
from cenacle.crypto import SecretBytes, SigningKey

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)


def digest(of: str) -> str:
    return "sha256:" + (of.encode().hex() * 64)[:64]


@dataclass
class Attested:
    """A simulated enclave and what a broker expects of it; tests change a part."""

    key: InstallationKey = field(
        default_factory=lambda: InstallationKey(SigningKey.from_seed(SecretBytes(b"i" * 32)))
    )
    bound: bytes = report_data(b"n" * 32, digest("contract"), b"hpke", b"signing")
    measurements: dict[str, str] = field(
        default_factory=lambda: {"package": digest("p"), "program": digest("r")}
    )
    layers: tuple[str, ...] = ("seccomp",)
    issued: datetime = NOW
    now: datetime = NOW

    def evidence(self) -> Evidence:
        return SimulatedAttester(self.key).attest(
            self.bound, self.measurements, self.layers, self.issued
        )

    def reference(self) -> dict[str, tuple[str, ...]]:
        return {
            "package": (digest("p"),),
            "program": (digest("r"),),
            "installation": (self.key.measurement,),
        }

    def verify(
        self,
        evidence: Evidence | None = None,
        reference: Mapping[str, tuple[str, ...]] | None = None,
        bound: bytes | None = None,
    ) -> Claims:
        return SimulatedVerifier().verify(
            self.evidence() if evidence is None else evidence,
            self.reference() if reference is None else reference,
            self.bound if bound is None else bound,
            self.now,
        )


@pytest.fixture
def attested() -> Attested:
    return Attested()


@pytest.fixture
def name_digest() -> Callable[[str], str]:
    return digest


@pytest.fixture
def altered() -> Callable[..., Evidence]:
    """Evidence with fields of its body, or ``stated`` ones of the agent's statement, replaced.

    The signature stays as it was.
    """

    def alter(evidence: Evidence, *, stated: dict[str, Any] | None = None, **fields: Any) -> Any:
        body = {**evidence.body, **fields}
        if stated is not None:
            body["statement"] = {**body["statement"], **stated}
        return Evidence(kind=evidence.kind, body=body)

    return alter
