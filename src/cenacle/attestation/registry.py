"""Attesters and verifiers, one pair per evidence kind, and the set that a broker trusts."""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, NoReturn, Self, final

from cenacle.attestation.binding import REPORT_DATA_BYTES, Statement
from cenacle.attestation.claims import Claims, Evidence, compare
from cenacle.documents.base import Digest, format_time, parse_time
from cenacle.documents.clauses import all_met, failed
from cenacle.documents.protection import Measured, Protection, protection_of
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = ["MAX_AGE", "Attester", "Shown", "Verifier", "VerifierSet"]

MAX_AGE: Final = timedelta(minutes=5)
"""Evidence further than this from the verifier's clock is stale (or from the future)."""


_STATEMENT: Final = "statement"


class Shown(NamedTuple):
    """What authenticated evidence shows.

    Attributes:
        claims: what the evidence vouches for by itself.
        bound: the bytes in it that were chosen by the attester: report data, qualifying data or
            a nonce. What they must be, :meth:`Verifier.authenticate` compares.
    """

    claims: Claims
    bound: bytes


class Attester(ABC):
    """Makes evidence; runs inside the enclave."""

    kind: ClassVar[str]

    def attest(
        self,
        report_data: bytes,
        measurements: Mapping[str, Digest],
        layers: tuple[str, ...],
        now: datetime,
    ) -> Evidence:
        """Evidence that binds ``report_data`` (64 bytes) and what the agent states of itself.

        Raises:
            InputError: the report data has another length.
            UnavailableError: this machine cannot make such evidence.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise InputError(
                "report data has the wrong length",
                found=f"{len(report_data)} bytes",
                expected=f"{REPORT_DATA_BYTES} bytes",
            )
        statement = Statement(
            measurements=dict(measurements), layers=layers, issued=format_time(now)
        )
        body = self.collect(statement.bind(report_data), now)
        return Evidence(kind=self.kind, body={**body, _STATEMENT: statement.to_fields()})

    @abstractmethod
    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        """The body of evidence that carries ``bound`` (64 bytes) in the kind's own way.

        Raises:
            UnavailableError: this machine cannot make such evidence.
        """


class Verifier(ABC):
    """Authenticates evidence. Pure: no network, no store; the clock is a parameter."""

    kind: ClassVar[str]

    @property
    def protection(self) -> Protection:
        return protection_of(self.kind)

    @abstractmethod
    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        """Check structure, signatures, certificates and their dates; refuse debug modes.

        Says nothing about freshness: use :meth:`authenticate` wherever keys depend on it.

        Raises:
            EvidenceError: saying which check failed, what was found and expected.
        """

    def binding(self, report_data: bytes) -> bytes:
        """How the kind carries 64 bytes of report data; as they are unless overridden."""
        return report_data

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        """The body for evidence in the vendor's own format, e.g. a quote in a file.

        Raises:
            InputError: the kind has no such format, or the file is not in it.
        """
        del raw, collateral
        raise InputError(
            f"{cls.kind} evidence has no raw format", expected="an evidence document (JSON)"
        )

    @final
    def authenticate(self, evidence: Evidence, report_data: bytes, now: datetime) -> Claims:
        """Check all that :meth:`inspect` does, and that the evidence is of this very moment.

        Args:
            report_data: 64 bytes, from the nonce that was given out (see
                :func:`~cenacle.attestation.binding.report_data`).

        Raises:
            EvidenceError: saying which check failed, what was found and expected.
        """
        if evidence.kind != self.kind:
            raise EvidenceError(
                "evidence is of another kind", found=evidence.kind, expected=self.kind
            )
        if len(report_data) != REPORT_DATA_BYTES:
            raise EvidenceError(
                "the expected report data has the wrong length",
                found=f"{len(report_data)} bytes",
                expected=f"{REPORT_DATA_BYTES} bytes",
            )
        shown = self.inspect(evidence, now)
        statement = self.statement(evidence)
        data = report_data if statement is None else statement.bind(report_data)
        expected = self.binding(data)
        if not hmac.compare_digest(shown.bound, expected):
            raise EvidenceError(
                "evidence is bound to another nonce, contract or enclave key",
                found=shown.bound[:12].hex(),
                expected=expected[:12].hex(),
                remedy="evidence cannot be replayed or relayed: make fresh evidence",
            )
        claims = shown.claims
        if statement is not None:
            self.check_age(parse_time(statement.issued), now)
            claims = self._with_statement(claims, statement)
        self.check_age(claims.issued, now)
        return claims

    def statement(self, evidence: Evidence) -> Statement | None:
        """What the agent states of itself in the evidence; unchecked.

        Raises:
            EvidenceError: it is malformed.
        """
        if _STATEMENT not in evidence.body:
            return None
        try:
            return Statement.from_fields(evidence.body[_STATEMENT])
        except CenacleError as error:
            raise EvidenceError(
                f"the agent's statement in {self.kind} evidence is malformed",
                found=error.diagnostics(),
            ) from None

    def _with_statement(self, claims: Claims, statement: Statement) -> Claims:
        if both := sorted(set(claims.measurements) & set(statement.measurements)):
            raise EvidenceError(
                f"the agent states measurements that only {self.kind} hardware can take",
                found=", ".join(both),
                expected="measurements of its own",
            )
        return claims.model_copy(
            update={
                "measurements": {**claims.measurements, **statement.measurements},
                "layers": statement.layers,
            }
        )

    def verify(
        self,
        evidence: Evidence,
        reference: Mapping[str, tuple[Measured, ...]],
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
