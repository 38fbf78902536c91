"""What a recipe must leave out so that a privacy plan can keep its promise.

Under a plan nothing of the records may reach an output but through clipped, noised sums. Each
rule here names a field that would let something past them.
"""

from __future__ import annotations

from collections.abc import Iterator

from cenacle.documents.offload import (
    EnclavePlan,
    LowRankPlan,
    MeasuredPlan,
    OffloadPlan,
    PermutedPlan,
)
from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan
from cenacle.documents.recipe import CnnModel, GraphModel, Recipe

__all__ = ["check_private_offload", "check_private_recipe", "privacy_events"]


def check_private_recipe(plan: PrivacyPlan, recipe: Recipe, *, metrics: bool) -> None:
    """Raises ValueError with the first thing that a plan does not allow, and what to do instead.

    Args:
        metrics: whether measures of the model leave the enclave.
    """
    for problem in _problems(plan, recipe, metrics):
        raise ValueError(f"the privacy plan forbids it: {problem}")


def check_private_offload(plan: OffloadPlan) -> None:
    """Raises ValueError if a privacy plan cannot be kept under an offload plan, with the remedy.

    Records are clipped by norms that the enclave takes, and noise is added inside; so sums of
    gradients have to come back, and to be what they should be.
    """
    if isinstance(plan, EnclavePlan | MeasuredPlan):
        return
    problem = None
    if not isinstance(plan, PermutedPlan | LowRankPlan):
        problem = (
            "its fixed point is scaled by the largest numbers of a batch, so that one record "
            "changes what is computed of others; use permuted or lowrank"
            if plan.scheme == "masked-training"
            else "it is for inference, but a recipe trains; use permuted or lowrank"
        )
    elif not plan.check:
        problem = (
            "an accelerator that lies could move a sum by more than the clipping norm, and the "
            "noise would not cover it; set check: true"
        )
    elif isinstance(plan, PermutedPlan) and plan.resident:
        problem = "weights that accelerators train get no noise; leave resident out"
    elif isinstance(plan, LowRankPlan) and plan.options.noise is not None:
        problem = (
            "the noise on residuals is part of the sums of gradients, so clipping does not bound "
            "them; leave options.noise out"
        )
    if problem is not None:
        raise ValueError(f"a privacy plan cannot be kept under offload {plan.scheme}: {problem}")


def _problems(plan: PrivacyPlan, recipe: Recipe, metrics: bool) -> Iterator[str]:
    data, model = recipe.data, recipe.model
    if data.standardize or data.standardize_target:
        yield (
            "standardize makes means and deviations of the records part of the model; set it to "
            "false and state public bounds (data.ranges of a table, data.scale of tensors)"
        )
    if recipe.early_stopping is not None:
        yield "early_stopping looks at records after each epoch; leave it out"
    if (isinstance(model, CnnModel) and model.batch_norm) or (
        isinstance(model, GraphModel) and any(node.op == "batch_norm" for node in model.nodes)
    ):
        yield "batch normalization mixes records; use group_norm"
    if recipe.holdout.fraction > 0 and recipe.holdout.stratified:
        yield "a stratified holdout looks at labels; set holdout.stratified: false"
    if metrics and recipe.task == "regression":
        yield "measures of a regression have no bound; leave the metrics output out"
    if metrics and plan.metrics_noise is None:
        yield "metrics are exact; leave the output out, or state metrics_noise"
    if not metrics and plan.metrics_noise is not None:
        yield "metrics_noise would be paid for, but no metrics leave; leave it out"
    if not metrics and recipe.compare_alone:
        yield "compare_alone would be paid for, but no metrics leave; leave it out"
    if plan.noise_multiplier is None:
        yield "noise_multiplier is not stated; `cenacle draft` computes it from epsilon"


def privacy_events(plan: PrivacyPlan, recipe: Recipe) -> tuple[PrivacyEvent, ...]:
    """What the whole job costs each unit at most, as :meth:`PrivacyPlan.events` has it.

    With ``compare_alone`` each record trains two models, and each measured record measures the
    pooled one and one of every party.
    """
    alone = len(recipe.data.assets) if recipe.compare_alone else 0
    return plan.events(
        recipe.epochs,
        trainings=2 if alone else 1,
        measurements=1 + alone if plan.metrics_noise is not None else 0,
    )
