"""Frames between an enclave that serves a model and its host: pure, no I/O.

``header length (4) | payload length (8) | header | payload``, big endian, as in
:mod:`cenacle.enclave.frames`. The header is JSON. Tensors travel in the payload as they lie in
memory (:mod:`cenacle.enclave.tensor_bytes`).

Both directions are read as hostile: lengths, names, types, shapes and their sum are bounded
before anything is made of them, and memory grows with what really arrives. Two things can be
wrong with what arrives. A frame whose lengths hold and whose content does not is handed over as
:class:`~cenacle.enclave.serving_messages.Malformed`, so that its sender can be told and the
next one read. A stream that is not one of frames raises, and cannot be read any further.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from cenacle.cut.specs import TensorSpec
from cenacle.documents.base import Base64, Digest, Frozen, JsonObject, Natural, unb64
from cenacle.enclave.frames import HEAD
from cenacle.enclave.serving_messages import (
    MAX_TEXT,
    NONCE_BYTES,
    Attest,
    Direction,
    Drain,
    Evidence,
    Failure,
    FailureCode,
    Infer,
    Malformed,
    Message,
    Ready,
    Result,
    Sealed,
    SealedResult,
)
from cenacle.enclave.tensor_bytes import (
    MAX_TENSORS,
    Parts,
    TensorHeader,
    byte_count,
    to_json,
    unpack_tensors,
)
from cenacle.errors import CenacleError, DataError, EnclaveError

__all__ = ["MAX_HEADER_BYTES", "Decoder", "encode"]

MAX_HEADER_BYTES: Final = 256 * 1024
_STEP: Final = 1 << 20

_Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
_Count = Annotated[int, Field(ge=1, le=1 << 40)]
_Headers = Annotated[tuple[TensorHeader, ...], Field(max_length=MAX_TENSORS)]
_Specs = Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=MAX_TENSORS)]


def _bad(found: str, expected: str) -> DataError:
    return DataError(
        "a message between enclave and host is malformed", found=found, expected=expected
    )


class _Plain(Frozen, ABC):
    """The header of a message that ends with it."""

    def read(self, payload: memoryview) -> Message:
        if payload.nbytes:
            raise _bad("bytes after a header that announces none", "nothing")
        return self.message()

    @abstractmethod
    def message(self) -> Message:
        """What it says."""


class _InferHeader(Frozen):
    type: Literal["infer"]
    id: Natural
    tensors: _Headers
    ticket: JsonObject | None = None

    def read(self, payload: memoryview) -> Message:
        return Infer(self.id, unpack_tensors(self.tensors, payload), self.ticket)


class _SealedHeader(Frozen):
    type: Literal["sealed"]
    id: Natural

    def read(self, payload: memoryview) -> Message:
        return Sealed(self.id, payload)


class _AttestHeader(_Plain):
    type: Literal["attest"]
    id: Natural
    nonce: Base64

    def message(self) -> Message:
        nonce = unb64(self.nonce)
        if len(nonce) != NONCE_BYTES:
            raise _bad(f"a nonce of {len(nonce)} bytes", f"{NONCE_BYTES} bytes")
        return Attest(self.id, nonce)


class _DrainHeader(_Plain):
    type: Literal["drain"]

    def message(self) -> Message:
        return Drain()


class _ReadyHeader(_Plain):
    type: Literal["ready"]
    contract: Digest
    inputs: _Specs
    outputs: _Specs
    hpke_key: Base64
    signing_key: Base64
    max_batch: _Count
    max_payload: _Count
    max_waiting: _Count

    def message(self) -> Message:
        return Ready(
            self.contract,
            tuple(TensorSpec.from_fields(one) for one in self.inputs),
            tuple(TensorSpec.from_fields(one) for one in self.outputs),
            unb64(self.hpke_key),
            unb64(self.signing_key),
            self.max_batch,
            self.max_payload,
            self.max_waiting,
        )


class _ResultHeader(Frozen):
    type: Literal["result"]
    id: Natural
    tensors: _Headers

    def read(self, payload: memoryview) -> Message:
        return Result(self.id, unpack_tensors(self.tensors, payload))


class _SealedResultHeader(Frozen):
    type: Literal["sealed-result"]
    id: Natural

    def read(self, payload: memoryview) -> Message:
        return SealedResult(self.id, payload)


class _EvidenceHeader(Frozen):
    type: Literal["evidence"]
    id: Natural

    def read(self, payload: memoryview) -> Message:
        return Evidence(self.id, payload)


class _ErrorHeader(Frozen):
    error: _Text
    what: _Text
    found: _Text | None = None
    expected: _Text | None = None
    remedy: _Text | None = None


class _FailureHeader(_Plain):
    type: Literal["failure"]
    id: Natural | None
    code: FailureCode
    error: _ErrorHeader

    def message(self) -> Message:
        return Failure(self.id, self.code, CenacleError.from_dict(self.error.to_fields()))


class _Numbered(Frozen, extra="ignore"):
    """What can be read of a header that is otherwise wrong, to tell its sender."""

    id: Natural


_READERS: Final[dict[Direction, TypeAdapter[Any]]] = {
    "to-enclave": TypeAdapter(
        Annotated[
            _InferHeader | _SealedHeader | _AttestHeader | _DrainHeader,
            Field(discriminator="type"),
        ]
    ),
    "from-enclave": TypeAdapter(
        Annotated[
            _ReadyHeader | _ResultHeader | _SealedResultHeader | _EvidenceHeader | _FailureHeader,
            Field(discriminator="type"),
        ]
    ),
}


def encode(message: Message) -> Parts:
    """The frame of a message, as buffers that follow each other; tensors are not copied.

    Raises:
        DataError: a message that the other side would refuse for its form.
    """
    fields, parts = message.frame()
    header = to_json(fields)
    if len(header) > MAX_HEADER_BYTES:
        raise _bad(f"a header of {len(header)} bytes", f"at most {MAX_HEADER_BYTES}")
    return [HEAD.pack(len(header), byte_count(parts)) + header, *parts]


def _decode(direction: Direction, raw: bytes, payload: memoryview) -> Message | Malformed:
    try:
        header = _READERS[direction].validate_json(raw)
    except ValidationError:
        # Pydantic's words quote what was sent.
        return Malformed(_number(raw), _bad("another header", "one of a message to this side"))
    try:
        message: Message = header.read(payload)
    except DataError as error:
        return Malformed(getattr(header, "id", None), error)
    return message


def _number(raw: bytes) -> int | None:
    try:
        return _Numbered.model_validate_json(raw).id
    except ValidationError:
        return None


class Decoder:
    """Frames out of a stream, whichever way its bytes come.

    Either receive into :meth:`buffer` and say with :meth:`received` how much came, which copies
    nothing, or :meth:`feed` whatever arrived.

    Args:
        direction: whose messages these are; those of the other direction are malformed.
        max_payload: bytes that may follow a header.
    """

    def __init__(self, direction: Direction, max_payload: int) -> None:
        self._direction, self._max_payload = direction, max_payload
        self._head: tuple[int, int] | None = None
        self._header: bytes | None = None
        self._buffer, self._done, self._wanted = bytearray(HEAD.size), 0, HEAD.size

    @property
    def idle(self) -> bool:
        """Whether the stream may end here: no frame has begun."""
        return self._head is None and self._done == 0

    def buffer(self) -> memoryview:
        """Where the next bytes belong; release it before :meth:`received`."""
        if self._done == len(self._buffer):
            # No more than has come already is made ready for what a length only promises.
            self._buffer.extend(bytes(min(max(_STEP, self._done), self._wanted - self._done)))
        return memoryview(self._buffer)[self._done :]

    def received(self, count: int) -> Message | Malformed | None:
        """``count`` bytes lie in the buffer now; returns the message that they complete.

        Raises:
            EnclaveError: these are no frames; the stream cannot be read any further.
        """
        self._done += count
        while self._done == self._wanted:
            whole = self._buffer
            if self._head is None:
                header, payload = HEAD.unpack(whole)
                if not 2 <= header <= MAX_HEADER_BYTES or payload > self._max_payload:
                    raise EnclaveError(
                        "the connection between enclave and host broke the protocol",
                        found="bytes that are no frame",
                        expected=f"headers of at most {MAX_HEADER_BYTES} bytes and payloads of "
                        f"at most {self._max_payload}",
                        remedy="run the same version of cenacle inside and outside",
                    )
                self._head = header, payload
                self._expect(header)
            elif self._header is None:
                self._header = bytes(whole)
                self._expect(self._head[1])
            else:
                message = _decode(self._direction, self._header, memoryview(whole))
                self._head = self._header = None
                self._expect(HEAD.size)
                return message
        return None

    def _expect(self, count: int) -> None:
        self._buffer, self._done, self._wanted = bytearray(min(count, _STEP)), 0, count

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message | Malformed]:
        """The messages that these bytes complete; raises as :meth:`received` does."""
        rest = memoryview(data)
        while rest:
            with self.buffer() as room:
                count = min(len(room), len(rest))
                room[:count] = rest[:count]
            rest = rest[count:]
            if (message := self.received(count)) is not None:
                yield message
