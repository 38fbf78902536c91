"""The ``cenacle`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import cenacle
from cenacle.cli import (
    attest,
    broker,
    broker_keys,
    contract,
    cut,
    cut_retrain,
    demo,
    enclave,
    evaluate,
    image,
    infer,
    log,
    offload,
    party,
    privacy,
    receipt,
    run,
    seal,
    serve,
    terms,
    ticket,
)
from cenacle.cli.output import EXIT_CODES, report_error
from cenacle.errors import CenacleError, InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="cenacle",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, hence secrets
    add_completion=False,
    help="Confidential machine learning between parties who trust neither each other nor the "
    "machines they rent.",
    epilog=f"Example: cenacle demo hospitals\n\n{EXIT_CODES}",
)

app.add_typer(party.app, name="party")
app.add_typer(terms.app, name="terms")
app.add_typer(ticket.app, name="ticket")
broker.app.add_typer(broker_keys.app, name="keys")
app.add_typer(broker.app, name="broker")
app.add_typer(enclave.app, name="enclave")
app.add_typer(attest.app, name="attest")
app.add_typer(image.app, name="image")
app.add_typer(offload.app, name="offload")
cut.app.command(
    epilog="Examples:\n\ncenacle cut retrain model.onnx --at features --classes 0-9 --out tail\n\n"
    "cenacle cut retrain model.onnx --at features --local --data mine.npz --compare-whole"
)(cut_retrain.retrain)
cut.app.command(
    epilog="Example: cenacle cut export model.safetensors --front front.onnx --out tail"
)(cut_retrain.export)
app.add_typer(cut.app, name="cut")
app.add_typer(demo.app, name="demo")
app.command(epilog="Example: cenacle seal records.csv --terms terms.yaml --as hospital-a")(
    seal.seal
)
app.command(epilog="Example: cenacle draft job.yaml --out contract.yaml")(contract.draft)
app.command(epilog="Example: cenacle propose contract.yaml --as clinic")(contract.propose)
app.command(epilog="Example: cenacle review sha256:4be1... --as hospital-a")(contract.review)
app.command(epilog="Example: cenacle sign sha256:4be1... --as hospital-a")(contract.sign)
app.command(epilog='Example: cenacle veto sha256:4be1... --as clinic --reason "wrong recipe"')(
    contract.veto
)
app.command(epilog="Example: cenacle contracts --as clinic")(contract.contracts)
app.command(epilog="Example: cenacle budget records.csv.sealed.asset.json --as hospital-a")(
    privacy.budget
)
app.command(
    epilog="Examples:\n\ncenacle run sha256:4be1... --data sealed/ --out results\n\n"
    "cenacle run sha256:4be1... --data sealed/ --out results --resume"
)(run.run)
app.command(
    epilog="Examples:\n\ncenacle serve sha256:4be1... --data sealed/ --front net.onnx --out out\n\n"
    "cenacle serve sha256:4be1... --data sealed/ --out out --listen 0.0.0.0:8443 --follow 60"
)(serve.serve)
app.command(
    epilog="Examples:\n\ncenacle infer https://127.0.0.1:8443 --model net --input x.npy\n\n"
    "cenacle infer https://127.0.0.1:8443 --sealed --contract sha256:4be1... --front front.onnx "
    "--input x.npy"
)(infer.infer)
app.command(epilog="Example: cenacle abandon sha256:4be1... --as clinic")(run.abandon)
app.command(
    "open",
    epilog="Example: cenacle open results/receipt.json model --as clinic --out model.safetensors",
)(receipt.open_)
app.command(epilog="Example: cenacle evaluate model.safetensors test-rows.csv")(evaluate.evaluate)
app.command(epilog="Example: cenacle verify results/receipt.json")(receipt.verify)
app.command(epilog="Example: cenacle log --limit 20")(log.log)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"cenacle {cenacle.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point of the console script."""
    if "--json" not in sys.argv[1:]:
        app()
        return
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        report_error(CenacleError("interrupted"), as_json=True)
        code = 130
    except Exception as error:
        # Typer brings its own copy of click, so the class has no name that could be imported.
        if not any(kind.__name__ == "UsageError" for kind in type(error).__mro__):
            raise
        words = error.format_message().rstrip(".") if hasattr(error, "format_message") else ""
        report_error(InputError(words, remedy="see --help"), as_json=True)
        code = InputError.exit_code
    sys.exit(code if isinstance(code, int) else 0)
