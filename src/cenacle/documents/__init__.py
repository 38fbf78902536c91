"""The signed nouns, and the pure rules that match terms against a contract.

Names are imported at their first use: who checks a signature needs no recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.documents.approval import AllOf, AnyOf, AtLeast, Rule, approves
    from cenacle.documents.asset import Asset, Container
    from cenacle.documents.base import Document, sha256_digest
    from cenacle.documents.clauses import Clause, all_met, failed
    from cenacle.documents.contract import (
        AssetRef,
        Contract,
        EnclaveRequirements,
        OffloadPlan,
        Output,
        Payment,
        ProgramJob,
        RecipeJob,
        Veto,
    )
    from cenacle.documents.dsse import Envelope
    from cenacle.documents.matching import UseFacts, match_terms
    from cenacle.documents.party import Party
    from cenacle.documents.receipt import Receipt, ReceiptBundle, Statement
    from cenacle.documents.recipe import Recipe
    from cenacle.documents.serving import OutputPolicy, ServeJob, ServingTerms
    from cenacle.documents.terms import Price, PrivacyBudget, Terms
    from cenacle.documents.ticket import Ticket, TicketUse

__all__ = [
    "AllOf",
    "AnyOf",
    "Asset",
    "AssetRef",
    "AtLeast",
    "Clause",
    "Container",
    "Contract",
    "Document",
    "EnclaveRequirements",
    "Envelope",
    "OffloadPlan",
    "Output",
    "OutputPolicy",
    "Party",
    "Payment",
    "Price",
    "PrivacyBudget",
    "ProgramJob",
    "Receipt",
    "ReceiptBundle",
    "Recipe",
    "RecipeJob",
    "Rule",
    "ServeJob",
    "ServingTerms",
    "Statement",
    "Terms",
    "Ticket",
    "TicketUse",
    "UseFacts",
    "Veto",
    "all_met",
    "approves",
    "failed",
    "match_terms",
    "sha256_digest",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AllOf": "approval",
        "AnyOf": "approval",
        "Asset": "asset",
        "AssetRef": "contract",
        "AtLeast": "approval",
        "Clause": "clauses",
        "Container": "asset",
        "Contract": "contract",
        "Document": "base",
        "EnclaveRequirements": "contract",
        "Envelope": "dsse",
        "OffloadPlan": "contract",
        "Output": "contract",
        "OutputPolicy": "serving",
        "Party": "party",
        "Payment": "contract",
        "Price": "terms",
        "PrivacyBudget": "terms",
        "ProgramJob": "contract",
        "Receipt": "receipt",
        "ReceiptBundle": "receipt",
        "Recipe": "recipe",
        "RecipeJob": "contract",
        "Rule": "approval",
        "ServeJob": "serving",
        "ServingTerms": "serving",
        "Statement": "receipt",
        "Terms": "terms",
        "Ticket": "ticket",
        "TicketUse": "ticket",
        "UseFacts": "matching",
        "Veto": "contract",
        "all_met": "clauses",
        "approves": "approval",
        "failed": "clauses",
        "match_terms": "matching",
        "sha256_digest": "base",
    },
)
