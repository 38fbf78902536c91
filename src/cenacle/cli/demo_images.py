"""The pictures' demonstration: one network, trained under three schemes, side by side."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from rich.table import Table

from cenacle.cli.demo_data import Pictures, load_pictures
from cenacle.cli.demo_download import download
from cenacle.cli.offload import PARTS
from cenacle.cli.output import progress_bar
from cenacle.cli.stage import Actor, BackgroundBroker, Stage
from cenacle.errors import InputError

__all__ = ["SCHEMES", "picture_job", "play"]

SCHEMES: Final = ("enclave", "permuted", "lowrank")
_ACCELERATORS: Final = 2
_PICTURES: Final = 4000

_TERMS: Final = """\
kind: terms
protection: simulated    # a demonstration: a real owner would say tee
recipes: [cnn]
offload: [enclave, permuted, lowrank]
privacy: unbounded       # outputs are not differentially private
recipients: [lab]
outputs: [model, metrics]
purposes: [reading handwriting]
uses: 3
expires: 2036-12-31
"""


def picture_job(pictures: Pictures) -> dict[str, Any]:
    """What each contract says is to be done: a small convolutional network, without custom code."""
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "tensors",
                "assets": ["pictures"],
                "inputs": "images",
                "labels": "labels",
                "classes": list(range(10)),
                "scale": pictures.scale,
            },
            "model": {"type": "cnn", "channels": [16, 32], "hidden": [64]},
            "optimizer": {"type": "adam", "learning_rate": 0.004},
            "epochs": max(3, 14_000 // len(pictures.images)),
            "batch_size": 64,
            "seed": 7,
            "holdout": {"fraction": 0.25},
        },
    }


def _draft(scheme: str, pictures: Pictures) -> dict[str, Any]:
    offload: dict[str, Any] = {"scheme": scheme}
    if scheme != "enclave":
        offload["accelerators"] = {"count": _ACCELERATORS, "kinds": ["process"]}
    return {
        "name": f"handwriting-{scheme}",
        "purpose": "reading handwriting",
        "parties": ["archive", "lab"],
        "assets": {"pictures": "../archive/pictures.npz.sealed.asset.json"},
        "job": picture_job(pictures),
        "offload": offload,
        "outputs": [
            {"name": "model", "kind": "model", "recipient": "lab"},
            {"name": "metrics", "kind": "metrics", "recipient": "lab"},
        ],
        "approval": "archive",
        "vetoes": ["lab"],
        "expires": "2036-12-31",
    }


def play(
    folder: Path | None, data: Path | None, url: str | None, *, quiet: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Play the job under each scheme. Returns the figures, and what prints the closing tables.

    Args:
        folder: keeps everything; a new one by default.
        data: a folder with MNIST's files; by default CENACLE_DATA, else scikit-learn's digits.
        url: where to download MNIST from, if anywhere.

    Raises:
        InputError: both a folder and an address are given, or one of them cannot be used.
    """
    if data is not None and url is not None:
        raise InputError(
            "the pictures can come from a folder or from an address, not from both",
            found="--data and --download-url",
            expected="one of them",
        )
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="cenacle-demo-")) if folder is None else folder.resolve()
    if url is not None:
        with progress_bar("downloading MNIST", not quiet) as bar:
            data = download(url, root / "mnist", report=bar.report)
    pictures = load_pictures(data, _PICTURES)
    stage = Stage(root, quiet=quiet)
    archive, lab, operator = (stage.actor(name) for name in ("archive", "lab", "operator"))
    stage.heading(f"Everything of this demonstration lies in {root}")
    with BackgroundBroker(
        stage.actor("broker"),
        *("--dir", "store", "--name", "demo/broker", "--port", "0", "--development"),
    ) as broker:
        _meet(stage, archive, lab, operator, broker.announced)
        _seal(stage, archive, pictures)
        contracts = _agree(stage, archive, lab, operator, pictures)
        rows = [_compute(stage, operator, lab, scheme, contracts[scheme]) for scheme in SCHEMES]
    seconds = round(time.monotonic() - started, 1)
    figures = {
        "pictures": len(pictures.images),
        "source": pictures.source,
        "schemes": rows,
        "seconds": seconds,
    }

    def show() -> None:
        _closing_tables(stage, figures)
        stage.console.print(f"\nplayed in {seconds} s")
        _closing_command(stage, lab, operator)

    return figures, show


def _meet(
    stage: Stage, archive: Actor, lab: Actor, operator: Actor, announced: dict[str, Any]
) -> None:
    stage.heading("1. An archive and a lab make keys, pin the broker, and register")
    identity = "../broker/store/identity.json"
    pin = ("broker", "pin", identity, "--digest", str(announced["digest"]))
    stage.together(*((one, ("party", "new", one.name), None) for one in (archive, lab)))
    stage.together(*((one, pin, None) for one in (archive, lab, operator)))
    # Tokens are secrets: they are piped, and the answers that hold them are not shown.
    register = ("party", "register")
    token = announced["owner_token"]
    stage.together((archive, (*register, "archive", "--token", "-"), token))
    token = archive.ask("broker", "invite", "--as", "archive")["token"]
    stage.together((lab, (*register, "lab", "--token", "-"), token))


