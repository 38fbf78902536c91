"""Sealed checkpoints: only the one that the broker named is ever opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cenacle.crypto import SecretBytes, derive_key
from cenacle.enclave.checkpoints import SealedCheckpoints
from cenacle.enclave.session import patiently
from cenacle.errors import ConflictError, SealError, UnavailableError

META = {"format": 1, "stage": 0, "results": [0.25], "name": "übung"}


class Run:
    """A session's part in checkpoints, with the broker's record of the newest."""

    def __init__(self, name: str = "run-1") -> None:
        self.secret = SecretBytes.random(32)
        self.release = SimpleNamespace(run=name, checkpoint_version=0, checkpoint_digest=None)
        self.refuse: Exception | None = None

    def checkpoint_key(self, version: int) -> SecretBytes:
        return derive_key(self.secret, "enclave/checkpoint", version.to_bytes(8, "big"))

    def register_checkpoint(self, version: int, digest: str) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.release.checkpoint_version = version
        self.release.checkpoint_digest = digest


def _sink(folder: Path, run: Run) -> SealedCheckpoints:
    session: Any = run
    return SealedCheckpoints(folder, session)


def _tensors(version: int) -> dict[str, Any]:
    return {"w": np.full((3, 2), version, dtype=np.float32), "step": np.int64(version)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints 1, 2 and 3; the older ones are kept aside in ``old``."""
    made = Run()
    (tmp_path / "old").mkdir()
    (tmp_path / "now").mkdir()
    for version in (1, 2, 3):
        _sink(tmp_path / "now", made).save(version, _tensors(version), META)
        (path,) = (tmp_path / "now").iterdir()
        shutil.copy(path, tmp_path / "old" / path.name)
    return made


def test_the_newest_checkpoint_comes_back_whole(tmp_path: Path, run: Run) -> None:
    found = _sink(tmp_path / "now", run).load()
    assert found is not None
    assert found.version == 3
    assert dict(found.meta) == META
    assert np.array_equal(found.tensors["w"], _tensors(3)["w"])
    assert int(found.tensors["step"]) == 3


def test_only_the_newest_is_kept(tmp_path: Path, run: Run) -> None:
    assert len(list((tmp_path / "now").iterdir())) == 1


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert _sink(tmp_path, Run()).load() is None


def test_names_of_checkpoints_say_nothing_and_cannot_be_a_path(tmp_path: Path) -> None:
    hostile = Run("../../etc/cron.d/x")
    _sink(tmp_path, hostile).save(1, _tensors(1), META)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("checkpoint-")
    assert "etc" not in path.name


def _older(now: Path, old: Path, run: Run) -> None:
    two = next(path for path in old.iterdir() if path.name.endswith("-2.sealed"))
    shutil.copy(two, now / two.name.replace("-2.", "-3."))


def _older_beside(now: Path, old: Path, run: Run) -> None:
    for path in now.iterdir():
        path.unlink()
    for path in old.iterdir():
        if not path.name.endswith("-3.sealed"):
            shutil.copy(path, now / path.name)


def _deleted(now: Path, old: Path, run: Run) -> None:
    for path in now.iterdir():
        path.unlink()


def _truncated(now: Path, old: Path, run: Run) -> None:
    (path,) = now.iterdir()
    path.write_bytes(path.read_bytes()[:-1])


def _empty(now: Path, old: Path, run: Run) -> None:
    (path,) = now.iterdir()
    path.write_bytes(b"")


def _flipped(now: Path, old: Path, run: Run) -> None:
    (path,) = now.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _extended(now: Path, old: Path, run: Run) -> None:
    (path,) = now.iterdir()
    path.write_bytes(path.read_bytes() + b"\0")


def _of_another_run(now: Path, old: Path, run: Run) -> None:
    """The other run's state under this run's file name: same version, another secret."""
    (path,) = now.iterdir()
    other = Run()
    for file in now.iterdir():
        file.unlink()
    _sink(now, other).save(3, _tensors(3), META)
    (made,) = now.iterdir()
    made.rename(path)


def _other_secret(now: Path, old: Path, run: Run) -> None:
    """Right bytes, but this enclave holds another job secret: it is not of this run."""
    run.secret = SecretBytes.random(32)


def _folder(now: Path, old: Path, run: Run) -> None:
    (path,) = now.iterdir()
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "attack",
    [
        _older,
        _older_beside,
        _deleted,
        _truncated,
        _empty,
        _flipped,
        _extended,
        _of_another_run,
        _other_secret,
        _folder,
    ],
)
def test_every_other_checkpoint_is_refused(
    tmp_path: Path, run: Run, attack: Callable[[Path, Path, Run], None]
) -> None:
    attack(tmp_path / "now", tmp_path / "old", run)
    with pytest.raises(SealError, match=r"the newest checkpoint \(version 3\)") as caught:
        _sink(tmp_path / "now", run).load()
    assert "abandon the run" in str(caught.value.remedy)


def test_a_checkpoint_that_the_broker_did_not_take_leaves_the_one_before(
    tmp_path: Path, run: Run
) -> None:
    run.refuse = UnavailableError("the broker cannot be reached")
    with pytest.raises(UnavailableError):
        _sink(tmp_path / "now", run).save(4, _tensors(4), META)
    found = _sink(tmp_path / "now", run).load()
    assert found is not None
    assert found.version == 3


def test_runs_share_a_folder_without_touching_each_other(tmp_path: Path, run: Run) -> None:
    other = Run("run-2")
    sink = _sink(tmp_path / "now", other)
    sink.save(1, _tensors(9), META)
    mine = _sink(tmp_path / "now", run)
    assert mine.load() is not None
    mine.discard()
    with pytest.raises(SealError):
        mine.load()
    found = sink.load()
    assert found is not None
    assert int(found.tensors["step"]) == 9


# ---------------------------------------------------------------------- patience


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves."""
    now = [0.0]
    monkeypatch.setattr("cenacle.enclave.session.time.monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("cenacle.enclave.session.time.sleep", sleep)
    return now


def test_a_broker_that_comes_back_is_waited_for(instant: list[float]) -> None:
    answers = iter([UnavailableError("away")] * 20 + [None])

    def call() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "done"

    assert patiently(call) == "done"
    assert 5 < instant[0] < 30


def test_patience_ends_after_a_minute(instant: list[float]) -> None:
    def call() -> None:
        raise UnavailableError("away")

    with pytest.raises(UnavailableError):
        patiently(call)
    assert 59 < instant[0] < 70


def test_other_errors_are_not_waited_for(instant: list[float]) -> None:
    def call() -> None:
        raise ConflictError("closed")

    with pytest.raises(ConflictError):
        patiently(call)
    assert instant[0] == 0
