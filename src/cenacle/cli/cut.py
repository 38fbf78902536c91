"""``cenacle cut``: split a model into a public front and a confidential tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer.core import TyperGroup

from cenacle.cli.home import write_file
from cenacle.cli.output import (
    JsonOption,
    cell,
    console,
    errors_in_words,
    finish,
    line,
    progress_bar,
    say,
)
from cenacle.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from cenacle.cut import Choice, OnnxModel, Suggestion

__all__ = ["InputOption", "ModelArgument", "WeightsOption", "app", "cut_table", "open_model"]

_DEFAULT: Final = "model"
_MOST_SAMPLES: Final = 2000

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An .onnx, .pt2 or .keras file; or package.module:function or file.py:function, "
        "which IS RUN to build a PyTorch module.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Weights for a PyTorch module: .safetensors, or a state dict."),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=TYPE[N,...]",
        help="An input's type and sizes, N for the batch, such as image=F32[N,3,224,224]: what a "
        "PyTorch module takes, or sizes that an ONNX file leaves open. Repeatable.",
    ),
]


class _ModelGroup(TyperGroup):
    """``cenacle cut MODEL ...`` is ``cenacle cut model MODEL ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelGroup,
    no_args_is_help=True,
    help="Cut a model into a public front, which runs anywhere, and a confidential tail for an "
    "enclave: `cenacle cut MODEL --suggest`, then `cenacle cut MODEL --at LAYER --out DIR`. "
    "(A model whose file is named like a command below: give its path as ./NAME.)",
    epilog="Example: cenacle cut model.onnx --suggest",
    subcommand_metavar="MODEL|COMMAND [ARGS]...",
)


def open_model(
    spec: str, weights: Path | None = None, inputs: Sequence[str] | None = None
) -> tuple[OnnxModel, dict[str, Sequence[int | None]]]:
    """A model as users name it, and sizes for axes that it leaves open.

    Raises:
        InputError: no such model, an input that is not described well or that a file lacks.
        DataError: a damaged or hostile file.
        UnavailableError: a library that this kind of model needs is not installed.
    """
    _require("onnx")
    from cenacle.cut.sources import load_model, parse_input

    specs = [parse_input(text, position=k) for k, text in enumerate(inputs or ())]
    path = Path(spec)
    if path.suffix.lower() != ".onnx":
        return load_model(spec, weights=weights, inputs=specs or None), {}
    model = load_model(path, weights=weights)
    own = {each.name: each for each in model.inputs}
    if len(specs) == len(own) == 1 and "=" not in (inputs or [""])[0]:
        return model, {next(iter(own)): specs[0].shape}
    for each in specs:
        if each.name in own and own[each.name].dtype != each.dtype:
            raise InputError(
                f"input {each.name!r} of the model is of another type",
                found=each.dtype,
                expected=own[each.name].dtype,
            )
    return model, {each.name: each.shape for each in specs}


def _require(library: str) -> None:
    from importlib.util import find_spec

    if find_spec(library) is None:
        raise UnavailableError(
            f"the library {library} is not installed",
            expected="the libraries that cut models",
            remedy="pip install 'cenacle[cut]'",
        )


