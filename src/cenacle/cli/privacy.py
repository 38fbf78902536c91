"""``budget``; and privacy plans, completed for a draft and said in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from cenacle.accounting import noise_multiplier_for
from cenacle.broker.messages import BudgetView
from cenacle.cli.home import Home
from cenacle.cli.options import AsOption, BrokerOption
from cenacle.cli.output import JsonOption, console, errors_in_words, finish
from cenacle.documents.asset import Asset
from cenacle.documents.contract import Contract, RecipeJob
from cenacle.documents.dsse import Envelope
from cenacle.documents.privacy import PrivacyPlan, PrivacyRecord, SubjectUnit
from cenacle.documents.private_recipe import privacy_events
from cenacle.errors import InputError

__all__ = ["budget", "budget_row", "completed_plan", "privacy_in_words", "record_in_words"]

_DIGITS: Final = 4


def completed_plan(plan: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's plan with its noise multiplier: the smallest that keeps its epsilon.

    Raises:
        InputError: no noise keeps it, or ``dp-accounting`` is not installed.
    """
    stated = PrivacyPlan.from_fields(dict(plan))
    if stated.noise_multiplier is not None or job.get("type", "recipe") != "recipe":
        return dict(plan)
    recipe = RecipeJob.from_fields(dict(job)).recipe
    # Only how often and on what is read of these events, not how much noise.
    training, *others = privacy_events(stated.model_copy(update={"noise_multiplier": 1.0}), recipe)
    most = stated.unit.most_records if isinstance(stated.unit, SubjectUnit) else 1
    noise = most * noise_multiplier_for(
        stated.epsilon,
        stated.delta,
        sampling_probability=training.sampling_probability,
        steps=training.steps,
        also=others,
    )
    return {**plan, "noise_multiplier": math.ceil(noise * 10**_DIGITS) / 10**_DIGITS}


def privacy_in_words(contract: Contract) -> list[str]:
    """What a contract promises about single records, one sentence a line."""
    plan = contract.privacy
    if plan is None:
        return ["The outputs are NOT differentially private."]
    record = PrivacyRecord.of(plan, contract.privacy_events)
    return [f"The outputs keep {record.description}"]


def record_in_words(record: PrivacyRecord | str) -> str:
    """What a receipt says of privacy."""
    return record if isinstance(record, str) else record.description


def _manifest(asset: str) -> str:
    """The digest of an asset that is named by its manifest's file, or by the digest itself."""
    if asset.startswith("sha256:"):
        return asset
    path = Path(asset)
    if not path.is_file():
        raise InputError(
            "an asset's manifest is not there",
            found=asset,
            expected="the .asset.json file that `cenacle seal` wrote, or the manifest's digest",
        )
    return Envelope.from_json(path.read_bytes()).peek(Asset).digest


def budget(
    asset: Annotated[str, typer.Argument(help="Your asset: its .asset.json file, or its digest.")],
    as_: AsOption,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """What all jobs ever on your asset's data have spent of its privacy budget, and what is left.

    Every manifest of the same data counts: of the same sealed file, and those it replaced.
    """
    with errors_in_words(json_):
        digest = _manifest(asset)
        with Home.default().client_as(as_, broker) as (keys, client):
            view = client.budget(keys.signing_key, as_, digest)

        def show() -> None:
            table = Table(title="privacy budget", title_justify="left")
            for column in ("asset", "budget", "spent", "left", "jobs"):
                table.add_column(column)
            table.add_row(*budget_row(view))
            console.print(table)

        finish(view.to_fields(), json_, show)


def budget_row(view: BudgetView) -> tuple[str, str, str, str, str]:
    """Name, budget, spent, left and number of jobs, as a table shows them."""
    spent = "unbounded" if view.spent is None else f"{view.spent:.3f}"
    jobs = f"{view.jobs} with a plan" + (f", {view.unbounded} without" if view.unbounded else "")
    if view.epsilon is None:
        return view.name, "unbounded", spent, "-", jobs
    left = 0.0 if view.spent is None else max(0.0, view.epsilon - view.spent)
    total = f"epsilon {view.epsilon:g} at delta {view.delta:g}"
    return view.name, total, spent, f"{left:.3f}", jobs
