"""``cenacle evaluate``: measure an opened model on rows of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cenacle.cli.output import JsonOption, console, errors_in_words, finish
from cenacle.errors import DataError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from cenacle.cut.front_runner import OnnxFront

__all__ = ["evaluate"]


def _read(path: Path) -> pa.Table:
    import pyarrow as arrow
    import pyarrow.csv
    import pyarrow.parquet

    readers: dict[str, Any] = {
        ".csv": pyarrow.csv.read_csv,
        ".parquet": pyarrow.parquet.read_table,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise InputError(
            "the rows to measure on cannot be read",
            found=str(path),
            expected="an existing file that ends in .csv, .parquet, .npz or .safetensors",
        )
    try:
        found: pa.Table = reader(path)
    except (arrow.ArrowInvalid, OSError):
        raise DataError(f"{path.name} is damaged", expected=f"a table as {path.suffix}") from None
    return found


def _front(path: Path | None) -> OnnxFront | None:
    if path is None:
        return None
    from cenacle.cut.front_runner import OnnxFront

    return OnnxFront.load(path)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model that `cenacle open` wrote.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="Rows with the model's features and target: .csv or .parquet; tensors: .npz or "
            ".safetensors."
        ),
    ],
    front: Annotated[
        Path | None,
        typer.Option(help="The front.onnx that the model was trained behind, if it was."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(help="The tensor of samples, for a model of tensors without a front."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure a model on rows of your own, here. Nothing is sent anywhere.

    On rows that training never saw this costs no privacy budget: they stay with you.
    """
    with errors_in_words(json_):
        from cenacle.training.evaluation import evaluate as measure
        from cenacle.training.evaluation import evaluate_tensors

        if not model.is_file():
            raise InputError(
                "the model is not there",
                found=str(model),
                expected="the file that `cenacle open` wrote",
            )
        if data.suffix.lower() in (".npz", ".safetensors"):
            from cenacle.cli.cut_samples import read_tensors

            found = evaluate_tensors(
                model.read_bytes(), read_tensors(data), samples=samples, front=_front(front)
            )
        elif front is not None or samples is not None:
            raise InputError("--front and --samples are for tensors", found=data.name)
        else:
            found = measure(model.read_bytes(), _read(data))

        def show() -> None:
            table = Table(title=f"{model.name} on {data.name}", title_justify="left")
            for column in ("measure", "value"):
                table.add_column(column)
            for name, value in found.items():
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
            console.print(table)

        finish(found, json_, show)
