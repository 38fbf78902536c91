"""What the serving demonstration prints in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from cenacle.cli.stage import Stage

if TYPE_CHECKING:
    from cenacle.cli.demo_serving_models import Material

__all__ = ["TIMED", "closing_tables"]

TIMED: Final = 20
"""Single rows that are timed, of each way in."""


def closing_tables(stage: Stage, matter: Material, figures: dict[str, Any]) -> None:
    """Accuracy beside what it is compared with, latency, and what was kept from whom."""
    console = stage.console
    table = Table(title="\nhow well", title_justify="left")
    for column in ("model", "trained", "accuracy", "on"):
        table.add_column(column)
    rows = figures["measured_rows"]
    table.add_row(
        f"front up to {matter.at}, and the sealed tail",
        "the tail, in the enclave",
        f"{figures['accuracy']:.1%}",
        "held-out rows" if rows is None else f"{rows} held-out rows",
    )
    for name, what, trained in (
        ("linear_probe", "the whole network's features", "one linear layer, in the open"),
        ("whole", "the whole network, 3 epochs", "every layer, its norms frozen, in the open"),
    ):
        if name in figures:
            found = figures[name]
            accuracy, count = f"{found['accuracy']:.1%}", f"{found['rows']} others held out"
            table.add_row(what, trained, accuracy, count)
    console.print(table)
    agree = "gave the same labels" if figures["same_answers"] else "gave DIFFERENT labels"
    console.print(
        f"of the {figures['asked_rows']} rows that the client asked about, which nobody trained "
        f"on, {figures['served_accuracy']:.1%} were answered rightly; plain and sealed {agree}; "
        "when the ticket was used up, the next query was refused"
    )
    latency = figures["latency_ms"]
    console.print(
        f"one query: {latency['plain']} ms in plain, {latency['sealed']} ms sealed (median of "
        f"{TIMED}, over HTTPS, the front included; all on this machine)"
    )
    hidden = Table(title="\nwhat was kept from whom", title_justify="left")
    for column in ("what", "who never saw it"):
        hidden.add_column(column)
    for what, whom in (
        ("the hospital's samples", "vendor, operator, client, broker"),
        ("the tail's parameters", "hospital, operator, client, broker"),
        ("sealed queries and their answers", "operator, vendor, hospital, broker"),
        ("plain queries and their answers", "vendor, hospital, broker; the operator SAW them"),
    ):
        hidden.add_row(what, whom)
    console.print(hidden)
    console.print(
        "[yellow]not used here[/]  hardware evidence: the enclaves are SIMULATED and protect from "
        "nobody with root; differential privacy: the tail can tell of single samples "
        "(`cenacle cut retrain --epsilon`)"
    )
    console.print(f"\nplayed in {figures['seconds']} s")