def _seal(stage: Stage, archive: Actor, pictures: Pictures) -> None:
    stage.heading(
        f"2. The archive seals {len(pictures.images)} pictures ({pictures.source}); its terms "
        "say under which schemes algebra may leave an enclave"
    )
    np.savez(
        archive.folder / "pictures.npz",
        images=pictures.images,
        labels=pictures.labels.astype(np.int64),
    )
    (archive.folder / "terms.yaml").write_text(_TERMS)
    archive.run("seal", "pictures.npz", "--terms", "terms.yaml", "--as", "archive")


def _agree(
    stage: Stage, archive: Actor, lab: Actor, operator: Actor, pictures: Pictures
) -> dict[str, str]:
    stage.heading("3. One contract a scheme; everything else in them is the same")
    for scheme in SCHEMES:
        text = yaml.safe_dump(_draft(scheme, pictures), sort_keys=False)
        (operator.folder / f"{scheme}.yaml").write_text(text)
    stage.together(
        *(
            (operator, ("draft", f"{scheme}.yaml", "--out", f"{scheme}-contract.yaml"), None)
            for scheme in SCHEMES
        )
    )
    digests = {}
    for scheme in SCHEMES:
        path = f"../operator/{scheme}-contract.yaml"
        digests[scheme] = str(lab.ask("propose", path, "--as", "lab")["contract"])
    stage.together(
        *((archive, ("sign", digest, "--as", "archive"), None) for digest in digests.values())
    )
    return digests


def _compute(stage: Stage, operator: Actor, lab: Actor, scheme: str, digest: str) -> dict[str, Any]:
    where = (
        "all inside the enclave"
        if scheme == "enclave"
        else f"secrets inside, algebra at {_ACCELERATORS} accelerator processes that nobody trusts"
    )
    stage.heading(f"4. The operator runs it under {scheme}: {where}")
    out = f"results-{scheme}"
    data = "../archive/pictures.npz.sealed"
    # One thread each: two cores are enough, and three processes would fight over more.
    with progress_bar(f"training under {scheme}", not stage.quiet):
        ran = operator.ask("run", digest, "--data", data, "--out", out, "--threads", "1")
    receipt = f"../operator/{out}/receipt.json"
    opened = f"metrics-{scheme}.json"
    lab.run("open", receipt, "metrics", "--as", "lab", "--out", opened)
    verified = lab.ask("verify", receipt)
    metrics = json.loads((lab.folder / opened).read_bytes())
    used = verified["accelerators"]
    steps = ran["stages"]["steps"]
    return {
        "scheme": scheme,
        "accuracy": metrics["pooled"]["accuracy"],
        "training_seconds": steps,
        "seconds_inside": steps if used is None else used["seconds_inside"],
        "seconds_outside": 0.0 if used is None else used["seconds_outside"],
        "bytes_sent": 0 if used is None else used["bytes_sent"],
        "bytes_received": 0 if used is None else used["bytes_received"],
        "results_checked": 0 if used is None else used["checked"],
        "dropped": [] if used is None else used["dropped"],
        "leakage": verified["leakage"],
        "receipt": str(operator.folder / out / "receipt.json"),
        "profile": None if ran["offload_profile"] is None else str(operator.folder / out),
    }


def _closing_tables(stage: Stage, figures: dict[str, Any]) -> None:
    console = stage.console
    costs = Table(title="\none network, three schemes", title_justify="left")
    costs.add_column("scheme")
    for column in ("accuracy", "in the enclave", "at accelerators", "sent", "taken"):
        costs.add_column(column, justify="right")
    leaks = Table(title="\nwhat the accelerators learnt", title_justify="left")
    for column in ("scheme", *PARTS):
        leaks.add_column(column)
    for row in figures["schemes"]:
        costs.add_row(
            row["scheme"],
            f"{row['accuracy']:.3f}",
            f"{row['seconds_inside']:.1f} s",
            f"{row['seconds_outside']:.1f} s",
            f"{row['bytes_sent'] / 1e6:,.0f} MB",
            f"{row['bytes_received'] / 1e6:,.0f} MB",
        )
        leaks.add_row(row["scheme"], *(_coloured(row["leakage"][part]) for part in PARTS))
    console.print(costs)
    console.print(
        "(The enclave's seconds leave out waiting for accelerators; under permuted they hold some "
        "for compiling its kernels. The accelerators ran on this machine's own processor and were "
        "no faster than the enclave, so for a network as small as this nothing could be gained. "
        "permuted starts from other weights: its first ones must not follow from a public seed.)"
    )
    console.print(leaks)
    for row in figures["schemes"]:
        if row["scheme"] != "enclave":
            note = row["leakage"]["note"]
            console.print(f"{row['scheme']}: {note}", markup=False)
    console.print(
        "[yellow]not used here[/]  hardware evidence: the enclave is SIMULATED and protects from "
        "nobody with root"
    )


def _coloured(word: str) -> str:
    colour = {"hidden": "green", "plaintext": "red"}.get(word, "yellow")
    return f"[{colour}]{word}[/]"


def _closing_command(stage: Stage, lab: Actor, operator: Actor) -> None:
    results = operator.folder / f"results-{SCHEMES[-1]}"
    receipt = results / "receipt.json"
    stage.console.print("costs by layer: ", end="")
    stage.console.print(f"cenacle offload profile {results}", soft_wrap=True, markup=False)
    stage.console.print("verify a receipt: ", end="")
    stage.console.print(
        f"CENACLE_HOME={lab.folder / 'home'} cenacle verify {receipt}",
        soft_wrap=True,
        markup=False,
    )
