"""What a contract demands of evidence beside its measurements, by kind: policies and verdicts.

A policy is part of the contract as plain fields. Its form belongs to the evidence kind, so it
is read here and not with the contract: :func:`policy_of` refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from cenacle.attestation.claims import Claims
from cenacle.documents.base import Frozen
from cenacle.documents.clauses import Clause, check
from cenacle.errors import CenacleError, DocumentError

__all__ = ["check_policies", "judge", "policy_kinds", "policy_of"]


class _Kind(NamedTuple):
    model: type[Frozen]
    judge: Callable[[Claims, Any], list[Clause]]


_KINDS: Final[dict[str, _Kind]] = {}


def policy_kinds() -> tuple[str, ...]:
    """Evidence kinds that have a policy."""
    return tuple(_KINDS)


def policy_of(kind: str, fields: Mapping[str, Any]) -> Frozen | None:
    """The policy of a kind from its fields; ``None`` for a kind that has none.

    Raises:
        DocumentError: the kind has no policy and fields are given, or they are not its fields.
    """
    found = _KINDS.get(kind)
    if found is not None:
        return found.model.from_fields(dict(fields))
    if fields:
        raise DocumentError(
            f"{kind} evidence has no policy",
            found=", ".join(sorted(fields)),
            expected="no fields",
            remedy=f"remove enclave.policy.{kind}",
        )
    return None


def check_policies(policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises :class:`DocumentError` unless every kind's policy can be read."""
    for kind, fields in policies.items():
        policy_of(kind, fields)


def judge(claims: Claims, fields: Mapping[str, Any]) -> list[Clause]:
    """One clause for each demand of the kind's policy; a policy that cannot be read fails.

    Args:
        fields: the contract's policy for the kind of the claims; empty for the strictest.
    """
    try:
        policy = policy_of(claims.kind, fields)
    except CenacleError as error:
        return [
            check(
                "contract",
                f"policy {claims.kind}",
                False,
                error.diagnostics(),
                "a policy of this evidence kind",
                "correct enclave.policy in a new contract",
            )
        ]
    return [] if policy is None else _KINDS[claims.kind].judge(claims, policy)
