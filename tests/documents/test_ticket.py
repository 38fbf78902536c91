"""Tickets and their uses: forms, signatures, and what a signature covers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64, parse_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.ticket import (
    MAX_QUERIES,
    MAX_ROWS,
    Ticket,
    TicketUse,
    new_request,
    new_serial,
    open_ticket,
    sign_use,
    use_message,
)
from cenacle.errors import DocumentError, InputError, RefusedError, SignatureError

CONTRACT = "sha256:" + "c" * 64
INPUT = "sha256:" + "1" * 64
VENDOR = SigningKey.from_seed(SecretBytes(b"vendor".ljust(32, b".")))
CLIENT = SigningKey.from_seed(SecretBytes(b"client".ljust(32, b".")))
ISSUER = Party(
    name="vendor",
    signing_key=b64(VENDOR.verify_key.raw),
    hpke_key=b64(HpkePrivateKey(SecretBytes(b"vendor".ljust(96, b"."))).public_key.raw),
    created="2027-01-01T00:00:00Z",
)
FIELDS: dict[str, Any] = {
    "kind": "ticket",
    "version": 1,
    "issuer": "vendor",
    "contract": CONTRACT,
    "serial": b64(b"s" * 16),
    "client": b64(CLIENT.verify_key.raw),
    "queries": 100,
    "not_before": "2027-01-01T00:00:00Z",
    "expires": "2027-02-01T00:00:00Z",
}


def _ticket(**changes: Any) -> Envelope:
    return Envelope.sign(Ticket.from_fields({**FIELDS, **changes}), VENDOR)


def _use(**changes: Any) -> TicketUse:
    asked: dict[str, Any] = {"request": b"r" * 16, "rows": 3, "input_digest": INPUT}
    return sign_use(_ticket(), CLIENT, **{**asked, **changes})


def test_a_ticket_and_its_use() -> None:
    ticket = open_ticket(_ticket(), ISSUER, CONTRACT)
    assert ticket.to_fields() == FIELDS
    assert ticket.client_key == CLIENT.verify_key
    use = _use()
    use.verify(ticket)
    again = TicketUse.from_fields(use.to_fields())
    assert again == use
    again.verify(open_ticket(Envelope.from_fields(again.ticket), ISSUER, CONTRACT))
    plain = _use(input_digest=None)
    assert "input" not in plain.to_fields()
    plain.verify(ticket)


WRONG: dict[str, dict[str, object]] = {
    "no queries": {"queries": 0},
    "too many queries": {"queries": MAX_QUERIES + 1},
    "queries that are no number": {"queries": "ten"},
    "half a query": {"queries": 1.5},
    "a short serial": {"serial": b64(b"s" * 15)},
    "a long serial": {"serial": b64(b"s" * 17)},
    "a serial that is no base64": {"serial": "!" * 24},
    "a short key": {"client": b64(b"k" * 31)},
    "a weak key": {"client": b64(bytes(32))},
    "no contract": {"contract": "study"},
    "a capital issuer": {"issuer": "Vendor"},
    "expired before it begins": {"expires": "2026-12-31T00:00:00Z"},
    "expired as it begins": {"expires": "2027-01-01T00:00:00Z"},
    "another version": {"version": 2},
    "another kind": {"kind": "veto"},
    "an unknown field": {"price": 5},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_ticket_of_the_wrong_form(case: str) -> None:
    with pytest.raises(DocumentError):
        Ticket.from_fields({**FIELDS, **WRONG[case]})


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"kind", "version"}))
def test_a_ticket_that_lacks_a_field(name: str) -> None:
    with pytest.raises(DocumentError, match=name):
        Ticket.from_fields({k: v for k, v in FIELDS.items() if k != name})


@pytest.mark.parametrize(
    "change",
    [
        {"request": b64(b"r" * 15)},
        {"request": "!"},
        {"rows": 0},
        {"rows": MAX_ROWS + 1},
        {"rows": True},
        {"signature": b64(b"s" * 63)},
        {"input": "sha256:"},
        {"ticket": []},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_use_of_the_wrong_form(change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        TicketUse.from_fields({**_use().to_fields(), **change})


# ------------------------------------------------------------------ signatures

ALTERED: dict[str, Callable[[TicketUse], TicketUse]] = {
    "request": lambda use: use.model_copy(update={"request": b64(b"R" * 16)}),
    "rows": lambda use: use.model_copy(update={"rows": 2}),
    "input": lambda use: use.model_copy(update={"input": "sha256:" + "2" * 64}),
    "no input": lambda use: use.model_copy(update={"input": None}),
    "signature": lambda use: use.model_copy(update={"signature": b64(bytes(64))}),
}


@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_use(case: str) -> None:
    with pytest.raises(SignatureError, match="not signed by its client"):
        ALTERED[case](_use()).verify(Ticket.from_fields(FIELDS))


@pytest.mark.parametrize(
    "change",
    [
        {"contract": "sha256:" + "d" * 64},
        {"serial": b64(b"S" * 16)},
        {"client": b64(VENDOR.verify_key.raw)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_use_under_another_ticket(change: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match="not signed by its client"):
        _use().verify(Ticket.from_fields({**FIELDS, **change}))


def test_a_document_signed_by_the_client_is_no_use() -> None:
    """The domain is a use's own: nothing else that a client signs can be taken for one."""
    ticket = Ticket.from_fields(FIELDS)
    for message in (ticket.canonical_bytes(), b"", b"r" * 16):
        forged = _use().model_copy(update={"signature": b64(CLIENT.sign(message))})
        with pytest.raises(SignatureError):
            forged.verify(ticket)


