"""Attesters and verifiers, one pair per evidence kind, and the set that a broker trusts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import ClassVar, Final, NoReturn, Self

from cenacle.attestation.claims import Claims, Evidence, compare
from cenacle.documents.base import Digest
from cenacle.documents.clauses import all_met, failed
from cenacle.documents.protection import Protection, protection_of
from cenacle.errors import EvidenceError

__all__ = ["MAX_AGE", "Attester", "Verifier", "VerifierSet"]

MAX_AGE: Final = timedelta(minutes=5)
"""Evidence further than this from the verifier's clock is stale (or from the future)."""


class Attester(ABC):
    """Makes evidence; runs inside the enclave."""

    kind: ClassVar[str]

    @abstractmethod
    def attest(
        self,
        report_data: bytes,
        measurements: Mapping[str, Digest],
        layers: tuple[str, ...],
        now: datetime,
    ) -> Evidence:
        """Evidence that binds ``report_data`` (64 bytes)."""


class Verifier(ABC):
    """Authenticates evidence. Pure: no network, no store; the clock is a parameter."""

    kind: ClassVar[str]

    @property
    def protection(self) -> Protection:
        return protection_of(self.kind)

    @abstractmethod
    def authenticate(self, evidence: Evidence, report_data: bytes, now: datetime) -> Claims:
        """Check signature, binding and age, and return what the evidence vouches for.

        Raises:
            EvidenceError: saying which check failed, what was found and expected.
        """

    def verify(
        self,
        evidence: Evidence,
        reference: Mapping[str, tuple[Digest, ...]],
        report_data: bytes,
        now: datetime,
    ) -> Claims:
        """Authenticate, then compare with the reference values.

        Raises:
            EvidenceError: naming every measurement that does not match.
        """
        claims = self.authenticate(evidence, report_data, now)
        clauses = compare(claims, reference)
        if not clauses:
            raise EvidenceError(
                "evidence shows no measurement and none is demanded, so it proves nothing",
                expected="at least one measurement with a reference value",
            )
        if not all_met(clauses):
            wrong = failed(clauses)
            raise EvidenceError(
                f"evidence shows other software than approved ({', '.join(c.name for c in wrong)})",
                found="; ".join(c.found for c in wrong),
                expected="; ".join(c.demanded for c in wrong),
                remedy=wrong[0].remedy,
            )
        return claims

    def check_age(self, issued: datetime, now: datetime) -> None:
        """Raises unless ``issued`` is within :data:`MAX_AGE` of ``now``, either way."""
        if abs(now - issued) > MAX_AGE:
            raise EvidenceError(
                f"{self.kind} evidence is not fresh",
                found=f"made at {issued:%Y-%m-%d %H:%M:%S}",
                expected=f"within {MAX_AGE.seconds} s of {now:%Y-%m-%d %H:%M:%S}",
                remedy="start the enclave again, and check both clocks",
            )


class VerifierSet:
    """The kinds that a broker accepts, fixed when it is made.

    A production set has no place for simulated evidence: the constructor refuses such a
    verifier, and nothing can be added later.
    """

    __slots__ = ("_verifiers", "production")

    _verifiers: Mapping[str, Verifier]
    production: bool

    def __init__(self, verifiers: tuple[Verifier, ...], *, production: bool) -> None:
        if len({verifier.kind for verifier in verifiers}) != len(verifiers):
            raise EvidenceError(
                "two verifiers are of one kind",
                found=", ".join(verifier.kind for verifier in verifiers),
            )
        for verifier in verifiers:
            if production and verifier.protection == "simulated":
                raise EvidenceError(
                    "a production broker cannot hold a simulated verifier",
                    found=verifier.kind,
                    remedy="use VerifierSet.of_development() for tests and demonstrations",
                )
        listed = MappingProxyType({verifier.kind: verifier for verifier in verifiers})
        object.__setattr__(self, "_verifiers", listed)
        object.__setattr__(self, "production", production)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a set of verifiers is fixed when it is made")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a set of verifiers is fixed when it is made")

    @classmethod
    def of_production(cls, *hardware: Verifier) -> Self:
        """Real kinds only."""
        return cls(hardware, production=True)

    @classmethod
    def of_development(cls, *verifiers: Verifier) -> Self:
        """Any kinds, the simulated one too."""
        return cls(verifiers, production=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(self._verifiers))

    def for_kind(self, kind: str) -> Verifier:
        """The verifier of a kind, or :class:`EvidenceError` naming those that exist."""
        verifier = self._verifiers.get(kind)
        if verifier is None:
            raise EvidenceError(
                "this broker has no verifier for the evidence",
                found=f"evidence of kind {kind!r}",
                expected=" or ".join(self.kinds) or "none: no kind is registered here",
                remedy="run the job on hardware that the broker accepts"
                if self.production
                else None,
            )
        return verifier
