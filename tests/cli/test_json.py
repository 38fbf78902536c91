"""``--json``: one object on the last line, on success and on error, for every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.house import TERMS, House, Sealed, recipe_job

Command = Callable[..., Any]

pytestmark = pytest.mark.processes

ZERO = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def contract(house: House, patients: dict[str, Sealed]) -> str:
    return house.agree(
        house.contract(patients, recipe_job(["a", "b"]), {"model": "model"}), "hospital-a"
    )


@pytest.fixture(scope="module")
def files(house: House, patients: dict[str, Sealed]) -> dict[str, Path]:
    folder = house.path("files")
    folder.mkdir()
    (folder / "terms.yaml").write_text(yaml.safe_dump(TERMS))
    (folder / "records.csv").write_text("x\n1\n")
    (folder / "identity.json").write_text(house.identity.model_dump_json())
    job = {
        "name": "drafted",
        "purpose": "research",
        "parties": ["hospital-a", "clinic"],
        "assets": {"a": f"{patients['a'].path}.asset.json"},
        "job": recipe_job(["a"]),
        "outputs": [{"name": "model", "kind": "model", "recipient": "clinic"}],
        "approval": "hospital-a",
        "expires": "2036-12-31",
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    # Of its own, so that no command here needs another to have run before it.
    proposal = house.contract(patients, recipe_job(["a", "b"]), {"other": "model"})
    (folder / "contract.yaml").write_text(proposal.to_yaml())
    (folder / "trace.json").write_text(json.dumps({"otherData": {"layers": [{"layer": "fc"}]}}))
    return {path.name: path for path in folder.iterdir()} | {"folder": folder}


# Actor, arguments, and a field of the answer. {names} are files, {contract} is a digest.
SUCCESSES = {
    "party new": ("lab", ["party", "new", "another"], "digest"),
    "party show": ("lab", ["party", "show", "lab"], "signing_key"),
    "party list": ("lab", ["party", "list"], "parties"),
    "terms new": ("lab", ["terms", "new"], "template"),
    "terms check": ("lab", ["terms", "check", "{terms.yaml}"], "uses"),
    "broker pin": ("lab", ["broker", "pin", "{identity.json}"], "digest"),
    "broker show": ("lab", ["broker", "show"], "url"),
    "broker measure": ("lab", ["broker", "measure"], "reference"),
    "attest show": ("lab", ["attest", "show"], "strongest"),
    "broker invite": ("hospital-a", ["broker", "invite", "--as", "hospital-a"], "token"),
    "enclave layers": ("lab", ["enclave", "layers"], "layers"),
    "enclave measure": ("operator", ["enclave", "measure"], "reference"),
    "offload profile": ("lab", ["offload", "profile", "{trace.json}"], "layers"),
    "offload schemes": ("lab", ["offload", "schemes"], "schemes"),
    "seal": (
        "hospital-a",
        ["seal", "{records.csv}", "--terms", "{terms.yaml}", "--as", "hospital-a"],
        "manifest",
    ),
    "draft": ("operator", ["draft", "{job.yaml}", "--out", "{folder}/drafted.yaml"], "contract"),
    "propose": ("clinic", ["propose", "{contract.yaml}", "--as", "clinic"], "contract"),
    "review": ("lab", ["review", "{contract}"], "clauses"),
    "sign": ("hospital-b", ["sign", "{contract}", "--as", "hospital-b"], "signed"),
    "contracts": ("clinic", ["contracts", "--as", "clinic"], "contracts"),
    "veto": (
        "clinic",
        ["veto", "{contract}", "--as", "clinic", "--reason", "late"],
        "vetoed_by",
    ),
    "log": ("lab", ["log"], "entries"),
}

FAILURES = {
    "party new": ("lab", ["party", "new", "lab"], 5),
    "party show": ("lab", ["party", "show", "nobody"], 2),
    "party register": ("lab", ["party", "register", "lab", "--token", "guess"], None),
    "terms new": ("lab", ["terms", "new", "--out", "{folder}/no/terms.yaml"], 2),
    "terms check": ("lab", ["terms", "check", "{records.csv}"], 2),
    "broker start": (
        "lab",
        ["broker", "start", "--dir", "{records.csv}", "--name", "x/y", "--port", "0"],
        2,
    ),
    "broker pin": ("lab", ["broker", "pin", "{identity.json}", "--digest", ZERO], 3),
    "broker show": ("lab", ["broker", "show", "--broker", "other"], 2),
    "broker measure": ("lab", ["broker", "measure", "--dir", "{records.csv}"], 6),
    "broker attest": ("lab", ["broker", "attest"], 6),  # this broker does not
    "attest verify": ("lab", ["attest", "verify", "{records.csv}"], 2),
    "attest trust": ("lab", ["attest", "trust", "{records.csv}", "--kind", "tpm"], 2),
    "image show": ("lab", ["image", "show", "{folder}"], 2),
    "image measure": ("lab", ["image", "measure", "{folder}"], 2),
    "broker invite": ("lab", ["broker", "invite", "--as", "lab"], 4),
    "enclave measure": ("lab", ["enclave", "measure", "--layers", "moat"], 2),
    "offload profile": ("lab", ["offload", "profile", "{folder}"], 2),
    "demo images": ("lab", ["demo", "images", "--data", "{folder}"], 2),
    "seal": (
        "hospital-a",
        ["seal", "{folder}/none.csv", "--terms", "{terms.yaml}", "--as", "hospital-a"],
        2,
    ),
    "draft": ("operator", ["draft", "{terms.yaml}"], 2),
    "propose": ("clinic", ["propose", "{terms.yaml}", "--as", "clinic"], 2),
    "review": ("lab", ["review", ZERO], 2),
    "sign": ("lab", ["sign", "{contract}", "--as", "lab"], 3),
    "veto": ("lab", ["veto", "{contract}", "--as", "lab", "--reason", "no"], 4),
    "contracts": ("lab", ["contracts", "--as", "nobody"], 2),
    "run": ("lab", ["run", ZERO, "--data", "{folder}", "--out", "{folder}/out"], 2),
    "abandon": ("clinic", ["abandon", "{contract}", "--as", "clinic"], 5),
    "open": (
        "clinic",
        ["open", "{records.csv}", "model", "--as", "clinic", "--out", "{folder}/m.safetensors"],
        2,
    ),
    "verify": ("lab", ["verify", "{records.csv}"], 2),
    "log": ("lab", ["log", "--broker", "{folder}/none.json"], 2),
}


def _filled(arguments: list[str], files: dict[str, Path], contract: str) -> list[str]:
    filled = []
    for argument in arguments:
        for name, path in {**files, "contract": contract}.items():
            argument = argument.replace("{" + name + "}", str(path))
        filled.append(argument)
    return filled


@pytest.mark.parametrize("command", SUCCESSES)
def test_success(cli: Command, files: dict[str, Path], contract: str, command: str) -> None:
    actor, arguments, wanted = SUCCESSES[command]
    answer = cli(actor, *_filled(arguments, files, contract), "--json")
    assert answer.code == 0, answer.out
    assert wanted in answer.json
    # Nothing but the object is on the output: what people read is on the other stream, or absent.
    assert len(answer.out.splitlines()) == 1
    assert answer.err == ""


@pytest.mark.parametrize("command", FAILURES)
def test_failure(cli: Command, files: dict[str, Path], contract: str, command: str) -> None:
    actor, arguments, code = FAILURES[command]
    filled = _filled(arguments, files, contract)
    answer = cli(actor, *filled, "--json")
    assert answer.code == code or (code is None and answer.code in {2, 3, 4})
    fields = answer.json
    assert fields["error"]
    assert fields["what"]
    assert set(fields) <= {"error", "what", "found", "expected", "remedy", "clauses"}
    # For people: one sentence on the error stream, nothing on the output, no traceback.
    told = cli(actor, *filled)
    assert told.code == answer.code
    assert told.out == ""
    assert "Traceback" not in told.err
    assert told.err.strip().splitlines()[-1].startswith("error: ")
    assert json.dumps(fields["what"])[1:20] in json.dumps(told.err)
