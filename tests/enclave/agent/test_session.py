"""A session's answers to a broker that is away, says no, or lost an answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.crypto import SecretBytes, SigningKey
from cenacle.enclave.receipt import DRAFT_FILE, draft_contract, finish
from cenacle.enclave.session import Session
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EnclaveError,
    InputError,
    RefusedError,
    UnavailableError,
)


class Broker:
    """Answers checkpoints with what it was told to, then well."""

    def __init__(self, *answers: CenacleError) -> None:
        self.answers = list(answers)
        self.records: list[Any] = []

    def checkpoint(self, record: Any, key: SigningKey) -> None:
        self.records.append(record)
        if self.answers:
            raise self.answers.pop(0)


def _session(broker: Broker) -> Session:
    anything: Any = SimpleNamespace(run="run-1")
    client: Any = broker
    return Session(
        contract="sha256:" + "c" * 64,
        client=client,
        signing_key=SigningKey.generate(),
        binding=anything,
        evidence=anything,
        measurements={},
        release=anything,
        asset_keys={"a": SecretBytes.random(32)},
        job_secret=SecretBytes.random(32),
    )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenacle.enclave.session.time.sleep", lambda seconds: None)


AWAY = UnavailableError("the broker cannot be reached")
TAKEN = ConflictError("a checkpoint is not newer than the last one")
DIGEST = "sha256:" + "1" * 64


def test_a_checkpoint_is_registered_with_run_number_and_digest() -> None:
    broker = Broker()
    _session(broker).register_checkpoint(3, DIGEST)
    (record,) = broker.records
    assert (record.run, record.number, record.content) == ("run-1", 3, DIGEST)


def test_a_checkpoint_whose_answer_was_lost_counts_as_registered() -> None:
    broker = Broker(AWAY, AWAY, TAKEN)
    _session(broker).register_checkpoint(3, DIGEST)
    assert len(broker.records) == 3


def test_a_conflict_at_the_first_attempt_is_an_error() -> None:
    with pytest.raises(ConflictError):
        _session(Broker(TAKEN)).register_checkpoint(3, DIGEST)


def test_a_refusal_is_not_repeated() -> None:
    broker = Broker(RefusedError("no"))
    with pytest.raises(RefusedError):
        _session(broker).register_checkpoint(3, DIGEST)
    assert len(broker.records) == 1


def test_closing_wipes_every_key() -> None:
    session = _session(Broker())
    key = session.asset_key("a")
    session.close()
    for secret in (key, session.job_secret):
        with pytest.raises(ValueError, match="wiped"):
            secret.view()


def test_an_asset_without_a_key_is_named() -> None:
    with pytest.raises(EnclaveError, match="no key for an asset; found other"):
        _session(Broker()).asset_key("other")


def test_checkpoint_keys_differ_by_version_and_run() -> None:
    first, second = _session(Broker()), _session(Broker())
    keys = {
        bytes(session.checkpoint_key(version).view())
        for session in (first, second)
        for version in (1, 2, 256)
    }
    assert len(keys) == 6
    assert bytes(first.checkpoint_key(1).view()) in keys


# ---------------------------------------------------------------------- drafts


def test_a_folder_without_a_draft_has_none(tmp_path: Path) -> None:
    assert draft_contract(tmp_path) is None
    assert draft_contract(tmp_path / "missing") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"statement": 1}', "\x00" * 100])
def test_a_draft_that_is_no_draft_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / DRAFT_FILE
    path.write_text(content)
    client: Any = None  # it must not come so far
    for call in (draft_contract, lambda folder: finish(client, folder)):
        with pytest.raises(InputError):
            call(tmp_path)
    assert path.read_text() == content
