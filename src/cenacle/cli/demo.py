"""``cenacle demo``: real jobs, played with the real commands of this program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenacle.cli.output import JsonOption, errors_in_words, finish

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Play real jobs with the real commands.",
    epilog="Example: cenacle demo hospitals",
)


@app.callback()
def _group() -> None:
    """Keep this a group although it has one command."""


@app.command(epilog="Example: cenacle demo hospitals --json")
def hospitals(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder to keep everything in; default: a new one."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Three hospitals train one model in an enclave; a clinic receives it; all get a receipt.

    The patients are the 569 of scikit-learn's breast-cancer data, split
    unevenly. Every command is printed as it runs; with --json the same figures
    end as one JSON object.
    """
    from cenacle.cli.demo_hospitals import play

    with errors_in_words(json_):
        figures, show = play(folder, quiet=json_)
        finish(figures, json_, show)
