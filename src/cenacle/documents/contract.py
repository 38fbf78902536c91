"""Contract: one job, on whose terms, where, for whom; and the veto against one."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from cenacle.documents.approval import Rule, parties_of
from cenacle.documents.base import (
    Digest,
    Document,
    Frozen,
    JsonObject,
    Name,
    Natural,
    NonEmpty,
    Timestamp,
)
from cenacle.documents.offload import (
    PUBLIC_BASE,
    EnclavePlan,
    LowRankPlan,
    OffloadPlan,
    PermutedPlan,
)
from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan
from cenacle.documents.private_recipe import (
    check_private_offload,
    check_private_recipe,
    privacy_events,
)
from cenacle.documents.protection import (
    ENCLAVE_KINDS,
    Measured,
    Protection,
    ProtectionByUse,
    Use,
    at_least,
    protection_of,
)
from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.documents.serving import ServeJob
from cenacle.documents.terms import OutputKind

__all__ = [
    "REATTEST_SECONDS",
    "AssetRef",
    "Contract",
    "EnclaveRequirements",
    "Job",
    "OffloadPlan",
    "Output",
    "Payment",
    "ProgramJob",
    "RecipeJob",
    "ServeJob",
    "Veto",
]

REATTEST_SECONDS: Final = 300
"""How often evidence that can drift is made again, in drafts that do not say."""

_DRIFTING: Final = frozenset({"ima", "tpm"})
_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
_RECIPE_OUTPUTS = ("model", "metrics")

Measurement = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,62}$")]
EntryPoint = Annotated[
    str,
    StringConstraints(
        pattern=rf"^{_IDENTIFIER}(?:\.{_IDENTIFIER})*:{_IDENTIFIER}$", max_length=200
    ),
]


class AssetRef(Frozen):
    """An asset by the digest of its manifest, and whose it is.

    Attributes:
        protection: what this job demands for the asset, where that is more than its owner does.
    """

    digest: Digest
    owner: Name
    protection: Protection | ProtectionByUse | None = None


class RecipeJob(Frozen):
    """Training declared in the contract itself: no custom code."""

    type: Literal["recipe"] = "recipe"
    recipe: Recipe
    checkpoint_every: Natural = 0

    def program_digest(self) -> str:
        """What the ``program`` measurement must be: the digest of the canonical recipe."""
        return self.recipe.digest


class ProgramJob(Frozen):
    """A sealed package with an entry point ``module:function`` taking the job's context."""

    type: Literal["program"] = "program"
    program: Name
    entry: EntryPoint = "main:run"
    parameters: JsonObject = Field(default_factory=dict)


Job = Annotated[RecipeJob | ProgramJob | ServeJob, Field(discriminator="type")]


class EnclaveRequirements(Frozen):
    """Which enclaves may run the job.

    Attributes:
        reference: accepted measurements by evidence kind: every one listed must be shown by
            the evidence with one of the accepted digests, and a kind that is not listed is
            not accepted. The ``program`` measurement follows from the job and is not listed.
        policy: by evidence kind, what else its evidence must prove (TCB status, security
            versions, chips), as the kind's own policy states it
            (:mod:`cenacle.attestation.policies`); the strictest where it is left out.
        layers: sandbox layers that must be active.
        reattest_seconds: how often the enclave has to prove itself again while the job runs; 0,
            or left out: never. A draft gets :data:`REATTEST_SECONDS` where the evidence shows a
            running system, which can drift (:meth:`completed`).
    """

    reference: Annotated[
        dict[
            Literal[*ENCLAVE_KINDS],  # type: ignore[valid-type]
            Annotated[
                dict[Measurement, Annotated[tuple[Measured, ...], Field(min_length=1)]],
                Field(min_length=1),
            ],
        ],
        Field(min_length=1),
    ]
    policy: Annotated[dict[Name, JsonObject], Field(min_length=1)] | None = None
    layers: tuple[Name, ...] = ()
    reattest_seconds: Annotated[int, Field(ge=0, le=86_400)] | None = None

    @model_validator(mode="after")
    def _policies_are_used(self) -> Self:
        if unused := sorted(set(self.policy or ()) - set(self.reference)):
            raise ValueError(
                f"policy names {', '.join(unused)}, which has no reference values: it would "
                "never be looked at"
            )
        return self

    @model_validator(mode="after")
    def _program_follows_from_the_job(self) -> Self:
        for kind, measurements in self.reference.items():
            if "program" in measurements:
                raise ValueError(
                    f"the reference values of {kind} list program, but that one follows from "
                    "the job: remove it"
                )
        return self

    def policy_for(self, kind: str) -> JsonObject:
        """The fields of the policy of an evidence kind; empty for the strictest."""
        return (self.policy or {}).get(kind, {})

    def completed(self) -> Self:
        """With :data:`REATTEST_SECONDS` where nothing is said and the evidence can drift.

        That is ``ima``, ``tpm``, and ``composite`` evidence that starts with one of them. It is
        written out, so that what was signed does not depend on a default.
        """
        parts = self.policy_for("composite").get("kinds")
        shown = {*self.reference, *(parts[:1] if isinstance(parts, list) else ())}
        if self.reattest_seconds is not None or not _DRIFTING & shown:
            return self
        return self.model_copy(update={"reattest_seconds": REATTEST_SECONDS})

    @property
    def weakest(self) -> Protection:
        """The weakest protection that the contract accepts."""
        kinds = [protection_of(kind) for kind in self.reference]
        return next(k for k in kinds if all(at_least(other, k) for other in kinds))


