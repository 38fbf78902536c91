"""HTTP as the service speaks it: limits on what is read, errors in words, answers in one piece."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    RefusedError,
    UnavailableError,
    VerificationError,
)
from cenacle.serving.backend import QueryError, QueryErrorCode
from cenacle.serving.open_inference import JSON_TYPE

__all__ = [
    "Answer",
    "BodyBudget",
    "BodyShare",
    "HttpError",
    "Limits",
    "Request",
    "failure",
    "read_body",
]

_STATUS: Final[tuple[tuple[type[CenacleError], int], ...]] = (
    (InputError, 400),
    (VerificationError, 403),
    (RefusedError, 403),
    (ConflictError, 409),
    (UnavailableError, 503),
)
_CODES: Final[dict[QueryErrorCode, int]] = {
    "malformed": 400,
    "input": 400,
    "too-large": 413,
    "busy": 503,
    "draining": 503,
    "sealed-only": 403,
    "ticket": 403,
    "failed": 500,
    "gone": 503,
    "late": 504,
}


@dataclass(frozen=True)
class Limits:
    """What strangers may cost.

    Attributes:
        body_bytes: of one request.
        bodies_bytes: of all requests that are being read or answered, together.
        waiting: queries that may be taken and not answered.
        attestations: that may be under way; evidence of real hardware takes its time.
        connections: that may be open.
        patience_s: seconds that a request may take to arrive, and that an answer may wait for
            its client to read on.
        answer_s: seconds that a query may wait for the enclave.
    """

    body_bytes: int = 64 * 1024 * 1024
    bodies_bytes: int = 512 * 1024 * 1024
    waiting: int = 256
    attestations: int = 4
    connections: int = 1024
    patience_s: float = 30.0
    answer_s: float = 60.0


class HttpError(Exception):
    """A request that is refused: its status, why in one word for the metrics, and in a sentence."""

    def __init__(
        self, status: int, reason: str, error: CenacleError, headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.error = error
        self.headers = dict(headers)


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes
    headers: Mapping[str, str]
    status: int = 200

    @classmethod
    def of(cls, fields: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
        """An answer in JSON."""
        body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
        return cls(body, {"Content-Type": JSON_TYPE, **headers}, status)

    async def send(self, send: Send) -> None:
        named = {**self.headers, "content-length": str(len(self.body))}
        listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in named.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": listed})
        await send({"type": "http.response.body", "body": self.body})


def failure(error: Exception) -> tuple[Answer, str]:
    """The answer to a request that went wrong, and the reason in one word.

    What goes wrong unforeseen is told by its class alone, and never raised on: a message may
    hold what a client sent, and nothing that a client sends is ever logged.
    """
    headers: dict[str, str] = {}
    match error:
        case HttpError():
            status, reason, words = error.status, error.reason, error.error
            headers = error.headers
        case QueryError():
            status, reason, words = _CODES[error.code], error.code, error.error
            if isinstance(words, UnavailableError) and status < 500:
                status = 503  # whether a ticket pays is not known yet: ask again
        case UnicodeError() | RecursionError():
            status, reason = 400, "malformed"
            words = DocumentError("a request is not Unicode text of bounded depth")
        case CenacleError():
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            reason = "malformed" if status == 400 else "refused" if status < 500 else "failed"
            words = error
        case MemoryError():
            status, reason = 503, "busy"
            words = UnavailableError("the service has no memory left for this request")
        case _:
            status, reason = 500, "failed"
            words = CenacleError(f"the service failed ({type(error).__name__})")
    if status == 503:
        headers.setdefault("Retry-After", "1")
    fields = {"error": words.diagnostics(), "details": words.to_dict()}
    return Answer.of(fields, status, headers), reason


class Request:
    """One request's head.

    Raises:
        HttpError: it has a header twice that may be there once.
    """

    _ONCE: Final = frozenset({"content-type", "content-encoding", "content-length"})

    def __init__(self, scope: Scope) -> None:
        self.method: str = scope["method"]
        # As it was sent: an escaped slash is part of a name.
        self.path: str = scope["raw_path"].decode("ascii", "replace")
        self._headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name = raw_name.decode("latin-1").lower()
            if name in self._headers and (name in self._ONCE or name.startswith("inference-")):
                raise HttpError(400, "malformed", InputError("a header stands twice", found=name))
            self._headers[name] = raw_value.decode("latin-1")

    def header(self, name: str) -> str | None:
        return self._headers.get(name.lower())

    def number(self, name: str) -> int | None:
        """A header that is a whole number, if it is there."""
        text = self.header(name)
        if text is None:
            return None
        if not text.isascii() or not text.isdigit() or len(text) > 15:
            raise HttpError(400, "malformed", InputError(f"{name} is not a whole number"))
        return int(text)

    def require_type(self, *types: str, optional: bool = False) -> None:
        """Raises unless the body is of one of these types, and not compressed."""
        encoding = self.header("content-encoding")
        if encoding is not None and encoding.strip().lower() != "identity":
            raise HttpError(
                415,
                "content-type",
                InputError("compressed requests are not taken", expected="no Content-Encoding"),
            )
        given = self.header("content-type")
        if given is None and optional:
            return
        kind = (given or "").partition(";")[0].strip().lower()
        if kind not in types:
            raise HttpError(
                415,
                "content-type",
                InputError(
                    "a request is of a type that is not taken here", expected=" or ".join(types)
                ),
            )


class BodyBudget:
    """The memory that bodies of requests take together, at most."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """One request's share; all of it is given back at the end of the block."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._left += share.taken

    def take(self, size: int) -> bool:
        """Whether there was so much left; then it is taken."""
        if size > self._left:
            return False
        self._left -= size
        return True


class BodyShare:
    """What one request has taken of a budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.taken = 0

    def take(self, size: int) -> None:
        """Raises HttpError where nothing is left for so much more."""
        if not self._budget.take(size):
            raise HttpError(
                503,
                "busy",
                UnavailableError("the service reads as many large requests as it can already"),
            )
        self.taken += size


async def read_body(request: Request, receive: Receive, limit: int, share: BodyShare) -> bytes:
    """The body, refused as soon as it is over the limit, whatever its headers claim."""
    announced = request.number("content-length") or 0
    if announced > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    seen, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise HttpError(
                400, "malformed", InputError("a request was cut off", found=f"{seen} bytes")
            )
        part = message.get("body", b"")
        more = message.get("more_body", False)
        seen += len(part)
        if seen > limit:
            raise _too_large(limit)
        share.take(len(part))
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> HttpError:
    return HttpError(
        413,
        "too-large",
        InputError("a request is too large", expected=f"at most {limit} bytes"),
        {"Connection": "close"},
    )
