"""How commands speak: tables for people, one JSON object with ``--json``, errors in a sentence."""

from __future__ import annotations

import json
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from cenacle.documents.clauses import Clause
from cenacle.errors import CenacleError, InputError, RefusedError

__all__ = [
    "EXIT_CODES",
    "JsonOption",
    "Steps",
    "cell",
    "clause_table",
    "clean",
    "console",
    "errors_in_words",
    "finish",
    "line",
    "progress_bar",
    "report_error",
    "say",
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on the last line, for programs.")
]

EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 unusable input; 3 verification failed; 4 refused "
    "by the rules; 5 conflict, somebody was first; 6 broker, disk or service unavailable; 7 the "
    "job failed inside the enclave; 130 interrupted."
)


def _drop_output() -> None:
    """Nobody reads the output any more; Python would complain of that once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    """Ends quietly when the reader of a pipe, such as ``head``, has seen enough."""

    def on_broken_pipe(self) -> None:
        _drop_output()
        raise SystemExit(0)


# Emoji codes would turn a colon in somebody's text into a picture.
console = _Console(highlight=False, emoji=False)
_errors = _Console(stderr=True, highlight=False, emoji=False)

_MARKS = {"met": "[green]met[/]", "failed": "[red]FAILED[/]", "pending": "[yellow]pending[/]"}


def clean(text: object) -> str:
    """Text of others without control characters, which could rewrite what a terminal shows."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text))


def cell(text: object) -> str:
    """Text of others for a table: no control characters, no markup."""
    return escape(clean(text))


def line(text: object) -> None:
    """Print text as it is; a terminal may wrap it, a file gets it whole."""
    console.print(clean(text), soft_wrap=True, markup=False)


def say(text: object) -> None:
    """Tell a person something that is not the result: on the error stream."""
    _errors.print(clean(text), soft_wrap=True, markup=False)


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
            cell(c.subject),
            cell(c.name),
            cell(c.found),
            cell(c.demanded),
            _MARKS[c.verdict],
        )
    return table


def report_error(error: CenacleError, as_json: bool) -> None:
    """Print an error: for people to the error stream, for programs as JSON to the output."""
    if as_json:
        sys.stdout.write(json.dumps(error.to_dict()) + "\n")
        sys.stdout.flush()
        return
    if isinstance(error, RefusedError) and error.clauses:
        clauses = [Clause.from_fields(fields) for fields in error.clauses]
        _errors.print("[red]refused[/]: the broker released nothing")
        _errors.print(clause_table(clauses, "clauses that are not met"))
        for remedy in dict.fromkeys(c.remedy for c in clauses if c.remedy):
            say(f"  {remedy}")
        return
    _errors.print(f"[red]error[/]: {cell(error.diagnostics())}", soft_wrap=True)


@contextmanager
def errors_in_words(as_json: bool) -> Iterator[None]:
    """Turn every error into its sentence and exit code; no traceback shows what a job held."""
    try:
        yield
    except CenacleError as error:
        report_error(error, as_json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if as_json:
            report_error(CenacleError("interrupted"), as_json)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        _drop_output()
        raise typer.Exit(0) from None
    except OSError as error:
        wrapped = InputError(
            "a file cannot be used",
            found=": ".join(str(part) for part in (error.strerror, error.filename) if part),
            remedy="check the path and the permissions",
        )
        report_error(wrapped, as_json)
        raise typer.Exit(wrapped.exit_code) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if os.environ.get("CENACLE_TRACEBACK"):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        bug = CenacleError(
            "this is a fault of cenacle",
            found=f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}",
            remedy="please report it, with the output under CENACLE_TRACEBACK=1 if it holds "
            "no secret",
        )
        report_error(bug, as_json)
        raise typer.Exit(bug.exit_code) from None


class Steps(ABC):
    """What a long command shows of itself, on the error stream."""

    @abstractmethod
    def step(self, label: str) -> None:
        """Begin the next part of the work."""

    @abstractmethod
    def report(self, done: int, total: int) -> None:
        """Show how far the current part is."""


class _Silent(Steps):
    def step(self, label: str) -> None:
        pass

    def report(self, done: int, total: int) -> None:
        pass


class _Lines(Steps):
    """One line a step: what suits a file, a pipe or a CI log."""

    def step(self, label: str) -> None:
        say(label)

    def report(self, done: int, total: int) -> None:
        pass


class _Bars(Steps):
    """One bar a step, for a terminal; a step that is over keeps its line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def step(self, label: str) -> None:
        self.end()
        self._task = self._progress.add_task(label, total=None)

    def report(self, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def end(self) -> None:
        """Stop the clock and the bar of the current step."""
        if self._task is None:
            return
        task = next(task for task in self._progress.tasks if task.id == self._task)
        if task.total is None:
            self._progress.update(self._task, completed=1, total=1)
        self._progress.stop_task(self._task)


@contextmanager
def progress_bar(label: str, shown: bool = True) -> Iterator[Steps]:
    """Progress of a command that takes a while, with ``label`` as its first step.

    Bars on a terminal, a line a step elsewhere, nothing unless ``shown``.
    """
    if not shown:
        yield _Silent()
        return
    if not _errors.is_terminal:
        lines = _Lines()
        lines.step(label)
        yield lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_errors) as progress:
        bars = _Bars(progress)
        bars.step(label)
        yield bars
        bars.end()
