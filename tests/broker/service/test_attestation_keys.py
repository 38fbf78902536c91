"""A broker certifies attestation keys of TPMs it trusts, once for each challenge."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.attestation.tpm import TpmVerifier
from cenacle.attestation.tpm_attester import TpmAttester, certify_attestation_key
from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyCertificate,
    AttestationKeyChallenge,
    AttestationKeyRequest,
    open_certificate,
)
from cenacle.attestation.tpm_device import TpmDevice
from cenacle.attestation.tpm_roots import vendor_roots
from cenacle.broker.attestation_keys import CHALLENGE_LIFETIME, AttestationKeys
from cenacle.broker.client import BrokerClient
from cenacle.broker.server import serving
from cenacle.broker.service import Broker
from cenacle.broker.tls import ensure_certificate
from cenacle.documents.base import b64, unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import ConflictError, DocumentError, EvidenceError
from tests.support.swtpm import Manufacturer, Tpm, require_swtpm, run_swtpm

REPORT = bytes(range(64))


@pytest.fixture(scope="module")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    require_swtpm()
    return Manufacturer(tmp_path_factory.mktemp("manufacturer"))


@pytest.fixture(scope="module")
def tpm(manufacturer: Manufacturer) -> Iterator[Tpm]:
    with run_swtpm(manufacturer, manufacturer.make("tpm")) as running:
        yield running


@dataclass
class Desk:
    """A broker that trusts the test's manufacturer."""

    world: Any
    root: Any

    @property
    def broker(self) -> Broker:
        verifier = TpmVerifier([self.world.broker.identity.verify_key], [self.root])
        verifiers = VerifierSet.of_development(SimulatedVerifier(), verifier)
        return Broker(self.world.store, self.world.broker.keys, verifiers, self.world.clock)

    @property
    def keys(self) -> AttestationKeys:
        """Anew each time, as after a restart: nothing is remembered outside the database."""
        return AttestationKeys(self.broker)

    challenge_attestation_key = property(lambda self: self.keys.challenge_attestation_key)
    certify_attestation_key = property(lambda self: self.keys.certify_attestation_key)


@pytest.fixture
def desk(world: Any, manufacturer: Manufacturer) -> Desk:
    world.clock.moment = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    return Desk(world, manufacturer.root)


class Recording:
    """Passes on to an issuer, and keeps what went over the wire."""

    def __init__(self, issuer: Any) -> None:
        self.issuer = issuer
        self.answer: AttestationKeyAnswer | None = None

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        challenge: AttestationKeyChallenge = self.issuer.challenge_attestation_key(request)
        return challenge

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        self.answer = answer
        raise EvidenceError("not now")


@pytest.fixture
def answer(desk: Desk, tpm: Tpm) -> AttestationKeyAnswer:
    """A right answer that was not sent yet."""
    recording = Recording(desk)
    stopped = pytest.raises(EvidenceError, match="not now")
    with TpmDevice(tpm.tcti) as device, device.attestation_key() as ak, stopped:
        certify_attestation_key(device, ak, recording, tpm.authorities)
    assert recording.answer is not None
    return recording.answer


def test_the_whole_protocol(desk: Desk, tpm: Tpm) -> None:
    attester = TpmAttester(tpm.tcti, (0, 7), issuer=desk, authorities=tpm.authorities)
    now = desk.world.clock()
    evidence = attester.attest(REPORT, {}, (), now)
    claims = desk.broker.verifiers.for_kind("tpm").authenticate(evidence, REPORT, now)
    assert set(claims.measurements) == {"pcr0", "pcr7", "ek"}


def test_over_tls(
    make_live_world: Any, manufacturer: Manufacturer, tpm: Tpm, tmp_path: Path
) -> None:
    world = make_live_world(tmp_path)
    desk = Desk(world, manufacturer.root)
    broker = desk.broker
    with contextlib.ExitStack() as stack:
        stack.callback(world.close)
        stack.enter_context(serving(broker, ensure_certificate(world.folder / "broker")))
        client = stack.enter_context(BrokerClient(broker.identity, timeout=20))
        device = stack.enter_context(TpmDevice(tpm.tcti))
        ak = stack.enter_context(device.attestation_key())
        envelope = certify_attestation_key(device, ak, client, tpm.authorities)
        issuers = [broker.identity.verify_key]
        found = open_certificate(envelope.to_fields(), issuers, world.clock())
        assert found.key_name == ak.public.name.hex()
        with pytest.raises(DocumentError, match="certificates: missing"):
            client._post({}, "attestation", "keys")
        with pytest.raises(DocumentError, match="challenge: missing"):
            client._post({}, "attestation", "keys", "activate")


