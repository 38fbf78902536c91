"""``cenacle offload``: the schemes under which algebra may leave an enclave, and what they leak."""

from __future__ import annotations

import typer
from rich.table import Table

from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, line
from cenacle.documents.contract import Contract
from cenacle.documents.offload import EnclavePlan, MeasuredPlan, PermutedPlan
from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import UnavailableError

__all__ = ["PARTS", "app", "leakage_in_words", "leakage_of", "plan_in_words"]

app = typer.Typer(
    no_args_is_help=True,
    help="Show how algebra may leave an enclave for accelerators that nobody trusts.",
    epilog="Example: cenacle offload schemes",
)

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

    return planned_leakage(contract.offload)


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
