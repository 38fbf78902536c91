"""Terms matched against a contract: every clause, with what was found and demanded.

Pure: no clock, no store. What only the moment of use can tell (protection shown, uses left)
comes in as :class:`UseFacts`; without them those clauses are ``pending``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from cenacle.documents.asset import Asset
from cenacle.documents.base import minutes, parse_time, short
from cenacle.documents.clauses import Clause, check
from cenacle.documents.contract import AssetRef, Contract, RecipeJob, ServeJob
from cenacle.documents.privacy import PrivacyLoss
from cenacle.documents.protection import (
    Protection,
    ProtectionByUse,
    at_least,
    demanded_for,
    strongest,
)
from cenacle.documents.terms import PrivacyBudget

__all__ = ["UseFacts", "match_terms"]


@dataclass(frozen=True)
class UseFacts:
    """What the broker knows at the moment of use.

    Attributes:
        protection: what the evidence proved.
        uses: runs of the asset that are reserved or settled already, this one not counted.
    """

    protection: Protection
    uses: int


def match_terms(
    alias: str,
    assets: Mapping[str, Asset],
    contract: Contract,
    *,
    now: datetime,
    signed: frozenset[str],
    facts: UseFacts | None = None,
    loss: PrivacyLoss | None = None,
) -> list[Clause]:
    """Every clause of one asset's terms, in a fixed order.

    Args:
        alias: the asset's name in the contract.
        assets: the contract's assets by alias, their manifests verified.
        now: the moment of decision, aware.
        signed: parties whose signature of this contract was verified.
        facts: ``None`` for a review before the job.
        loss: what the broker's ledger makes of the contract's privacy plan for this asset; without
            it the clause of a bounded budget is ``pending``.
    """
    asset = assets[alias]
    terms = asset.terms
    subject = f"asset {alias} of {asset.owner}"

    def clause(name: str, met: bool, found: object, demanded: object, remedy: str) -> Clause:
        return check(subject, name, met, found, demanded, remedy)

    return [
        _identity(alias, asset, contract, subject),
        clause(
            "broker",
            asset.broker == contract.broker,
            short(contract.broker),
            short(asset.broker),
            "seal the asset again for this broker",
        ),
        _approval(asset, signed, subject),
        _protection(asset, contract.assets.get(alias), contract, facts, subject),
        _job(alias, assets, contract, subject),
        clause(
            "offload",
            contract.offload_permission in terms.offload,
            contract.offload_permission,
            _listed(terms.offload),
            "choose a scheme that the owner allows",
        ),
        _privacy(alias, asset, contract, loss, facts is None),
        clause(
            "outputs",
            all(output.kind in terms.outputs for output in contract.outputs),
            _listed(sorted({output.kind for output in contract.outputs})),
            _listed(terms.outputs),
            "drop the output, or ask the owner to allow its kind",
        ),
        _recipients(asset, contract, subject),
        clause(
            "purpose",
            contract.purpose in terms.purposes,
            repr(contract.purpose),
            _listed([repr(p) for p in terms.purposes]),
            "state a purpose that the owner allows",
        ),
        _uses(asset, facts, subject),
        clause(
            "expires",
            now <= parse_time(terms.expires),
            minutes(now),
            f"until {terms.expires}",
            "ask the owner to seal new terms",
        ),
        _price(asset, contract, subject),
    ]


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"


def _identity(alias: str, asset: Asset, contract: Contract, subject: str) -> Clause:
    ref = contract.assets.get(alias)
    found = (
        "not in the contract"
        if ref is None
        else f"{short(ref.digest)} of {ref.owner} ({short(contract.parties[ref.owner])})"
    )
    return check(
        subject,
        "identity",
        ref is not None
        and ref.digest == asset.digest
        and ref.owner == asset.owner
        and contract.parties[ref.owner] == asset.owner_digest,
        found,
        f"{short(asset.digest)} of {asset.owner} ({short(asset.owner_digest)})",
        "draft the contract again from the asset's current manifest",
    )


def _approval(asset: Asset, signed: frozenset[str], subject: str) -> Clause:
    by_terms = asset.terms.approval == "terms"
    return check(
        subject,
        "approval",
        by_terms or asset.owner in signed,
        "the terms suffice" if by_terms else f"signed by {_listed(sorted(signed))}",
        "no signature beyond the terms" if by_terms else f"the signature of {asset.owner}",
        f"{asset.owner} runs `cenacle sign`",
    )


def _protection(
    asset: Asset, ref: AssetRef | None, contract: Contract, facts: UseFacts | None, subject: str
) -> Clause:
    # A contract may demand more for an asset than its owner does, never less.
    more = None if ref is None else ref.protection
    demands = [asset.terms.protection] + ([] if more is None else [more])
    demanded = strongest(*(demanded_for(demand, contract.use) for demand in demands))
    by_use = any(isinstance(demand, ProtectionByUse) for demand in demands)
    shown = contract.enclave.weakest if facts is None else facts.protection
    met = at_least(shown, demanded)
    clause = check(
        subject,
        "protection",
        met,
        f"{shown}" + (" accepted by the contract" if facts is None else " proved by evidence"),
        f"{demanded} or stronger" + (f" for {contract.use}" if by_use else ""),
        "run on stronger hardware, or ask the owner to accept less",
    )
    if facts is None and met:
        return replace(clause, verdict="pending")
    return clause


def _job(alias: str, assets: Mapping[str, Asset], contract: Contract, subject: str) -> Clause:
    terms, job = assets[alias].terms, contract.job
    if isinstance(job, RecipeJob):
        digest, model = job.program_digest(), job.recipe.model.type
        return check(
            subject,
            "recipe",
            model in terms.recipes or digest in terms.recipes,
            f"{model} ({short(digest)})",
            _listed(short(r) if r.startswith("sha256:") else r for r in terms.recipes),
            "choose a recipe that the owner allows",
        )
    if isinstance(job, ServeJob):
        return _serving(assets[alias], job, subject)
    package = assets[job.program].package
    if alias == job.program:
        return check(
            subject,
            "program",
            package is not None,
            f"a {assets[alias].type}",
            "a program",
            "name an asset that was sealed as a program as the job's program",
        )
    return check(
        subject,
        "program",
        package is not None and package in terms.programs,
        "not a program" if package is None else short(package),
        _listed(short(p) for p in terms.programs),
        "ask the owner to allow this very program",
    )


def _serving(asset: Asset, job: ServeJob, subject: str) -> Clause:
    terms = asset.terms.serving
    tickets = "no tickets" if job.tickets is None else f"tickets of {job.tickets}"
    found = f"{job.outputs.in_words()}, for {tickets}"
    if terms is None or asset.type != "model" or asset.content != "tensors":
        return check(
            subject,
            "serving",
            False,
            found if terms is None else f"a {asset.type} of {asset.content}",
            "not to be served" if terms is None else "a model whose tensors `cenacle cut` wrote",
            "ask the owner to state serving in the terms"
            if terms is None
            else "seal the tail that `cenacle cut` writes as a model",
        )
    return check(
        subject,
        "serving",
        job.outputs.tells_at_most(terms.outputs)
        and (not terms.tickets or job.tickets == asset.owner),
        found,
        f"at most {terms.outputs.in_words()}"
        + (f", for tickets of {asset.owner}" if terms.tickets else ""),
        "let queries be told less, and name the owner as issuer of tickets where they are demanded",
    )


def _privacy(
    alias: str, asset: Asset, contract: Contract, loss: PrivacyLoss | None, review: bool
) -> Clause:
    subject = f"asset {alias} of {asset.owner}"
    budget, plan = asset.terms.privacy, contract.privacy
    bounded = contract.protects(alias)
    promised = (
        f"epsilon <= {plan.epsilon:g} at delta {plan.delta:g} for this job"
        if plan is not None and bounded
        else "no differential privacy: epsilon unbounded"
    )
    if not isinstance(budget, PrivacyBudget):
        return check(subject, "privacy", True, promised, "no bound")
    demanded = f"epsilon <= {budget.epsilon:g} at delta {budget.delta:g} over all jobs"
    if not bounded or plan is None:
        return check(
            subject,
            "privacy",
            False,
            promised,
            demanded,
            "state a privacy plan in the contract; without one the owner must state "
            "`privacy: unbounded`",
        )
    if loss is None:
        return Clause(
            subject=subject,
            name="privacy",
            found=promised,
            demanded=demanded,
            verdict="pending",
            remedy="the broker composes it with earlier jobs",
        )
    met = loss.total <= budget.epsilon
    found = (
        f"epsilon {_figure(loss.total)} with this job, {_figure(loss.spent)} before it, at delta "
        f"{budget.delta:g}"
    )
    clause = check(
        subject,
        "privacy",
        met,
        found,
        demanded,
        f"{_figure(max(0.0, budget.epsilon - loss.spent))} is left: plan more noise, fewer epochs "
        "or a smaller sampling probability, or ask the owner for a larger budget",
    )
    # Other jobs may be charged before this one.
    return replace(clause, verdict="pending") if review and met else clause


def _figure(epsilon: float) -> str:
    return "unbounded" if math.isinf(epsilon) else f"{epsilon:.4g}"


def _recipients(asset: Asset, contract: Contract, subject: str) -> Clause:
    allowed = asset.terms.recipients
    patterns = (asset.owner,) if allowed is None else allowed
    names = set()
    for pattern in patterns:
        name, _, digest = pattern.partition("@")
        if "@" not in pattern or contract.parties.get(name) == digest:
            names.add(name)
    receivers = sorted({output.recipient for output in contract.outputs})
    return check(
        subject,
        "recipients",
        all(receiver in names for receiver in receivers),
        _listed(receivers),
        _listed(pattern[:90] for pattern in patterns),
        "send outputs only to parties that the owner allows",
    )


def _uses(asset: Asset, facts: UseFacts | None, subject: str) -> Clause:
    limit = asset.terms.uses
    if facts is None:
        return Clause(
            subject=subject,
            name="uses",
            found="known when the enclave asks",
            demanded=f"at most {limit}",
            verdict="pending",
        )
    return check(
        subject,
        "uses",
        facts.uses + 1 <= limit,
        f"use {facts.uses + 1}",
        f"at most {limit}",
        "ask the owner for more uses",
    )


def _price(asset: Asset, contract: Contract, subject: str) -> Clause:
    price = asset.terms.price
    if price is None:
        return check(subject, "price", True, "nothing asked", "nothing")
    paid = contract.payment_to(asset.owner, price.currency)
    return check(
        subject,
        "price",
        paid >= price.amount,
        f"{paid / 100:.2f} {price.currency} to {asset.owner}",
        f"{price.amount / 100:.2f} {price.currency}",
        "add a payment to the owner",
    )
