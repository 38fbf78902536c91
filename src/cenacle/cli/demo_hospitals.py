"""The hospitals' demonstration: three owners, a clinic, an operator, a broker."""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from rich.markup import escape
from rich.table import Table

from cenacle.cli.stage import Actor, BackgroundBroker, Stage
from cenacle.errors import UnavailableError

__all__ = ["HOSPITALS", "hospital_job", "hospital_patients", "play"]

HOSPITALS: Final = ("hospital-a", "hospital-b", "hospital-c")
_TARGET: Final = "diagnosis"

_TERMS: Final = """\
kind: terms
protection: simulated    # a demonstration: a real owner would say tee
recipes: [mlp, logistic]
privacy: unbounded       # outputs are not differentially private
recipients: [clinic]
outputs: [model, metrics]
purposes: [breast cancer diagnosis]
uses: 3
expires: 2036-12-31
"""


def hospital_patients() -> tuple[list[str], dict[str, list[list[Any]]]]:
    """The 569 patients as three hospitals with different case mixes: 310, 170 and 89.

    A screening centre sees mostly benign findings and obvious tumours, a surgical clinic mostly
    malignant ones, a referral centre few and difficult cases. So none of them alone sees what
    decides the others' cases. The mix is chosen to make that point: with a random split the
    largest hospital alone is about as good as all together.

    Returns:
        Column names, and rows by hospital, in a fixed order; every patient is in one hospital.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise UnavailableError(
            "the demonstration's data is not here",
            found="no scikit-learn",
            remedy="pip install 'cenacle[demo]'",
        ) from None
    data = load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in data.feature_names]
    by_size = np.argsort(data.data[:, names.index("mean_radius")], kind="stable")
    malignant, benign = by_size[data.target[by_size] == 0], by_size[data.target[by_size] == 1]
    # The 20 largest tumours and the 60 smallest benign findings are the easy cases.
    hard_malignant, hard_benign = malignant[:-20], benign[60:]
    few_benign = np.linspace(0, len(hard_benign) - 1, 7).astype(int)
    some_malignant = np.linspace(0, len(hard_malignant) - 1, 82).astype(int)
    rows = {
        "hospital-a": [np.delete(hard_benign, few_benign), malignant[-20:]],
        "hospital-b": [np.delete(hard_malignant, some_malignant), benign[:60]],
        "hospital-c": [hard_benign[few_benign], hard_malignant[some_malignant]],
    }
    labels = [str(name) for name in data.target_names]
    return [*names, _TARGET], {
        name: [
            [*map(float, data.data[row]), labels[data.target[row]]]
            for row in np.sort(np.concatenate(parts))
        ]
        for name, parts in rows.items()
    }


def hospital_job() -> dict[str, Any]:
    """What the contract says is to be done: a recipe, without custom code."""
    return {
        "type": "recipe",
        "recipe": {
            "task": "classification",
            "data": {
                "form": "table",
                "assets": list(HOSPITALS),
                "target": _TARGET,
                "classes": ["malignant", "benign"],
            },
            "model": {"type": "mlp", "hidden": [16]},
            "optimizer": {"type": "adamw", "learning_rate": 0.01},
            "epochs": 40,
            "batch_size": 32,
            "seed": 7,
            "holdout": {"fraction": 0.3},
            "compare_alone": True,
        },
    }


def _draft() -> dict[str, Any]:
    return {
        "name": "diagnosis-model",
        "purpose": "breast cancer diagnosis",
        "parties": [*HOSPITALS, "clinic"],
        "assets": {name: f"../{name}/records.csv.sealed.asset.json" for name in HOSPITALS},
        "job": hospital_job(),
        "outputs": [
            {"name": "model", "kind": "model", "recipient": "clinic"},
            {"name": "metrics", "kind": "metrics", "recipient": "clinic"},
        ],
        "approval": {"all_of": list(HOSPITALS)},
        "vetoes": ["clinic"],
        "expires": "2036-12-31",
    }


def play(folder: Path | None, *, quiet: bool) -> tuple[dict[str, Any], Callable[[], None]]:
    """Play the whole job. Returns its figures, and what prints the closing tables."""
    columns, patients = hospital_patients()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="cenacle-demo-")) if folder is None else folder.resolve()
    stage = Stage(root, quiet=quiet)
    hospitals = [stage.actor(name) for name in HOSPITALS]
    clinic, operator = stage.actor("clinic"), stage.actor("operator")
    stage.heading(f"Everything of this demonstration lies in {root}")
    with BackgroundBroker(
        stage.actor("broker"),
        *("--dir", "store", "--name", "demo/broker", "--port", "0", "--development"),
    ) as broker:
        _meet(stage, hospitals, clinic, operator, broker.announced)
        _seal(stage, hospitals, columns, patients)
        digest = _agree(stage, hospitals, clinic, operator)
        _compute(stage, operator, digest)
        metrics = _receive(stage, clinic, hospitals[0], operator)
    seconds = round(time.monotonic() - started, 1)
    alone = [metrics["alone"][name]["accuracy"] for name in HOSPITALS]
    figures = {
        "accuracy_pooled": metrics["pooled"]["accuracy"],
        "accuracy_single": alone,
        "receipt": str(operator.folder / "results" / "receipt.json"),
        "seconds": seconds,
    }

    def show() -> None:
        _closing_tables(stage, metrics, operator)
        stage.console.print(f"\nplayed in {seconds} s")
        _closing_commands(stage, clinic, hospitals[0], operator)

    return figures, show


def _meet(
    stage: Stage,
    hospitals: list[Actor],
    clinic: Actor,
    operator: Actor,
    announced: dict[str, Any],
) -> None:
    stage.heading("1. The parties make keys, pin the broker, and register")
    identity = "../broker/store/identity.json"
    pin = ("broker", "pin", identity, "--digest", str(announced["digest"]))
    parties = (*hospitals, clinic)
    stage.together(*((actor, ("party", "new", actor.name), None) for actor in parties))
    stage.together(*((actor, pin, None) for actor in (*parties, operator)))

    def register(actor: Actor, token: str) -> tuple[Actor, tuple[str, ...], str]:
        return actor, ("party", "register", actor.name, "--token", "-"), token

    # The broker's first token makes its owner, who invites the others. Tokens are secrets:
    # they are piped, and the answers that hold them are not shown.
    owner = hospitals[0]
    stage.together(register(owner, announced["owner_token"]))
    tokens = [owner.ask("broker", "invite", "--as", owner.name)["token"] for _ in parties[1:]]
    stage.together(*map(register, parties[1:], tokens))


def _seal(
    stage: Stage,
    hospitals: list[Actor],
    columns: list[str],
    patients: dict[str, list[list[Any]]],
) -> None:
    stage.heading("2. Each hospital states its terms and seals its patients' records")
    for actor in hospitals:
        with (actor.folder / "records.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(patients[actor.name])
        (actor.folder / "terms.yaml").write_text(_TERMS)
    seal = ("seal", "records.csv", "--terms", "terms.yaml", "--as")
    stage.together(*((actor, (*seal, actor.name), None) for actor in hospitals))


def _agree(stage: Stage, hospitals: list[Actor], clinic: Actor, operator: Actor) -> str:
    stage.heading("3. The operator drafts a contract, the clinic proposes it, the hospitals sign")
    (operator.folder / "job.yaml").write_text(yaml.safe_dump(_draft(), sort_keys=False))
    operator.run("enclave", "layers")
    digest = str(operator.ask("draft", "job.yaml", "--out", "contract.yaml")["contract"])
    clinic.run("propose", "../operator/contract.yaml", "--as", clinic.name)
    hospitals[0].run("review", digest, "--as", hospitals[0].name)
    stage.together(*((actor, ("sign", digest, "--as", actor.name), None) for actor in hospitals))
    return digest


def _compute(stage: Stage, operator: Actor, digest: str) -> None:
    stage.heading("4. The operator runs it: evidence, keys, training, all inside the enclave")
    data = [part for name in HOSPITALS for part in ("--data", f"../{name}/records.csv.sealed")]
    operator.run("run", digest, *data, "--out", "results")


def _receive(stage: Stage, clinic: Actor, hospital: Actor, operator: Actor) -> dict[str, Any]:
    stage.heading("5. The clinic opens what was sealed to it; anyone verifies the receipt")
    receipt = f"../{operator.name}/results/receipt.json"
    for_clinic = ("--as", clinic.name, "--out")
    stage.together(
        (clinic, ("open", receipt, "model", *for_clinic, "model.safetensors"), None),
        (clinic, ("open", receipt, "metrics", *for_clinic, "metrics.json"), None),
        (hospital, ("verify", receipt), None),
        (hospital, ("log", "--limit", "5"), None),
    )
    metrics: dict[str, Any] = json.loads((clinic.folder / "metrics.json").read_bytes())
    return metrics


def _closing_tables(stage: Stage, metrics: dict[str, Any], operator: Actor) -> None:
    console = stage.console
    results = Table(title="\naccuracy on the pooled held-out patients", title_justify="left")
    for column in ("trained on", "patients", "accuracy"):
        results.add_column(column, justify="left" if column == "trained on" else "right")
    for name in HOSPITALS:
        training = metrics["rows"][name]["training"]
        results.add_row(f"{name} alone", str(training), f"{metrics['alone'][name]['accuracy']:.3f}")
    every = sum(rows["training"] for rows in metrics["rows"].values())
    held = sum(rows["holdout"] for rows in metrics["rows"].values())
    pooled = metrics["pooled"]["accuracy"]
    results.add_row("[bold]all three together[/]", str(every), f"[bold]{pooled:.3f}[/]")
    console.print(results)
    console.print(
        f"({held} patients held out. The hospitals' case mixes were made different on purpose; "
        "with a random split the largest alone is about as good as all.)"
    )
    layers = operator.ask("enclave", "layers", shown=False)["layers"]
    active = [layer["name"] for layer in layers if layer["missing"] is None]
    absent = [f"{layer['name']}: {layer['missing']}" for layer in layers if layer["missing"]]
    table = Table(title="\nwhat was protected from whom", title_justify="left", show_lines=True)
    for column in ("what", "protected from", "not protected from"):
        table.add_column(column)
    root = (
        "root on the operator's machine, and the user who starts the enclave: "
        "[bold]it is SIMULATED[/]"
    )
    table.add_row(
        "patients' records",
        "the other hospitals, the clinic, the broker's disk, the network; other users of the "
        "operator's machine" + (f" (sandbox: {', '.join(active)})" if active else ""),
        root + "; whoever runs the broker, who could take its keys",
    )
    table.add_row(
        "the trained model",
        "everyone but the clinic (sealed to its key, post-quantum hybrid)",
        root,
    )
    table.add_row(
        "single patients in the model",
        "-",
        "the clinic: the model is not differentially private, and its metadata holds the means "
        "and deviations of all features; the metrics hold row counts and each hospital's accuracy",
    )
    table.add_row(
        "the agreement",
        "changes by anyone: every clause was checked before a key left, and is in the log",
        "a broker and an operator who collude, as long as evidence is simulated",
    )
    console.print(table)
    for line in absent:
        console.print(f"[yellow]not used here[/]  {escape(line)}", soft_wrap=True)
    console.print(
        "[yellow]not used here[/]  hardware evidence: no TPM, TDX, SEV-SNP or SGX in this job"
    )


def _closing_commands(stage: Stage, clinic: Actor, hospital: Actor, operator: Actor) -> None:
    receipt = operator.folder / "results" / "receipt.json"
    out = stage.console
    out.print("open the model:     ", end="")
    out.print(
        f"CENACLE_HOME={clinic.folder / 'home'} cenacle open {receipt} model --as clinic "
        "--out model.safetensors",
        soft_wrap=True,
        markup=False,
    )
    out.print("verify the receipt: ", end="")
    out.print(
        f"CENACLE_HOME={hospital.folder / 'home'} cenacle verify {receipt}",
        soft_wrap=True,
        markup=False,
    )
