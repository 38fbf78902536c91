"""What a contract demands of evidence beside its measurements, by kind: policies and verdicts.

A policy is part of the contract as plain fields. Its form belongs to the evidence kind, so it
is read here and not with the contract: :func:`policy_of` refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Final, NamedTuple

from cenacle.attestation.claims import Claims, compare
from cenacle.documents.base import Frozen
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Measured
from cenacle.errors import CenacleError, DocumentError, UnavailableError

__all__ = ["appraise", "check_policies", "judge", "policy_kinds", "policy_of"]


_PARTS: Final = "composite"


class _Kind(NamedTuple):
    model: type[Frozen]
    judge: Callable[[Claims, Any], list[Clause]]


# Home, model and verdict of each kind; imported when a contract or evidence of it comes up.
_HOMES: Final = {
    "tpm": ("tpm", "TpmPolicy", "judge_tpm"),
    "ima": ("ima", "ImaPolicy", "judge_ima"),
    "sgx": ("sgx", "SgxPolicy", "judge_sgx"),
    "tdx": ("tdx", "TdxPolicy", "judge_tdx"),
    "snp": ("snp_policy", "SnpPolicy", "judge_snp"),
    "az-snp-vtpm": ("snp_policy", "AzSnpVtpmPolicy", "judge_az_snp_vtpm"),
    "nitro": ("nitro", "NitroPolicy", "judge_nitro"),
    "nvidia": ("nvidia", "NvidiaPolicy", "judge_nvidia"),
    "composite": ("composite", "CompositePolicy", "judge_composite"),
}


# Kinds whose policy chooses which measurements identify what runs.
_IDENTITIES: Final = {"sgx": ("sgx", "sgx_identity"), "tdx": ("tdx", "tdx_identity")}


def _kind(name: str) -> _Kind | None:
    if name not in _HOMES:
        return None
    home, model, verdict = _HOMES[name]
    try:
        module = import_module(f"cenacle.attestation.{home}")
    except ImportError as error:
        raise UnavailableError(
            f"the policy of {name} evidence cannot be read here",
            found=f"no {error.name}",
            remedy="pip install 'cenacle[attest]'",
        ) from None
    decide = getattr(module, verdict)
    # Its parts are judged by the policies of their own kinds.
    return _Kind(getattr(module, model), partial(decide, judge=judge) if name == _PARTS else decide)


def policy_kinds() -> tuple[str, ...]:
    """Evidence kinds that have a policy."""
    return tuple(_HOMES)


def policy_of(kind: str, fields: Mapping[str, Any]) -> Frozen | None:
    """The policy of a kind from its fields; ``None`` for a kind that has none.

    Raises:
        DocumentError: the kind has no policy and fields are given, or they are not its fields.
    """
    found = _kind(kind)
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
        if kind == _PARTS and isinstance(members := fields.get("members"), dict):
            check_policies(members)


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
    kind = _kind(claims.kind)
    return [] if policy is None or kind is None else kind.judge(claims, policy)


def appraise(
    claims: Claims, reference: Mapping[str, tuple[Measured, ...]], fields: Mapping[str, Any]
) -> list[Clause]:
    """Everything that evidence must show: reference values, in both directions, and the policy.

    Args:
        reference: accepted values by measurement.
        fields: the policy of the kind of the claims; empty for the strictest.
    """
    aside = _judged_otherwise(claims, fields)
    identified = claims.model_copy(
        update={"measurements": {n: v for n, v in claims.measurements.items() if n not in aside}}
    )
    return [*compare(identified, reference), *judge(claims, fields)]


def _judged_otherwise(claims: Claims, fields: Mapping[str, Any]) -> frozenset[str]:
    """Measurements that the policy judges by other means than their value."""
    if claims.kind == _PARTS:
        members = import_module("cenacle.attestation.composite").members_of(claims)
        inner = fields.get("members")
        policy = inner.get(members[0].kind) if isinstance(inner, dict) else None
        return _judged_otherwise(members[0], policy) if isinstance(policy, dict) else frozenset()
    if claims.kind not in _IDENTITIES:
        return frozenset()
    try:
        policy = policy_of(claims.kind, fields)
    except CenacleError:
        return frozenset()  # and its clause fails
    home, name = _IDENTITIES[claims.kind]
    identify = getattr(import_module(f"cenacle.attestation.{home}"), name)
    return frozenset(claims.measurements) - frozenset(identify(claims, policy).measurements)
