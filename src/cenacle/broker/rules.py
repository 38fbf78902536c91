"""Whether keys may leave: pure, and with a reason for every clause.

Nothing here reads a clock, a store or a network. The invariants:

* The answer is a list of clauses; keys may leave only if there is at least one and every one
  is met. No clause is skipped because another failed: a refusal names them all.
* What is unknown is not met. A ``pending`` clause (possible in a review only) refuses.
* A clause that forbids cannot be outvoted: there is no flag, role or policy above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from cenacle.attestation.claims import Claims
from cenacle.attestation.policies import appraise
from cenacle.documents.approval import approves, describe_rule
from cenacle.documents.asset import Asset
from cenacle.documents.base import minutes, parse_time, short
from cenacle.documents.clauses import Clause, check, failed
from cenacle.documents.contract import Contract, ProgramJob, RecipeJob
from cenacle.documents.matching import UseFacts, match_terms
from cenacle.documents.privacy import PrivacyLoss
from cenacle.documents.serving import ServeJob
from cenacle.errors import RefusedError

__all__ = [
    "Facts",
    "Lineage",
    "decide",
    "evidence_clauses",
    "expected_program",
    "require",
    "superseded_by",
]


@dataclass(frozen=True)
class Lineage:
    """Contracts linked by ``replaces``: at most one successor each.

    Attributes:
        ancestors: nearest first, each with the parties that signed it.
        descendants: nearest first, likewise.
    """

    ancestors: tuple[tuple[Contract, frozenset[str]], ...] = ()
    descendants: tuple[tuple[Contract, frozenset[str]], ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that a decision rests on; all signatures in it were verified.

    Attributes:
        broker: digest of the deciding broker's keys.
        assets: manifests by alias.
        replaced: digest of the newer manifest for each alias that has one.
        signed: parties that signed this contract.
        vetoes: reason by vetoing party.
        uses: runs of each alias's asset that are reserved or settled, this one not counted.
        promised: the epsilon of the contract's privacy plan at its delta, composed; ``None``
            where nobody composed it.
        losses: of each alias whose terms have a budget that the plan is charged to.
        claims: what the verifier believes; ``None`` in a review or if evidence failed.
        evidence_error: why the evidence was not accepted.
        review: whether this is a review before any enclave asks.
    """

    broker: str
    contract: Contract
    assets: Mapping[str, Asset]
    signed: frozenset[str]
    now: datetime
    uses: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    vetoes: Mapping[str, str] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    promised: float | None = None
    losses: Mapping[str, PrivacyLoss] = field(default_factory=dict)
    claims: Claims | None = None
    evidence_error: str | None = None
    review: bool = False


def expected_program(contract: Contract, assets: Mapping[str, Asset]) -> str:
    """The ``program`` measurement that the job demands.

    For a recipe or serving the digest of what the contract says of it; for a sealed program the
    digest of its container's ciphertext, which the enclave can measure before it has any key.
    """
    match contract.job:
        case RecipeJob() | ServeJob():
            return contract.job.program_digest()
        case ProgramJob():
            return assets[contract.job.program].container.digest


def decide(facts: Facts) -> tuple[Clause, ...]:
    """Every clause of the contract, then of every asset's terms."""
    contract = facts.contract
    clauses = [
        check(
            "contract",
            "broker",
            contract.broker == facts.broker,
            f"this broker is {short(facts.broker)}",
            short(contract.broker),
            "take the contract to the broker that it names",
        ),
        check(
            "contract",
            "approval",
            approves(contract.approval, facts.signed),
            f"signed by {', '.join(sorted(facts.signed)) or 'nobody'}",
            describe_rule(contract.approval),
            "the missing parties run `cenacle review`, then `cenacle sign`",
        ),
        _vetoes(facts),
        *_replacement(facts),
        check(
            "contract",
            "expires",
            facts.now <= parse_time(contract.expires),
            minutes(facts.now),
            f"until {contract.expires}",
            "draft a contract that replaces this one",
        ),
        *_privacy(facts),
        *_evidence(facts),
    ]
    for alias in contract.assets:
        clauses += _asset(alias, facts)
    return tuple(clauses)


def require(clauses: tuple[Clause, ...]) -> None:
    """Raises :class:`RefusedError` naming every clause that is not met."""
    wrong = failed(clauses)
    if not clauses or wrong:
        listed = "; ".join(
            f"{c.subject}: {c.name} (found {c.found}, demanded {c.demanded})" for c in wrong
        )
        raise RefusedError(
            f"the broker refuses: {listed or 'nothing was decided'}",
            remedy=wrong[0].remedy if wrong else None,
            clauses=[clause.to_fields() for clause in wrong],
        )


def _vetoes(facts: Facts) -> Clause:
    # A veto of a party that the contract gives none is on record but stops nothing.
    standing = {p: r for p, r in facts.vetoes.items() if p in facts.contract.vetoes}
    return check(
        "contract",
        "vetoes",
        not standing,
        "; ".join(f"{party}: {reason}" for party, reason in sorted(standing.items())) or "none",
        "none",
        "settle the objection and draft a contract that replaces this one",
    )


