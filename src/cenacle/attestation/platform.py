"""Evidence from outside the sandbox: the host asks its hardware for what the enclave binds.

A quote speaks for the machine, not for the process that asked for it: whoever may use the TPM or
the TEE's device can have any 64 bytes quoted. So nothing is lost by letting the host ask, and no
device has to stand open inside the sandbox. What makes evidence the enclave's is the nonce and
the keys in those bytes, and the measured software that alone could have sent them.

On the socket: 64 bytes from the enclave, then from the host four bytes of length (big-endian) and
JSON, ``{"body": ...}`` or ``{"error": ...}``. One request a connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from cenacle.attestation.binding import REPORT_DATA_BYTES
from cenacle.attestation.registry import Attester
from cenacle.errors import CenacleError, EvidenceError, UnavailableError

__all__ = ["MAX_EVIDENCE_BYTES", "PlatformAttester", "PlatformService"]

MAX_EVIDENCE_BYTES: Final = 32 * 1024 * 1024
_TIMEOUT_S: Final = 60.0
_LENGTH: Final = struct.Struct(">I")


class PlatformService:
    """Answers on a unix socket in a private folder with evidence of one attester.

    Use as a context manager, or call :meth:`start` and :meth:`close`.
    """

    def __init__(self, attester: Attester) -> None:
        self._attester = attester
        self._folder: Path | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """The socket; raises RuntimeError unless the service is running."""
        if self._folder is None:
            raise RuntimeError("the service is not running")
        return self._folder / "platform.sock"

    def start(self) -> Self:
        """Listen; raises UnavailableError."""
        if self._thread is not None:
            raise RuntimeError("the service was started already")
        folder = Path(tempfile.mkdtemp(prefix="cenacle-", dir="/tmp"))  # short: sun_path
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(folder / "platform.sock"))
            (folder / "platform.sock").chmod(0o600)
            listener.listen(4)
        except OSError as error:
            listener.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise UnavailableError(
                "the socket for evidence cannot be made", found=error.strerror
            ) from None
        self._folder, self._listener = folder, listener
        self._thread = threading.Thread(target=self._serve, name="cenacle-platform", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering. Safe to call twice."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._listener.close()
        if self._thread is not None:
            self._thread.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_TIMEOUT_S)
                answer = self._answer(_read(connection, REPORT_DATA_BYTES))
                connection.sendall(_LENGTH.pack(len(answer)) + answer)

    def _answer(self, bound: bytes) -> bytes:
        try:
            if len(bound) != REPORT_DATA_BYTES:
                raise UnavailableError("the enclave asked for less than 64 bytes")
            fields: dict[str, Any] = {"body": self._attester.collect(bound, datetime.now(UTC))}
            return json.dumps(fields).encode()
        except CenacleError as error:
            return json.dumps({"error": error.to_dict()}).encode()
        except Exception as error:  # a driver's own: the next request must find someone here
            failed = UnavailableError("the host's hardware failed", found=type(error).__name__)
            return json.dumps({"error": failed.to_dict()}).encode()


class PlatformAttester(Attester):
    """Asks a :class:`PlatformService` for evidence; runs inside the enclave.

    What comes back is not judged here: the broker does that. A host that answers with something
    else gets no keys.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind  # type: ignore[misc]  # one class for every kind that the host serves
        self._path = path

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_TIMEOUT_S)
                connection.connect(str(self._path))
                connection.sendall(bound)
                (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
                if length > MAX_EVIDENCE_BYTES:
                    raise EvidenceError(
                        "the host's evidence is too large",
                        found=f"{length} bytes",
                        expected=f"at most {MAX_EVIDENCE_BYTES}",
                    )
                fields = json.loads(_exactly(connection, length))
        except OSError as error:
            raise UnavailableError(
                "the host gives no evidence",
                found=error.strerror or type(error).__name__,
                remedy="start the job with `cenacle run`",
            ) from None
        except (ValueError, RecursionError):
            raise EvidenceError("the host's evidence is not JSON") from None
        match fields:
            case {"body": dict(body)}:
                return body
            case {"error": dict(problem)}:
                raise CenacleError.from_dict(problem)
        raise EvidenceError("the host answered with something that is no evidence")


def _read(connection: socket.socket, size: int) -> bytes:
    """Up to ``size`` bytes; fewer where the other side ends."""
    data = bytearray()
    while len(data) < size and (chunk := connection.recv(min(size - len(data), 1 << 20))):
        data += chunk
    return bytes(data)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = _read(connection, size)
    if len(data) != size:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return data
