"""Tickets: how many queries a client may put to a model that is served, and what uses one.

A *ticket* is signed by the issuer that the contract names. It says whose queries count, how
many, and until when; a query is one row of a batch. A *use* asks for an answer under a ticket.
The client signs it over (contract, serial, request, rows, digest of the input), so that an
operator can neither spend a client's queries nor put another input under a use.

The request is the client's own name for what it asks, 16 random bytes. Asking again under the
same name with the same input costs nothing more, so that an answer which was lost on its way is
asked for again.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from cenacle.crypto.kdf import encode_fields
from cenacle.crypto.signing import SigningKey, VerifyKey
from cenacle.documents.base import (
    Base64,
    Digest,
    Document,
    Frozen,
    Name,
    Timestamp,
    b64,
    format_time,
    parse_time,
    unb64,
)
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import CenacleError, InputError, RefusedError, SignatureError

__all__ = [
    "MAX_QUERIES",
    "MAX_ROWS",
    "REQUEST_BYTES",
    "SERIAL_BYTES",
    "Ticket",
    "TicketUse",
    "new_request",
    "new_serial",
    "open_ticket",
    "sign_use",
    "use_message",
]

SERIAL_BYTES: Final = 16
REQUEST_BYTES: Final = 16
MAX_QUERIES: Final = 2**40
MAX_ROWS: Final = 2**20
"""Rows of one request, at most."""

_DOMAIN: Final = b"cenacle/ticket-use/v1"


class Ticket(Document):
    """So many queries of one contract's model, for one client, within a span of time.

    Attributes:
        issuer: the party that the contract lets sell queries; it signs the ticket.
        serial: base64 of 16 random bytes. Tickets of the same serial share their queries.
        client: base64 of the client's Ed25519 public key (32 bytes), whose uses count.
        queries: rows that may be answered, 1 to 2^40.
        not_before, expires: by the broker's clock; from the one on, and before the other.
    """

    media_type = "application/vnd.cenacle.ticket+json"

    kind: Literal["ticket"] = "ticket"
    version: Literal[1] = 1
    issuer: Name
    contract: Digest
    serial: Base64
    client: Base64
    queries: Annotated[int, Field(ge=1, le=MAX_QUERIES)]
    not_before: Timestamp
    expires: Timestamp

    @field_validator("serial")
    @classmethod
    def _serial_has_its_length(cls, text: str) -> str:
        return _of_length(text, SERIAL_BYTES, "a serial")

    @field_validator("client")
    @classmethod
    def _client_key_parses(cls, text: str) -> str:
        try:
            VerifyKey(unb64(text))
        except CenacleError as error:
            raise ValueError(error.diagnostics()) from None
        return text

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.not_before >= self.expires:
            raise ValueError("a ticket expires after it begins: correct not_before or expires")
        return self

    @property
    def client_key(self) -> VerifyKey:
        return VerifyKey(unb64(self.client))

    @property
    def serial_bytes(self) -> bytes:
        return unb64(self.serial)

    def require_begun(self, now: datetime) -> None:
        """Raises :class:`RefusedError` before ``not_before``."""
        if now < parse_time(self.not_before):
            raise RefusedError(
                "a ticket is not valid yet",
                found=f"{format_time(now)} by the broker's clock",
                expected=f"from {self.not_before} on",
                remedy="ask again then",
            )

    def require_not_expired(self, now: datetime) -> None:
        """Raises :class:`RefusedError` from ``expires`` on."""
        if now >= parse_time(self.expires):
            raise RefusedError(
                "a ticket has expired",
                found=f"{format_time(now)} by the broker's clock",
                expected=f"before {self.expires}",
                remedy=f"ask {self.issuer} for a new ticket",
            )


class TicketUse(Frozen):
    """A signed request for an answer under a ticket.

    Attributes:
        ticket: the signed ticket's envelope.
        request: base64 of 16 random bytes: the client's name for this request.
        rows: that are to be answered, hence queries that it costs.
        input: digest of the input; absent where the client does not know what reaches the
            enclave, because the host runs the model's front.
        signature: base64 of the client's Ed25519 signature of :func:`use_message`.
    """

    ticket: dict[str, Any]
    request: Base64
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    input: Digest | None = None
    signature: Base64

    @field_validator("request")
    @classmethod
    def _request_has_its_length(cls, text: str) -> str:
        return _of_length(text, REQUEST_BYTES, "a request's name")

    @field_validator("signature")
    @classmethod
    def _signature_has_its_length(cls, text: str) -> str:
        return _of_length(text, 64, "a signature")

    @property
    def request_bytes(self) -> bytes:
        return unb64(self.request)

    def verify(self, ticket: Ticket) -> None:
        """Verify the client's signature under ``ticket``, which :func:`open_ticket` has opened.

        Raises:
            SignatureError: the client of the ticket did not sign this use.
        """
        message = use_message(
            ticket.contract, ticket.serial_bytes, self.request_bytes, self.rows, self.input
        )
        try:
            ticket.client_key.verify(unb64(self.signature), message)
        except SignatureError:
            raise SignatureError(
                "the use of a ticket is not signed by its client",
                found=f"bytes not signed by key {ticket.client_key.keyid[:16]}",
                expected="the client's signature over this contract, serial, request, rows and "
                "input",
                remedy="sign with the key that the ticket was issued for",
            ) from None


def _of_length(text: str, length: int, what: str) -> str:
    found = len(unb64(text))
    if found != length:
        raise ValueError(f"{what} has {length} bytes, not {found}")
    return text


def new_serial() -> str:
    """A serial for a new ticket."""
    return b64(secrets.token_bytes(SERIAL_BYTES))


def new_request() -> bytes:
    """A name for a new request."""
    return secrets.token_bytes(REQUEST_BYTES)


def open_ticket(envelope: Envelope, issuer: Party, contract: str) -> Ticket:
    """A ticket that ``issuer`` signed for ``contract``; its time and count are not judged here.

    Raises:
        SignatureError: another one signed it, or it names another issuer.
        RefusedError: it is for another contract.
        DocumentError: it is no ticket.
    """
    ticket = envelope.open(Ticket, issuer.verify_key)
    if ticket.issuer != issuer.name:
        raise SignatureError(
            "a ticket names another issuer than the one who signed it",
            found=ticket.issuer,
            expected=issuer.name,
        )
    if ticket.contract != contract:
        raise RefusedError(
            "a ticket is for another contract",
            found=ticket.contract,
            expected=contract,
            remedy=f"ask {issuer.name} for a ticket of this contract",
        )
    return ticket


def use_message(
    contract: str, serial: bytes, request: bytes, rows: int, input_digest: str | None
) -> bytes:
    """What a client signs: every field with its length, under a domain of its own."""
    return encode_fields(
        _DOMAIN,
        contract.encode(),
        serial,
        request,
        rows.to_bytes(8, "big"),
        b"" if input_digest is None else input_digest.encode(),
    )


def sign_use(
    ticket: Envelope,
    key: SigningKey,
    *,
    request: bytes,
    rows: int,
    input_digest: str | None = None,
) -> TicketUse:
    """A use of ``ticket`` by the client that holds ``key``.

    Args:
        request: from :func:`new_request`; the same one again when an answer was lost.
        input_digest: ``sha256:...`` of the input, in sealed requests.

    Raises:
        InputError: the ticket is for another client's key, or rows or request are out of range.
    """
    terms = ticket.peek(Ticket)
    if terms.client_key != key.verify_key:
        raise InputError(
            "a ticket is for another client's key",
            found=f"key {key.verify_key.keyid[:16]}",
            expected=f"key {terms.client_key.keyid[:16]}",
            remedy="use the key that the ticket was issued for: `cenacle ticket show` tells",
        )
    if not 1 <= rows <= MAX_ROWS:
        raise InputError("a request has too many rows", found=rows, expected=f"1 to {MAX_ROWS}")
    message = use_message(terms.contract, terms.serial_bytes, request, rows, input_digest)
    fields: dict[str, Any] = {
        "ticket": ticket.to_fields(),
        "request": b64(request),
        "rows": rows,
        "signature": b64(key.sign(message)),
    }
    if input_digest is not None:
        fields["input"] = input_digest
    return TicketUse.from_fields(fields)
