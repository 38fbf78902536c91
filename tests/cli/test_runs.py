"""``cenacle run`` and what follows it, with real enclaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker.identity import BrokerKeys
from tests.support.house import House, Sealed, Trap, patient_rows, recipe_job

Command = Callable[..., Any]

pytestmark = pytest.mark.processes

_PROGRAMS = pytest.mark.usefixtures("program_layers")


@dataclass(frozen=True)
class Played:
    """A job that lacked only its receipt when its enclave was killed, and what each try said."""

    contract: str
    data: tuple[object, ...]
    out: Path
    killed: Any
    again: Any
    other: Any
    resumed: Any
    resumed_again: Any


@pytest.fixture(scope="module")
def played(cli: Command, house: House, patients: dict[str, Sealed]) -> Played:
    outputs = {"model": "model", "metrics": "metrics"}
    digest, other = (
        house.agree(house.contract(patients, recipe_job(["a", "b"]), outputs)) for _ in range(2)
    )
    out = house.folder / "operator" / "results"
    data = ("--data", patients["a"].path, "--data", patients["b"].path, "--out", out)
    house.trap = Trap()
    house.trap.set("settle", when="before")
    killed = cli("operator", "run", digest, *data)
    house.trap = None
    return Played(
        digest,
        data,
        out,
        killed,
        cli("operator", "run", digest, *data),
        cli("operator", "run", other, *data, "--resume"),
        cli("operator", "run", digest, *data, "--resume"),
        cli("operator", "run", digest, *data, "--resume"),
    )


@pytest.fixture(scope="module")
def receipt(played: Played) -> Path:
    assert played.resumed.code == 0, played.resumed.err
    return played.out / "receipt.json"


def test_a_run_says_what_it_does_and_how_to_go_on_when_it_is_killed(played: Played) -> None:
    assert played.killed.code == 7
    for step in ("starting", "checking sealed files", "showing evidence", "running", "settling"):
        assert f"enclave: {step}" in played.killed.err
    error = played.killed.err.strip().splitlines()[-1]
    assert error.startswith("error: the enclave was")
    assert "Go on with `cenacle run ... --resume`" in error
    assert "cenacle abandon" in error


def test_a_finished_job_without_its_receipt_is_completed_and_never_repeated(
    played: Played, house: House
) -> None:
    assert played.again.code == 5
    assert "lacks only its receipt" in played.again.err
    assert played.other.code == 5
    assert "Complete it with --resume and its contract" in played.other.err
    assert played.resumed.code == 0
    assert f"receipt {played.out / 'receipt.json'} after" in played.resumed.out
    assert played.resumed_again.code == 5
    entries = [e for e in house.log() if e.get("contract") == played.contract]
    assert [e["kind"] for e in entries if e["kind"] in {"release", "settlement"}] == [
        "release",
        "settlement",
    ]


def test_a_receipt_is_verified_offline_by_whoever_pinned_the_broker(
    cli: Command, receipt: Path, played: Played
) -> None:
    shown = cli("lab", "verify", receipt)
    assert shown.code == 0
    assert "protects from nobody with root" in shown.out
    assert played.contract in shown.out
    found = cli("lab", "verify", receipt, "--json").json
    assert found["verified"] is True
    assert found["contract"] == played.contract
    assert found["protection"] == "simulated"
    assert found["signed"] == ["hospital-a", "hospital-b"]


@pytest.mark.parametrize("required", ["measured", "tee"])
def test_a_simulated_receipt_does_not_pass_for_more(
    cli: Command, receipt: Path, required: str
) -> None:
    answer = cli("lab", "verify", receipt, "--require", required, "--json")
    assert answer.code == 3
    assert answer.json["error"] == "EvidenceError"
    assert answer.json["found"] == "simulated"
    assert cli("lab", "verify", receipt, "--require", "nothing").code == 2


def test_a_receipt_under_another_pinned_broker_is_refused(
    alone: Command, receipt: Path, tmp_path: Path
) -> None:
    assert alone("verify", receipt).code == 2  # none is pinned
    other = BrokerKeys.create(tmp_path / "other", "test/broker")
    (tmp_path / "other.json").write_text(other.identity.model_dump_json())
    alone("broker", "pin", tmp_path / "other.json")
    answer = alone("verify", receipt, "--json")
    assert answer.code == 3
    assert answer.json["error"] == "ProofError"


def test_an_altered_receipt_is_refused(cli: Command, receipt: Path, tmp_path: Path) -> None:
    bundle = json.loads(receipt.read_bytes())
    for field in ("statement", "evidence", "contract", "settlement", "binding"):
        copy = json.loads(json.dumps(bundle))
        copy[field] = _one_byte_off(copy[field])
        (tmp_path / "receipt.json").write_text(json.dumps(copy))
        answer = cli("lab", "verify", tmp_path / "receipt.json", "--json")
        assert answer.code in {2, 3, 4}, (field, answer.out)
        assert answer.json["error"]
    for content in ("", "{", "[]", "{}"):
        (tmp_path / "receipt.json").write_text(content)
        assert cli("lab", "verify", tmp_path / "receipt.json").code == 2


def _one_byte_off(value: Any) -> Any:
    """The longest text in it, changed in its middle."""
    texts: list[tuple[int, Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, item in items:
            if isinstance(item, str):
                texts.append((len(item), node, key))
            elif isinstance(item, (dict, list)):
                walk(item)

    walk(value)
    _, node, key = max(texts, key=lambda found: found[0])
    text = node[key]
    middle = len(text) // 2
    node[key] = text[:middle] + ("A" if text[middle] != "A" else "B") + text[middle + 1 :]
    return value


def test_an_output_is_opened_by_its_recipient_alone(
    cli: Command, receipt: Path, house: House, tmp_path: Path
) -> None:
    target = tmp_path / "model.safetensors"
    opened = cli("clinic", "open", receipt, "model", "--as", "clinic", "--out", target)
    assert opened.code == 0
    assert "bytes)" in opened.out
    assert target.stat().st_mode & 0o077 == 0
    metrics = tmp_path / "metrics.json"
    cli("clinic", "open", receipt, "metrics", "--as", "clinic", "--out", metrics)
    assert json.loads(metrics.read_bytes())["pooled"]["accuracy"] > 0.5

    to_x = ("--out", tmp_path / "x")
    wrong = cli(
        "hospital-a", "open", receipt, "model", "--as", "hospital-a", "--out", tmp_path / "x"
    )
    assert wrong.code == 2
    assert "nothing in it is for hospital-a" in wrong.err
    missing = cli("clinic", "open", receipt, "other", "--as", "clinic", *to_x)
    assert missing.code == 2
    assert "expected model, metrics" in missing.err
    assert not (tmp_path / "x").exists()


def test_another_party_of_the_same_name_opens_nothing(
    house: House, receipt: Path, alone: Command, tmp_path: Path
) -> None:
    alone("party", "new", "clinic")
    (tmp_path / "identity.json").write_text(house.identity.model_dump_json())
    alone("broker", "pin", tmp_path / "identity.json")
    answer = alone("open", receipt, "model", "--as", "clinic", "--out", tmp_path / "x", "--json")
    assert answer.code == 3
    assert answer.json["error"] == "SealError"
    assert not (tmp_path / "x").exists()


def test_an_altered_output_is_not_opened(cli: Command, receipt: Path, tmp_path: Path) -> None:
    data = bytearray((receipt.parent / "model.sealed").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.sealed").write_bytes(data)
    for sealed in (tmp_path / "model.sealed", receipt.parent / "metrics.sealed", tmp_path / "no"):
        answer = cli(
            "clinic",
            *("open", receipt, "model", "--as", "clinic"),
            *("--out", tmp_path / "x", "--sealed", sealed),
        )
        assert answer.code in {2, 3}
        assert len(answer.err.strip().splitlines()) == 1
        assert not (tmp_path / "x").exists()


def test_a_refused_run_names_every_clause_that_is_not_met(
    cli: Command, house: House, patients: dict[str, Sealed], tmp_path: Path
) -> None:
    sealed = house.seal("hospital-a", _csv(house), purposes=["billing"], outputs=["metrics"])
    assets = {**patients, "a": sealed}
    contract = house.contract(assets, recipe_job(["a", "b"]), {"model": "model"})
    digest = house.agree(contract, "hospital-a")
    before = house.uses(sealed)
    out = tmp_path / "out"
    answer = cli(
        "operator",
        *("run", digest, "--data", sealed.path, "--data", patients["b"].path, "--out", out),
    )
    assert answer.code == 4
    assert "the broker released nothing" in answer.err
    lines = [line for line in answer.err.splitlines() if "FAILED" in line]
    failed = {tuple(cell.strip() for cell in line.split("\u2502")[1:3]) for line in lines}
    assert failed == {
        ("contract", "approval"),
        ("asset b of hospital-b", "approval"),
        ("asset a of hospital-a", "purpose"),
        ("asset a of hospital-a", "outputs"),
    }
    assert "`cenacle sign`" in answer.err
    assert house.uses(sealed) == before
    assert list((out / "checkpoints").iterdir()) == []


def _csv(house: House) -> Path:
    path = house.path("rows").with_suffix(".csv")
    path.write_text(patient_rows(20))
    return path


def _program(
    house: House, source: str, outputs: dict[str, str]
) -> tuple[str, dict[str, Sealed], tuple[object, ...]]:
    program = house.program(source)
    approved = [program.asset.package]
    assets = {"a": house.seal("hospital-a", _csv(house), programs=approved), "program": program}
    contract = house.contract(assets, {"type": "program", "program": "program"}, outputs)
    digest = house.agree(contract)
    data = tuple(part for sealed in assets.values() for part in ("--data", sealed.path))
    return digest, assets, data


@_PROGRAMS
def test_a_program_that_fails_is_exit_code_7_and_its_run_can_be_given_up(
    cli: Command, house: House, tmp_path: Path
) -> None:
    source = "def run(ctx): raise ValueError(str(ctx.assets['a'].read().to_pylist()))"
    digest, assets, data = _program(house, source, {"report": "file"})
    run = ("run", digest, *data, "--out", tmp_path / "out")
    answer = cli("operator", *run, "--json")
    assert answer.code == 7
    assert answer.json["error"] == "EnclaveError"
    assert answer.json["found"] == "ValueError"
    assert "`cenacle abandon`" in answer.json["remedy"]
    again = cli("operator", *run, "--json")
    assert again.code == 5
    assert "--resume" in again.json["remedy"]
    assert cli("clinic", "abandon", digest, "--as", "clinic").code == 0
    assert cli("clinic", "abandon", digest, "--as", "clinic").code == 5
    assert house.uses(assets["a"]) == 1


_MEGABYTE = """
import os
def run(ctx): ctx.output("report", os.urandom(1 << 20))
"""


@_PROGRAMS
def test_a_full_disk_is_exit_code_6_and_the_run_goes_on_when_there_is_room(
    cli: Command, house: House, tmp_path: Path
) -> None:
    digest, assets, data = _program(house, _MEGABYTE, {"report": "file"})
    out = tmp_path / "out"
    command = ["run", digest, *map(str, data), "--out", str(out)]
    cenacle = f"{sys.executable} -m cenacle"
    # A limit of 256 KiB on every file that is written, which acts as a full disk does.
    full = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -f 512; exec {cenacle} "$@" --json', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CENACLE_HOME": str(house.operator.folder)},
    )
    assert full.returncode == 6, (full.stdout, full.stderr)
    fields = json.loads(full.stdout.splitlines()[-1])
    assert "the disk has no room" in fields["what"]
    assert "--resume" in fields["remedy"]
    assert not list(out.glob("*.sealed"))
    resumed = cli("operator", *command, "--resume")
    assert resumed.code == 0, resumed.err
    assert cli("clinic", "verify", out / "receipt.json").code == 0
    assert house.uses(assets["a"]) == 1
