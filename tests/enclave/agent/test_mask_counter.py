"""A mask store under the broker's count: it goes on where it was, and old copies are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cenacle.crypto import SecretBytes, SigningKey
from cenacle.enclave.mask_counter import RunCounter, open_mask_store
from cenacle.enclave.session import Session
from cenacle.errors import ConflictError, SealError, UnavailableError
from cenacle.offload.mask_store import MaskPlan, MaskStore

PLAN = MaskPlan("layer", 6, 4, 1, 1, "aa")


class Broker:
    """Its record of one run: a checkpoint's number only grows, and is durable."""

    def __init__(self, version: int = 0, digest: str | None = None) -> None:
        self.version, self.digest = version, digest
        self.secret = bytes(range(32))
        self.away = False  # counts, and its answer is lost

    def checkpoint(self, record: Any, key: SigningKey) -> None:
        if record.number <= self.version:
            raise ConflictError("a checkpoint is not newer than the last one")
        self.version, self.digest = record.number, record.content
        if self.away:
            raise UnavailableError("the broker cannot be reached")

    def release(self, run: str = "run-1") -> Session:
        """To the enclave that holds the run from now on."""
        anything: Any = SimpleNamespace()
        client: Any = self
        release: Any = SimpleNamespace(
            run=run, checkpoint_version=self.version, checkpoint_digest=self.digest
        )
        return Session(
            contract="sha256:" + "c" * 64,
            client=client,
            signing_key=SigningKey.generate(),
            binding=anything,
            evidence=anything,
            measurements={},
            release=release,
            asset_keys={},
            job_secret=SecretBytes(self.secret),
        )


def correct(plan: MaskPlan, mask: torch.Tensor) -> torch.Tensor:
    return mask[:, : plan.y_size]


def take(store: MaskStore) -> bytes:
    """One mask, as a worker might see it of zeros."""
    pieces = [part.copy() for _, part in store.take("layer", 1, "aa").consume()]
    return np.concatenate(pieces).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "masks"


def test_an_enclave_that_resumes_the_run_goes_on_with_new_masks(folder: Path) -> None:
    broker, seen = Broker(), []
    for turn in range(4):
        with open_mask_store(folder, broker.release(), stride=2) as store:
            if not turn:
                store.fill([PLAN], 20, correct)
            seen += [take(store), take(store), take(store)]
    assert len(set(seen)) == len(seen) == 12


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_an_old_copy_is_refused(folder: Path, tmp_path: Path, kept: int) -> None:
    broker = Broker()
    for turn in range(3):
        with open_mask_store(folder, broker.release(), stride=1) as store:
            if not turn:
                store.fill([PLAN], 20, correct)
            for number in range(3):
                if turn == kept and number == 1:
                    shutil.copytree(folder, tmp_path / "old")
                take(store)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "old", folder)
    with pytest.raises(SealError, match="old copy"):
        open_mask_store(folder, broker.release())
    shutil.rmtree(folder)
    with pytest.raises(SealError, match="old copy"):  # nor begun anew, with used numbers
        open_mask_store(folder, broker.release())


def test_an_old_copy_is_refused_while_the_enclave_lives(folder: Path, tmp_path: Path) -> None:
    """Its own count has grown since the release, which a second store must not forget."""
    session = Broker().release()
    counter = RunCounter(session)
    key = SecretBytes(bytes(32))
    with MaskStore(folder, key, counter=counter, stride=1) as store:
        store.fill([PLAN], 20, correct)
        shutil.copytree(folder, tmp_path / "old")
        take(store)
        take(store)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "old", folder)
    with pytest.raises(SealError, match="old copy"):
        MaskStore(folder, key, counter=counter)


def test_a_count_whose_answer_was_lost_hands_nothing_out_and_loses_no_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker()
    with open_mask_store(folder, broker.release(), stride=1) as store:
        store.fill([PLAN], 20, correct)
        first = take(store)
        monkeypatch.setattr("cenacle.enclave.session._PATIENCE_S", -1.0)
        broker.away = True
        with pytest.raises(UnavailableError):
            take(store)
    broker.away = False
    with open_mask_store(folder, broker.release()) as store:
        assert take(store) != first


def test_another_runs_store_is_refused(folder: Path) -> None:
    broker = Broker()
    with open_mask_store(folder, broker.release()) as store:
        store.fill([PLAN], 2, correct)
    with pytest.raises(SealError, match="another key"):
        open_mask_store(folder, broker.release("run-2"))


def test_a_run_with_checkpoints_of_its_own_is_refused() -> None:
    with pytest.raises(ConflictError, match="has checkpoints"):
        RunCounter(Broker(3, "sha256:" + "1" * 64).release())


@pytest.mark.parametrize("value", [0, 4, 5])
def test_the_counter_only_grows(value: int) -> None:
    broker = Broker()
    counter = RunCounter(broker.release())
    counter.advance(5)
    with pytest.raises(ConflictError, match="only grows"):
        counter.advance(value)
    assert counter.value() == broker.version == 5
    assert RunCounter(broker.release()).value() == 5
