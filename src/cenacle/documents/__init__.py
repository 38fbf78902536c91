"""The signed nouns, and the pure rules that match terms against a contract."""

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
    "UseFacts",
    "Veto",
    "all_met",
    "approves",
    "failed",
    "match_terms",
    "sha256_digest",
]
