"""Evidence as it travels, claims as they are believed, and their comparison with references."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from cenacle.documents.base import Document, Frozen, JsonObject, Name, short
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Measured, Protection

__all__ = ["Claims", "Evidence", "compare"]


class Evidence(Document):
    """What an enclave shows: a kind, and a body that only that kind's verifier reads."""

    media_type = "application/vnd.cenacle.evidence+json"

    version: Literal[1] = 1
    kind: Name
    body: Annotated[JsonObject, Field(min_length=1)]


class Claims(Frozen):
    """What a verifier believes after authenticating evidence.

    Attributes:
        measurements: name to digest or register value, all of them really vouched for by the
            evidence; compared with the contract's reference values in both directions.
        properties: what else the evidence proves, for a policy to judge: TCB status, security
            versions, chip identifiers, versions of firmware.
        layers: sandbox layers that were active, as the measured agent reports them.
        issued: when the evidence was made, by its own clock if it has one.
    """

    kind: Name
    protection: Protection
    measurements: dict[str, Measured]
    properties: JsonObject = Field(default_factory=dict)
    layers: tuple[Name, ...]
    issued: datetime


def compare(claims: Claims, reference: Mapping[str, tuple[Measured, ...]]) -> list[Clause]:
    """Measurements against reference values, one clause each, in both directions.

    A reference that the evidence does not show fails (it cannot pass unused), an empty list
    of accepted digests fails (it does not mean "skip"), and a measurement without a
    reference fails (nothing runs unapproved).
    """
    clauses = []
    for name in sorted(set(reference) | set(claims.measurements)):
        accepted = reference.get(name, ())
        shown = claims.measurements.get(name)
        clauses.append(
            check(
                "contract",
                f"measurement {name}",
                shown is not None and shown in accepted,
                "not in the evidence" if shown is None else short(shown),
                " or ".join(short(digest) for digest in accepted) or "no reference value",
                "the enclave runs something that was not approved: restore it, or draft a new "
                "contract with `cenacle draft` and have it signed",
            )
        )
    return clauses
