"""Brokers and operators that are killed in the middle of a job, as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.house import TERMS, patient_rows, recipe_job
from tests.support.processes import alive, descendants

Command = Callable[..., Any]

pytestmark = pytest.mark.processes


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "CENACLE_HOME": str(home)}


class BrokerProcess:
    """A broker that can be killed and started again at its old address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        command = ["broker", "start", "--dir", str(self._folder), "--name", "test/broker"]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cenacle", *command),
                *("--port", str(self._port), "--development", "--json"),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(self._folder / "home"),
        )
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        self._port = int(told["url"].rpartition(":")[2])
        return told

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    made = BrokerProcess(tmp_path / "broker")
    yield made
    made.kill()


@pytest.fixture
def job(broker: BrokerProcess, alone: Command, tmp_path: Path) -> tuple[str, list[str], Path]:
    """A signed contract of a longer training: digest, arguments of its run, checkpoints' folder."""
    token = broker.start()["owner_token"]
    assert alone("broker", "pin", tmp_path / "broker/identity.json").code == 0
    for name in ("hospital", "clinic"):
        alone("party", "new", name)
        assert alone("party", "register", name, "--token", token).code == 0
        token = alone("broker", "invite", "--as", "hospital", "--json").json["token"]
    records, terms = tmp_path / "records.csv", tmp_path / "terms.yaml"
    records.write_text(patient_rows(64))
    terms.write_text(yaml.safe_dump(TERMS))
    sealed = alone("seal", records, "--terms", terms, "--as", "hospital", "--json").json
    draft = {
        "name": "long",
        "purpose": "research",
        "parties": ["hospital", "clinic"],
        "assets": {"a": sealed["manifest"]},
        "job": recipe_job(["a"], epochs=80, every=10),
        "outputs": [{"name": "model", "kind": "model", "recipient": "clinic"}],
        "approval": "hospital",
        "expires": "2036-12-31",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(draft))
    arguments = ("draft", tmp_path / "job.yaml", "--out", tmp_path / "contract.yaml", "--json")
    digest = alone(*arguments).json["contract"]
    alone("propose", tmp_path / "contract.yaml", "--as", "clinic")
    alone("sign", digest, "--as", "hospital")
    out = tmp_path / "results"
    run = ["run", digest, "--data", sealed["sealed"], "--out", str(out)]
    return digest, run, out / "checkpoints"


def _run_until_checkpoint(run: list[str], checkpoints: Path, home: Path) -> subprocess.Popen[str]:
    """A run in a process of its own that has sealed a checkpoint by now; fails if it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cenacle", *run, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(home),
    )
    while not any(checkpoints.glob("*.sealed")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_a_job_outlives_the_broker_that_is_killed_and_started_again(
    job: tuple[str, list[str], Path], broker: BrokerProcess, alone: Command, tmp_path: Path
) -> None:
    _, run, checkpoints = job
    process = _run_until_checkpoint(run, checkpoints, tmp_path / "home")
    broker.kill()
    broker.start()
    out, err = process.communicate()
    assert process.returncode == 0, (out, err)
    receipt = json.loads(out.splitlines()[-1])["receipt"]
    assert alone("verify", receipt).code == 0
    kinds = [e["kind"] for e in alone("log", "--limit", "1000", "--json").json["entries"]]
    assert (kinds.count("release"), kinds.count("settlement")) == (1, 1)


@pytest.mark.slow
def test_an_operator_that_is_killed_takes_the_enclave_along_and_resumes(
    job: tuple[str, list[str], Path], alone: Command, tmp_path: Path
) -> None:
    _, run, checkpoints = job
    process = _run_until_checkpoint(run, checkpoints, tmp_path / "home")
    members = descendants(process.pid)
    assert len(members) >= 2  # the agent and the process for programs
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while alive(members) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(members) == set()
    again = alone(*run)
    assert again.code == 5
    resumed = alone(*run, "--resume", "--json")
    assert resumed.code == 0, resumed.out
    assert alone("verify", resumed.json["receipt"]).code == 0
    kinds = [e["kind"] for e in alone("log", "--limit", "1000", "--json").json["entries"]]
    assert (kinds.count("release"), kinds.count("settlement")) == (2, 1)


@pytest.mark.slow
def test_a_broker_that_stays_away_ends_the_job_with_words(
    job: tuple[str, list[str], Path], broker: BrokerProcess, alone: Command, tmp_path: Path
) -> None:
    _, run, checkpoints = job
    process = _run_until_checkpoint(run, checkpoints, tmp_path / "home")
    broker.kill()
    out, _ = process.communicate()
    assert process.returncode == 6
    assert json.loads(out.splitlines()[-1])["error"] == "UnavailableError"
    broker.start()
    assert alone(*run, "--resume").code == 0
