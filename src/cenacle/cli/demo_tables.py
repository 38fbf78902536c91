"""What the hospitals' demonstration shows at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cenacle.broker.messages import BudgetView
from cenacle.cli.demo_patients import HOSPITALS
from cenacle.cli.privacy import budget_row
from cenacle.cli.stage import Stage

__all__ = ["Outcome", "closing_tables", "show_budgets", "show_layers"]


@dataclass
class Outcome:
    """What a performance came to.

    Attributes:
        number: of the job in its folder.
        evidence: kind of the enclave's evidence.
        pooled: measures of the clinic's model on the clinic's patients.
        alone: the same of each hospital's own.
        views: the hospitals' budgets afterwards.
        layers: of the sandbox, as `cenacle enclave layers` tells them.
    """

    number: int
    evidence: str = "simulated"
    pooled: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    views: list[BudgetView] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    receipt: Path = Path()
    model: str = ""
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        spent = [view.spent for view in self.views]
        left = [max(0.0, (v.epsilon or 0.0) - (v.spent or 0.0)) for v in self.views]
        return {
            "accuracy_pooled": self.pooled["accuracy"],
            "accuracy_single": [self.alone[name]["accuracy"] for name in HOSPITALS],
            "job": self.number,
            "epsilon_budget": self.views[0].epsilon,
            "delta": self.views[0].delta,
            "epsilon_spent": spent,
            "epsilon_left": left,
            "receipt": str(self.receipt),
            "seconds": self.seconds,
        }


def show_budgets(stage: Stage, names: Sequence[str], views: Sequence[BudgetView]) -> None:
    """One row a hospital."""
    table = Table(title="privacy budgets, over all jobs ever", title_justify="left")
    for column in ("patients of", "budget", "spent", "left", "jobs"):
        table.add_column(column)
    for name, view in zip(names, views, strict=True):
        table.add_row(name, *budget_row(view)[1:])
    stage.console.print(table)


def closing_tables(stage: Stage, outcome: Outcome) -> None:
    """Accuracy, protection, and the commands to go on with."""
    _accuracy(stage, outcome)
    _protection(stage, outcome.layers, outcome.evidence)
    stage.console.print(f"\nplayed in {outcome.seconds} s")
    _commands(stage, outcome)


def _accuracy(stage: Stage, outcome: Outcome) -> None:
    console = stage.console
    results = Table(
        title="\naccuracy on the clinic's own patients, who are in no hospital's records",
        title_justify="left",
    )
    for column in ("trained on", "accuracy"):
        results.add_column(column, justify="left" if column == "trained on" else "right")
    for name in HOSPITALS:
        results.add_row(f"{name} alone", f"{outcome.alone[name]['accuracy']:.3f}")
    pooled = outcome.pooled["accuracy"]
    results.add_row("[bold]all three together[/]", f"[bold]{pooled:.3f}[/]")
    console.print(results)
    console.print(
        f"({outcome.pooled['rows']} patients. All four models are trained under the same privacy "
        "plan. The hospitals' case mixes were made different on purpose; with a random split the "
        "largest alone is about as good as all.)"
    )


def show_layers(stage: Stage, layers: Sequence[dict[str, Any]]) -> None:
    """One line a layer of the operator's sandbox."""
    for layer in layers:
        state = "active" if layer["missing"] is None else f"not used: {layer['missing']}"
        stage.console.print(f"  {layer['name']:12} {escape(state)}", soft_wrap=True)


def _protection(stage: Stage, layers: Sequence[dict[str, Any]], evidence: str) -> None:
    console = stage.console
    active = [layer["name"] for layer in layers if layer["missing"] is None]
    absent = [f"{layer['name']}: {layer['missing']}" for layer in layers if layer["missing"]]
    table = Table(title="\nwhat was protected from whom", title_justify="left", show_lines=True)
    for column in ("what", "protected from", "not protected from"):
        table.add_column(column)
    root = (
        "root on the operator's machine, and the user who starts the enclave: "
        "[bold]it is SIMULATED[/]"
        + ("" if evidence == "simulated" else f" (its {evidence} is one in software)")
    )
    table.add_row(
        "patients' records",
        "the other hospitals, the clinic, the broker's disk, the network; other users of the "
        "operator's machine" + (f" (sandbox: {', '.join(active)})" if active else ""),
        root + "; whoever runs the broker, who could take its keys",
    )
    table.add_row(
        "single patients in the model",
        "the clinic, and whoever it gives the model to: up to the contract's epsilon and delta, "
        "and over all jobs up to the hospitals' budgets",
        "that a hospital has so many patients; whoever has the model and the broker's keys",
    )
    table.add_row(
        "the trained model",
        "everyone but the clinic (sealed to its key, post-quantum hybrid)",
        root,
    )
    table.add_row(
        "the agreement",
        "changes by anyone: every clause was checked before a key left, and is in the log",
        "a broker and an operator who collude, as long as evidence is simulated",
    )
    console.print(table)
    for line in absent:
        console.print(f"[yellow]not used here[/]  {escape(line)}", soft_wrap=True)
    software = "no TPM," if evidence == "simulated" else "the TPM is one in software; no"
    console.print(
        f"[yellow]not used here[/]  hardware evidence: {software} TDX, SEV-SNP or SGX in this job"
    )


def _commands(stage: Stage, outcome: Outcome) -> None:
    out, receipt = stage.console, outcome.receipt
    again = {"tpm": " --enclave tpm", "ima": " --enclave vm"}.get(outcome.evidence, "")
    clinic, hospital = stage.actor("clinic").folder, stage.actor(HOSPITALS[0]).folder
    for what, line in (
        (
            "open the model:     ",
            f"CENACLE_HOME={clinic / 'home'} cenacle open {receipt} model --as clinic "
            "--out model.safetensors",
        ),
        ("verify the receipt: ", f"CENACLE_HOME={hospital / 'home'} cenacle verify {receipt}"),
        ("train once more:    ", f"cenacle demo hospitals --dir {stage.folder}{again}"),
    ):
        out.print(what, end="")
        out.print(line, soft_wrap=True, markup=False)
