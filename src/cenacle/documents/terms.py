"""Terms: what an owner demands of every use of an asset.

An absent field means the safe default; an empty list means none. So terms that state only
``expires`` allow nothing at all until the owner says what may be done.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cenacle.documents.base import Digest, Document, Frozen, Natural, NonEmpty, Timestamp
from cenacle.documents.protection import Protection, ProtectionByUse
from cenacle.documents.serving import ServingTerms

__all__ = ["OutputKind", "PartyPattern", "Price", "PrivacyBudget", "Terms"]

OutputKind = Literal["model", "metrics", "table", "file"]

PartyPattern = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:@sha256:[0-9a-f]{64})?$", max_length=140
    ),
]
"""A party's name, or its name and the digest of its Party document (``clinic@sha256:...``)."""

Scheme = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
RecipeName = Annotated[
    str, StringConstraints(pattern=r"^(?:[a-z][a-z0-9-]{0,30}|sha256:[0-9a-f]{64})$")
]


class PrivacyBudget(Frozen):
    """The total differential privacy loss of all uses ever."""

    epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, lt=1)


class Price(Frozen):
    """What one use costs, in the currency's minor unit (cents)."""

    amount: Natural
    currency: Currency


class Terms(Document):
    """What the owner demands.

    Attributes:
        protection: the weakest protection under which plaintext may exist, for every use or
            each of training and inference. Default ``tee``.
        programs: package digests that may run on the asset. Default none.
        recipes: model types (``logistic``, ``mlp``, ...) or recipe digests. Default none.
        offload: schemes under which algebra may leave the enclave. Default ``enclave``: it
            may not.
        privacy: total budget over all uses, or ``unbounded`` when outputs need no
            differential privacy. Default a budget of zero.
        recipients: who may receive outputs. Absent: the owner alone. Empty: nobody.
        outputs: kinds of output that may leave the enclave. Default none.
        purposes: purposes that a contract may state. Default none.
        uses: how many runs in all. Default one.
        serving: how a model may be served. Absent: not at all.
        expires: after this moment, no use.
        price: what a contract must pay the owner for a use. Absent: nothing.
        approval: ``owner``: the owner signs each contract (default). ``terms``: a contract
            that meets the terms needs no signature of the owner.
    """

    media_type = "application/vnd.cenacle.terms+json"

    kind: Literal["terms"] = "terms"
    version: Literal[1] = 1
    protection: Protection | ProtectionByUse = "tee"
    programs: tuple[Digest, ...] = ()
    recipes: tuple[RecipeName, ...] = ()
    offload: tuple[Scheme, ...] = ("enclave",)
    privacy: PrivacyBudget | Literal["unbounded"] = PrivacyBudget(epsilon=0.0, delta=0.0)
    recipients: tuple[PartyPattern, ...] | None = None
    outputs: tuple[OutputKind, ...] = ()
    purposes: tuple[NonEmpty, ...] = ()
    uses: Natural = 1
    serving: ServingTerms | None = None
    expires: Timestamp
    price: Price | None = None
    approval: Literal["owner", "terms"] = "owner"