def _governing(lineage: Lineage) -> Contract | None:
    """The nearest predecessor that took effect: approved by its own rule and its governor's."""
    governing: Contract | None = None
    for contract, signed in reversed(lineage.ancestors):
        if approves(contract.approval, signed) and (
            governing is None or approves(governing.approval, signed)
        ):
            governing = contract
    return governing


def superseded_by(contract: Contract, signed: frozenset[str], lineage: Lineage) -> Contract | None:
    """The nearest successor that took effect, under the rule that governs this contract.

    A successor that only its own, laxer rule approves supersedes nothing: whoever proposes one
    cannot stop an agreement that others have made or are about to sign.
    """
    governing = _governing(lineage)
    effective = approves(contract.approval, signed) and (
        governing is None or approves(governing.approval, signed)
    )
    rule = (contract if effective or governing is None else governing).approval
    return next(
        (
            newer
            for newer, by in lineage.descendants
            if approves(newer.approval, by) and approves(rule, by)
        ),
        None,
    )


def _replacement(facts: Facts) -> list[Clause]:
    newer = superseded_by(facts.contract, facts.signed, facts.lineage)
    clauses = [
        check(
            "contract",
            "current",
            newer is None,
            "the newest approved" if newer is None else f"replaced by {short(newer.digest)}",
            "not replaced",
            "run the contract that replaces this one",
        )
    ]
    governing = _governing(facts.lineage)
    if governing is not None:
        clauses.append(
            check(
                "contract",
                "replaces",
                approves(governing.approval, facts.signed),
                f"signed by {', '.join(sorted(facts.signed)) or 'nobody'}",
                f"{describe_rule(governing.approval)}, as {short(governing.digest)} demands",
                "those who approved the replaced contract must sign this one too",
            )
        )
    return clauses


def _privacy(facts: Facts) -> list[Clause]:
    """That the noise which the plan states keeps the epsilon which it promises."""
    plan = facts.contract.privacy
    if plan is None:
        return []
    found = facts.promised
    return [
        check(
            "contract",
            "privacy",
            found is not None and found <= plan.epsilon,
            "not composed" if found is None else f"epsilon {found:.4g} at delta {plan.delta:g}",
            f"epsilon <= {plan.epsilon:g} at delta {plan.delta:g}",
            "leave noise_multiplier out of the draft: `cenacle draft` computes it",
        )
    ]


def _evidence(facts: Facts) -> list[Clause]:
    contract, claims = facts.contract, facts.claims
    kinds = " or ".join(contract.enclave.reference)
    if facts.review:
        return [
            Clause(
                subject="contract",
                name="evidence",
                found="known when the enclave asks",
                demanded=kinds,
                verdict="pending",
            )
        ]
    if claims is None:
        return [
            check(
                "contract",
                "evidence",
                False,
                facts.evidence_error or "none",
                kinds,
                "start the enclave again with `cenacle run`",
            )
        ]
    return list(evidence_clauses(contract, facts.assets, claims))


def evidence_clauses(
    contract: Contract, assets: Mapping[str, Asset], claims: Claims
) -> tuple[Clause, ...]:
    """What a contract demands of its enclave, of claims that a verifier believes."""
    kinds = " or ".join(contract.enclave.reference)
    # An unlisted kind gets no reference values, so every one of its measurements fails too.
    listed = contract.enclave.reference.get(claims.kind, {})
    program = expected_program(contract, assets)
    missing = sorted(set(contract.enclave.layers) - set(claims.layers))
    return (
        check(
            "contract",
            "evidence",
            claims.kind in contract.enclave.reference,
            claims.kind,
            kinds,
            "run on the hardware that the contract names",
        ),
        *appraise(
            claims,
            {**listed, "program": (program,)},
            contract.enclave.policy_for(claims.kind),
        ),
        check(
            "contract",
            "layers",
            not missing,
            ", ".join(claims.layers) or "none",
            ", ".join(contract.enclave.layers) or "none",
            f"install what brings {', '.join(missing)}: `cenacle enclave layers` tells",
        ),
    )


def _asset(alias: str, facts: Facts) -> list[Clause]:
    newer = facts.replaced.get(alias)
    asset = facts.assets[alias]
    use = (
        UseFacts(protection=facts.claims.protection, uses=facts.uses[alias])
        if facts.claims is not None
        else UseFacts(protection="simulated", uses=facts.uses.get(alias, 0))
    )
    return [
        *match_terms(
            alias,
            facts.assets,
            facts.contract,
            now=facts.now,
            signed=facts.signed,
            facts=None if facts.review else use,
            loss=facts.losses.get(alias),
        ),
        check(
            f"asset {alias} of {asset.owner}",
            "current",
            newer is None,
            "the newest manifest" if newer is None else f"replaced by {short(newer)}",
            "not replaced",
            "draft the contract again with the newer manifest",
        ),
    ]
