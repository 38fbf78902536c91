"""``cenacle demo``: real jobs, played with the real commands of this program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cenacle.cli.output import JsonOption, errors_in_words, finish
from cenacle.errors import InputError

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Play real jobs with the real commands.",
    epilog="Example: cenacle demo hospitals",
)


@app.command(
    epilog="Examples:\n\ncenacle demo hospitals --json\n\ncenacle demo hospitals --enclave tpm"
)
def hospitals(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="Folder to keep everything in, and to go on in; default: a new one."
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            min=0.0, help="Epsilon that each hospital allows over all jobs; a job costs 1."
        ),
    ] = 2.0,
    enclave: Annotated[
        Literal["process", "tpm", "vm"],
        typer.Option(
            help="process: a sandboxed process with simulated evidence; tpm: the same with quotes "
            "of a TPM, here one in software (needs Debian's swtpm); vm: in a measured virtual "
            "machine (needs `cenacle image build --extra sandbox --extra tpm --extra train`)."
        ),
    ] = "process",
    json_: JsonOption = False,
) -> None:
    """Three hospitals train one private model in an enclave for a clinic; all get a receipt.

    The patients are the 569 of scikit-learn's breast-cancer data, split
    unevenly. Every command is printed as it runs; with --json the same figures
    end as one JSON object. In a folder in which it was played before, the next
    job is trained on the same patients, until their privacy budget refuses.
    """
    from cenacle.cli.demo_hospitals import play

    with errors_in_words(json_):
        figures, show = play(folder, budget, enclave, quiet=json_)
        finish(figures, json_, show)


@app.command(epilog="Examples:\n\ncenacle demo images\n\ncenacle demo images --data ~/mnist --json")
def images(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with MNIST's IDX files. Default: what CENACLE_DATA names; without such "
            "files, scikit-learn's digits."
        ),
    ] = None,
    download_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Fetch MNIST's IDX files from below this HTTPS address first; they are believed "
            "by their digests.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder to keep everything in; default: a new one."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Train a network on pictures in an enclave that lets untrusted accelerators do the algebra.

    The same recipe runs three times: inside the enclave alone, and with two
    accelerator processes outside of it under the schemes permuted and lowrank.
    The tables at the end show accuracy, time inside and outside, bytes across,
    and what the accelerators learnt.
    """
    from cenacle.cli.demo_images import play

    with errors_in_words(json_):
        figures, show = play(folder, data, download_url, quiet=json_)
        finish(figures, json_, show)


@app.command(
    epilog="Examples:\n\ncenacle demo serving\n\ncenacle demo serving --images ~/photos\n\n"
    "cenacle demo serving --text --json"
)
def serving(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with MNIST's IDX files. Default: what CENACLE_DATA names; without such "
            "files, scikit-learn's digits."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Photographs instead, one subfolder a class, PNG or JPEG (needs Pillow).",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Short texts instead: 200 synthetic triage notes.")
    ] = False,
    whole: Annotated[
        bool,
        typer.Option(
            "--compare-whole", help="Also train all of the network in the open, for minutes."
        ),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder to keep everything in; default: a new one."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Train a tail behind a public network on private data, and sell it by the query.

    EfficientNet-Lite0's ImageNet weights (or all-MiniLM-L6-v2) are the public
    front. A hospital's samples train a tail in an enclave, for a vendor, who
    seals it again and has it served: clients ask in plain or sealed, until
    their ticket is used up. The tables at the end show accuracy beside what
    it is compared with, latency, and what was kept from whom.
    """
    from cenacle.cli.demo_serving import play

    with errors_in_words(json_):
        if sum((data is not None, images is not None, text)) > 1:
            raise InputError(
                "the demonstration plays with one kind of samples",
                expected="one of --data, --images and --text",
            )
        kind: Literal["digits", "photos", "notes"] = "digits"
        if text or images is not None:
            kind = "notes" if text else "photos"
        figures, show = play(kind, folder, images or data, whole=whole, quiet=json_)
        finish(figures, json_, show)
