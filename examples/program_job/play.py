"""Two hospitals let a lab's program compute pooled statistics; a clinic gets them.

Real commands, printed as they run, in a folder of its own::

    python examples/program_job/play.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cenacle.cli.stage import BackgroundBroker, Stage
from cenacle.enclave.rehearsal import rehearse

HERE = Path(__file__).parent
COLUMNS = ["age", "dose"]
OUTPUTS = [{"name": "statistics", "kind": "metrics", "recipient": "clinic"}]
PARAMETERS = {"columns": COLUMNS, "smallest_group": 20}
TERMS: dict[str, Any] = {
    "protection": "simulated",  # a real owner would say tee
    "privacy": "unbounded",
    "recipients": ["clinic"],
    "outputs": ["metrics"],
    "purposes": ["dosage study"],
    "expires": "2036-12-31",
}


def make_up(path: Path, rows: int, seed: int) -> None:
    """Write a table of patients who never lived."""
    random = np.random.default_rng(seed)
    lines = [f"{age:.1f},{age / 3 + random.normal():.3f}" for age in random.normal(60, 9, rows)]
    path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")


def rehearsal(folder: Path) -> dict[str, Any]:
    """Before the program is sealed: run it here, where its errors can be seen."""
    make_up(folder / "made-up.csv", 30, seed=0)
    spec = importlib.util.spec_from_file_location("main", HERE / "program" / "main.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    kinds = {output["name"]: output["kind"] for output in OUTPUTS}
    files = {"hospital-a": folder / "made-up.csv"}
    return rehearse(main.run, files, kinds, PARAMETERS)["statistics"]  # type: ignore[no-any-return]


def play(folder: Path) -> dict[str, Any]:
    """Play the job; returns the statistics that the clinic opened."""
    print("on made-up data:", json.dumps(rehearsal(folder)))
    stage = Stage(folder, quiet=True)
    hospitals = [stage.actor(name) for name in ("hospital-a", "hospital-b")]
    lab, clinic, operator = (stage.actor(name) for name in ("lab", "clinic", "operator"))
    arguments = ("--dir", "store", "--name", "example/broker", "--port", "0", "--development")
    with BackgroundBroker(stage.actor("broker"), *arguments) as broker:
        pin = ("broker", "pin", "../broker/store/identity.json")
        token = broker.announced["owner_token"]
        parties = (*hospitals, lab, clinic)
        stage.together(*((actor, ("party", "new", actor.name), None) for actor in parties))
        stage.together(*((actor, pin, None) for actor in (*parties, operator)))
        for actor in parties:
            register = ("party", "register", actor.name, "--token", "-")
            stage.together((actor, register, token))
            if actor is not clinic:
                token = hospitals[0].ask("broker", "invite", "--as", "hospital-a")["token"]

        # The lab seals its code, and tells the owners which digest to allow.
        shutil.copytree(HERE / "program", lab.folder / "statistics")
        (lab.folder / "terms.yaml").write_text(yaml.safe_dump(TERMS))
        seal = ("--terms", "terms.yaml", "--as")
        program = lab.ask("seal", "statistics", *seal, "lab")
        for number, actor in enumerate(hospitals, 1):
            make_up(actor.folder / "patients.csv", 40 * number, seed=number)
            terms = {**TERMS, "programs": [program["package"]]}
            (actor.folder / "terms.yaml").write_text(yaml.safe_dump(terms))
        stage.together(*((a, ("seal", "patients.csv", *seal, a.name), None) for a in hospitals))

        sealed = {actor.name: f"../{actor.name}/patients.csv.sealed" for actor in hospitals}
        sealed["program"] = "../lab/statistics.sealed"
        job = {
            "name": "pooled-statistics",
            "purpose": "dosage study",
            "parties": [actor.name for actor in parties],
            "assets": {alias: f"{path}.asset.json" for alias, path in sealed.items()},
            "job": {"type": "program", "program": "program", "parameters": PARAMETERS},
            "outputs": OUTPUTS,
            "approval": {"all_of": [actor.name for actor in parties[:3]]},
            "expires": "2036-12-31",
        }
        (operator.folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
        digest = str(operator.ask("draft", "job.yaml", "--out", "contract.yaml")["contract"])
        clinic.run("propose", "../operator/contract.yaml", "--as", "clinic")
        hospitals[0].run("review", digest, "--as", "hospital-a")
        stage.together(*((a, ("sign", digest, "--as", a.name), None) for a in parties[:3]))
        data = [part for path in sealed.values() for part in ("--data", path)]
        operator.run("run", digest, *data, "--out", "results")
        receipt = "../operator/results/receipt.json"
        opened = ("--as", "clinic", "--out", "statistics.json")
        clinic.run("open", receipt, "statistics", *opened)
        found: dict[str, Any] = json.loads((clinic.folder / "statistics.json").read_bytes())
        return found


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="cenacle-"))
    print(json.dumps(play(where)))