def test_who_may_issue() -> None:
    stranger = Envelope.sign(Ticket.from_fields(FIELDS), CLIENT)
    with pytest.raises(SignatureError, match="a signature is missing"):
        open_ticket(stranger, ISSUER, CONTRACT)
    with pytest.raises(SignatureError, match="names another issuer"):
        open_ticket(_ticket(issuer="somebody"), ISSUER, CONTRACT)
    with pytest.raises(RefusedError, match="for another contract"):
        open_ticket(_ticket(), ISSUER, "sha256:" + "d" * 64)
    with pytest.raises(DocumentError, match="another kind of document"):
        open_ticket(Envelope.sign(ISSUER, VENDOR), ISSUER, CONTRACT)
    altered = Envelope(_ticket(queries=999).payload, Ticket.media_type, dict(_ticket().signatures))
    with pytest.raises(SignatureError, match="does not verify"):
        open_ticket(altered, ISSUER, CONTRACT)


def test_signing_with_another_key_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="another client's key"):
        sign_use(_ticket(), VENDOR, request=new_request(), rows=1)
    for rows in (0, -1, MAX_ROWS + 1):
        with pytest.raises(InputError, match="too many rows"):
            sign_use(_ticket(), CLIENT, request=new_request(), rows=rows)
    with pytest.raises(DocumentError, match="16 bytes, not 3"):
        sign_use(_ticket(), CLIENT, request=b"abc", rows=1)


_MESSAGE = st.tuples(
    st.sampled_from([CONTRACT, "sha256:" + "d" * 64]),
    st.binary(max_size=20),
    st.binary(max_size=20),
    st.integers(0, MAX_ROWS),
    st.none() | st.sampled_from(["", INPUT]),
)


@given(one=_MESSAGE, other=_MESSAGE)
def test_no_two_uses_sign_the_same_bytes(one: Any, other: Any) -> None:
    def plain(use: Any) -> Any:
        return (*use[:4], use[4] or None)  # no digest is empty

    assert (use_message(*one) == use_message(*other)) == (plain(one) == plain(other))


def test_names_are_random() -> None:
    assert len({new_serial() for _ in range(50)} | {b64(new_request()) for _ in range(50)}) == 100


# ------------------------------------------------------------------ times


def test_a_ticket_is_valid_from_its_first_to_before_its_last_second() -> None:
    ticket = Ticket.from_fields(FIELDS)
    first, last = parse_time(ticket.not_before), parse_time(ticket.expires)
    second = timedelta(seconds=1)
    for moment in (first, first + second, last - second):
        ticket.require_begun(moment)
        ticket.require_not_expired(moment)
    with pytest.raises(RefusedError, match=r"not valid yet; found 2026-12-31T23:59:59Z by the br"):
        ticket.require_begun(first - second)
    with pytest.raises(RefusedError, match="has expired; found 2027-02-01T00:00:00Z"):
        ticket.require_not_expired(last)
    assert copy.copy(ticket) == ticket
