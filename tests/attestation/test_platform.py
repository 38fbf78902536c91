"""The host's socket for evidence: real sockets, an honest host, and hosts that are not."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation import InstallationKey, SimulatedAttester, SimulatedVerifier
from cenacle.attestation.attesters import attester_for
from cenacle.attestation.platform import MAX_EVIDENCE_BYTES, PlatformAttester, PlatformService
from cenacle.attestation.registry import Attester
from cenacle.crypto import SigningKey
from cenacle.errors import EvidenceError, UnavailableError

Attested = Any  # of conftest, which tests cannot import


class Hardware(Attester):
    """Hardware that says what it was asked, or that it cannot."""

    kind = "snp"

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.asked: list[bytes] = []

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        self.asked.append(bound)
        if self._error is not None:
            raise self._error
        return {"quote": bound.hex(), "year": now.year}


def test_evidence_through_the_socket_is_the_hardware_s(attested: Attested) -> None:
    key = InstallationKey(SigningKey.generate())
    with PlatformService(SimulatedAttester(key)) as service:
        enclave = attester_for("snp", {}, service.path)
        assert isinstance(enclave, PlatformAttester)
        enclave = PlatformAttester("simulated", service.path)
        evidence = enclave.attest(
            attested.bound, attested.measurements, attested.layers, attested.now
        )
    # The host's own clock dates what it signs; the statement is dated by the enclave's.
    shown = SimulatedVerifier().inspect(evidence, attested.now)
    statement = SimulatedVerifier().statement(evidence)
    assert statement is not None
    assert shown.bound == statement.bind(attested.bound)
    assert shown.claims.measurements == {"installation": key.measurement}
    assert statement.measurements == attested.measurements


def test_one_service_answers_again_and_again() -> None:
    hardware = Hardware()
    with PlatformService(hardware) as service:
        for index in range(5):
            bound = bytes([index]) * 64
            body = PlatformAttester("snp", service.path).collect(bound, datetime.now())  # noqa: DTZ005
            assert body["quote"] == bound.hex()
    assert len(hardware.asked) == 5
    assert not service_exists(service)


def service_exists(service: PlatformService) -> bool:
    try:
        return service.path.exists()
    except RuntimeError:
        return False


def test_the_socket_is_the_user_s_alone() -> None:
    with PlatformService(Hardware()) as service:
        assert service.path.stat().st_mode & 0o077 == 0
        assert service.path.parent.stat().st_mode & 0o077 == 0


def test_what_the_hardware_lacks_is_told_in_its_own_words(attested: Attested) -> None:
    missing = UnavailableError("there is no TPM", found="/dev/tpmrm0", remedy="use another machine")
    with (
        PlatformService(Hardware(missing)) as service,
        pytest.raises(UnavailableError, match="there is no TPM") as caught,
    ):
        PlatformAttester("tpm", service.path).attest(bytes(64), {}, (), attested.now)
    assert caught.value.remedy == "use another machine"


def test_a_driver_that_fails_unforeseen_does_not_end_the_service() -> None:
    hardware = Hardware(RuntimeError("a secret of the driver's"))
    with PlatformService(hardware) as service:
        for _ in range(2):
            with pytest.raises(UnavailableError, match="hardware failed") as caught:
                PlatformAttester("snp", service.path).collect(bytes(64), datetime.now())  # noqa: DTZ005
            assert caught.value.found == "RuntimeError"
    assert len(hardware.asked) == 2


def test_an_enclave_that_asks_for_less_gets_nothing() -> None:
    hardware = Hardware()
    with PlatformService(hardware) as service:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(service.path))
            connection.sendall(b"short")
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        assert "error" in json.loads(answer[4:])
        # and the next one is served
        assert PlatformAttester("snp", service.path).collect(bytes(64), datetime.now())  # noqa: DTZ005
    assert hardware.asked == [bytes(64)]


@contextmanager
def host(tmp_path: Path, answer: bytes) -> Iterator[Path]:
    """A host that answers every request with these bytes."""
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(64)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        thread.join()
        listener.close()


def framed(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack(">I", len(text)) + text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(b"", "gives no evidence", id="silence"),
        pytest.param(b"\x00\x00", "gives no evidence", id="half a length"),
        pytest.param(struct.pack(">I", 90) + b"{}", "gives no evidence", id="less than promised"),
        pytest.param(struct.pack(">I", MAX_EVIDENCE_BYTES + 1), "too large", id="too much"),
        pytest.param(framed(b"\xff\xfe"), "not JSON", id="no text"),
        pytest.param(framed(b"[" * 100_000), "not JSON", id="too deep"),
        pytest.param(framed([]), "no evidence", id="a list"),
        pytest.param(framed({}), "no evidence", id="nothing"),
        pytest.param(framed({"body": "text"}), "no evidence", id="no object"),
    ],
)
def test_a_host_that_answers_badly(tmp_path: Path, answer: bytes, said: str) -> None:
    with (
        host(tmp_path, answer) as path,
        pytest.raises((EvidenceError, UnavailableError), match=said),
    ):
        PlatformAttester("snp", path).collect(bytes(64), datetime.now())  # noqa: DTZ005


def test_no_host(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="gives no evidence") as caught:
        PlatformAttester("snp", tmp_path / "nothing").collect(bytes(64), datetime.now())  # noqa: DTZ005
    assert caught.value.remedy


def test_a_service_starts_once() -> None:
    service = PlatformService(Hardware()).start()
    with pytest.raises(RuntimeError):
        service.start()
    service.close()
    service.close()
    with pytest.raises(RuntimeError):
        _ = service.path