@app.command(
    _DEFAULT,
    epilog="Examples:\n\ncenacle cut model.onnx --suggest --plot cuts.svg\n\n"
    "cenacle cut model.onnx --at layer3 --secret 'fc.*' --out cut\n\n"
    "cenacle cut nets.py:build --weights net.safetensors --input image=F32[N,3,224,224] "
    "--at features --out cut",
)
def cut_model(
    model: ModelArgument,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="The last public layer, with all layers inside it; or a node or a tensor.",
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="No front: the whole model becomes the tail.")
    ] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Show every possible cut, with what it costs.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The folder for the files of the cut."),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Weights that must lie in the tail, such as 'head.*'. Repeatable.",
        ),
    ] = None,
    weights: WeightsOption = None,
    input_: InputOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw the suggestion as a picture."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --suggest: labelled samples, .npz or .safetensors. Behind good cuts a "
            "linear head is trained on three quarters of them and measured on the rest."
        ),
    ] = None,
    samples: Annotated[str, typer.Option(help="The tensor of samples in --data.")] = "images",
    labels: Annotated[str, typer.Option(help="The tensor of labels in --data.")] = "labels",
    feed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=TENSOR", help="What feeds a further input of the model. Repeatable."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on every element of a sample.")] = 1.0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of an earlier cut.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Cut a model after a layer, or show where it could be cut."""
    with errors_in_words(json_):
        wanted = suggest or plot is not None or data is not None
        _check_options(at, whole=whole, wanted=wanted, out=out)
        measured = None if data is None else _samples(data, samples, labels, feed, scale)
        with progress_bar(f"reading {Path(model).name}", not json_) as bar:
            found, shapes = open_model(model, weights, input_)
            from cenacle.cut.cutting import Cutter
            from cenacle.cut.suggestion import suggest as suggest_cuts

            suggestion = None
            if wanted:
                bar.step("weighing every cut")
                suggestion = suggest_cuts(found, secret=secret or (), shapes=shapes)
                if measured is not None:
                    bar.step("training linear heads")
                    suggestion = _measure(found, suggestion, measured, bar.report)
            fields: dict[str, Any] = {"model": model}
            if suggestion is not None:
                fields["choices"] = [one.to_fields() for one in suggestion.choices]
                fields["refused"] = [vars(one) for one in suggestion.refused]
            if at is not None or whole:
                bar.step("cutting")
                cutter = Cutter(found, secret=secret or (), shapes=shapes)
                fields["cut"] = _cut(cutter, at, out, force=force)
        if plot is not None and suggestion is not None:
            from cenacle.cut.plot import plot_choices

            picture = plot_choices(suggestion.choices, f"Cuts of {Path(model).name}")
            write_file(plot, picture.encode())
            fields["plot"] = str(plot)
        finish(fields, json_, lambda: _show(fields, suggestion, out))


def _check_options(at: str | None, *, whole: bool, wanted: bool, out: Path | None) -> None:
    if at is not None and whole:
        raise InputError("--at and --whole exclude each other", expected="one of them")
    if at is None and not whole and (out is not None or not wanted):
        raise InputError(
            "it is not said where to cut",
            expected="--at LAYER, or --suggest to see where",
        )


def _samples(path: Path, samples: str, labels: str, feed: list[str] | None, scale: float) -> Any:
    _require("torch")
    from cenacle.cli.cut_samples import parse_feeds, read_tensors
    from cenacle.cut.accuracy import Samples

    tensors = read_tensors(path)
    return Samples(tensors, samples, labels, parse_feeds(feed) or None, scale).first(_MOST_SAMPLES)


def _measure(
    model: OnnxModel, suggestion: Suggestion, samples: Any, progress: Callable[[int, int], None]
) -> Suggestion:
    from cenacle.cut.accuracy import head_accuracy, spread

    good = [one.layer for one in suggestion if one.good]
    layers = spread(good or [one.layer for one in suggestion])
    return suggestion.with_accuracy(head_accuracy(model, layers, samples, progress=progress))


def _cut(cutter: Any, at: str | None, out: Path | None, *, force: bool) -> dict[str, Any]:
    from cenacle.cut.cut_files import describe_cut, write_cut

    made = None if at is None else cutter.cut(at)
    described = (
        describe_cut(cutter.model, made)
        if out is None
        else write_cut(cutter.model, made, out, force=force)
    )
    known = [] if made is None else cutter.known_weights(made)
    return {**described, "known": [{"secret": name, "public": twin} for name, twin in known]}


def _show(fields: dict[str, Any], suggestion: Suggestion | None, out: Path | None) -> None:
    if suggestion is not None:
        console.print(cut_table(suggestion))
        line(
            "for one row of a batch; compute in multiply-accumulates"
            + ("" if all(one.exact for one in suggestion) else "; >= where sizes are open")
        )
        _show_refused(suggestion)
    if "plot" in fields:
        line(f"plot   {fields['plot']}")
    if "cut" in fields:
        _show_cut(fields["cut"], out)


def cut_table(suggestion: Suggestion) -> Table:
    """All cuts, one a line; fits 80 columns."""
    table = Table(
        title="possible cuts after a layer (*: no other hides about as much for less)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    measured = any(one.accuracy is not None for one in suggestion)
    table.add_column("")
    table.add_column("--at", overflow="fold", min_width=12)
    heads = ["secret\nweights", "of all", "tail\ncompute", "of all", "tail\nmemory"]
    heads += ["crossing\na row", *(["linear\nhead"] if measured else [])]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for one in suggestion:
        table.add_row(*_row(one, measured=measured), style="bold" if one.good else None)
    return table


def _row(one: Choice, *, measured: bool) -> list[str]:
    least = "" if one.exact else ">= "
    tensors = len(one.crossing)
    accuracy = "-" if one.accuracy is None else f"{one.accuracy:.1%}"
    return [
        "*" if one.good else "",
        cell(one.layer),
        f"{one.parameters:,}",
        f"{one.share:.1%}",
        f"{least}{_count(one.macs)}",
        f"{one.macs_share:.1%}",
        f"{least}{_bytes(one.memory)}",
        f"{least}{_bytes(one.crossing_bytes)}" + (f" in {tensors}" if tensors > 1 else ""),
        *([accuracy] if measured else []),
    ]


def _show_refused(suggestion: Suggestion) -> None:
    reasons: dict[str, list[str]] = {}
    for refusal in suggestion.refused:
        reasons.setdefault(refusal.why, []).append(refusal.layer)
    for why, layers in reasons.items():
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        say(f"no cut at {', '.join(layers[:3])}{more}: {why}")


def _show_cut(made: dict[str, Any], out: Path | None) -> None:
    secret, public = made["secret"], made["public"]
    total = secret["numbers"] + public["numbers"]
    share = f" ({secret['numbers'] / total:.1%})" if total else ""
    where = "the whole model is the tail" if made["layer"] is None else f"cut after {made['layer']}"
    line(f"{where}: {secret['numbers']:,} of {total:,} learned numbers{share} are in the tail")
    for spec in made["crossing"]:
        sizes = " x ".join("N" if size is None else str(size) for size in spec["shape"])
        line(f"crossing  {spec['name']}  {spec['dtype']} [{sizes}]")
    for pair in made["known"]:
        say(f"warning: {pair['secret']} in the tail equals {pair['public']} in the public front")
    if out is None:
        line("nothing was written; --out DIR writes the two parts")
        return
    if made["front"] is not None:
        line(f"front     {out / made['front']['file']}  may be given to anybody")
        line(f"          {made['front']['digest']}")
    tail = out / made["tail"]["file"]
    line(f"tail      {tail}  is SECRET and not yet encrypted: seal it, then delete it")
    line(f"          cenacle seal {tail} --type model --terms terms.yaml --as PARTY")


def _count(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
