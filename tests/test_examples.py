"""Every example runs as its first lines say, and gives what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.processes


def _run(script: str, folder: Path) -> list[str]:
    """Run an example in an empty folder; returns the lines of its output."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={n: v for n, v in os.environ.items() if n != "CENACLE_HOME"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_script_is_tested() -> None:
    scripts = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")}
    assert scripts == {
        "library_use.py",
        *("mnist_privacy.py", "mnist_privacy_features.py", "mnist_privacy_plot.py"),
        "offload_training.py",
        "private_training.py",
        "program_job/play.py",
        "program_job/program/main.py",
        "seal_and_read.py",
        "serving_client.py",  # by tests/serving/test_whole_service.py: it needs a service
    }


def test_seal_and_read(tmp_path: Path) -> None:
    lines = _run("seal_and_read.py", tmp_path / "x")
    assert lines[0].startswith("sealed 8,000,992 bytes of tensors")
    assert lines[-2] == "oldest of a hundred: 89"
    assert lines[-1].startswith("one bit flipped: ")


def test_library_use(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")
    metrics = json.loads(_run("library_use.py", tmp_path / "x")[-1])
    assert metrics["pooled"]["accuracy"] > 0.8
    assert set(metrics["rows"]) == {"a", "b"}


@pytest.mark.slow
def test_offload_training(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="offloading needs torch (pip: cenacle[train])")
    lines = _run("offload_training.py", tmp_path / "x")
    assert float(lines[1].removeprefix("accuracy ")) > 0.9
    assert [line.split()[0] for line in lines[4:8]] == ["0", "3", "6", "all"]  # costs by layer
    assert lines[8] == "workers see inputs obfuscated, weights obfuscated"
    trace = json.loads((tmp_path / "x" / "trace.json").read_text())
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert tracks == {"enclave", "one", "two"}


def test_private_training(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch (pip: cenacle[train])")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (pip: cenacle[demo])")
    lines = _run("private_training.py", tmp_path / "x")
    assert float(lines[0].removeprefix("accuracy ")) > 0.7
    assert lines[1].endswith("143.7 expected")
    (event,) = json.loads(lines[2])
    assert event["steps"] == 150
    assert event["sampling"]["kind"] == "poisson"
    assert event["secure"] is True


@pytest.mark.slow
@pytest.mark.usefixtures("program_layers")
def test_program_job(tmp_path: Path) -> None:
    statistics = json.loads(_run("program_job/play.py", tmp_path / "x")[-1])
    assert statistics["patients"] == 120
    assert 55 < statistics["columns"]["age"]["mean"] < 65
    rows = [
        tuple(map(float, line.split(",")))
        for name in ("hospital-a", "hospital-b")
        for line in (tmp_path / "x" / name / "patients.csv").read_text().splitlines()[1:]
    ]
    mean = sum(age for age, _ in rows) / len(rows)
    assert statistics["columns"]["age"]["mean"] == pytest.approx(mean, abs=1e-5)
