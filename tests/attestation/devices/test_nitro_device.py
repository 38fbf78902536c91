"""The security module's exchange, recorded, and the system call below it."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

from cenacle.attestation.nitro_device import NitroAttester, NsmDevice
from cenacle.errors import InputError, UnavailableError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
BOUND = bytes(range(64))
# What aws-nitro-enclaves-nsm-api sends for an attestation with user data alone.
REQUEST = bytes.fromhex("a16b4174746573746174696f6ea369757365725f646174615840") + BOUND
REQUEST += bytes.fromhex("656e6f6e6365f66a7075626c69635f6b6579f6")


class Module:
    """A security module that answers with what was recorded."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    def exchange(self, request: bytes) -> bytes:
        self.requests.append(request)
        return self.answer


def test_exchange(enclave: Any) -> None:
    measurements = {"program": "sha256:" + "ab" * 32}
    module = Module(b"")

    class Hypervisor(Module):
        def exchange(self, request: bytes) -> bytes:
            self.requests.append(request)
            enclave.user_data = cbor2.loads(request)["Attestation"]["user_data"]
            return cbor2.dumps({"Attestation": {"document": enclave.document()}})

    module = Hypervisor(b"")
    evidence = NitroAttester(module).attest(BOUND, measurements, ("seccomp",), NOW)
    claims = enclave.verifier().authenticate(evidence, BOUND, NOW)
    assert claims.measurements["program"] == measurements["program"]
    assert claims.layers == ("seccomp",)
    altered = evidence.model_copy(
        update={
            "body": {
                **evidence.body,
                "statement": {**evidence.body["statement"], "layers": []},
            }
        }
    )
    with pytest.raises(Exception, match="bound to another nonce"):
        enclave.verifier().authenticate(altered, BOUND, NOW)


def test_request_is_the_recorded_one(enclave: Any) -> None:
    module = Module(cbor2.dumps({"Attestation": {"document": enclave.document()}}))
    NitroAttester(module).collect(BOUND, NOW)
    assert module.requests == [REQUEST]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (cbor2.dumps({"Error": "InvalidArgument"}), "error InvalidArgument"),
        (cbor2.dumps({"Attestation": {"document": b"no"}}), "bytes in another form"),
        (cbor2.dumps({"Attestation": {}}), "bytes in another form"),
        (cbor2.dumps({"GetRandom": {"random": b"1"}}), "bytes in another form"),
        (b"", "0 bytes in another form"),
        (b"\xff", "1 bytes in another form"),
        (b"\x01", "1 bytes in another form"),
    ],
)
def test_other_answers(answer: bytes, found: str) -> None:
    with pytest.raises(UnavailableError, match=found):
        NitroAttester(Module(answer)).collect(BOUND, NOW)


def kernel(answer: bytes, length: int | None = None) -> tuple[Callable[..., int], list[bytes]]:
    """The NSM driver: reads and writes the process's memory at the addresses that it is given."""
    seen: list[bytes] = []

    def ioctl(fd: int, code: int, message: bytearray) -> int:
        assert code == 0xC0200A00
        given, given_length, room, room_length = struct.unpack("=QQQQ", message)
        seen.append(ctypes.string_at(given, given_length))
        assert room_length == 0x3000
        ctypes.memmove(room, answer, len(answer))
        stated = len(answer) if length is None else length
        message[:] = struct.pack("=QQQQ", given, given_length, room, stated)
        return 0

    return ioctl, seen


def test_system_call(tmp_path: Path) -> None:
    device = tmp_path / "nsm"
    device.touch()
    ioctl, seen = kernel(b"answer")
    assert NsmDevice(device, ioctl).exchange(b"request") == b"answer"
    assert seen == [b"request"]


@pytest.mark.parametrize("length", [0, 0x3001, 1 << 63])
def test_lengths_that_cannot_be(tmp_path: Path, length: int) -> None:
    device = tmp_path / "nsm"
    device.touch()
    with pytest.raises(UnavailableError, match="no credible answer"):
        NsmDevice(device, kernel(b"answer", length)[0]).exchange(b"request")


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No such file"):
        NsmDevice(tmp_path / "nsm").exchange(b"request")


def test_a_file_that_is_no_device(tmp_path: Path) -> None:
    device = tmp_path / "nsm"
    device.touch()
    with pytest.raises(UnavailableError, match="does not answer"):
        NsmDevice(device).exchange(b"request")


def test_the_call_fails(tmp_path: Path) -> None:
    device = tmp_path / "nsm"
    device.touch()

    def ioctl(fd: int, code: int, message: bytearray) -> int:
        raise OSError(errno.EMSGSIZE, "Message too long")

    with pytest.raises(UnavailableError, match="Message too long"):
        NsmDevice(device, ioctl).exchange(b"request")


@pytest.mark.parametrize("request_", [b"", bytes(0x1001)])
def test_requests_that_are_never_sent(request_: bytes) -> None:
    with pytest.raises(InputError, match="credible length"):
        NsmDevice().exchange(request_)
