"""Recipe jobs in real enclaves: to the end, killed at every step, and against a lying launcher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cenacle
from cenacle.enclave.channel import Message, Progress, Stage
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.receipt import DRAFT_FILE, draft_contract, finish
from cenacle.enclave.sandbox import folders
from cenacle.errors import (
    ConflictError,
    DataError,
    EnclaveError,
    RefusedError,
    SealError,
    SignatureError,
)
from tests.support.house import House, Outcome, Sealed, Trap, patient_rows, recipe_job
from tests.support.processes import alive, descendants

pytestmark = pytest.mark.processes

OUTPUTS = {"model": "model", "metrics": "metrics"}


@dataclass(frozen=True)
class Finished:
    """A job that ran without interruption, to compare others with."""

    digest: str
    outcome: Outcome
    model: bytes
    metrics: bytes


def _job() -> Any:
    # Ten checkpoints in 24 steps, so that there is always one to resume from.
    return recipe_job(["a", "b"], epochs=4, every=3, holdout={"fraction": 0.2})


def _agreed(house: House, patients: dict[str, Sealed]) -> str:
    return house.agree(house.contract(patients, _job(), OUTPUTS))


@pytest.fixture(scope="module")
def finished(house: House, patients: dict[str, Sealed]) -> Finished:
    digest = _agreed(house, patients)
    outcome = house.run(digest, patients)
    return Finished(digest, outcome, house.open(outcome, "model"), house.open(outcome, "metrics"))


def test_a_recipe_runs_from_evidence_to_receipt(house: House, finished: Finished) -> None:
    outcome = finished.outcome
    assert outcome.stages == ["attesting", "keys", "running", "outputs", "receipt"]
    done, total = outcome.progress[-1]
    assert done == total == 24
    found = house.verify(outcome.receipt)
    assert found.receipt.resumed == 0
    assert found.receipt.layers == house.plan.layers
    assert found.receipt.protection == "simulated"
    assert set(found.opened.signed) == {"hospital-a", "hospital-b"}
    assert house.metrics(outcome)["pooled"]["accuracy"] > 0.5
    # The draft is gone, and checkpoints of a settled run are of no more use.
    assert sorted(p.name for p in outcome.out.iterdir()) == [
        "checkpoints",
        "metrics.sealed",
        "model.sealed",
        "receipt.json",
    ]
    assert list((outcome.out / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "everywhere",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["where an answer is lost", "everywhere"],
)
def test_the_same_job_gives_the_same_model_bit_for_bit_after_being_killed(
    house: House, patients: dict[str, Sealed], finished: Finished, trap: Trap, everywhere: bool
) -> None:
    """kill -9 at every step of one run, in the order in which it goes through them.

    Each takes an enclave that measures itself anew, so the quick tests have the three that leave
    broker and enclave of different minds.
    """
    before = {alias: house.uses(sealed) for alias, sealed in patients.items()}
    digest = _agreed(house, patients)
    out = house.path("results")

    def charged() -> set[int]:
        return {house.uses(sealed) - before[alias] for alias, sealed in patients.items()}

    def interrupted(watch: Callable[[RunningEnclave, Message], None] | None = None) -> Outcome:
        outcome = house.run(digest, patients, out, resume=house.open_run(digest), watch=watch)
        assert isinstance(outcome.error, EnclaveError)
        assert "stopped" in outcome.error.what
        return outcome

    def at(wanted: Message) -> Callable[[RunningEnclave, Message], None]:
        return lambda enclave, message: enclave.kill() if message == wanted else None

    if everywhere:
        # Before the release nothing is charged, and a new start is a new run.
        interrupted(at(Stage("attesting")))
        assert house.open_run(digest) is None
        trap.set("release", when="before")
        interrupted()
        assert (charged(), house.open_run(digest)) == ({0}, None)

    # The release is durable, its answer is lost: charged once, and resumable.
    trap.set("release", when="after")
    interrupted()
    run = house.open_run(digest)
    assert run is not None
    if everywhere:
        # A checkpoint is on the disk that the broker never heard of.
        trap.set("checkpoint", when="before")
        interrupted()
    # A checkpoint is registered, its answer is lost.
    trap.set("checkpoint", when="after", at=2)
    interrupted()
    if everywhere:
        # In the middle of the steps between two checkpoints; then outputs are sealed.
        resumed = interrupted(at(Progress(11, 24)))
        assert resumed.progress[0][0] > 3
        interrupted(at(Stage("outputs")))
    # Everything is done but the settlement.
    trap.set("settle", when="before")
    last = interrupted()
    assert everywhere or last.progress[0][0] > 3
    assert draft_contract(out) == digest
    assert (charged(), house.open_run(digest)) == ({1}, run)

    # The host completes it without an enclave; a second time changes nothing.
    shutil.copy(out / DRAFT_FILE, out / "kept")
    receipt = finish(house.client, out)
    assert not (out / DRAFT_FILE).exists()
    (out / "kept").rename(out / DRAFT_FILE)
    again = finish(house.client, out)
    found = house.verify(receipt)
    releases = 6 if everywhere else 3
    assert found.receipt.resumed == releases - 1
    assert again == receipt
    assert charged() == {1}
    assert house.open_run(digest) is None
    entries = [entry for entry in house.log() if entry.get("run") == run]
    assert [entry["kind"] for entry in entries if entry["kind"] != "checkpoint"] == [
        *["release"] * releases,
        "settlement",
    ]

    last.error = None
    last.out = out
    last.messages = finished.outcome.messages
    assert house.open(last, "model") == finished.model
    assert house.open(last, "metrics") == finished.metrics


def test_killed_between_settlement_and_receipt_the_host_writes_the_receipt(
    house: House, patients: dict[str, Sealed], finished: Finished, trap: Trap
) -> None:
    digest = _agreed(house, patients)
    out = house.path("results")
    trap.set("settle", when="after")
    outcome = house.run(digest, patients, out)
    assert isinstance(outcome.error, EnclaveError)
    assert house.open_run(digest) is None
    assert not (out / "receipt.json").exists()

    # An output is lost: nothing pretends otherwise.
    sealed = (out / "model.sealed").read_bytes()
    (out / "model.sealed").write_bytes(sealed[:-1])
    with pytest.raises(SealError, match="sealed output model of the finished job is not whole"):
        finish(house.client, out)
    (out / "model.sealed").write_bytes(sealed)

    house.verify(finish(house.client, out))
    outcome.error = None
    outcome.messages = finished.outcome.messages
    assert house.open(outcome, "model") == finished.model


@pytest.mark.slow
def test_an_old_checkpoint_is_not_resumed_from(
    house: House, patients: dict[str, Sealed], trap: Trap
) -> None:
    digest = _agreed(house, patients)
    out = house.path("results")
    kept = house.path("kept")
    kept.mkdir()

    def keep_then_kill(enclave: RunningEnclave, message: Message) -> None:
        if isinstance(message, Progress) and message.done == 4:
            for path in (out / "checkpoints").iterdir():
                shutil.copy(path, kept / path.name)
        if isinstance(message, Progress) and message.done == 14:
            enclave.kill()

    house.run(digest, patients, out, watch=keep_then_kill)
    newest = list((out / "checkpoints").iterdir())
    assert newest
    old = list(kept.iterdir())
    assert {p.name for p in old}.isdisjoint({p.name for p in newest})
    for path in newest:
        path.unlink()
    for path in old:
        shutil.copy(path, newest[0])
    refused = house.run(digest, patients, out, resume=house.open_run(digest))
    assert isinstance(refused.error, SealError)
    assert "the newest checkpoint" in refused.error.what
    assert not (out / "model.sealed").exists()


# ---------------------------------------------------------------------- what launchers may try


def _refused_early(house: House, digest: str, patients: dict[str, Sealed], file: Path) -> SealError:
    before = [house.uses(sealed) for sealed in patients.values()]
    entries = len(house.log())
    outcome = house.run(digest, patients, files={"a": file})
    assert isinstance(outcome.error, SealError)
    assert "the sealed file of asset a is not the one in its manifest" in outcome.error.what
    # Before any key was asked for: nothing is charged, nothing is logged, nothing is open.
    assert [house.uses(sealed) for sealed in patients.values()] == before
    assert len(house.log()) == entries
    assert house.open_run(digest) is None
    return outcome.error


def test_an_altered_sealed_file_is_refused_before_a_use_is_charged(
    house: House, patients: dict[str, Sealed], finished: Finished
) -> None:
    digest = _agreed(house, patients)
    data = bytearray(patients["a"].path.read_bytes())
    data[-40] ^= 1
    altered = house.path("altered")
    altered.write_bytes(data)
    error = _refused_early(house, digest, patients, altered)
    assert error.expected == patients["a"].asset.container.digest


def test_the_file_of_another_asset_is_refused(house: House, patients: dict[str, Sealed]) -> None:
    digest = _agreed(house, patients)
    _refused_early(house, digest, patients, patients["b"].path)


@pytest.mark.slow
def test_an_older_sealing_of_the_same_data_is_refused(
    house: House, patients: dict[str, Sealed]
) -> None:
    source = house.path("source").with_suffix(".csv")
    source.write_text(patient_rows(60, seed=1))
    older, newer = house.seal("hospital-a", source), house.seal("hospital-a", source)
    assets = {**patients, "a": newer}
    _refused_early(house, _agreed(house, assets), assets, older.path)


def test_one_changed_byte_of_the_package_is_refused_by_name(
    house: House, patients: dict[str, Sealed], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _agreed(house, patients)
    before = house.uses(patients["a"])
    copy = house.path("tree")
    shutil.copytree(Path(cenacle.__file__).parent, copy / "cenacle", ignore=_caches)
    changed = copy / "cenacle" / "training" / "metrics.py"
    text = changed.read_text()
    changed.write_text(text.replace("e", "E", 1) if '"""' in text[:3] else "#" + text)
    assert changed.stat().st_size == len(text.encode())

    original = folders.enclave_environment
    monkeypatch.setattr(
        "cenacle.enclave.launcher.enclave_environment",
        lambda threads: {**original(threads), "PYTHONPATH": str(copy)},
    )
    nothing = house.path("no-byte-code")
    nothing.mkdir()
    monkeypatch.setattr("cenacle.enclave.launcher.bytecode_folder", lambda: nothing)
    mounted = house.plan.layers
    request_files = {"a": patients["a"].path}
    if "bubblewrap" in mounted or "landlock" in mounted:
        shown = folders.interpreter_folders()
        monkeypatch.setattr(
            "cenacle.enclave.sandbox.bubblewrap.interpreter_folders",
            lambda: (*shown, copy / "cenacle"),
        )
    outcome = house.run(digest, patients, files=request_files)
    assert isinstance(outcome.error, RefusedError)
    failed = [clause["name"] for clause in outcome.error.clauses]
    assert failed == ["measurement bytecode", "measurement package"]
    assert house.uses(patients["a"]) == before


