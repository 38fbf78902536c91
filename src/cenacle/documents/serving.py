"""Serving: what a model that stays in an enclave may tell those who query it."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from cenacle.documents.base import Digest, Frozen, Name, canonical_json, sha256_digest

__all__ = ["OutputPolicy", "ServeJob", "ServingTerms"]

OutputForm = Literal["label", "top-k", "scores"]

_ORDER: Final[dict[str, int]] = {"label": 0, "top-k": 1, "scores": 2}


class OutputPolicy(Frozen):
    """What leaves the enclave of one row's scores. The less, the dearer it is to steal the model.

    Whoever has all scores of enough queries can train a copy (Tramer et al. 2016, *Stealing
    Machine Learning Models via Prediction APIs*); labels and rounding make that take more
    queries, and prevent it never.

    Attributes:
        form: ``label``: the index of the greatest score. ``top-k``: the indices of the ``k``
            greatest, and their scores. ``scores``: every output as it is.
        k: how many, for ``top-k``.
        decimals: scores are rounded to so many decimals; left out, they are not.
    """

    form: OutputForm
    k: Annotated[int, Field(ge=1, le=1000)] | None = None
    decimals: Annotated[int, Field(ge=0, le=9)] | None = None

    @model_validator(mode="after")
    def _fields_are_used(self) -> Self:
        if (self.form == "top-k") != (self.k is not None):
            raise ValueError("k belongs to top-k, which needs it")
        if self.form == "label" and self.decimals is not None:
            raise ValueError("a label has no decimals: leave decimals out")
        return self

    def tells_at_most(self, allowed: OutputPolicy) -> bool:
        """Whether it tells nothing that ``allowed`` would not."""
        if _ORDER[self.form] > _ORDER[allowed.form]:
            return False
        if self.k is not None and allowed.k is not None and self.k > allowed.k:
            return False
        if self.form == "label" or allowed.decimals is None:
            return True
        return self.decimals is not None and self.decimals <= allowed.decimals

    def in_words(self) -> str:
        """For a clause or a review."""
        rounded = "" if self.decimals is None else f" rounded to {self.decimals} decimals"
        match self.form:
            case "label":
                return "the label alone"
            case "top-k":
                return f"the top {self.k} labels with scores{rounded}"
        return f"all scores{rounded}"


class ServingTerms(Frozen):
    """What the owner of a model demands of those who serve it.

    Attributes:
        outputs: the most that a query may be told. Default the label alone.
        tickets: each query needs a ticket that the owner signed. Default true.
    """

    outputs: OutputPolicy = OutputPolicy(form="label")
    tickets: bool = True

    def in_words(self) -> str:
        """One sentence, for someone who must decide."""
        paid = "with a ticket that the owner signed" if self.tickets else "without tickets"
        return f"It may be served {paid}; a query may be told {self.outputs.in_words()}."


class ServeJob(Frozen):
    """Answer queries with a sealed model until the operator asks the enclave to end.

    Attributes:
        model: alias of the asset that holds the model, or the confidential tail of one.
        front: SHA-256 of the public front's file, which runs outside; left out, the whole model
            is in the enclave.
        outputs: what of the scores leaves the enclave.
        tickets: the party whose tickets queries need; left out, whoever reaches the service may
            ask, as often as they like.
        sealed_only: take sealed queries alone, which the operator cannot read.
        memory_mb: MiB that the model's parameters may take in the enclave; what does not fit is
            read from the sealed file at each use. Left out, all of them stay in memory.
        max_batch: rows that are computed together.
        max_wait_ms: how long a row may wait for others.
    """

    type: Literal["serve"] = "serve"
    model: Name
    front: Digest | None = None
    outputs: OutputPolicy
    tickets: Name | None = None
    sealed_only: bool = False
    memory_mb: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    max_wait_ms: Annotated[float, Field(ge=0.0, le=1000.0)] = 2.0

    def program_digest(self) -> str:
        """What the ``program`` measurement must be: the digest of the canonical job."""
        return sha256_digest(canonical_json(self.to_fields()))
