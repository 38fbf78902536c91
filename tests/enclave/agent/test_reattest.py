"""The agent's side of re-attestation against brokers and hosts that answer, refuse, or hang."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Attester
from cenacle.broker.messages import Reattested
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64
from cenacle.documents.receipt import Binding
from cenacle.enclave.channel import Channel, Failed, read_messages
from cenacle.enclave.reattest import EXIT_REVOKED, Reattestation, boot_clock, end_enclave
from cenacle.enclave.session import Session
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EnclaveError,
    EvidenceError,
    RefusedError,
    SignatureError,
    UnavailableError,
)

DUE = "2027-02-01T10:00:00Z"
REVOKED = RefusedError("the run was revoked", found="/tmp/miner, unknown")
PATIENCE_S = 20.0


class Hardware(Attester):
    """Evidence that says how often it was made; ``hang`` makes none."""

    kind = "tpm"

    def __init__(self) -> None:
        self.made = 0
        self.hang: threading.Event | None = None

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del bound, now
        self.made += 1
        if self.hang is not None:
            self.hang.wait(PATIENCE_S)
        return {"made": self.made}


@dataclass
class Broker:
    """Answers proofs with what it was told to, then well."""

    answers: list[CenacleError | bool] = field(default_factory=list)
    shown: list[tuple[bytes, Evidence]] = field(default_factory=list)
    nonces: int = 0
    timeouts: list[float] = field(default_factory=list)

    @contextmanager
    def connect(self, *, timeout: float) -> Iterator[Any]:
        self.timeouts.append(timeout)
        yield self

    def run_nonce(self, run: str) -> tuple[bytes, int]:
        assert run == "run-1"
        self.nonces += 1
        return b"%d" % self.nonces, 0

    def reattest(self, nonce: bytes, evidence: Evidence, run: str, key: SigningKey) -> Reattested:
        assert run == "run-1"
        assert isinstance(key, SigningKey)
        self.shown.append((nonce, evidence))
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, CenacleError):
            raise answer
        return Reattested(accepted=answer, entries=0, due=DUE)


def session(client: Any = None) -> Session:
    hpke, signing = HpkePrivateKey.generate(), SigningKey.generate()
    anything: Any = SimpleNamespace(run="run-1")
    return Session(
        contract="sha256:" + "c" * 64,
        client=client,
        signing_key=signing,
        binding=Binding(
            nonce=b64(b"n"),
            hpke_key=b64(hpke.public_key.raw),
            signing_key=b64(signing.verify_key.raw),
        ),
        evidence=anything,
        measurements={"package": "sha256:" + "1" * 64},
        release=anything,
        asset_keys={"a": SecretBytes.random(32)},
        job_secret=SecretBytes.random(32),
    )


class Ended:
    """What the enclave was ended for."""

    def __init__(self) -> None:
        self.reason: BaseException | None = None
        self._told = threading.Event()

    def __call__(self, error: BaseException) -> None:
        assert self.reason is None, "ended twice"
        self.reason = error
        self._told.set()

    def wait(self) -> BaseException:
        assert self._told.wait(PATIENCE_S)
        assert self.reason is not None
        return self.reason


def watching(
    broker: Broker, ended: Ended, interval: float | None, hardware: Hardware | None = None
) -> Reattestation:
    return Reattestation(
        session(),
        hardware or Hardware(),
        ("landlock",),
        interval,
        since=boot_clock(),
        connect=broker.connect,
        end=ended,
    )


def test_without_an_interval_nothing_happens() -> None:
    broker, ended = Broker(), Ended()
    with watching(broker, ended, None) as watch:
        watch.confirm()
    assert broker.nonces == 0
    assert ended.reason is None


def test_it_goes_on_until_it_is_closed() -> None:
    broker, ended, hardware = Broker(), Ended(), Hardware()
    with watching(broker, ended, 1.0, hardware) as watch:
        while watch.rounds < 2:
            assert ended.reason is None
            time.sleep(0.05)
    assert hardware.made >= 2
    nonces = [nonce for nonce, _ in broker.shown]
    assert len(set(nonces)) == len(nonces)
    _, evidence = broker.shown[0]
    assert evidence.body["statement"]["measurements"] == {"package": "sha256:" + "1" * 64}
    assert evidence.body["statement"]["layers"] == ["landlock"]
    assert ended.reason is None


def test_a_proof_before_the_outputs_is_a_new_one() -> None:
    broker, ended = Broker(), Ended()
    with watching(broker, ended, 3600) as watch:
        for count in (1, 2, 3):
            watch.confirm()
            assert len(broker.shown) == count
    with pytest.raises(EnclaveError, match="proves nothing any more"):
        watch.confirm()
    assert ended.reason is None


@pytest.mark.parametrize(
    "hiccup",
    [
        UnavailableError("the broker cannot be reached"),
        EvidenceError("the nonce has expired"),
        CenacleError("the broker failed (OSError)"),
        False,
    ],
    ids=["away", "late", "failed", "elsewhere"],
)
def test_what_may_pass_is_tried_again(hiccup: CenacleError | bool) -> None:
    broker, ended = Broker([hiccup, hiccup]), Ended()
    with watching(broker, ended, 1.0) as watch:
        watch.confirm()
    assert len(broker.shown) == 3
    assert all(0 < timeout <= 2.0 for timeout in broker.timeouts)
    assert ended.reason is None


@pytest.mark.parametrize(
    "final",
    [
        REVOKED,
        ConflictError("a run is not open", found="run-1: abandoned"),
        SignatureError("another enclave holds the run"),
    ],
    ids=["revoked", "closed", "taken over"],
)
def test_what_is_final_ends_the_enclave(final: CenacleError) -> None:
    broker, ended = Broker([True, final]), Ended()
    with pytest.raises(type(final)) as caught, watching(broker, ended, 3600) as watch:  # noqa: PT012
        watch.confirm()
        watch.confirm()
    assert caught.value is final
    assert ended.wait() is final
    assert final.__traceback__ is not None  # so that the channel passes its words on
    assert len(broker.shown) == 2


def test_whatever_else_breaks_because_of_it_is_not_told() -> None:
    broker, ended = Broker([REVOKED]), Ended()
    with pytest.raises(RefusedError), watching(broker, ended, 3600) as watch:  # noqa: PT012
        with contextlib.suppress(RefusedError):
            watch.confirm()
        raise ValueError("this secret was wiped")


@pytest.mark.parametrize("where", ["hardware", "broker"])
def test_whoever_hangs_the_deadline_does_not(where: str) -> None:
    broker, ended, hardware = Broker(), Ended(), Hardware()
    release = threading.Event()
    if where == "hardware":
        hardware.hang = release
    else:

        def held(run: str) -> tuple[bytes, int]:
            del run
            release.wait(PATIENCE_S)
            return b"late", 0

        broker.run_nonce = held  # type: ignore[method-assign]
    with (
        pytest.raises(EnclaveError, match="could not prove itself again"),
        watching(broker, ended, 0.2, hardware),
    ):
        ended.wait()
    release.set()
    assert broker.shown == [] or where == "hardware"


def test_a_broker_that_stays_away() -> None:
    broker, ended = Broker([UnavailableError("away")] * 1000), Ended()
    with pytest.raises(EnclaveError, match="in time"), watching(broker, ended, 0.6):
        ended.wait()
    assert len(broker.shown) > 1


def test_an_error_of_another_kind_ends_it_too() -> None:
    broker, ended = Broker(), Ended()
    nonces: dict[str, tuple[bytes, int]] = {}
    broker.run_nonce = nonces.__getitem__  # type: ignore[assignment]
    with pytest.raises(KeyError), watching(broker, ended, 3600) as watch:
        watch.confirm()
    assert isinstance(ended.wait(), KeyError)


@pytest.mark.parametrize("reading", [True, False])
def test_the_end_wipes_the_keys_and_the_process(*, reading: bool) -> None:
    """Also where the host reads nothing, so that telling it would take for ever."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        if not reading:
            os.set_blocking(into, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(into, bytes(4096))
            os.set_blocking(into, True)
        held = session()
        secret = held.job_secret
        leave = os._exit
        os._exit = lambda code: leave(code if _is_wiped(secret) else 1)  # type: ignore[assignment]
        try:
            raise REVOKED
        except RefusedError as error:
            end_enclave(held, Channel(into), error)
    os.close(into)
    if reading:
        (message,) = list(read_messages(out))
        assert isinstance(message, Failed)
    _, status = os.waitpid(child, 0)
    os.close(out)
    assert os.waitstatus_to_exitcode(status) == EXIT_REVOKED


def _is_wiped(secret: SecretBytes) -> bool:
    try:
        secret.view()
    except ValueError:
        return True
    return False