def test_an_answer_counts_once(desk: Desk, answer: AttestationKeyAnswer) -> None:
    desk.keys.certify_attestation_key(answer)
    with pytest.raises(ConflictError, match="was answered already"):
        desk.keys.certify_attestation_key(answer)


def test_of_two_at_once_one_wins(desk: Desk, answer: AttestationKeyAnswer) -> None:
    keys = desk.keys

    def certify(_: int) -> str:
        try:
            return keys.certify_attestation_key(answer).payload_type
        except ConflictError:
            return "late"

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(certify, range(4)))
    assert sorted(results) == sorted(["late"] * 3 + [AttestationKeyCertificate.media_type])


def test_two_challenges_of_one_host_do_not_disturb_each_other(
    desk: Desk, answer: AttestationKeyAnswer
) -> None:
    desk.keys.challenge_attestation_key(answer.request)
    desk.keys.certify_attestation_key(answer)


def test_a_challenge_expires(desk: Desk, answer: AttestationKeyAnswer) -> None:
    desk.world.clock.turn(seconds=CHALLENGE_LIFETIME.seconds + 1)
    with pytest.raises(EvidenceError, match="the challenge has expired"):
        desk.keys.certify_attestation_key(answer)


def test_challenges_take_no_room(desk: Desk, answer: AttestationKeyAnswer) -> None:
    """Whoever asks and never answers fills no table."""
    before = _spent(desk)
    for _ in range(20):
        desk.keys.challenge_attestation_key(answer.request)
    assert _spent(desk) == before
    desk.keys.certify_attestation_key(answer)
    assert _spent(desk) == before + 1
    desk.world.clock.turn(days=2)
    assert desk.broker.tidy() == 1
    assert _spent(desk) == before


def _spent(desk: Desk) -> int:
    with contextlib.closing(sqlite3.connect(desk.world.folder / "broker.db")) as database:
        return int(database.execute("SELECT COUNT(*) FROM nonces").fetchone()[0])


def test_every_byte_of_challenge_and_secret_counts(
    desk: Desk, answer: AttestationKeyAnswer
) -> None:
    keys = desk.keys
    for name in ("challenge", "secret"):
        raw = unb64(getattr(answer, name))
        for at in range(len(raw)):
            wrong = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            with pytest.raises(EvidenceError):
                keys.certify_attestation_key(answer.model_copy(update={name: b64(wrong)}))
        for wrong in (b"", raw[:-1], raw + b"\x00"):
            with pytest.raises(EvidenceError):
                keys.certify_attestation_key(answer.model_copy(update={name: b64(wrong)}))
    keys.certify_attestation_key(answer)


def test_a_challenge_is_for_its_own_request(desk: Desk, answer: AttestationKeyAnswer) -> None:
    """The secret of one key buys no certificate of another."""
    request = answer.request
    key = bytearray(unb64(request.attestation_key))
    key[-1] ^= 1
    for changes in (
        {"attestation_key": b64(bytes(key))},
        {"endorsement_key": request.attestation_key},
        {"certificates": request.certificates[:1]},
        {"certificates": (*request.certificates, request.certificates[0])},
    ):
        other = answer.model_copy(update={"request": request.model_copy(update=changes)})
        with pytest.raises(EvidenceError, match="not one that this broker gave for these keys"):
            desk.keys.certify_attestation_key(other)


def test_another_brokers_challenge_does_not_count(
    desk: Desk, answer: AttestationKeyAnswer, make_world: Any, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_world(tmp_path / "other")
    other.clock.moment = desk.world.clock.moment
    with pytest.raises(EvidenceError, match="not one that this broker gave"):
        Desk(other, desk.root).keys.certify_attestation_key(answer)
    other.close()


def test_a_root_taken_away_meanwhile_stops_certification(
    desk: Desk, answer: AttestationKeyAnswer
) -> None:
    desk.root = vendor_roots()[0]
    with pytest.raises(EvidenceError, match="does not lead to a trusted root"):
        desk.keys.certify_attestation_key(answer)


def test_an_endorsement_that_expires_meanwhile_does_too(
    desk: Desk, answer: AttestationKeyAnswer
) -> None:
    desk.world.clock.turn(days=-30)
    with pytest.raises(EvidenceError, match="is not valid now"):
        desk.keys.certify_attestation_key(answer)


def test_a_broker_without_a_tpm_verifier_certifies_nothing(
    world: Any, answer: AttestationKeyAnswer
) -> None:
    with pytest.raises(
        EvidenceError, match="certifies no attestation keys; found verifiers of sim"
    ):
        AttestationKeys(world.broker).challenge_attestation_key(answer.request)