class Output(Frozen):
    """Something that leaves the enclave, sealed to one party."""

    name: Name
    kind: OutputKind
    recipient: Name


class Payment(Frozen):
    """What one party owes another for the job, in the currency's minor unit."""

    payer: Name
    payee: Name
    amount: Natural
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]


class Contract(Document):
    """One job. Its digest is what parties sign and what evidence is bound to.

    Attributes:
        parties: everyone involved, each pinned by the digest of the Party document.
        assets: inputs by the alias under which the job sees them.
        offload: under which scheme algebra leaves the enclave; by default it does not.
        privacy: what the outputs may tell of single records; without it there is no bound.
        approval: who must have signed.
        vetoes: parties any one of whom can stop the job with a signed veto.
        replaces: digest of the contract that this one supersedes. The broker accepts one
            successor only, so that no update is lost.
        broker: digest of the broker's keys.
    """

    media_type = "application/vnd.cenacle.contract+json"

    kind: Literal["contract"] = "contract"
    version: Literal[1] = 1
    name: Name
    purpose: NonEmpty
    broker: Digest
    parties: Annotated[dict[Name, Digest], Field(min_length=1, max_length=100)]
    assets: Annotated[dict[Name, AssetRef], Field(min_length=1, max_length=1000)]
    job: Job
    enclave: EnclaveRequirements
    offload: OffloadPlan = EnclavePlan()
    privacy: PrivacyPlan | None = None
    outputs: Annotated[tuple[Output, ...], Field(min_length=1, max_length=100)]
    approval: Rule
    vetoes: tuple[Name, ...] = ()
    payments: tuple[Payment, ...] = ()
    replaces: Digest | None = None
    expires: Timestamp

    @field_validator("outputs")
    @classmethod
    def _outputs_differ(cls, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        names = [output.name for output in outputs]
        if len(set(names)) != len(names):
            raise ValueError("two outputs have the same name")
        return outputs

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        named = {
            "assets": {ref.owner for ref in self.assets.values()},
            "outputs": {output.recipient for output in self.outputs},
            "approval": set(parties_of(self.approval)),
            "vetoes": set(self.vetoes),
            "payments": {p for pay in self.payments for p in (pay.payer, pay.payee)},
            "tickets": set(),
        }
        if isinstance(self.job, ServeJob) and self.job.tickets is not None:
            named["tickets"] = {self.job.tickets}
        for field, names in named.items():
            if unknown := sorted(names - set(self.parties)):
                raise ValueError(f"{field} name {', '.join(unknown)}, not listed under parties")
        if len(set(self.parties.values())) != len(self.parties):
            raise ValueError("one party stands under two names")
        if len({ref.digest for ref in self.assets.values()}) != len(self.assets):
            raise ValueError("one asset stands under two aliases")
        wanted = _aliases(self.job)
        if unknown := sorted(wanted - set(self.assets)):
            raise ValueError(f"the job uses {', '.join(unknown)}, not listed under assets")
        # What a program reads is known to nobody.
        if not isinstance(self.job, ProgramJob) and (unused := sorted(set(self.assets) - wanted)):
            raise ValueError(
                f"the {self.job.type} job does not use {', '.join(unused)}; remove from assets"
            )
        return self

    @model_validator(mode="after")
    def _job_makes_the_outputs(self) -> Self:
        for output in self.outputs:
            if isinstance(self.job, RecipeJob) and output.kind not in _RECIPE_OUTPUTS:
                raise ValueError(
                    f"output {output.name} is a {output.kind}, but a recipe makes only "
                    f"{' and '.join(_RECIPE_OUTPUTS)}: change its kind, or run a program"
                )
            if isinstance(self.job, ServeJob) and output.kind != "metrics":
                raise ValueError(
                    f"output {output.name} is a {output.kind}, but serving makes only metrics, "
                    "the report of its use: change its kind"
                )
        return self

    @model_validator(mode="after")
    def _job_can_be_offloaded(self) -> Self:
        plan = self.offload
        if isinstance(plan, EnclavePlan):
            return self
        if isinstance(self.job, ProgramJob):
            _check_program_offload(plan)
            return self
        if isinstance(self.job, ServeJob):
            raise ValueError(
                "a served model is not offloaded: leave offload out, and cut the model earlier or "
                "later to choose what runs outside"
            )
        if plan.scheme == "masked":
            raise ValueError(
                "offload masked is for inference, but a recipe trains: use masked-training, or "
                "another scheme"
            )
        if isinstance(plan, PermutedPlan) and self._starts_from_weights != plan.allow_public_base:
            raise ValueError(
                "offload permuted hides nothing from whoever knows the weights that training "
                "starts from: set allow_public_base: true, or train from random weights"
                if self._starts_from_weights
                else "offload permuted allows a public base, but the recipe has no "
                "initial_weights: leave allow_public_base out"
            )
        if isinstance(plan, PermutedPlan) and plan.resident and plan.check:
            optimizer = self.job.recipe.optimizer
            if optimizer.type != "sgd":
                raise ValueError(
                    f"offload permuted cannot check {optimizer.type} where accelerators carry it "
                    "out: use sgd, leave resident out, or set check: false"
                )
        return self

    @model_validator(mode="after")
    def _privacy_can_be_kept(self) -> Self:
        if self.privacy is None:
            return self
        if isinstance(self.job, ProgramJob):
            raise ValueError(
                "a privacy plan is for recipes: what a program does with records cannot be known; "
                "leave privacy out"
            )
        if isinstance(self.job, ServeJob):
            raise ValueError(
                "a privacy plan is for training; what a served model tells is the job's outputs: "
                "leave privacy out"
            )
        check_private_offload(self.offload)
        metrics = any(output.kind == "metrics" for output in self.outputs)
        check_private_recipe(self.privacy, self.job.recipe, metrics=metrics)
        return self

    @property
    def privacy_events(self) -> tuple[PrivacyEvent, ...]:
        """What the job costs each unit of every data asset at most; empty without a plan."""
        if self.privacy is None or not isinstance(self.job, RecipeJob):
            return ()
        return privacy_events(self.privacy, self.job.recipe)

    def protects(self, alias: str) -> bool:
        """Whether the privacy plan bounds what outputs tell of the asset's records.

        It does for what a recipe trains on; not for weights that training starts from.
        """
        return (
            self.privacy is not None
            and isinstance(self.job, RecipeJob)
            and alias in self.job.recipe.data.assets
        )

    @property
    def use(self) -> Use:
        """What the job does with its assets; of a program nobody knows."""
        match self.job:
            case RecipeJob():
                return "training"
            case ServeJob():
                return "inference"
        return "any"

    @property
    def _starts_from_weights(self) -> bool:
        model = self.job.recipe.model if isinstance(self.job, RecipeJob) else None
        return isinstance(model, GraphModel) and model.initial_weights is not None

    @property
    def offload_permission(self) -> str:
        """The name that terms must list under ``offload``: the scheme's, or what it comes to.

        ``permuted`` of weights that others may know protects next to nothing, so it is not
        allowed by terms that allow ``permuted``.
        """
        if isinstance(self.offload, PermutedPlan) and self.offload.allow_public_base:
            return PUBLIC_BASE
        return self.offload.scheme

    def payment_to(self, payee: str, currency: str) -> int:
        """The sum that others owe ``payee``; what a party pays itself does not count."""
        return sum(
            pay.amount
            for pay in self.payments
            if pay.payee == payee and pay.payer != payee and pay.currency == currency
        )


def _aliases(job: Job) -> set[str]:
    """The assets without which the job cannot run."""
    match job:
        case RecipeJob():
            return set(job.recipe.aliases)
        case ProgramJob():
            return {job.program}
        case ServeJob():
            return {job.model}


def _check_program_offload(plan: OffloadPlan) -> None:
    """Raises ValueError if products of a program cannot be offloaded so."""
    problem = None
    if plan.scheme == "masked":
        problem = "its masks are made beforehand, for a model that is known: use another scheme"
    elif isinstance(plan, PermutedPlan) and plan.resident:
        problem = "accelerators keep no weights of a program: leave resident out"
    elif isinstance(plan, LowRankPlan) and isinstance(plan.options.ranks, dict):
        problem = "layers of a program have no names in here: state one number for ranks"
    if problem is not None:
        raise ValueError(f"offload {plan.scheme} cannot be used by a program: {problem}")


class Veto(Document):
    """A party's signed refusal of one contract."""

    media_type = "application/vnd.cenacle.veto+json"

    kind: Literal["veto"] = "veto"
    version: Literal[1] = 1
    contract: Digest
    party: Name
    reason: NonEmpty
