"""``cenacle enclave``: what this machine can do, and what its enclave measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from cenacle.cli.evidence import CollateralOption, TctiOption, hardware_reference
from cenacle.cli.home import Home
from cenacle.cli.options import BrokerOption
from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, line

__all__ = ["app", "measure_here"]

app = typer.Typer(
    no_args_is_help=True,
    help="Show this machine's sandbox and measurements.",
    epilog="Example: cenacle enclave layers",
)


def measure_here(
    home: Home,
    layers: Sequence[str] | None,
    *,
    accelerators: bool = False,
    hardware: Mapping[str, Any] | None = None,
    serving: bool = False,
) -> dict[str, Any]:
    """Reference values of this machine's enclave, as a contract's ``enclave`` field.

    Measured in an enclave with the same sandbox that is started for it, but for the sockets to
    accelerators, hardware and a server, of which the sandbox's own digest tells.

    Args:
        hardware: what the machine's hardware shows (:func:`~cenacle.cli.evidence.
            hardware_reference`); without it the enclave's evidence is simulated.
        serving: with the socket to the server of a job that serves.
    """
    from cenacle.enclave.reference import measure_in_sandbox
    from cenacle.enclave.sandbox import plan

    chosen = plan(layers, accelerators=accelerators, platform=hardware is not None, serving=serving)
    own = {**measure_in_sandbox(plan(layers)), "sandbox": chosen.digest}
    stated = {name: [value] for name, value in own.items()}
    if hardware is None:
        installation = {"installation": [home.installation().measurement]}
        return {
            "reference": {"simulated": {**stated, **installation}},
            "layers": list(chosen.layers),
        }
    ((kind, shown),) = hardware["reference"].items()
    return {
        **hardware,
        "reference": {kind: {**shown, **stated}},
        "layers": list(chosen.layers),
    }


@app.command(epilog="Example: cenacle enclave layers")
def layers(json_: JsonOption = False) -> None:
    """Show which sandbox layers work here, found out by using each."""
    from cenacle.enclave.sandbox import probe

    with errors_in_words(json_):
        found = probe()
        table = Table("layer", "works here", "protects")
        for status in found:
            works = (
                "[green]yes[/]"
                if status.missing is None
                else f"[yellow]no[/]: {cell(status.missing)}"
            )
            table.add_row(status.name, works, status.protects)
        fields = {"layers": [{"name": s.name, "missing": s.missing} for s in found]}
        finish(fields, json_, lambda: console.print(table))


@app.command(epilog="Example: cenacle enclave measure --json")
def measure(
    layers_: Annotated[
        str, typer.Option("--layers", help="Layers of the sandbox: all, or a,b,c.")
    ] = "all",
    accelerators: Annotated[
        bool,
        typer.Option("--accelerators", help="With sockets to accelerators, for an offload plan."),
    ] = False,
    evidence: Annotated[
        str, typer.Option(help="Kind of evidence: simulated, or of this machine's hardware.")
    ] = "simulated",
    tcti: TctiOption = None,
    collateral: CollateralOption = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Measure the enclave that this machine would start: reference values for a contract.

    A TPM shows them under a key that the broker certifies, so the broker has to
    be there then.
    """
    with errors_in_words(json_):
        chosen = None if layers_ == "all" else layers_.split(",")
        home = Home.default()
        hardware = None
        if evidence != "simulated":
            with home.client(broker) as client:
                hardware = hardware_reference(
                    evidence, home.folder, client, tcti=tcti, collateral=collateral
                )
        fields = measure_here(home, chosen, accelerators=accelerators, hardware=hardware)
        values = fields["reference"][evidence]
        # Not a table: digests are there to be compared and copied whole.
        finish(
            fields,
            json_,
            lambda: line("\n".join(f"{name:14}{found[0]}" for name, found in values.items())),
        )
