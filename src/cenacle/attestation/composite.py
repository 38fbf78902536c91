"""Composite evidence: one CPU kind and any number of accelerators, bound to one key.

Each accelerator's evidence binds a hash of the report data and of its place among them; the
CPU's evidence binds a hash of the report data and of every accelerator's evidence. So the CPU's
trusted environment vouches that it received just these, in this order: none can be left out,
exchanged, shown twice or taken from another machine's evidence. Nonces alone would not do: a host
can ask any GPU to sign a nonce that it has seen.

The body holds ``cpu`` and ``accelerators`` (``kind`` and ``body`` each) and ``bound``, the 64
bytes that all of them stand for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import Field

from cenacle.attestation.accelerator_evidence import AcceleratorAttester, AcceleratorVerifier
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Attester, Shown, Verifier
from cenacle.crypto.kdf import encode_fields
from cenacle.documents.base import (
    Base64,
    Frozen,
    JsonObject,
    Name,
    b64,
    canonical_json,
    unb64,
)
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Measured, Protection, at_least, protection_of
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = [
    "CompositeAttester",
    "CompositePolicy",
    "CompositeVerifier",
    "judge_composite",
    "members_of",
]

_KIND: Final = "composite"
# Kinds that speak for a whole machine, with the driver in it. An SGX or Nitro enclave has devices
# only through a host that it does not measure, which could show it any device's evidence.
_MACHINES: Final = frozenset({"tdx", "snp", "az-snp-vtpm", "tpm", "ima", "simulated"})
_MAX_ACCELERATORS: Final = 32
_BOUND_BYTES: Final = 64

_Judge = Callable[[Claims, Mapping[str, Any]], list[Clause]]


class _Member(Frozen):
    kind: Name
    body: Annotated[JsonObject, Field(min_length=1)]

    def evidence(self) -> Evidence:
        return Evidence(kind=self.kind, body=self.body)


class _Body(Frozen):
    cpu: _Member
    accelerators: Annotated[tuple[_Member, ...], Field(max_length=_MAX_ACCELERATORS)]
    bound: Base64
    statement: JsonObject | None = None


class CompositePolicy(Frozen):
    """What a contract demands of the machine as a whole.

    Attributes:
        kinds: the evidence that it must show, the CPU's first, e.g. ``[tdx, nvidia, nvidia]``:
            a contract always says how many accelerators there are.
        members: the policy of each kind, by name; a kind that is left out has its strictest.
    """

    kinds: Annotated[tuple[Name, ...], Field(min_length=1)]
    members: dict[Name, JsonObject] = Field(default_factory=dict)


def _bound_by_accelerator(bound: bytes, kind: str, index: int, count: int) -> bytes:
    fields = encode_fields(
        b"cenacle/composite-accelerator/v1",
        bound,
        kind.encode(),
        index.to_bytes(4, "big"),
        count.to_bytes(4, "big"),
    )
    return hashlib.sha512(fields).digest()


def _bound_by_cpu(bound: bytes, accelerators: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    fields = [
        part
        for kind, body in accelerators
        for part in (kind.encode(), hashlib.sha512(canonical_json(dict(body))).digest())
    ]
    return hashlib.sha512(encode_fields(b"cenacle/composite-cpu/v1", bound, *fields)).digest()


class CompositeAttester(Attester):
    """Collects the accelerators' evidence, then the CPU's over all of it."""

    kind = _KIND

    def __init__(self, cpu: Attester, accelerators: Sequence[AcceleratorAttester]) -> None:
        _check_machine(cpu.kind, InputError)
        self._cpu = cpu
        self._accelerators = tuple(accelerators)

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        count = len(self._accelerators)
        collected = [
            (
                attester.kind,
                attester.collect(_bound_by_accelerator(bound, attester.kind, index, count), now),
            )
            for index, attester in enumerate(self._accelerators)
        ]
        return {
            "cpu": {
                "kind": self._cpu.kind,
                "body": self._cpu.collect(_bound_by_cpu(bound, collected), now),
            },
            "accelerators": [{"kind": kind, "body": body} for kind, body in collected],
            "bound": b64(bound),
        }


def _check_machine(kind: str, error: type[CenacleError]) -> None:
    if kind not in _MACHINES:
        raise error(
            "composite evidence starts with that of a whole machine, drivers included",
            found=kind,
            expected=" or ".join(sorted(_MACHINES - {"simulated"})),
        )


class CompositeVerifier(Verifier):
    """Judges every member with the verifier of its kind, and that they belong together.

    Claims have the CPU's measurements under their own names. A measurement on whose value all
    accelerators agree is ``gpu.NAME``; where they differ it is ``gpu0.NAME``, ``gpu1.NAME`` and
    so on. The protection is that of the weakest member.

    Args:
        members: verifiers of the kinds that may take part, CPUs' and accelerators'.
    """

    kind = _KIND

    def __init__(self, members: Sequence[Verifier]) -> None:
        self._members = {member.kind: member for member in members}
        if len(self._members) != len(members) or _KIND in self._members:
            raise EvidenceError(
                "a composite verifier needs one verifier for each kind",
                found=", ".join(member.kind for member in members),
            )

    @property
    def protection(self) -> Protection:
        """What evidence can prove at best; ``simulated`` if any member may be simulated."""
        weakest = min(self._members.values(), key=_strength, default=None)
        if weakest is None or weakest.protection == "simulated":
            return "simulated"
        return protection_of(_KIND)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        if evidence.kind != _KIND:
            raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=_KIND)
        try:
            body = _Body.from_fields(evidence.body)
            bound = unb64(body.bound)
            bound_by_cpu = _bound_by_cpu(
                bound, [(member.kind, member.body) for member in body.accelerators]
            )
        except CenacleError as error:
            raise EvidenceError(
                "composite evidence is malformed", found=error.diagnostics()
            ) from None
        if len(bound) != _BOUND_BYTES:
            raise EvidenceError(
                "composite evidence binds another number of bytes",
                found=len(bound),
                expected=_BOUND_BYTES,
            )
        count = len(body.accelerators)
        cpu = self._judge_cpu(body.cpu, bound_by_cpu, now)
        accelerators = [
            self._judge_accelerator(
                member, index, _bound_by_accelerator(bound, member.kind, index, count), now
            )
            for index, member in enumerate(body.accelerators)
        ]
        _check_distinct(accelerators)
        members = [cpu, *accelerators]
        claims = Claims(
            kind=_KIND,
            protection=min((member.protection for member in members), key=_rank),
            measurements=_merge(cpu, accelerators),
            properties={
                "members": [
                    {
                        "kind": member.kind,
                        "protection": member.protection,
                        "measurements": member.measurements,
                        "properties": member.properties,
                    }
                    for member in members
                ]
            },
            layers=(),
            issued=min(member.issued for member in members),
        )
        return Shown(claims, bound)

    def _judge_cpu(self, member: _Member, bound: bytes, now: datetime) -> Claims:
        _check_machine(member.kind, EvidenceError)
        verifier = self._verifier(member)
        return _judge(verifier, member, "the CPU", verifier.binding(bound), now)

    def _judge_accelerator(
        self, member: _Member, index: int, bound: bytes, now: datetime
    ) -> Claims:
        verifier = self._verifier(member)
        if not isinstance(verifier, AcceleratorVerifier):
            raise EvidenceError(
                "composite evidence holds a second kind that is no accelerator's",
                found=member.kind,
                expected="one CPU's, then accelerators'",
            )
        where = f"accelerator {index}"
        return _judge(verifier, member, where, verifier.part_binding(bound), now)

    def _verifier(self, member: _Member) -> Verifier:
        verifier = self._members.get(member.kind)
        if verifier is None:
            raise EvidenceError(
                "no verifier for a part of composite evidence",
                found=member.kind,
                expected=" or ".join(sorted(self._members)),
            )
        return verifier


def _judge(
    verifier: Verifier, member: _Member, which: str, expected: bytes, now: datetime
) -> Claims:
    if "statement" in member.body:
        raise EvidenceError(
            "a part of composite evidence has a statement of its own",
            found=which,
            expected="one statement, of the whole",
        )
    try:
        shown = verifier.inspect(member.evidence(), now)
    except EvidenceError as error:
        raise EvidenceError(
            f"the evidence of {which} ({member.kind}) is not accepted: {error.what}",
            found=error.found,
            expected=error.expected,
            remedy=error.remedy,
        ) from None
    if not hmac.compare_digest(shown.bound, expected):
        raise EvidenceError(
            f"the evidence of {which} ({member.kind}) does not belong to the rest",
            found=shown.bound[:12].hex(),
            expected=expected[:12].hex(),
            remedy="evidence cannot be put together from parts: make fresh evidence",
        )
    return shown.claims


_ORDER: Final[tuple[Protection, ...]] = ("simulated", "measured", "tee")


def _rank(protection: Protection) -> int:
    return sum(at_least(protection, other) for other in _ORDER)


def _strength(verifier: Verifier) -> int:
    return _rank(verifier.protection)


def _check_distinct(accelerators: Sequence[Claims]) -> None:
    devices = [claims.properties.get("device") for claims in accelerators]
    for index, device in enumerate(devices):
        if device is None or device in devices[:index]:
            raise EvidenceError(
                "composite evidence shows one accelerator twice",
                found=f"accelerator {index}: {device or 'no device identifier'}",
                expected="as many devices as parts",
            )


def _merge(cpu: Claims, accelerators: Sequence[Claims]) -> dict[str, Measured]:
    merged = dict(cpu.measurements)
    names = sorted({name for claims in accelerators for name in claims.measurements})
    for name in names:
        values = [claims.measurements.get(name) for claims in accelerators]
        if len(set(values)) == 1 and values[0] is not None:
            found = {f"gpu.{name}": values[0]}
        else:
            found = {
                f"gpu{index}.{name}": value
                for index, value in enumerate(values)
                if value is not None
            }
        for key, value in found.items():
            if key in merged:
                raise EvidenceError("two parts of composite evidence use one name", found=key)
            merged[key] = value
    return merged


def members_of(claims: Claims) -> tuple[Claims, ...]:
    """The claims of each part, the CPU's first.

    Raises:
        EvidenceError: the claims are not those of composite evidence.
    """
    members = claims.properties.get("members")
    if claims.kind != _KIND or not isinstance(members, list):
        raise EvidenceError("claims are of another kind", found=claims.kind, expected=_KIND)
    return tuple(Claims(**member, layers=(), issued=claims.issued) for member in members)


def judge_composite(claims: Claims, policy: CompositePolicy, judge: _Judge) -> list[Clause]:
    """Whether the parts are those demanded, then each kind's own clauses.

    Args:
        judge: how the claims of one kind are judged by the fields of its policy.
    """
    members = members_of(claims)
    found = [member.kind for member in members]
    clauses = [
        check(
            "contract",
            "composite kinds",
            tuple(found) == policy.kinds,
            " + ".join(found),
            " + ".join(policy.kinds),
            "run on a machine with these parts, or draft a new contract",
        )
    ]
    strange = sorted(set(policy.members) - set(found))
    if strange:
        clauses.append(
            check(
                "contract",
                "composite members",
                False,
                f"a policy for {', '.join(strange)}",
                "policies for kinds that are shown",
                "correct enclave.policy in a new contract",
            )
        )
    for index, member in enumerate(members):
        for clause in judge(member, policy.members.get(member.kind, {})):
            where = "cpu" if index == 0 else f"gpu{index - 1}"
            clauses.append(_named(clause, f"{where} {clause.name}"))
    return clauses


def _named(clause: Clause, name: str) -> Clause:
    return Clause(
        clause.subject, name, clause.found, clause.demanded, clause.verdict, clause.remedy
    )
