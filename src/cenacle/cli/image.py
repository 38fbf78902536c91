"""``cenacle image``: build the image of a measured virtual machine, and look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cenacle.cli.image_measure import EPILOG, measure
from cenacle.cli.output import (
    JsonOption,
    cell,
    console,
    errors_in_words,
    finish,
    line,
    progress_bar,
)

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Build, measure and show images of virtual machines.",
    epilog="Example: cenacle image build",
)

ImageArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FOLDER", help="An image; by default the one that `build` makes."),
]


@app.command(
    epilog="Examples:\n\ncenacle image build\n\n"
    "cenacle image build -o image --extra sandbox --extra tpm --extra train --memory 8192"
)
def build(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Where to write the image; default: yours."
        ),
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An extra of cenacle whose packages the image has; repeatable. "
            "Default: sandbox and tpm.",
        ),
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another installed Python package to include; repeatable."
        ),
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="An earlier image, whose Debian packages are taken again."
        ),
    ] = None,
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory of the machine.")] = 3072,
    processors: Annotated[int, typer.Option(help="Processors of the machine.")] = 2,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where downloaded packages are kept."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Build an image from Debian packages and this installation of cenacle.

    Two builds from the same packages give the same bytes: compare their digests.
    """
    from cenacle.enclave.vm.image import ImagePlan, build_image
    from cenacle.enclave.vm.launcher import default_image
    from cenacle.enclave.vm.manifest import ImageManifest

    with errors_in_words(json_):
        folder = out or default_image()
        plan = ImagePlan(
            extras=tuple(extra or ("sandbox", "tpm")),
            more=tuple(package or ()),
            lock=None if lock is None else ImageManifest.load(lock, check=False),
            memory=memory,
            processors=processors,
        )
        with progress_bar("image: starting", not json_) as bar:
            manifest = build_image(
                folder, plan, cache=cache, step=lambda text: bar.step(f"image: {text}")
            )
        finish(
            {"folder": str(folder), "digest": manifest.digest},
            json_,
            lambda: line(f"image {folder}\n{manifest.digest}"),
        )


@app.command(epilog="Example: cenacle image show image --json")
def show(
    folder: ImageArgument = None,
    packages: Annotated[
        bool, typer.Option("--packages", help="List every package with its version.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check every file of an image against its manifest, and show what it is made of."""
    from cenacle.enclave.vm.launcher import default_image
    from cenacle.enclave.vm.manifest import ImageManifest

    with errors_in_words(json_):
        manifest = ImageManifest.load(folder or default_image())

        def table() -> None:
            shown = Table("part", "value", show_lines=False)
            shown.add_row("digest", manifest.digest)
            shown.add_row("kernel", cell(manifest.kernel_release))
            shown.add_row("arguments", cell(manifest.cmdline))
            shown.add_row("machine", f"{manifest.memory} MiB, {manifest.processors} processors")
            shown.add_row("root hash", manifest.verity.root_hash)
            for kind, file in manifest.files.items():
                shown.add_row(kind, f"{cell(file.name)}, {file.size} bytes, {file.digest}")
            console.print(shown)
            software = (*manifest.packages, *manifest.distributions)
            if packages:
                line("\n".join(f"{one.name} {one.version}" for one in software))
            else:
                line(f"{len(software)} packages; --packages lists them")

        finish({"digest": manifest.digest, **manifest.to_fields()}, json_, table)


app.command(name="measure", epilog=EPILOG)(measure)