def _caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]


# ---------------------------------------------------------------------- data and parties


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("age,dose,pressure,diagnosis\n1,2,3,0\n271828.5,,3,1\n", "has no value in row 1"),
        pytest.param(
            "age,dose,pressure,diagnosis\n1,2,3,0\n271828.5,2,3,271828\n",
            "holds a label in row 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "age,dose,diagnosis\n271828.5,1,1\n",
            "asset 'b' has columns that the first asset does not have",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["missing value", "unknown label", "missing column"],
)
def test_data_that_does_not_fit_is_named_by_place_and_not_by_value(
    house: House, patients: dict[str, Sealed], rows: str, words: str
) -> None:
    source = house.path("bad").with_suffix(".csv")
    source.write_text(rows)
    assets = {**patients, "a": house.seal("hospital-a", source, allow_missing=True)}
    digest = _agreed(house, assets)
    outcome = house.run(digest, assets)
    assert isinstance(outcome.error, DataError)
    assert words in outcome.error.what
    assert "271828" not in str(outcome.error.to_dict())
    assert house.uses(assets["a"]) == 1


@pytest.mark.slow
def test_a_run_of_a_contract_that_is_open_is_not_started_twice(
    house: House, patients: dict[str, Sealed], trap: Trap
) -> None:
    digest = _agreed(house, patients)
    before = house.uses(patients["a"])
    trap.set("release", when="after")
    house.run(digest, patients)
    outcome = house.run(digest, patients)
    assert isinstance(outcome.error, ConflictError)
    assert house.uses(patients["a"]) == before + 1


@pytest.mark.slow
def test_an_enclave_that_was_replaced_is_fenced_off(
    house: House, patients: dict[str, Sealed], trap: Trap
) -> None:
    """Two operators resume one run: only the last one's enclave counts."""
    digest = _agreed(house, patients)
    stale, fresh = house.path("stale"), house.path("fresh")
    trap.set("settle", when="before")
    house.run(digest, patients, stale)
    shutil.copytree(stale / "checkpoints", fresh / "checkpoints")
    run = house.open_run(digest)
    second = house.run(digest, patients, fresh, resume=run)
    house.verify(second.receipt)
    with pytest.raises(SignatureError):
        finish(house.client, stale)


@pytest.mark.slow
def test_no_process_of_an_enclave_outlives_it(house: House, patients: dict[str, Sealed]) -> None:
    digest = _agreed(house, patients)
    members: set[int] = set()

    def look_then_kill(enclave: RunningEnclave, message: Message) -> None:
        if message == Stage("keys"):
            members.update(descendants(enclave.pid) | {enclave.pid})
            enclave.kill()

    house.run(digest, patients, watch=look_then_kill)
    assert len(members) >= 2  # the agent and the process for programs
    assert alive(members) == set()
