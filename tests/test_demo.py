"""The demonstrations, as a user plays them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.swtpm import require_swtpm

pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")
pytest.importorskip("sklearn", reason="the data comes with scikit-learn (pip: cenacle[demo])")

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")


def _play(folder: Path, cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if n != "CENACLE_HOME"}
    command = [sys.executable, "-m", "cenacle", "demo", "hospitals", "--json"]
    return subprocess.run(
        [*command, "--dir", str(folder), "--budget", "1.2", *more],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
    )


@pytest.mark.processes
def test_the_demonstration_plays_and_its_figures_are_the_last_line(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    played = _play(folder, tmp_path)
    assert played.returncode == 0, played.stderr
    figures = json.loads(played.stdout.splitlines()[-1])
    assert {"accuracy_pooled", "accuracy_single", "receipt", "seconds"} < set(figures)
    assert len(figures["accuracy_single"]) == 3
    assert all(figures["accuracy_pooled"] > alone for alone in figures["accuracy_single"])
    assert figures["seconds"] > 0
    assert figures["job"] == 1
    for spent, left in zip(figures["epsilon_spent"], figures["epsilon_left"], strict=True):
        assert 0.99 < spent <= 1.0
        assert left == pytest.approx(1.2 - spent)

    # Every command was shown as it ran, on the other stream.
    words = "party new/seal records.csv/propose/review/sign/run/verify/evaluate/budget"
    for command in words.split("/"):
        assert f"cenacle {command}" in played.stderr
    assert "Traceback" not in played.stderr

    receipt = Path(figures["receipt"])
    assert receipt.is_file()
    environment = {n: v for n, v in os.environ.items() if n != "CENACLE_HOME"}
    verified = subprocess.run(
        [sys.executable, "-m", "cenacle", "verify", str(receipt), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "CENACLE_HOME": str(folder / "hospital-b" / "home")},
    )
    assert verified.returncode == 0, verified.stdout
    found = json.loads(verified.stdout.splitlines()[-1])
    assert found["protection"] == "simulated"
    assert set(found["inputs"]) == set(HOSPITALS)
    assert found["signed"] == list(HOSPITALS)
    assert found["privacy"]["description"].startswith("(1, 0.0001)-differential privacy")
    (event,) = found["privacy"]["events"]
    assert (event["steps"], event["sampling_probability"]) == (100, 0.1)

    # The clinic opened the model; nobody else has plaintext of anybody's records.
    assert (folder / "clinic" / "model.safetensors").is_file()
    row = (folder / "hospital-a" / "records.csv").read_text().splitlines()[1]
    others = (p for p in folder.rglob("*") if p.is_file() and p.name != "records.csv")
    assert not [p for p in others if row.encode() in p.read_bytes()]


@pytest.mark.slow
@pytest.mark.processes
def test_the_demonstration_is_played_again_until_the_budget_refuses(tmp_path: Path) -> None:
    """Before any key leaves, and with the figures."""
    folder = tmp_path / "demo"
    assert _play(folder, tmp_path).returncode == 0
    again = _play(folder, tmp_path)
    assert again.returncode == 4, again.stderr
    refusal = json.loads(again.stdout.splitlines()[-1])
    assert refusal["error"] == "RefusedError"
    assert "the privacy budget allows no job number 2" in refusal["what"]
    assert "0.2" in refusal["found"]
    assert "of epsilon 1.2 left at delta 0.0001, after 1 jobs" in refusal["found"]
    assert "FAILED" in again.stderr
    assert not (folder / "operator" / "results-2" / "model.sealed").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_the_demonstration_with_quotes_of_a_tpm(tmp_path: Path) -> None:
    """The whole job by the real protocol; a TPM in software is simulated, and says so."""
    require_swtpm()
    folder = tmp_path / "demo"
    played = _play(folder, tmp_path, "--enclave", "tpm")
    assert played.returncode == 0, played.stderr
    figures = json.loads(played.stdout.splitlines()[-1])
    assert all(figures["accuracy_pooled"] > alone for alone in figures["accuracy_single"])
    assert "--evidence tpm" in played.stderr
    environment = {**os.environ, "CENACLE_HOME": str(folder / "hospital-b" / "home")}
    verify = [sys.executable, "-m", "cenacle", "verify", figures["receipt"], "--json"]

    def verified(*more: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [*verify, *more], capture_output=True, text=True, check=False, env=environment
        )
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    code, found = verified()
    assert code == 0
    assert (found["evidence"], found["protection"]) == ("tpm", "simulated")
    assert verified("--require", "measured")[0] == 3
    # Whoever does not trust the maker of that TPM believes nothing that it says.
    shutil.rmtree(folder / "hospital-b" / "home" / "trust")
    code, found = verified()
    assert code == 3
    assert "root" in found["what"]


@pytest.mark.slow
@pytest.mark.processes
def test_one_network_is_trained_under_three_schemes(tmp_path: Path) -> None:
    """On scikit-learn's digits; MNIST is the same with more pictures."""
    folder = tmp_path / "demo"
    environment = {n: v for n, v in os.environ.items() if n not in {"CENACLE_HOME", "CENACLE_DATA"}}
    played = subprocess.run(
        [sys.executable, "-m", "cenacle", "demo", "images", "--json", "--dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert played.returncode == 0, played.stderr
    figures = json.loads(played.stdout.splitlines()[-1])
    assert figures["pictures"] == 1797
    rows = {row["scheme"]: row for row in figures["schemes"]}
    assert list(rows) == ["enclave", "permuted", "lowrank"]
    for scheme, row in rows.items():
        assert row["accuracy"] > 0.8
        assert row["leakage"]["scheme"] == scheme
        assert Path(row["receipt"]).is_file()
        assert (row["bytes_sent"] > 0) == (scheme != "enclave")
        assert (row["results_checked"] > 0) == (scheme != "enclave")
        assert row["dropped"] == []
    assert abs(rows["lowrank"]["accuracy"] - rows["enclave"]["accuracy"]) < 0.01
    assert rows["permuted"]["leakage"]["weights"] == "obfuscated"
    for words in ("draft lowrank.yaml", "propose", "sign", "run", "open", "verify"):
        assert f"cenacle {words}" in played.stderr
    assert "Traceback" not in played.stderr
