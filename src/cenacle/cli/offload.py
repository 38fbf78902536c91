"""``cenacle offload``: the schemes under which algebra may leave an enclave, and what they leak."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, line
from cenacle.documents.contract import Contract
from cenacle.documents.offload import EnclavePlan, MeasuredPlan, PermutedPlan
from cenacle.documents.offload_profile import COLUMNS, PROFILE_FILE, OffloadProfile
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import DocumentError, InputError, UnavailableError

__all__ = ["PARTS", "app", "leakage_in_words", "leakage_of", "plan_in_words", "read_profile"]

app = typer.Typer(
    no_args_is_help=True,
    help="Show how algebra may leave an enclave for accelerators that nobody trusts.",
    epilog="Example: cenacle offload schemes",
)

_MAX_TRACE: Final = 64 << 20
PARTS = ("inputs", "weights", "activations", "gradients", "labels")
_WORDS = {
    "hidden": "hidden",
    "obfuscated": "disguised, and recovered by known attacks",
    "partial": "in part",
    "plaintext": "in plain",
}


def leakage_of(contract: Contract) -> LeakageRecord:
    """What accelerators learn under a contract's plan. Raises UnavailableError without torch."""
    _require_torch()
    from cenacle.offload.planned import planned_leakage

    return planned_leakage(contract.offload, private=contract.privacy is not None)


def _require_torch() -> None:
    import cenacle.training._torch  # noqa: F401 - says in words that it is missing


def leakage_in_words(record: LeakageRecord) -> str:
    """One sentence: what workers see, the worst first, and what they do not."""
    by_word: dict[str, list[str]] = {}
    for part in PARTS:
        by_word.setdefault(getattr(record, part), []).append(part)
    seen = [
        f"{', '.join(by_word[word])} {_WORDS[word]}"
        for word in ("plaintext", "partial", "obfuscated")
        if word in by_word
    ]
    hidden = ", ".join(by_word.get("hidden", [])) or "nothing"
    return f"Accelerators see {'; '.join(seen) or 'nothing'}. Hidden from them: {hidden}."


def plan_in_words(contract: Contract) -> list[str]:
    """A contract's offload plan, one sentence a line, for someone who must decide."""
    plan = contract.offload
    if isinstance(plan, EnclavePlan):
        return ["Nothing is sent to accelerators."]
    many = plan.accelerators.count
    workers = "one accelerator" if many == 1 else f"{many} accelerators"
    lines = [
        f"Algebra leaves the enclave under scheme {plan.scheme}, for {workers} "
        f"({' or '.join(plan.accelerators.kinds)}) outside of its sandbox."
    ]
    if isinstance(plan, MeasuredPlan):
        lines.append(
            "What they answer is not checked, and no evidence of their host is verified: it is for "
            "data that you would show to whoever runs it."
        )
    else:
        lines.append(
            "What they answer is checked, and a worker that lies is dropped."
            if plan.check
            else "What they answer is NOT checked: a worker that lies spoils the result."
        )
    if isinstance(plan, PermutedPlan) and plan.allow_public_base:
        lines.append(
            "Training starts from given weights: whoever knows them, or weights that they were "
            "made from, recovers the permutations and then sees EVERYTHING in plain."
        )
    try:
        record = leakage_of(contract)
    except UnavailableError as error:
        lines.append(f"What accelerators learn cannot be shown here: {error.what}.")
    else:
        lines += [leakage_in_words(record), record.note]
    return lines


def read_profile(path: Path) -> OffloadProfile:
    """The costs in a trace file, or in the one of a folder of results.

    Raises:
        InputError: there is no such file, or it is too large.
        DocumentError: it is no trace of an offloaded job.
    """
    from cenacle.sealing.disk import disk_errors, open_source

    if path.is_dir():
        if not (path / PROFILE_FILE).is_file():
            raise InputError(
                "the folder has no profile",
                found=str(path),
                expected=PROFILE_FILE,
                remedy="it is written by jobs whose contract sends algebra to accelerators",
            )
        path /= PROFILE_FILE
    with os.fdopen(open_source(path), "rb") as file, disk_errors(f"read {path}"):
        data = file.read(_MAX_TRACE + 1)
    if len(data) > _MAX_TRACE:
        raise InputError("a trace is too large", expected=f"at most {_MAX_TRACE >> 20} MiB")
    try:
        trace = json.loads(data)
    except (ValueError, RecursionError):
        raise DocumentError("a trace is not valid JSON", expected="JSON in UTF-8") from None
    return OffloadProfile.from_trace(trace)


@app.command(
    epilog="Examples:\n\ncenacle offload profile results\n\n"
    "cenacle offload profile trace.json --json"
)
def profile(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help=f"A job's folder of results, its {PROFILE_FILE}, or what write_trace wrote.",
        ),
    ],
    json_: JsonOption = False,
) -> None:
    """Show what offloading cost a job: seconds and bytes by layer.

    The file also holds the timeline of the job's last steps: open it at
    https://ui.perfetto.dev or chrome://tracing. It shows names of layers, times
    and sizes, and no data. Nothing in it is signed, and accelerators' seconds are
    what they say.
    """
    with errors_in_words(json_):
        found = read_profile(path)

        def show() -> None:
            table = Table(show_footer=True)
            *_, total = found.cells()
            for place, ((name, unit), footer) in enumerate(zip(COLUMNS, total, strict=True)):
                table.add_column(
                    f"{name}\n{unit}",
                    footer,
                    justify="right" if place else "left",
                    overflow="fold",
                )
            for row in found.layers:
                table.add_row(*map(cell, row.cells()))
            console.print(table)
            if found.events_left_out:
                line(f"the timeline leaves out the first {found.events_left_out:,} spans")

        fields = found.to_fields()
        finish({**fields, "total": found.total.to_fields()}, json_, show)


@app.command(epilog="Example: cenacle offload schemes --json")
def schemes(json_: JsonOption = False) -> None:
    """List all schemes, and what accelerators learn under each with its default options."""
    with errors_in_words(json_):
        _require_torch()
        from cenacle.offload.schemes import SCHEMES, make_scheme

        records = [make_scheme(name).leakage for name in sorted(SCHEMES)]

        def show() -> None:
            table = Table("scheme", *PARTS)
            for record in records:
                table.add_row(record.scheme, *(getattr(record, part) for part in PARTS))
            console.print(table)
            for record in records:
                line(f"{record.scheme}: {cell(record.note)}")

        finish({"schemes": [record.to_fields() for record in records]}, json_, show)
