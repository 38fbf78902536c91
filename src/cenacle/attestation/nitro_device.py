"""The Nitro Security Module of an enclave: `/dev/nsm`, one CBOR request and response per ioctl.

Source: Linux, include/uapi/linux/nsm.h (NSM_IOCTL_RAW), and aws/aws-nitro-enclaves-nsm-api,
src/driver and src/api.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

import cbor2

from cenacle.attestation.nitro import NitroVerifier
from cenacle.attestation.registry import Attester
from cenacle.errors import InputError, UnavailableError

__all__ = ["NSM_DEVICE", "NitroAttester", "NsmDevice", "SecurityModule"]

NSM_DEVICE: Final = Path("/dev/nsm")

_IOCTL_RAW: Final = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_raw), 32 bytes
_RAW: Final = struct.Struct("=QQQQ")  # address and length of the request, then of the response
_REQUEST_BYTES: Final = 0x1000
_RESPONSE_BYTES: Final = 0x3000

_Ioctl = Callable[[int, int, bytearray], Any]


class SecurityModule(Protocol):
    """Whatever answers a Nitro Security Module's requests."""

    def exchange(self, request: bytes) -> bytes:
        """The response to one CBOR request.

        Raises:
            UnavailableError: there is no such module here, or it does not answer.
        """
        ...


def _ioctl(fd: int, code: int, message: bytearray) -> Any:
    return fcntl.ioctl(fd, code, message, True)


class NsmDevice:
    """The module behind the kernel's driver.

    Args:
        ioctl: the system call, which a test replaces.
    """

    def __init__(self, path: Path = NSM_DEVICE, ioctl: _Ioctl = _ioctl) -> None:
        self._path = path
        self._ioctl = ioctl

    def exchange(self, request: bytes) -> bytes:
        if not 0 < len(request) <= _REQUEST_BYTES:
            raise InputError(
                "a request to the Nitro Security Module has no credible length",
                found=f"{len(request)} bytes",
                expected=f"1 to {_REQUEST_BYTES}",
            )
        # Arrays know the address of their bytes and are not moved while they are not resized.
        given, answer = array("B", request), array("B", bytes(_RESPONSE_BYTES))
        message = bytearray(
            _RAW.pack(given.buffer_info()[0], len(given), answer.buffer_info()[0], len(answer))
        )
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._ioctl(fd, _IOCTL_RAW, message)
            finally:
                os.close(fd)
        except OSError as error:
            raise UnavailableError(
                "the Nitro Security Module does not answer",
                found=f"{error.strerror}: {self._path}",
                remedy="run inside a Nitro enclave whose kernel has the NSM driver",
            ) from None
        length = _RAW.unpack(message)[3]
        if not 0 < length <= len(answer):
            raise UnavailableError(
                "the Nitro Security Module gave no credible answer", found=f"{length} bytes"
            )
        return answer[:length].tobytes()


class NitroAttester(Attester):
    """Asks the security module for a document with the report data as ``user_data``."""

    kind = "nitro"

    def __init__(self, module: SecurityModule | None = None) -> None:
        self._module = NsmDevice() if module is None else module

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now  # the hypervisor has a clock of its own
        request = cbor2.dumps(
            {"Attestation": {"user_data": bound, "nonce": None, "public_key": None}}
        )
        answer = self._module.exchange(request)
        try:
            document = cbor2.loads(answer, max_depth=4)["Attestation"]["document"]
            return NitroVerifier.body_of(document)
        except Exception:  # an error code, or an answer in another form
            raise UnavailableError(
                "the Nitro Security Module made no attestation document",
                found=_reason(answer),
                expected="a document",
            ) from None


def _reason(answer: bytes) -> str:
    try:
        return f"error {str(cbor2.loads(answer, max_depth=4)['Error'])[:60]}"
    except Exception:
        return f"{len(answer)} bytes in another form"
