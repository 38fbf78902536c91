"""How commands speak: tables for people, one JSON object with ``--json``, errors in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cenacle.documents.clauses import Clause
from cenacle.errors import CenacleError, InputError, RefusedError

__all__ = [
    "EXIT_CODES",
    "JsonOption",
    "clause_table",
    "console",
    "errors_in_words",
    "finish",
    "progress_bar",
    "report_error",
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on the last line, for programs.")
]

EXIT_CODES = """\
Exit codes: 0 done; 1 unexpected failure; 2 unusable input; 3 verification failed; 4 refused by
the rules; 5 conflict, somebody was first; 6 broker, disk or service unavailable; 7 the job
failed inside the enclave; 130 interrupted."""

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)

_MARKS = {"met": "[green]met[/]", "failed": "[red]FAILED[/]", "pending": "[yellow]pending[/]"}


def finish(fields: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """End a command: with ``--json`` one object on one line, else what ``show`` prints."""
    if as_json:
        sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
        sys.stdout.flush()
    else:
        show()


def clause_table(clauses: list[Clause], title: str) -> Table:
    """Clauses with found, demanded and verdict, one line each."""
    table = Table(title=title, title_justify="left", show_lines=False, expand=False)
    for column in ("whose", "demand", "found", "demanded", "verdict"):
        table.add_column(column, overflow="fold")
    for c in clauses:
        table.add_row(
            escape(c.subject),
            escape(c.name),
            escape(c.found),
            escape(c.demanded),
            _MARKS[c.verdict],
        )
    return table


def report_error(error: CenacleError, as_json: bool) -> None:
    """Print an error: for people to the error stream, for programs as JSON to the output."""
    if as_json:
        sys.stdout.write(json.dumps(error.to_dict()) + "\n")
        return
    if isinstance(error, RefusedError) and error.clauses:
        clauses = [Clause.from_fields(fields) for fields in error.clauses]
        _errors.print("[red]refused[/]: the broker released nothing")
        _errors.print(clause_table(clauses, "clauses that are not met"))
        for remedy in dict.fromkeys(c.remedy for c in clauses if c.remedy):
            _errors.print(f"  {escape(remedy)}", soft_wrap=True)
        return
    _errors.print(f"[red]error[/]: {escape(error.diagnostics())}", soft_wrap=True)


@contextmanager
def errors_in_words(as_json: bool) -> Iterator[None]:
    """Turn every error of ours into its sentence and exit code; others stay bugs."""
    try:
        yield
    except CenacleError as error:
        report_error(error, as_json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except OSError as error:
        wrapped = InputError(
            "a file cannot be used", found=f"{error.strerror or error}: {error.filename or ''}"
        )
        report_error(wrapped, as_json)
        raise typer.Exit(wrapped.exit_code) from None


@contextmanager
def progress_bar(label: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the error stream; yields ``report(done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_errors, disable=not shown, transient=False) as progress:
        task = progress.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report
